"""The plan of a job that is not finished, beside the arrays that it fills: whoever goes on with it takes the plan over.

Comes in: what a job computes, of which data set, by which encoder. Goes out: the batch size and the compilation that it
began with, which move last bits. The file is written before the first row is computed and removed when nothing is left,
so there is one only where a job was stopped, or runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from engine.arrays.storage import Storage
from engine.errors import CacheError
from engine.keys import short_hash
from engine.plan import Plan

log = logging.getLogger(__name__)

FOLDER = "plans"
LOCK = "locks/plans.lock"


class UnfinishedJob:
    """What is kept of one job.

    Parameters
    ----------
    storage : Storage
    encoder_id, dataset : str
        An encoder's id and a data set's name.
    products : sequence of str
        What the job computes.
    """

    def __init__(self, storage: Storage, encoder_id: str, dataset: str, products: Sequence[str]) -> None:
        self._storage = storage
        self._what = {"encoder": encoder_id, "dataset": dataset, "what": sorted(products)}
        self._file = f"{FOLDER}/{short_hash(json.dumps(self._what))}.json"

    def kept(self) -> dict[str, Any]:
        """Return "batch_size" and "compiled" of the job where it was stopped; nothing otherwise."""
        try:
            plan = json.loads(self._storage.read(self._file))
            return {"batch_size": int(plan["batch_size"]), "compiled": bool(plan["compiled"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}

    def begin(self, plan: Plan) -> None:
        """Keep the plan of a job that begins, or goes on; where it cannot be written, the log says so."""
        values = {**self._what, "batch_size": plan.batch_size, "compiled": bool(plan.compiled)}
        if self.kept() == {name: values[name] for name in ("batch_size", "compiled")}:
            return
        try:
            with self._storage.lock(LOCK), self._storage.writing(self._file, "tmp/plans") as path:
                path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except CacheError as error:
            # Not the end of the job: perhaps all its rows are there, and those that are not say better what is amiss.
            log.warning("the job's plan is not kept, so one that goes on with it may choose another: %s", error)

    def finish(self) -> None:
        """Let go of the plan: nothing is left to compute."""
        if self._storage.writable and self._storage.exists(self._file):
            # A copy that cannot be written is read all the same, with whatever plans it has.
            with suppress(CacheError), self._storage.lock(LOCK):
                self._storage.remove(self._file)
