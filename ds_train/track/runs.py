"""A run as its folder tells it: records of metrics.jsonl, and the plan and recipe beside it where they are."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from ds_train.errors import user_error
from ds_train.track.metrics import read_metrics

Record = dict[str, Any]
Floats = NDArray[np.float64]
Part = Literal["train", "evals"]
_TOO_LARGE = 1e100
_NAMES = ("kind", "event")

NOT_EVENTS = ("train", "eval", "sample")
"""Kinds of records that are series or text; every other kind is something that happened."""


@dataclass(frozen=True)
class Run:
    """Records in the order of the file; `plan` and `recipe` are empty where they can't be read."""

    name: str
    train: list[Record]
    evals: list[Record]
    events: list[Record]
    samples: list[Record] = field(default_factory=list)
    plan: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    """Steps of the whole run, where its recipe or the run itself says so."""
    _columns: dict[tuple[Part, str], Floats] = field(default_factory=dict, repr=False, compare=False)

    def column(self, key: str, part: Part = "train") -> Floats:
        """`key` of each training or evaluation record, (records,) float64; NaN where it isn't a number."""
        if (part, key) not in self._columns:
            records = self.train if part == "train" else self.evals
            values = np.fromiter((number(record.get(key)) for record in records), np.float64, len(records))
            self._columns[part, key] = values
        return self._columns[part, key]

    @property
    def last(self) -> Record:
        """The newest training record."""
        return self.train[-1] if self.train else {}


def read_run(path: Path, last_bytes: int | None = None) -> Run:
    """The run in a folder, or of a metrics.jsonl; of its newest records alone where `last_bytes` says how much to read.

    Lines that a crash cut off are left out.

    Raises:
        UserError: there is no metrics file, or no training record in it.
    """
    file = path if path.is_file() else path / "metrics.jsonl"
    if not file.is_file():
        raise user_error("RUN", "there is no metrics.jsonl", "give the folder of a run: runs/NAME", str(path))
    records = [record for record in read_metrics(file, last_bytes) if isinstance(record.get("kind"), str)]
    train, evals = ([r for r in records if r["kind"] == kind and _counted(r)] for kind in ("train", "eval"))
    if not train:
        raise user_error("RUN", "no step has been written yet", "wait for the first one", str(path))
    folder = file.resolve().parent
    recipe = _mapping(folder / "recipe.yaml")
    return Run(
        name=str(recipe.get("name") or folder.name),
        train=train,
        evals=evals,
        events=_events(records),
        samples=[record for record in records if record["kind"] == "sample"],
        plan=_mapping(folder / "plan.json"),
        recipe=recipe,
        steps=_steps(recipe, _mapping(folder / "data.json")),
    )


def told_apart(runs: Sequence[Run], paths: Sequence[Path]) -> list[Run]:
    """`runs` of the `paths`; those that share a name are named by their path."""
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(path)) if names[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]


def number(value: Any) -> float:
    """A record's value as a float; NaN for what is none. Strings, and what overflows elsewhere, are not finite."""
    if isinstance(value, bool):
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError):
        return math.nan
    return found if abs(found) < _TOO_LARGE or math.isnan(found) else math.copysign(math.inf, found)


def details(event: Mapping[str, Any]) -> str:
    """What a record says besides its kind, step, tokens and time, in a line."""
    shown = {key: value for key, value in event.items() if key not in ("kind", "step", "tokens", "time")}
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in shown.items() if value is not None)


def _events(records: list[Record]) -> list[Record]:
    """What happened, by kind, or by what a line of kind health calls it.

    Of steps that were skipped or went wrong the training records tell where no such line does.
    """
    told = {number(record.get("step")) for record in records if record.get("event") == "skipped"}
    found = []
    for record in records:
        if record["kind"] == "health":
            found.append({"kind": str(record.get("event")), **{k: v for k, v in record.items() if k not in _NAMES}})
        elif record["kind"] not in NOT_EVENTS:
            found.append(record)
        elif record["kind"] == "train" and number(record.get("step")) not in told:
            base = {key: record.get(key) for key in ("step", "tokens", "time")}
            if record.get("applied") is False:
                found.append({"kind": "skipped update", **base, "gradient_norm": record.get("grad_norm")})
            if not math.isfinite(number(record.get("loss"))):
                found.append({"kind": "loss not finite", **base, "loss": record.get("loss")})
    return found


def _steps(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> int | None:
    steps = (recipe.get("schedule") or {}).get("steps") or data.get("steps")
    return int(steps) if isinstance(steps, int) else None


def _counted(record: Record) -> bool:
    step = record.get("step")
    return isinstance(step, int) and not isinstance(step, bool)


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
