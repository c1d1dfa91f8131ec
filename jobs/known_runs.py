"""What the records of a cache's runs know: which model an encoder's id stands for, and how a data set was opened.

Comes in: the folder of runs. Goes out: by encoder id its description and how it was loaded; commands that would embed a
data set again exactly as it was. Sample tables and arrays hold no paths of models, so this is where they are found.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from jobs.config import read_yaml
from jobs.runs import CONFIG_FILE, PLAN_FILE, PROVENANCE_FILE


@dataclass(frozen=True)
class KnownEncoder:
    """How an encoder was loaded.

    Parameters
    ----------
    id : str
    description : dict
        Empty where the run did not keep it.
    model, precision, decoder : str
        As they were given.
    """

    id: str
    description: dict[str, Any]
    model: str
    precision: str
    decoder: str


@dataclass(frozen=True)
class KnownRuns:
    """What all runs of a cache know; later runs win.

    Parameters
    ----------
    encoders : dict of str to KnownEncoder
    data : dict of str to dict
        Options of a data set by its schema string.
    plans : dict of (encoder id, schema, what) to dict
        Batch size and compilation, which move last bits.
    """

    encoders: dict[str, KnownEncoder] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    plans: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Descriptions by encoder id, of those whose run kept it."""
        return {name: known.description for name, known in self.encoders.items() if known.description}

    def embed_command(self, cache: Path, schema: str, encoder: str, what: Sequence[str]) -> str:
        """Return the command that embeds a data set with an encoder; MODEL where no run tells which model it was."""
        known = self.encoders.get(encoder)
        words = ["fluoro", "embed", schema, "--model", known.model if known else "MODEL"]
        if known and known.precision != "auto":
            words += ["--precision", known.precision]
        if known and known.decoder != "exact":
            words += ["--decoder", known.decoder]
        words += ["--what", ",".join(what), "--cache", str(cache)]
        for name, value in self.data.get(schema, {}).items():
            words += ["--data", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        missing = "" if known else f"   # MODEL is the one whose id is {encoder}"
        return shlex.join(words) + missing


def known_runs(runs: Path) -> KnownRuns:
    """Read the records of all runs in a folder; what cannot be read is left out."""
    known = KnownRuns()
    for folder in sorted(path.parent for path in runs.glob(f"*/{PROVENANCE_FILE}")):
        provenance = _read(folder / PROVENANCE_FILE)
        try:
            config = read_yaml(folder / CONFIG_FILE)[0]
        except UsageError:
            continue
        schema, options = _dataset(provenance, config)
        if schema:
            known.data[schema] = options
        # The first encoder of a run is the one that it was asked for; others were trained from it.
        for entry in list(_encoders(provenance))[:1]:
            if isinstance(config.get("model"), str):
                known.encoders[entry["id"]] = KnownEncoder(
                    entry["id"],
                    dict(entry.get("description") or known.descriptions.get(entry["id"]) or {}),
                    config["model"],
                    str(config.get("precision", "auto")),
                    str(config.get("decoder", "exact")),
                )
        for plan in _read_plans(folder / PLAN_FILE):
            # Runs of earlier versions do not say what; they have one plan alone.
            for what in plan.get("what", ("image", "text")):
                known.plans[plan.get("encoder", ""), plan.get("dataset", ""), what] = plan
    return known


def _dataset(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a run's data set as schema string and options; a study has them in a section."""
    options = config.get("data")
    options = dict(options) if isinstance(options, Mapping) else {}
    if isinstance(config.get("dataset"), str):
        return config["dataset"], options
    told = provenance.get("dataset")
    schema = told.get("schema") if isinstance(told, dict) else None
    inner = options.get("options")
    return schema or "", dict(inner) if isinstance(inner, Mapping) else {}


def _encoders(provenance: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entries = provenance.get("encoders")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            yield entry


def _read(path: Path) -> dict[str, Any]:
    values = _read_json(path)
    return values if isinstance(values, dict) else {}


def _read_plans(path: Path) -> list[dict[str, Any]]:
    values = _read_json(path)
    # Runs of earlier versions have one alone.
    return [plan for plan in (values if isinstance(values, list) else [values]) if isinstance(plan, dict)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
