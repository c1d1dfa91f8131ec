"""``tar:PATTERN``: webdataset tars, also many of them (``train-{000..099}.tar``), read without unpacking.

Tars come in, one `Dataset` goes out. As in webdataset, a sample is what shares a name up to its file name's first dot:
``a/0001.jpg``, ``a/0001.txt`` and ``a/0001.json`` are the image, text and metadata of the sample ``a/0001``. The fields
of ``.json`` files become columns, ``.cls`` the label, ``.txt`` the text. Images are read when they are needed, by their
place in the tar (`engine.sources.tar_reader`); texts and metadata are read while the headers are.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from engine.dataset import REQUIRED_COLUMNS, Dataset
from engine.errors import DataError, UsageError
from engine.remote_files import forget_filesystems, is_url, last_part, parent
from engine.sources.annotation_files import read_annotations
from engine.sources.files import IMAGE_SUFFIXES, LARGEST_FILE, count_suffixes
from engine.sources.folder import LARGEST_TEXT, text_of_file
from engine.sources.label_columns import read_label_columns
from engine.sources.patterns import expand_files
from engine.sources.sample_columns import chosen_columns, joined_text, kept_rows, split_column, text_columns_of
from engine.sources.schema import as_integer, as_mapping, as_names, dataset_name
from engine.sources.tar_index import Member, Window, members_of
from engine.sources.tar_reader import Shard, TarReader, forget_remote_tars, member_name, open_shard, uri_of
from engine.splits import check_split
from engine.tables import TEXT, constant_text, offer, place, text_of

logger = logging.getLogger(__name__)

TEXT_EXTENSIONS = ("txt", "text", "caption")
CLASS = "cls"
METADATA = "json"
OWN_COLUMNS = ("image", "key", "shard")
# Remote tars whose headers are read at once: each waits for the network.
TARS_AT_ONCE = 8


def open_tar(
    path: str,
    *,
    schema: str,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    group: str | None = None,
    view: str | None = None,
    split: str | None = None,
    labels: str | Sequence[str] | None = None,
    label_names: str | Sequence[str] | None = None,
    separator: str = ";",
    fields: str | Sequence[str] | None = None,
    keep: str | Mapping[str, Any] | None = None,
    boxes: str | Sequence[str] | None = None,
    boxes_columns: str | Mapping[str, str] | None = None,
    coco: str | Sequence[str] | None = None,
    label_map: str | Mapping[str, str] | None = None,
    boxes_outside: str = "error",
    max_bytes: int | str = LARGEST_FILE,
) -> Dataset:
    """Open tars of samples.

    Parameters
    ----------
    path : str
        One tar, a folder of tars, ``{000..099}``, ``{a,b}``, ``*``, or several with commas; local or URLs.
    image : str
        Extension of the images, such as "jpg" or "left.png"; by default the first member of a sample that is one.
    text : str or list of str
        Extensions (txt, text, caption) or fields of the metadata; the first of the usual ones by default.
    group, view, split : str
        Fields of the metadata; "" for none, the usual names by default (see `open_table`).
    labels : list of str, or str
        As for `open_table`; by default the whole numbers (or words) of ``.cls`` members, one a sample.
    label_names : list of str
        Names of the classes 0, 1, 2, ... of ``.cls`` members, or as for `open_table`.
    separator : str
        Between the names of a list.
    fields : list of str
        Fields of the ``.json`` members to keep, all by default; "" reads none.
    keep, boxes, boxes_columns, coco, label_map, boxes_outside
        See `open_table`; annotations name images by sample id.
    max_bytes : int
        Larger images become listed failures.

    Returns
    -------
    Dataset
        Ids are the samples' names, with the tar's before them where two tars have the same one. Further columns: shard,
        and the fields of the metadata.

    Raises
    ------
    UsageError
        A pattern that names nothing.
    DataError
        A tar that is compressed, cut off or damaged, or texts and metadata that cannot be read.
    """
    forget_filesystems()
    forget_remote_tars()
    files = expand_files(path, ".tar")
    names = _shard_names(files)
    wanted = None if fields is None else as_names(fields)
    shards: dict[str, Shard] = {}
    parts, notes = [], _Notes(Counter(), Counter(), [])
    for name, read in zip(names, _read_all(files, names, image, wanted, separator), strict=True):
        shards[name] = read.shard
        parts.append(read.samples)
        notes.add(read)
    table = _joined(parts)
    if not len(table) or not ((table["image"] != "").any() or set(TEXT_EXTENSIONS) & set(table.columns)):
        raise DataError(f"{schema!r}: no image in {len(files)} tars; they hold {notes.holds()}")
    table = kept_rows(table, as_mapping("keep", keep), path)

    chosen = chosen_columns(table, path, group=group, view=view, split=split)
    if text is None and TEXT_EXTENSIONS[0] in table.columns:
        text = TEXT_EXTENSIONS[0]
    samples = _samples(table, chosen, text_columns_of(table, path, text), path)
    label_names_, values, used = _labels(table, path, labels, as_names(label_names), separator)
    extra = [name for name in table.columns if name not in (*REQUIRED_COLUMNS, "image", *TEXT_EXTENSIONS, *used)]
    samples = pd.concat([samples, table[extra].reset_index(drop=True)], axis=1)
    if chosen["split"]:
        check_split(samples["group"], samples["split"])
    folder = parent(files[0]) if is_url(files[0]) else os.path.dirname(files[0])
    annotations = read_annotations(
        samples,
        folder,
        boxes=boxes,
        boxes_columns=boxes_columns,
        coco=coco,
        label_map=label_map,
        boxes_outside=boxes_outside,
    )
    told = notes.sentences(bool(chosen["group"]))
    for note in told:
        logger.info("%s: %s", schema, note)
    return Dataset(
        schema=schema,
        name=dataset_name("tar", path, keep=keep, image=image),
        samples=samples,
        label_names=label_names_,
        labels=values,
        reader=TarReader(shards, as_integer("max_bytes", max_bytes, 1)),
        annotations=annotations,
        notes=told,
    )


class _Read(NamedTuple):
    """What one tar holds: its samples as a table, and what was noticed."""

    shard: Shard
    samples: pa.Table
    others: Counter[str]
    noticed: Counter[str]


class _Notes(NamedTuple):
    others: Counter[str]
    noticed: Counter[str]
    empty: list[str]

    def add(self, read: _Read) -> None:
        self.others.update(read.others)
        self.noticed.update(read.noticed)
        if not len(read.samples):
            self.empty.append(read.shard.path)

    def holds(self) -> str:
        return count_suffixes(list(self.others.elements())) or "nothing"

    def sentences(self, grouped: bool) -> tuple[str, ...]:
        told = [what.format(count) for what, count in self.noticed.items()]
        if self.others:
            told.append(
                f"{self.others.total()} members are nothing that is read here and were left out: {self.holds()}"
            )
        if self.empty:
            told.append(f"{len(self.empty)} tars hold no sample, first {self.empty[0]!r}")
        if not grouped:
            told.append("no field of patients was named, so each sample is its own group")
        return tuple(told)


def _shard_names(files: Sequence[str]) -> list[str]:
    """Return a name for each tar that no other has: its file name, or as much of its path as is needed."""
    names = [last_part(file) for file in files]
    depth = 2
    while len(set(names)) < len(names) and depth < 64:
        names = ["/".join(file.split("/")[-depth:]) for file in files]
        depth += 1
    return [name.replace(":", "_") for name in names]


def _read_all(
    files: Sequence[str], names: Sequence[str], image: str | None, fields: list[str] | None, separator: str
) -> Iterator[_Read]:
    def read(number: int) -> _Read:
        return _read_tar(files[number], names[number], image, fields, separator)

    if not any(map(is_url, files)):
        yield from map(read, range(len(files)))
        return
    with ThreadPoolExecutor(TARS_AT_ONCE, thread_name_prefix="tar") as pool:
        yield from pool.map(read, range(len(files)))


def _read_tar(file: str, name: str, image: str | None, fields: list[str] | None, separator: str) -> _Read:
    """Read a tar's headers, texts and metadata."""
    shard, window = open_shard(file)
    samples: dict[str, dict[str, str]] = {}
    others: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    for member in members_of(window, repr(file)):
        key, extension = key_and_extension(member.name)
        kind = _kind_of(extension, image)
        if not key or not kind or (kind == METADATA and fields == []):
            others["*" + os.path.splitext(member.name)[1].lower()] += 1
            continue
        sample = samples.setdefault(key, {})
        if kind == "image":
            _add_image(sample, uri_of(name, member), extension, noticed)
        elif kind == METADATA:
            for field, value in _metadata(window, member, file, fields, separator):
                sample.setdefault(field, value)  # what members of the sample say themselves goes before its fields
        else:
            sample[kind] = text_of_file(_content(window, member, file), f"{member.name!r} in {file!r}")
    return _Read(shard, _as_table(samples, name), others, noticed)


def key_and_extension(name: str) -> tuple[str, str]:
    """Return a member's sample and extension by webdataset's rule, ("", "") where it is no part of a sample.

    The name is cut at the first dot of its last part; hidden files, and webdataset's own ``__...__``, are no samples.

    Examples
    --------
    >>> key_and_extension("./a.b/0001.left.PNG")
    ('a.b/0001', 'left.png')
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    return folder + slash + stem, extension.lower()


def _kind_of(extension: str, image: str | None) -> str:
    """Return what an extension holds: "image", "json", or the name of a column of text; "" for anything else."""
    if image:
        if extension == image.lower().lstrip("."):
            return "image"
    elif "." + extension.rpartition(".")[2] in IMAGE_SUFFIXES:
        return "image"
    return extension if extension in (*TEXT_EXTENSIONS, CLASS, METADATA) else ""


def _add_image(sample: dict[str, str], uri: str, extension: str, noticed: Counter[str]) -> None:
    before = sample.get("image")
    if before is None:
        sample["image"] = uri
    elif key_and_extension(member_name(before))[1] == extension:
        sample["image"] = uri  # as tar itself has it: what was added later replaces what is there
        noticed["{} images occur more than once in their tar; the last one is taken"] += 1
    else:
        noticed["{} images are further ones of their sample and were left out; choose one with image=EXTENSION"] += 1


def _content(window: Window, member: Member, file: str) -> bytes:
    if member.kind:
        raise DataError(f"{member.name!r} in {file!r} is {member.kind}; only plain files in a tar are read")
    return window.at(member.offset, min(member.size, LARGEST_TEXT + 1))


def _metadata(
    window: Window, member: Member, file: str, fields: list[str] | None, separator: str
) -> Iterator[tuple[str, str]]:
    """Yield the fields of a ``.json`` member as text: lists joined, what is nested as JSON."""
    text = text_of_file(_content(window, member, file), f"{member.name!r} in {file!r}")
    try:
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair is no character, so no table could hold it
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{member.name!r} in {file!r} is not JSON: {error}; fields='' reads no metadata") from error
    if not isinstance(content, dict):
        raise DataError(f"{member.name!r} in {file!r} must map fields to values; fields='' reads no metadata")
    for field, value in content.items():
        if fields is None or field in fields:
            yield f"{METADATA}.{field}" if field in OWN_COLUMNS else field, _as_text(value, separator)


def _as_text(value: Any, separator: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return separator.join(_as_text(item, separator) for item in value)
    return json.dumps(value, ensure_ascii=False)


def _as_table(samples: Mapping[str, Mapping[str, str]], shard: str) -> pa.Table:
    columns = dict.fromkeys(["image", *(name for sample in samples.values() for name in sample)])
    text = pa.large_string()
    arrays = {name: pa.array([sample.get(name, "") for sample in samples.values()], text) for name in columns}
    return pa.table({"key": pa.array(samples, text), "shard": pa.array([shard] * len(samples), text), **arrays})


def _joined(parts: Sequence[pa.Table]) -> pd.DataFrame:
    """Return all samples as one table whose index names them, for messages."""
    table = pa.concat_tables(parts, promote_options="default")
    frame = table.to_pandas(types_mapper=lambda _: TEXT).fillna("")
    ids = frame["key"]
    if ids.duplicated().any():
        ids = frame["shard"] + ":" + ids
    return frame.assign(key=ids).set_index("key")


def _samples(table: pd.DataFrame, chosen: Mapping[str, str], text_columns: list[str], path: str) -> pd.DataFrame:
    """Return the required columns."""
    ids = pd.Series(table.index, index=table.index, dtype=TEXT)
    blank = constant_text("", len(table), table.index)
    columns = {role: text_of(table[column]) if column else blank for role, column in chosen.items()}
    return pd.DataFrame(
        {
            "id": ids,
            "uri": table["image"],
            "text": joined_text([text_of(table[column]) for column in text_columns], blank),
            "group": columns["group"].where(columns["group"] != "", ids),
            "view": columns["view"],
            "split": split_column(columns["split"], path, chosen["split"]),
        }
    ).reset_index(drop=True)


def _labels(
    table: pd.DataFrame, path: str, labels: str | Sequence[str] | None, names: list[str], separator: str
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Return label names, the (n, L) matrix, and the columns that it was made from."""
    if labels is not None or CLASS not in table.columns:
        return read_label_columns(table, path, labels, names, separator)
    codes, distinct = pd.factorize(text_of(table[CLASS]))
    words = [str(word) for word in distinct]
    numbers = [int(word) if word.isdecimal() and len(word) < 10 else -1 for word in words]
    if all(number >= 0 for word, number in zip(words, numbers, strict=True) if word):
        known = names or [str(number) for number in sorted({number for number in numbers if number >= 0})]
        of_word = [(names[n] if n < len(names) else None) if names and n >= 0 else str(n) for n in numbers]
    else:
        known, of_word = names or sorted(word for word in words if word), list(words)
    of_class = np.zeros((len(words), len(known)), np.int8)
    for number, (word, name) in enumerate(zip(words, of_word, strict=True)):
        if not word:
            continue
        if name not in known:
            row = table.index[int(np.flatnonzero(codes == number)[0])]
            raise DataError(f"{place(path, row)}: unknown class {word!r} in its .cls; {offer(word, known)}")
        of_class[number, known.index(name)] = 1
    if len(set(known)) < len(known):
        raise UsageError(f"label_names={names} names a label twice")
    return tuple(known), of_class[codes], [CLASS]
