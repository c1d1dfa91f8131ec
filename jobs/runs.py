"""One job's record on disk: what was asked, on which machine, what came out and what it cost.

``with open_run("study", config, out=...) as run`` makes the folder, saves the resolved config before any work starts,
and closes the record whatever happens. Results are one JSON object a line, ``kind`` first, so that they can be read
while the job still runs; a cost line is written by ``with run.step("embed images") as step: step.items = n``.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import secrets
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import psutil

from engine import machine
from engine.arrays.durable import make_folder, write_plainly
from engine.arrays.storage import LocalStorage, storage_of
from engine.errors import CacheError, UsageError
from engine.plan import Plan
from jobs import LOGGERS, interrupts
from jobs.config import JobConfig, default_cache, load_config, save_config, user_folder
from jobs.plain import plain

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
RESULTS_FILE = "results.jsonl"
FAILURES_FILE = "failures.csv"
PLAN_FILE = "plan.json"
LOG_FILE = "run.log"
FAILURE_COLUMNS = ("id", "uri", "what", "reason")
SECONDS_BETWEEN_MEMORY_LOOKS = 0.5


@dataclass
class StepCost:
    """What one step did and took; the job fills in items, bytes and reused.

    Parameters
    ----------
    step : str
        Name, such as "embed images".
    items : int
        Units worked on; the rate is items a second.
    bytes : int or None
        Written to disk by the step.
    reused : int or None
        Units that were there already and cost nothing.
    seconds : float
    peak_memory : int
        Largest resident memory seen during the step, of this process and its children, in bytes.
    peak_device_memory : int or None
        Largest memory allocated on the CUDA device, in bytes.
    """

    step: str
    items: int = 0
    bytes: int | None = None
    reused: int | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    peak_device_memory: int | None = None

    @property
    def rate(self) -> float | None:
        """Items a second, None where nothing was counted."""
        return self.items / self.seconds if self.items and self.seconds > 0 else None

    def row(self) -> dict[str, Any]:
        """Return the cost as a result line."""
        values = {
            "kind": "cost",
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "items": self.items or None,
            "rate": self.rate,
            "bytes": self.bytes,
            "reused": self.reused,
            "peak_memory": self.peak_memory,
        }
        if self.peak_device_memory is not None:
            values["peak_device_memory"] = self.peak_device_memory
        return values


@contextmanager
def measured(name: str) -> Iterator[StepCost]:
    """Measure a step's seconds and peak memory, with or without a run folder."""
    cost = StepCost(name)
    device = _cuda()
    if device is not None:
        device.reset_peak_memory_stats()
    watch = _MemoryWatch()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_memory = watch.stop()
        if device is not None:
            cost.peak_device_memory = int(device.max_memory_allocated())


class Run:
    """An open run folder; made by `open_run`."""

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.fresh = False
        self.way_on = interrupts.SAME_COMMAND
        self.provenance = provenance
        self.failures: list[dict[str, str]] = []
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self._log = _RunLog(folder / LOG_FILE)

    def path(self, relative: str) -> Path:
        """Return a path in the run folder, its parent made."""
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, kind: str, **values: Any) -> None:
        """Append one result line; it is on disk when this returns."""
        line = json.dumps({"kind": kind, **plain(values)}, ensure_ascii=False, allow_nan=False)
        with self._lock:
            write_plainly(self.folder / RESULTS_FILE, (line + "\n").encode(), "ab")

    def record_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append result lines that carry their kind themselves."""
        for row in rows:
            values = dict(row)
            self.record(values.pop("kind"), **values)

    @contextmanager
    def step(self, name: str) -> Iterator[StepCost]:
        """Measure a step and append its cost line, also when the step fails."""
        cost, done = StepCost(name), False
        try:
            with measured(name) as cost:
                yield cost
            done = True
        finally:
            values = cost.row()
            with nullcontext() if done else _not_hiding_the_error():
                self.record(values.pop("kind"), **values)

    def note(self, **values: Any) -> None:
        """Add to the provenance, such as the encoders used; written at once."""
        self.provenance.update(plain(values))
        self._write_provenance()

    def plan(self, encoder: str, dataset: str, what: Sequence[str], plan: Plan) -> None:
        """Keep how something is embedded: with what batch size, compiled or not and why."""
        work = {"encoder": encoder, "dataset": dataset, "what": list(what)}
        path = self.folder / PLAN_FILE
        # A run that goes on keeps those of what it need not compute again.
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        others = [each for each in there if {name: each.get(name) for name in work} != work]
        write_plainly(path, (json.dumps([*others, {**work, **asdict(plan)}], indent=1) + "\n").encode())

    def fail(self, failures: pd.DataFrame | Sequence[Mapping[str, Any]]) -> None:
        """Add samples that could not be read or computed: columns id, uri, what, reason."""
        rows = failures.to_dict("records") if isinstance(failures, pd.DataFrame) else failures
        self.failures += [{column: str(row.get(column, "")) for column in FAILURE_COLUMNS} for row in rows]
        table = pd.DataFrame(self.failures, columns=list(FAILURE_COLUMNS)).to_csv(index=False)
        write_plainly(self.folder / FAILURES_FILE, table.encode())

    def __enter__(self) -> Run:
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._log)
        self._log.close()
        if kind is not None and issubclass(kind, UsageError) and self._holds_nothing():
            # A mistyped name must not leave a folder that the corrected command then finds in its way.
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        status = "stopped" if stopped else "failed" if kind else "done"
        self.provenance.update(
            status=status,
            finished=_now(),
            seconds=round(time.perf_counter() - self._start, 3),
            failures=len(self.failures),
        )
        if stopped and error is not None:
            error.add_note(self.way_on)  # for whoever tells of it
        elif error is not None:
            self.provenance["error"] = f"{type(error).__name__}: {error}"
        with nullcontext() if error is None else _not_hiding_the_error():
            self._write_provenance()

    def _holds_nothing(self) -> bool:
        """Tell whether this run made the folder and left nothing in it but its beginning."""
        if not self.fresh or any(path.is_dir() for path in self.folder.iterdir()):
            return False
        names = {path.name for path in self.folder.iterdir()}
        lines = (self.folder / RESULTS_FILE).read_text(encoding="utf-8").splitlines()
        return names <= {CONFIG_FILE, PROVENANCE_FILE, RESULTS_FILE, LOG_FILE} and all(
            '"kind": "cost"' in line for line in lines
        )

    def _write_provenance(self) -> None:
        text = json.dumps(plain(self.provenance), indent=1, ensure_ascii=False)
        partial = self.folder / (PROVENANCE_FILE + ".partial")
        write_plainly(partial, (text + "\n").encode())
        partial.replace(self.folder / PROVENANCE_FILE)


def open_run(
    verb: str,
    config: JobConfig,
    *,
    out: Path | None = None,
    cache: Path | str | None = None,
    overwrite: bool = False,
    resume: bool | None = None,
    command: Sequence[str] | None = None,
    accelerators: bool = False,
) -> Run:
    """Make a run folder, save the resolved config and the start of the provenance in it, and return it open.

    Parameters
    ----------
    verb : str
        The job, such as "study"; part of a run's id.
    config : JobConfig
    out : Path, optional
        The folder; `<cache>/runs/<run-id>` unless given.
    cache : Path or URL, optional
        Where new runs go, see `runs_folder`; the user's cache unless given.
    overwrite : bool
        Delete what an earlier run left in `out`. Only a folder that is a run is ever deleted.
    resume : bool, optional
        Go on in `out`, which must have been started with the same config. Results are written anew; what was embedded
        is taken from the cache. None: a job that offers no such way.
    command : sequence of str, optional
        `sys.argv` unless given.
    accelerators : bool
        Describe the GPUs too, where torch is wanted anyway.

    Raises
    ------
    UsageError
        `out` exists and neither way out was chosen, or it is no run, or was started by another verb or with another
        config.
    """
    folder = out.expanduser() if out is not None else runs_folder(cache) / run_id(verb)
    if overwrite and resume:
        raise UsageError("--overwrite and --resume exclude each other; give one of them")
    started = None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {str(folder)!r} is a file; give another folder with --out")
    if folder.is_dir() and any(folder.iterdir()):
        started = _take_over(folder, verb, config, overwrite, resume)
    fresh = not folder.exists()
    make_folder(folder)
    save_config(config, folder / CONFIG_FILE)
    for name in (RESULTS_FILE, FAILURES_FILE):
        (folder / name).unlink(missing_ok=True)
    write_plainly(folder / RESULTS_FILE, b"")
    provenance: dict[str, Any] = {
        "verb": verb,
        "command": shlex.join(command if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "status": "running",
        "started": _now(),
        "versions": machine.versions(),
        "git_commit": machine.git_commit(),
        "machine": machine.describe_machine(accelerators=accelerators or "torch" in sys.modules),
    }
    if started:
        provenance["first_started"] = started
    run = Run(folder, provenance)
    run.fresh = fresh
    if resume is not None:
        run.way_on = f"`fluoro {verb} --resume --out {shlex.quote(str(folder))}` goes on from there"
    elif out is not None and not overwrite:
        run.way_on = "the same command with --overwrite goes on from there"
    run._write_provenance()
    return run


def runs_folder(cache: Path | str | None = None) -> Path:
    """Return where runs are recorded: in a cache's folder; in the user's own where the cache is somewhere else."""
    storage = storage_of(cache or default_cache())
    if isinstance(storage, LocalStorage):
        return storage.folder / "runs"
    return user_folder() / "runs"


@contextmanager
def _not_hiding_the_error() -> Iterator[None]:
    """Log that the record cannot be written (a full disk), where another error has ended the job already."""
    try:
        yield
    except (CacheError, OSError) as problem:
        log.warning("the run's record is not complete: %s", problem)


def run_id(verb: str) -> str:
    """Return a new run's id, which sorts by time: 20260131-120500-study-1f3c."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{moment}-{re.sub('[^a-z0-9]+', '-', verb.lower())}-{secrets.token_hex(2)}"


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's record."""
    return (folder / CONFIG_FILE).is_file() and (folder / PROVENANCE_FILE).is_file()


def _take_over(folder: Path, verb: str, config: JobConfig, overwrite: bool, resume: bool | None) -> str | None:
    """Clear or check an existing output folder; return when the run to go on with was started."""
    if not overwrite and not resume:
        resuming = "" if resume is None else "--resume to go on with it, "
        ways = f"{resuming}--overwrite to replace it, or --out with another folder"
        if not is_run(folder):
            ways = "--out with another folder (it is not a run's record, so it is not offered for replacing)"
        raise UsageError(f"output {str(folder)!r} exists and is not empty; give {ways}")
    if not is_run(folder):
        raise UsageError(
            f"output {str(folder)!r} is not a run's record ({CONFIG_FILE} and {PROVENANCE_FILE} are not both there), "
            "so it is neither replaced nor resumed; give another folder with --out"
        )
    if overwrite:
        shutil.rmtree(folder)
        return None
    try:
        provenance = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        provenance = {}
    begun = provenance.get("verb", verb)
    if begun != verb:
        raise UsageError(
            f"run {str(folder)!r} was started by `fluoro {begun}`, so `fluoro {verb}` cannot go on with it; give "
            "--out with another folder"
        )
    earlier = load_config(type(config), folder / CONFIG_FILE)
    differing = [
        name for name in type(config).model_fields if plain(getattr(earlier, name)) != plain(getattr(config, name))
    ]
    if differing:
        raise UsageError(
            f"run {str(folder)!r} was started with other values of {', '.join(differing)}; give the same ones to "
            "resume it, or --out with another folder"
        )
    return provenance.get("first_started") or provenance.get("started")


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _cuda() -> Any:
    """Return torch.cuda where torch is loaded and its device in use already; never load it for this."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda


class _RunLog(logging.FileHandler):
    """What the job says, as lines in its run folder; made with the first of them. One that goes on adds to it.

    A line that cannot be written is lost: a full disk ends the job by itself, and says so.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do not print where a line is lost."""

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            super().close()


@dataclass
class _MemoryWatch:
    """Looks at the resident memory of this process and its children twice a second, from a thread."""

    peak: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._process = psutil.Process()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        self._look()
        return self.peak

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_MEMORY_LOOKS):
            self._look()

    def _look(self) -> None:
        total = 0
        for process in [self._process, *self._children()]:
            try:
                total += int(process.memory_info().rss)
            except psutil.Error:
                continue
        self.peak = max(self.peak, total)

    def _children(self) -> list[psutil.Process]:
        try:
            return self._process.children(recursive=True)
        except psutil.Error:
            return []
