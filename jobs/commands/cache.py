"""The verbs `embed`, `cache ...`, `index` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.commands import options
from jobs.commands.verb import verb


def _parts(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Split a comma list."""
    return [part.strip() for part in value.split(",") if part.strip()] if value else None


@verb("embed", "jobs.embed")
@options.dataset
@options.model
@options.cache
@click.option(
    "--what", metavar="LIST", callback=_parts, help="Comma list of image, text, pixels, tokens@LAYER. [image]"
)
@options.batches
@options.out
@click.option("--workers", type=int, metavar="N", help="Compute in N worker processes, one GPU each. [this process]")
@click.option("--scheduler", metavar="ADDRESS", help="Compute in the workers of a Dask scheduler: tcp://HOST:PORT.")
@click.option("--compiled/--no-compiled", default=None, help="Compile the image tower. [by the size of the job]")
@click.option("--max-pixels", type=int, metavar="N", help="Refuse larger images: decompression bombs.")
@click.option("--rehash", is_flag=True, default=None, help="Read every file again, also those that look unchanged.")
def embed(**given: Any) -> dict[str, Any]:
    """Embed the images and texts of DATASET into the cache; what is there already is not computed again.

    DATASET is folder:PATH, table:FILE.csv, tar:PATTERN, iu-xray:PATH or phantom:N?seed=S; PATH, FILE and PATTERN may be
    URLs that fsspec opens, such as s3://BUCKET/FOLDER or zip://::file:///FILE.zip. Files that cannot be read are listed
    with their reason (exit status 3); everything else is done. A killed run goes on where it was.
    """
    return options.with_data(given)


@verb("cache ls", "jobs.cache", config="ListConfig", run="ls")
@options.cache
def ls(**given: Any) -> dict[str, Any]:
    """List what is cached: encoders, arrays, rows, bytes, when each was last used, data sets and indexes.

    A use is a job that reads or writes the array, noted to the hour; on a cache that cannot be written it is not noted.
    """
    return given


@verb("cache verify", "jobs.cache", config="VerifyConfig", run="tell")
@options.cache
@click.option("--repair", is_flag=True, default=None, help="Drop damaged rows, and only those; mend metadata.")
@click.option("--dataset", metavar="DATASET", help="With --repair: compute its dropped rows again, with --model.")
@options.data
@options.model
def verify(**given: Any) -> dict[str, Any]:
    """Check every row against its checksum, and metadata, sample tables and indexes against their digests.

    Damage is reported by array, chunk and rows, and ends with exit status 1. With --repair exactly the damaged rows are
    dropped, everything else stays; with --dataset and --model (as `fluoro embed` takes them) the dropped rows are
    computed again, without them the commands that do it are printed. A kill at any moment loses nothing: the same
    command goes on. Others may read meanwhile.
    """
    return options.with_data(given)


@verb("cache compact", "jobs.cache_compact")
@options.cache
@click.option("--unused", is_flag=True, default=None, help="Drop image, pixel and token rows that no data set uses.")
@click.option(
    "--removed",
    is_flag=True,
    default=None,
    help="Also those of samples that were gone when last embedded (or left out).",
)
@click.option("--texts", is_flag=True, default=None, help="With these: text rows too. Prompts are among them!")
@click.option("--dry-run", is_flag=True, default=None, help="Only say what would go.")
def compact(**given: Any) -> dict[str, Any]:
    """Build arrays anew without holes and doubles and, if asked for, without rows that no sample uses any more.

    Which rows are used is read from the sample tables that `fluoro embed` writes, one a data set. Rows of prompts and
    imported rows stand in none of them, so look at --dry-run first. Indexes over rows that get other numbers are
    removed and named. A kill at any moment loses nothing, and who reads meanwhile reads whole rows.
    """
    return given


@verb("cache rm", "jobs.cache_remove", config="RmConfig", run="rm")
@click.argument("encoder", metavar="ENCODER", required=False)
@options.cache
@options.confirmed
def rm(**given: Any) -> dict[str, Any]:
    """Remove ENCODER, an id as `fluoro cache ls` prints it: its embeddings, tokens and indexes.

    Pixels belong to a preprocessing and not to an encoder; its id removes them. What goes is named with its bytes
    before anything is deleted.
    """
    return given


@verb("cache forget", "jobs.cache_remove", config="ForgetConfig", run="forget_samples")
@click.option("--dataset", metavar="DATASET", help="Data set, as 'fluoro cache ls' names it; its files are not needed.")
@click.option("--group", multiple=True, metavar="PATIENT", help="Patient to forget; may be given several times.")
@click.option("--id", multiple=True, metavar="SAMPLE", help="Single sample to forget; likewise.")
@click.option(
    "--runs",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Runs outside the cache to clean as well; likewise.",
)
@options.cache
@options.confirmed
def forget(**given: Any) -> dict[str, Any]:
    """Forget a patient: rows that nobody else uses, index and table entries, records and figures of runs.

    Rows are kept where a sample of another patient (in any data set of the cache) has the same content, and these
    samples are named. What cannot be taken apart is named too: heads trained with the patient, and files elsewhere. A
    kill at any moment is safe: the same command goes on.
    """
    return given


@verb("cache export", "jobs.cache_export")
@click.argument("out", metavar="FILE", required=False, type=click.Path(path_type=Path))
@options.cache
@click.option("--encoder", metavar="ID", help="Encoder id, as 'fluoro cache ls' prints it.")
@click.option("--kind", type=click.Choice(["image", "text", "pixels", "tokens"]), help="Which rows. [image]")
@click.option("--format", type=click.Choice(["npy", "parquet", "faiss", "csv"]), help="[by FILE's ending]")
@click.option("--dataset", metavar="DATASET", help="Its samples, in its order, with their ids. [all rows, by key]")
@click.option("--normalize", is_flag=True, default=None, help="Scale rows to length one.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace FILE.")
def export(**given: Any) -> dict[str, Any]:
    """Write cached embeddings to FILE: .npy, .parquet, .faiss (one exact index) or .csv (keys alone).

    Beside .npy and .faiss a CSV says which row is what. Rows are written as the model gave them (float16; in Parquet
    float32, which more tools read), in blocks, so memory stays constant; a FAISS index needs 4 bytes a number. With
    --dataset there is one row a sample, with id, patient, view, split and text; samples without a row are named.
    """
    return given


@verb("cache import", "jobs.cache_import")
@click.argument("folder", metavar="FOLDER", required=False, type=click.Path(path_type=Path))
@options.cache
@click.option("--name", metavar="NAME", help="Model that made them; they get an id imported-NAME-...")
@click.option("--description", metavar="TEXT", help="What else makes them what they are; part of the id.")
@click.option("--root", metavar="ROOT", help="Folder or URL that image paths are relative to, or tar:PATTERN.")
@click.option("--kind", type=click.Choice(["both", "image", "text"]), help="Which embeddings. [both]")
@click.option("--column", metavar="COLUMN", help="Column of image paths (or captions). [the usual names]")
@click.option("--encoder-id", metavar="ID", help="Store them as rows of this encoder; needs --model.")
@options.model
def import_(**given: Any) -> dict[str, Any]:
    """Take in embeddings that others made: FOLDER as clip-retrieval or img2dataset leave it.

    That is img_emb/ and text_emb/ (.npy) with metadata/ (.parquet), or .npy and .parquet files side by side. Where the
    images were embedded from webdataset tars, such as img2dataset's, ROOT is 'tar:DIR/{00000..00099}.tar'. Rows are
    stored by content, so the images are read and hashed; rows whose image cannot be read, that hold NaN or do not fit
    float16 are left out and listed (exit status 3). With --encoder-id, 32 rows are computed again by --model and must
    agree (cosine of 0.999 or more, the same length), else nothing is stored.
    """
    return given


HOW = "exact, ivf, hnsw, pq or a FAISS factory string such as IVF1024,PQ64np."


@verb("index", "jobs.index")
@options.cache
@options.model
@click.option("--encoder", metavar="ID", help="Encoder id, as 'fluoro cache ls' prints it.")
@click.option("--kind", type=click.Choice(["image", "text"]), help="Which embeddings. [image]")
@click.option("--how", metavar="KIND", help=f"{HOW} [exact]")
@click.option("--rebuild", is_flag=True, default=None, help="Build anew; by default only new rows are added.")
def index(**given: Any) -> dict[str, Any]:
    """Build a search index over the cached embeddings of an encoder, or add the rows that came since.

    'fluoro search' needs none: it compares with all rows, exactly. This says up to how many rows that is fast enough
    on this machine. 'fluoro index check' measures how much an approximate index misses.
    """
    return given


@verb("index check", "jobs.index_check")
@options.cache
@options.model
@click.option("--encoder", metavar="ID", help="Encoder id, as 'fluoro cache ls' prints it.")
@click.option("--kind", type=click.Choice(["image", "text"]), help="Which embeddings. [image]")
@click.option("--how", metavar="KIND", help="Kind of the index, as it was built. [exact]")
@click.option("-k", "k", multiple=True, type=int, metavar="K", help="Neighbours; may be repeated. [1, 10, 100]")
@click.option("--queries", type=int, metavar="N", help="Queries of each kind, drawn at random. [1000]")
@click.option("--dataset", metavar="DATASET", help="Its texts and labels tell what is right.")
@options.data
def index_check(**given: Any) -> dict[str, Any]:
    """Measure how much of what is nearest an index finds, asked by image rows and by text rows.

    With --dataset also how often an image finds its own text and a text its image (identical texts count as right), and
    how often hits have the query's label, beside chance; images of the query's own patient do not count.
    """
    return options.with_data(given)


@verb("search", "jobs.search")
@options.dataset
@options.model
@options.cache
@click.option("--text", multiple=True, metavar="TEXT", help="Search by text; may be given several times.")
@click.option("--image", multiple=True, metavar="FILE", help="Search by an image file; may be given several times.")
@click.option("--id", multiple=True, metavar="SAMPLE", help="Search by a sample of DATASET; likewise.")
@click.option("--vector", multiple=True, metavar="FILE.npy", help="Search by vectors of the embeddings' length.")
@click.option("--head", metavar="FILE", help="Search by the weights of a saved head, or of a run of 'fluoro probe'.")
@click.option("--label", multiple=True, metavar="NAME", help="Label of the head; may be given several times.")
@click.option("--text-file", multiple=True, metavar="FILE", help="One text a line, or a table's column 'text'.")
@click.option("--id-file", multiple=True, metavar="FILE", help="One id a line, or a table's column 'id'.")
@click.option("--together", is_flag=True, default=None, help="Join all queries into one, their mean.")
@click.option("--minus-text", multiple=True, metavar="TEXT", help="Keep away from a text; joins all queries.")
@click.option("--minus-image", multiple=True, metavar="FILE", help="Keep away from an image file; likewise.")
@click.option("--minus-id", multiple=True, metavar="SAMPLE", help="Keep away from a sample; likewise.")
@click.option("--where", multiple=True, metavar="CONDITION", help="Only samples with this; several must all hold.")
@click.option("--one-per", metavar="COLUMN", help="Find each value of a column once, such as group (patient).")
@click.option("-k", "k", type=int, metavar="N", help="Neighbours of each query. [10]")
@click.option("--kind", type=click.Choice(["image", "text"]), help="Search among images or texts. [image]")
@click.option("--how", metavar="KIND", help="Kind of index. [exact while that is fast enough]")
@click.option("--output", multiple=True, metavar="FILE", help="Write the answers: .csv, .parquet, .json or .png.")
def search(**given: Any) -> dict[str, Any]:
    """Find the samples of DATASET nearest to texts, image files, samples, vectors, or what a probe's head looks for.

    A CONDITION is COLUMN=VALUE, COLUMN!=VALUE, COLUMN=ONE|OTHER, COLUMN>=NUMBER, label:NAME or label!:NAME, over any
    column of the samples. It is applied before the search, so k answers come where so many samples pass. A .png is a
    contact sheet of the images.
    """
    return options.with_data(given)
