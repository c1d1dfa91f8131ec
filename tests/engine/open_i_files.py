"""Small folders in the layouts of IU-Xray, for tests."""

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

REPORTS = (
    ("CXR1", "normal", "Clear lungs.", "No acute disease.", ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001")),
    ("CXR2", "Cardiomegaly/mild;Opacity/lung/base/left", "Large heart.", "", ("CXR2_IM-0652-1001",)),
    ("CXR10", "No Indexing", "", "", ()),
    ("CXR11", "Pleural Effusion/left", "", "Effusion.", ("CXR11_IM-0067-1001", "CXR11_IM-0067-2001")),
)
VIEWS = {
    "CXR1_1_IM-0001-3001": "Lateral",
    "CXR1_1_IM-0001-4001": "Frontal",
    "CXR2_IM-0652-1001": "Frontal",
    "CXR11_IM-0067-1001": "Frontal",
    "CXR11_IM-0067-2001": "Lateral",
}


def kaggle_name(image: str) -> str:
    return f"{image.removeprefix('CXR').replace('1_1_IM', '1_IM')}.dcm.png"


def xml_of(uid, mesh, findings, impression, images) -> str:
    terms = "".join(f"<major>{term}</major>" for term in mesh.split(";"))
    named = "".join(
        f'<parentImage id="{image}"><caption>Chest PA and lateral</caption></parentImage>' for image in images
    )
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{uid}"/><Abstract>'
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">{impression}'
        f"</AbstractText></Abstract><MeSH>{terms}</MeSH>{named}</eCitation>"
    )


def write_png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10), value, dtype=np.uint8)).save(path)


def write_official(folder: Path, *, xml="ecgen-radiology", images=True, projections=True, reports=REPORTS) -> Path:
    """xml: a folder below, "" for flat, or the name of an archive ending in .tgz."""
    folder.mkdir(parents=True, exist_ok=True)
    if xml.endswith(".tgz"):
        with tarfile.open(folder / xml, "w:gz") as archive:
            for report in reports:
                content = xml_of(*report).encode()
                member = tarfile.TarInfo(f"ecgen-radiology/{report[0][3:]}.xml")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    else:
        for report in reports:
            path = folder / xml / f"{report[0][3:]}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(xml_of(*report))
    if images:
        for number, image in enumerate(VIEWS):
            write_png(folder / f"{image}.png", number)
    if projections:
        write_projections(folder)
    return folder


def write_projections(folder: Path) -> None:
    lines = ["uid,filename,projection"]
    lines += [f"{image[3:].split('_')[0]},{kaggle_name(image)},{view}" for image, view in VIEWS.items()]
    (folder / "indiana_projections.csv").write_text("\n".join(lines) + "\n")


def write_kaggle(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_projections(folder)
    lines = ["uid,MeSH,Problems,image,indication,comparison,findings,impression"]
    lines += [
        f"{uid[3:]},{mesh},,,,,{findings},{impression}" for uid, mesh, findings, impression, named in REPORTS if named
    ]
    (folder / "indiana_reports.csv").write_text("\n".join(lines) + "\n")
    for number, image in enumerate(VIEWS):
        write_png(folder / "images" / "images_normalized" / kaggle_name(image), number)
    return folder
