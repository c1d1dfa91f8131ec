"""``phantom:N?seed=S&size=256&enrich=E``: a data set of phantoms, drawn when an image or a mask is asked for.

Numbers come in; a data set goes out whose labels, texts and groups are known at once. Ids have the form of Open-i's
image ids, so that phantoms written to disk come back under the same ones.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from engine.annotations import BOX_COLUMNS, Annotations
from engine.dataset import Dataset, Fingerprint
from engine.errors import ImageError, UsageError
from engine.labels import NO_FINDING, STUDY_LABELS
from engine.phantom import GENERATOR_VERSION, Phantom, draw_case, draw_phantom
from engine.phantom.phantom import LARGEST, SMALLEST
from engine.phantom.report import write_report
from engine.sources.schema import as_integer, as_number, dataset_name


@dataclass(frozen=True)
class PhantomSet:
    """What all phantoms of a data set share."""

    seed: int
    size: int
    enrich: float

    def uri(self, index: int) -> str:
        """Return the name of one phantom, from which it can be drawn again."""
        return f"phantom:seed={self.seed}&size={self.size}&enrich={self.enrich:g}/{index}"

    def index(self, uri: str) -> int:
        """Return the index of one of this set's uris; ImageError for another."""
        index = uri.rpartition("/")[2]
        if not index.isdigit() or self.uri(int(index)) != uri:
            raise ImageError(f"{uri}: is no phantom of this data set, whose uris are like {self.uri(0)!r}")
        return int(index)

    def draw(self, index: int) -> Phantom:
        """Return a phantom; the last few are kept, because pixels, masks and boxes are asked for one after another."""
        return _drawn(self.seed, index, self.size, self.enrich)


@dataclass(frozen=True)
class PhantomReader:
    """Gives phantoms' pixels."""

    phantoms: PhantomSet

    def read(self, uri: str) -> np.ndarray:
        """Return pixels, uint8 (size, size)."""
        return self.phantoms.draw(self.phantoms.index(uri)).pixels

    def fingerprint(self, uri: str) -> Fingerprint:
        """Return what stands for a file's: a change of generator, seed, size or enrichment is another file."""
        self.phantoms.index(uri)
        digest = hashlib.blake2b(f"{GENERATOR_VERSION} {uri}".encode(), digest_size=8).digest()
        return Fingerprint(self.phantoms.size**2, 0, 0, int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class PhantomAnnotations:
    """Masks (when called) and boxes of phantoms, drawn on demand."""

    phantoms: PhantomSet
    sample_ids: tuple[str, ...]
    labels: tuple[str, ...]

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        """Return the mask of a label in a phantom, bool (size, size), None where it is not there."""
        return self.phantoms.draw(index_of(sample_id)).masks.get(label)

    def pairs(self) -> pd.DataFrame:
        """Return sample_id and label of every finding, without drawing."""
        return pd.DataFrame({"sample_id": list(self.sample_ids), "label": list(self.labels)}, dtype=object)

    def boxes_of(self, sample_id: str) -> pd.DataFrame:
        """Return the boxes of one phantom."""
        boxes = self.phantoms.draw(index_of(sample_id)).boxes
        rows = [(sample_id, label, *box, "phantom", "") for label, found in boxes.items() for box in found]
        return pd.DataFrame(rows, columns=list(BOX_COLUMNS))


def sample_id_of(patient: str, index: int) -> str:
    """Return the id of phantom `index`, in the form of Open-i's image ids."""
    return f"{patient}_IM-{index + 1:04d}-1001"


def index_of(sample_id: str) -> int:
    """Return which phantom a sample id names."""
    found = re.search(r"_IM-(\d+)-1001$", sample_id)
    if found is None:
        raise UsageError(f"{sample_id!r} is not the id of a phantom, such as {sample_id_of('CXR1', 0)!r}")
    return int(found[1]) - 1


def open_phantoms(
    path: str, *, schema: str, seed: int | str = 0, size: int | str = 256, enrich: float | str = 0.0
) -> Dataset:
    """Open the first N phantoms of a seed.

    Parameters
    ----------
    path : str
        N, how many.
    seed : int
    size : int
        Side in pixels.
    enrich : float
        Least share of each label, 0 for the study's prevalences.

    Returns
    -------
    Dataset
        Further columns indication, findings, impression, mesh, projection, as `open_iu_xray` has them.

    Raises
    ------
    UsageError
        A number that is none or out of range.
    """
    count = as_integer("N", path, 1)
    phantoms = PhantomSet(as_integer("seed", seed), as_integer("size", size, 1), as_number("enrich", enrich, 0, 1))
    if not SMALLEST <= phantoms.size <= LARGEST:
        raise UsageError(f"size={size!r} must be from {SMALLEST} to {LARGEST} pixels")
    cases = [draw_case(phantoms.seed, index, phantoms.enrich) for index in range(count)]
    reports = [write_report(case) for case in cases]
    ids = [sample_id_of(case.patient, case.index) for case in cases]
    samples = pd.DataFrame(
        {
            "id": ids,
            "uri": [phantoms.uri(case.index) for case in cases],
            "text": [" ".join(filter(None, (report["findings"], report["impression"]))) for report, _ in reports],
            "group": [case.patient for case in cases],
            "view": [case.view.lower() for case in cases],
            "split": "",
            "projection": [case.projection for case in cases],
            **{name: [report[name] for report, _ in reports] for name in ("indication", "findings", "impression")},
            "mesh": [";".join(terms) for _, terms in reports],
        },
        dtype=object,
    )
    labels = np.stack([case.labels for case in cases]).astype(np.int8)
    rows, columns = np.nonzero(labels[:, : STUDY_LABELS.index(NO_FINDING)])
    annotated = PhantomAnnotations(
        phantoms, tuple(ids[row] for row in rows), tuple(STUDY_LABELS[column] for column in columns)
    )
    return Dataset(
        schema=schema,
        name=dataset_name("phantom", str(count), seed=phantoms.seed, size=phantoms.size, enrich=phantoms.enrich),
        samples=samples,
        label_names=STUDY_LABELS,
        labels=labels,
        reader=PhantomReader(phantoms),
        annotations=Annotations(mask_reader=annotated, box_source=annotated),
    )


@lru_cache(maxsize=8)
def _drawn(seed: int, index: int, size: int, enrich: float) -> Phantom:
    return draw_phantom(seed, index, size, enrich)
