"""``folder:PATH``: a tree of images, with sub-folders as labels, or flat; in a folder or below a URL.

What a folder says without a table: its first level of sub-folders are labels (after ``train``, ``val``, ``test``
folders, if those come first), a ``.txt`` file beside an image is its text. Every image is its own group, because a
folder names no patients.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
import pandas as pd

from engine import remote_files
from engine.dataset import Dataset
from engine.errors import DataError, ImageError
from engine.remote_files import is_url, list_files
from engine.sources.files import LARGEST_FILE, FileReader, count_suffixes, is_image, walk_files
from engine.sources.remote import open_reader
from engine.sources.schema import dataset_name
from engine.splits import split_name
from engine.tables import TEXT, constant_text, text_from_codes

logger = logging.getLogger(__name__)

LARGEST_TEXT = 2**20


def open_folder(
    path: str, *, schema: str, max_bytes: int | str = LARGEST_FILE, follow_links: bool | str = True
) -> Dataset:
    """Open a folder of images.

    Parameters
    ----------
    path : str
        Images lie in it (flat: no labels), in one sub-folder a label, or in ``train|val|test`` folders of either. A
        folder, or anything that fsspec lists: ``zip://images::file:///data/x.zip``, ``s3://bucket/images``.
    max_bytes : int
        Larger files become listed failures.
    follow_links : bool
        Whether symbolic links may lead out of the folder; elsewhere than on local disks there are none.

    Returns
    -------
    Dataset
        Ids and uris are paths relative to the folder, sorted; other files are counted in its notes.

    Raises
    ------
    UsageError
        No such folder.
    DataError
        No image in it, an image whose name is not UTF-8, or texts that cannot be read.
    """
    reader = open_reader(path, schema, max_bytes, follow_links)
    root = reader.root
    files = walk_files(root) if isinstance(reader, FileReader) else list(list_files(root))
    images = [name for name in files if is_image(name)]
    if not images:
        holds = f"it holds {count_suffixes(files)} files" if files else "it is empty"
        raise DataError(
            f"{schema!r}: no image below {root!r}: {holds}; images are known by suffixes such as .png and .jpg"
        )
    texts, others = _texts_beside(root, images, [name for name in files if not is_image(name)])
    # What a folder says is worked out once a folder, not once an image.
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(name.rpartition("/")[0], len(numbers)) for name in images], np.int64)
    splits, folders = _splits_and_folders(list(numbers))
    label_names = tuple(sorted({folder for folder in folders if folder}))
    of_folder = np.array([[folder == name for name in label_names] for folder in folders], np.int8)
    labels = of_folder.reshape(len(folders), len(label_names))[codes]
    notes = [f"{len(others)} files are no images and were left out: {count_suffixes(others)}"] if others else []
    unlabelled = int(np.isin(codes, [number for number, folder in enumerate(folders) if not folder]).sum())
    if label_names and unlabelled:
        notes.append(f"{unlabelled} images lie outside the {len(label_names)} label folders and have no label")
    for note in notes:
        logger.info("%s: %s", schema, note)
    names = _column_of_names(images, schema)
    samples = pd.DataFrame(
        {
            "id": names,
            "uri": names,
            "text": pd.Series(texts, dtype=TEXT) if texts else constant_text("", len(images)),
            "group": names,
            "view": constant_text("", len(images)),
            "split": text_from_codes(codes, splits),
        }
    )
    return Dataset(
        schema=schema,
        name=dataset_name("folder", root),
        samples=samples,
        label_names=label_names,
        labels=labels,
        reader=reader,
        notes=tuple(notes),
    )


def _column_of_names(images: Sequence[str], schema: str) -> pd.Series:
    """Return names as a column; DataError for one that is not UTF-8, which no table of samples could hold."""
    try:
        return pd.Series(images, dtype=TEXT)
    except UnicodeEncodeError:
        wrong = [name for name in images if os.fsencode(name).decode("utf-8", "replace") != name]
        raise DataError(
            f"{schema!r}: the names of {len(wrong)} images are not UTF-8, first {wrong[0]!r}; rename them, such as "
            "with `convmv -r -f latin1 -t utf8 --notest FOLDER`"
        ) from None


def _splits_and_folders(folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return for each folder with images the split ("" without) and the label ("" without) that its path says."""
    parts = [folder.split("/") if folder else [] for folder in folders]
    # A lone folder that holds everything, such as images/, says nothing about the images in it.
    while all(parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    first_level = {part[0] for part in parts if part}
    has_splits = len(first_level) > 1 and all(split_name(name) for name in first_level)
    if not has_splits:
        return [""] * len(folders), [part[0] if part else "" for part in parts]
    splits = [split_name(part[0]) or "" if part else "" for part in parts]
    return splits, [part[1] if len(part) > 1 else "" for part in parts]


def _texts_beside(root: str, images: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the text of each image from the ``.txt`` file of its name (nothing without any), and the other files."""
    by_stem = {os.path.splitext(name)[0]: name for name in others if name.endswith(".txt")}
    if not by_stem:
        return [], list(others)
    texts, used = [], set()
    for image in images:
        name = by_stem.get(os.path.splitext(image)[0])
        texts.append(_read_text(root, name) if name else "")
        used.add(name)
    return texts, [name for name in others if name not in used]


def _read_text(root: str, name: str) -> str:
    try:
        if is_url(root):
            content = remote_files.read(root, name, most=LARGEST_TEXT)
        else:
            with open(os.path.join(root, name), "rb") as file:
                content = file.read(LARGEST_TEXT + 1)
    except (OSError, ImageError) as error:
        raise DataError(f"cannot read the text file {name!r} below {root!r}: {error}") from error
    return text_of_file(content, f"{name!r} below {root!r}")


def text_of_file(content: bytes, place: str) -> str:
    """Return the text of a file beside an image; DataError where it is too long or not UTF-8."""
    if len(content) > LARGEST_TEXT:
        raise DataError(f"the text file {place} is longer than {LARGEST_TEXT} bytes; is it the text of an image?")
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read the text file {place}: {error}; save it as UTF-8") from error
