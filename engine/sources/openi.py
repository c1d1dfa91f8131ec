"""Open-i's Indiana reports as they are published: XML files, their archive, or the Kaggle copy's tables.

A folder's file list comes in; two tables go out: reports (uid, sections, terms) and images (uid, image id, file, view).
Both layouts are brought to Open-i's own names, uid ``CXR12`` and image ``CXR12_IM-0140-1001``, so that labels and boxes
fit either. Nothing is unpacked: the archive's members are read in memory and their names serve for messages only.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

import pandas as pd
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from engine.errors import DataError
from engine.tables import place, read_table, require_columns, text_of

SECTIONS = ("indication", "comparison", "findings", "impression")
REPORT_COLUMNS = ("uid", *SECTIONS, "mesh", "mesh_automatic")
IMAGE_COLUMNS = ("uid", "image", "file", "view", "caption")
REPORTS_TABLE, PROJECTIONS_TABLE = "indiana_reports.csv", "indiana_projections.csv"
LARGEST_XML = 4 * 2**20
# Open-i names the first report's images CXR1_1_..., the Kaggle copy 1_IM-...
FIRST_REPORT = re.compile(r"^1_IM-0001-")


class Reports(NamedTuple):
    """What a folder holds: one row a report, one row an image that a report names, and notes."""

    reports: pd.DataFrame
    images: pd.DataFrame
    notes: list[str]


def uid_of(name: str) -> str:
    """Return Open-i's uid of a report: ``12`` and ``ecgen-radiology/12.xml`` become ``CXR12``, others stay."""
    base = name.strip().replace("\\", "/").rpartition("/")[2]
    base = base.removesuffix(".xml")
    return f"CXR{base}" if base.isdigit() else base


def image_id_of(name: str) -> str:
    """Return Open-i's id of an image: ``12_IM-0140-1001.dcm.png`` becomes ``CXR12_IM-0140-1001``."""
    base = name.strip().replace("\\", "/").rpartition("/")[2]
    for suffix in (".png", ".jpg", ".jpeg", ".dcm"):
        base = base.removesuffix(suffix)
    if not re.match(r"\d+_IM-", base):
        return base
    return f"CXR{FIRST_REPORT.sub('1_1_IM-0001-', base)}"


def kaggle_file_of(image_id: str) -> str:
    """Return the Kaggle copy's file name of an image, the other way round than `image_id_of`."""
    return f"{image_id.removeprefix('CXR').replace('1_1_IM-0001-', '1_IM-0001-')}.dcm.png"


def natural_order(name: str) -> tuple[Any, ...]:
    """Return a sort key under which CXR2 comes before CXR10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name))


def find_xml(files: Sequence[str]) -> list[str]:
    """Return the XML files of a folder, or else the archive of reports that it holds."""
    xml = [name for name in files if name.lower().endswith(".xml")]
    if xml:
        return xml
    return [name for name in files if re.search(r"reports[^/]*\.(tgz|tar\.gz|tar)$", name, re.IGNORECASE)][:1]


def find_table(files: Sequence[str], *names: str) -> str | None:
    """Return the file of one of these names that lies highest in the tree."""
    found = [name for name in files if name.rpartition("/")[2].lower() in names]
    return min(found, key=lambda name: (name.count("/"), name)) if found else None


def read_official(root: str, files: Sequence[str]) -> Reports:
    """Read the official XML files, or their archive.

    Returns
    -------
    Reports
        In the order of the uids' numbers. Views are "" but for captions that are "Frontal" or "Lateral" and no more.

    Raises
    ------
    DataError
        Not one Open-i report, a uid twice, an XML file that is broken or declares a document type or entities.
    """
    reports, images = [], []
    first_file: dict[str, str] = {}
    foreign = 0
    for name, content in _xml_contents(root, find_xml(files)):
        tree = _parsed(name, content)
        found = tree.find("uId")
        uid = (found.get("id") or "").strip() if found is not None else ""
        if not uid:
            foreign += 1
            continue
        if uid in first_file:
            raise DataError(f"the uid {uid!r} is in both {first_file[uid]!r} and {name!r}; remove one of them")
        first_file[uid] = name
        reports.append(
            (uid, *_sections(tree), *(";".join(_texts(tree, f"MeSH/{kind}")) for kind in ("major", "automatic")))
        )
        images += _images(tree, uid)
    if not reports:
        raise DataError(f"none of the {foreign} XML files below {root!r} is an Open-i report (eCitation with uId)")
    report_table = pd.DataFrame(reports, columns=list(REPORT_COLUMNS), dtype=object)
    report_table = report_table.sort_values("uid", key=lambda uids: uids.map(natural_order), kind="stable")
    image_table = pd.DataFrame(images, columns=list(IMAGE_COLUMNS), dtype=object)
    image_table = image_table.sort_values("uid", key=lambda uids: uids.map(natural_order), kind="stable")
    notes = [f"{foreign} XML files are no Open-i reports and were left out"] if foreign else []
    return Reports(report_table.reset_index(drop=True), image_table.reset_index(drop=True), notes)


def read_kaggle(root: str, files: Sequence[str]) -> Reports:
    """Read the Kaggle copy's two tables.

    Returns
    -------
    Reports
        In the order of the projections table, which the study's split depends on.
    """
    projections = find_table(files, PROJECTIONS_TABLE, "projections.csv")
    reports = find_table(files, REPORTS_TABLE, "reports.csv")
    if projections is None or reports is None:
        missing = PROJECTIONS_TABLE if projections is None else REPORTS_TABLE
        raise DataError(f"the Kaggle layout in {root!r} lacks {missing!r}; both tables must lie beside each other")
    images = read_projections(os.path.join(root, projections))
    path = os.path.join(root, reports)
    table = read_table(path)
    require_columns(table, ["uid", "findings", "impression"], path)
    columns = {"uid": text_of(table["uid"]).map(uid_of)}
    for section in SECTIONS:
        columns[section] = text_of(table[section]) if section in table.columns else ""
    columns["mesh"] = text_of(table["MeSH"]).str.replace(r"\s*;\s*", ";", regex=True) if "MeSH" in table.columns else ""
    read = pd.DataFrame(columns)
    twice = read["uid"][read["uid"].duplicated()]
    if len(twice):
        raise DataError(f"{place(path, twice.index[0])}: the uid {twice.iloc[0]!r} occurs more than once; keep one row")
    orphans = ~images["uid"].isin(read["uid"])
    if orphans.all():
        raise DataError(f"no uid of {projections!r} is in {reports!r}; the tables do not belong together")
    notes = [f"{int(orphans.sum())} images have no report and no text"] if orphans.any() else []
    return Reports(read, images, notes)


def read_projections(path: str) -> pd.DataFrame:
    """Read which view each image is: columns uid, filename, projection (Frontal or Lateral).

    Returns
    -------
    DataFrame
        The columns of `IMAGE_COLUMNS`, in the table's order; views "frontal", "lateral" or "".
    """
    table = read_table(path)
    require_columns(table, ["uid", "filename", "projection"], path)
    views = text_of(table["projection"]).str.lower()
    wrong = ~views.isin(("frontal", "lateral", "")).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{place(path, row)}, column 'projection': unknown view {views.iloc[row]!r}; known are Frontal and Lateral"
        )
    files = text_of(table["filename"])
    return pd.DataFrame(
        {
            "uid": text_of(table["uid"]).map(uid_of),
            "image": files.map(image_id_of),
            "file": files,
            "view": views,
            "caption": "",
        }
    )


def _xml_contents(root: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each XML file, from the folder or from its archive."""
    for name in names:
        path = os.path.join(root, name)
        if name.lower().endswith(".xml"):
            try:
                with open(path, "rb") as file:
                    yield name, _limited(name, file.read(LARGEST_XML + 1))
            except OSError as error:
                raise DataError(f"cannot read {path!r}: {error}") from error
            continue
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    # Links and devices are skipped; a link could point outside the archive.
                    if member.isreg() and member.name.lower().endswith(".xml"):
                        file_in_archive = archive.extractfile(member)
                        assert file_in_archive is not None
                        yield f"{name}:{member.name}", _limited(member.name, file_in_archive.read(LARGEST_XML + 1))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"cannot read the archive {path!r}: {error}; copy or download it again") from error


def _limited(name: str, content: bytes) -> bytes:
    if len(content) > LARGEST_XML:
        raise DataError(f"{name!r} is longer than {LARGEST_XML} bytes, too long for a report; remove it")
    return content


def _parsed(name: str, content: bytes) -> Element:
    try:
        return fromstring(content, forbid_dtd=True)
    except DefusedXmlException as error:
        raise DataError(
            f"{name!r} declares a document type or entities ({type(error).__name__}), which reports never do and "
            "attacks use; remove it, or the declaration"
        ) from error
    except (ParseError, ValueError) as error:
        raise DataError(f"{name!r} is not readable XML ({error}); copy or download it again") from error


def _sections(tree: Element) -> list[str]:
    found = {(part.get("Label") or "").lower(): (part.text or "").strip() for part in tree.iter("AbstractText")}
    return [found.get(section, "") for section in SECTIONS]


def _texts(tree: Element, path: str) -> list[str]:
    return [text for part in tree.findall(path) if (text := (part.text or "").strip())]


def _images(tree: Element, uid: str) -> list[tuple[str, str, str, str, str]]:
    named = [(image.get("id", "").strip(), image.findtext("caption") or "") for image in tree.findall("parentImage")]
    return [(uid, image, f"{image}.png", _view_of(caption), caption.strip()) for image, caption in named if image]


def _view_of(caption: str) -> str:
    """Return the view where a caption is nothing but that; Open-i's own describe the whole examination."""
    word = caption.strip().lower()
    return word if word in ("frontal", "lateral") else ""
