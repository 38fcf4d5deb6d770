"""Runs -> the curves of a report: what is drawn, over what, thinned without losing a spike. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_train.track.phases import PHASES
from ds_train.track.runs import Floats, Part, Record, Run, number

Axis = Literal["step", "tokens", "hours"]
Unit = Literal["", "%", "MB", "ms"]
Look = Literal["line", "faint", "dashed", "dots"]

BUCKETS = 250
"""Places along the axis at which a thinned curve keeps its first, lowest, highest and last value."""
_SMOOTH_FROM = 200
_SPREAD_OF_LOG = 60.0
_KNOWN = {
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_mb", "memory_peak_mb", "step_ms",
    "save_ms", "seconds", "time", "slowest_rank", "real_tokens", "labels", *(f"{phase}_ms" for phase in PHASES),
}  # fmt: skip
_KNOWN_OF_EVALS = {"step", "tokens", "time", "loss", "perplexity", "labels", "seconds"}


@dataclass(frozen=True)
class Curve:
    """`ys` over `xs`, both finite and of one length, of run number `run`."""

    label: str
    run: int
    look: Look
    xs: Floats
    ys: Floats


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes. `unit` "%" is of shares in [0, 1]."""

    title: str
    unit: Unit
    about: str
    curves: list[Curve]
    log: bool = False


def places(run: Run, axis: Axis, part: Part = "train") -> Floats:
    """Where the training or evaluation records of `run` lie along `axis`; NaN for one that doesn't say."""
    if axis == "hours":
        times = run.column("time", part)
        return np.where(np.isfinite(times), times - _started(run), np.nan) / 3600
    return run.column(axis, part)


def place(run: Run, axis: Axis, event: Record) -> float:
    """Where an event lies: by its own word, or by its step."""
    if axis == "hours":
        return (number(event.get("time")) - _started(run)) / 3600
    if axis in event:
        return number(event[axis])
    index = int(np.searchsorted(run.column("step"), number(event.get("step"))))
    return float(places(run, axis)[min(index, len(run.train) - 1)])


def _started(run: Run) -> float:
    """Seconds of the epoch at the first record; NaN where none says."""
    times = run.column("time")
    times = times[np.isfinite(times)]
    return float(times.min()) if len(times) else math.nan


def best_axis(runs: Sequence[Run]) -> Axis:
    """Steps, unless the steps of these runs differ in their tokens."""
    per_step = {round(number(run.last.get("tokens")) / max(1.0, number(run.last.get("step"))), 3) for run in runs}
    return "step" if len(per_step) == 1 else "tokens"


def panels(runs: Sequence[Run], axis: Axis) -> list[Panel]:
    """Every curve that the records hold; a panel without any is left out."""
    make = _Maker(runs, axis)
    loss = make.smoothed("Training loss", "loss", "nats per label")
    found = [
        loss,
        *([make.end("Training loss after its fall", "loss", "nats per label")] if _hides_its_end(loss) else []),
        make.of("Held-out loss", ("loss",), "nats per label", part="evals"),
        make.of("Held-out accuracy", ("accuracy",), "share of labels", unit="%", part="evals"),
        make.of("Learning rate", ("lr",), ""),
        make.smoothed("Gradient norm", "grad_norm", "L2, before clipping"),
        make.smoothed("Tokens per second", "tokens_per_second", "all ranks together"),
        make.smoothed("MFU", "mfu", "model FLOPs of the peak", unit="%"),
        make.of("Memory", ("memory_peak_mb", "memory_mb"), "of the fullest rank; dashed: now", unit="MB"),
        make.smoothed("Step time", "step_ms", "", unit="ms"),
        make.smoothed("Imbalance", "imbalance", "forward and backward: slowest rank over the mean"),
        *(make.of(_words(key), (key,), "") for key in _others(runs, "train", _KNOWN | {"imbalance"})),
        *(
            make.of(f"Held-out {_words(key).lower()}", (key,), "", part="evals")
            for key in _others(runs, "evals", _KNOWN_OF_EVALS | {"accuracy"})
        ),
    ]
    return [panel for panel in found if panel.curves]


def phase_means(run: Run) -> dict[str, float]:
    """Mean milliseconds of each phase of a step, without its slow beginning; empty where the records have none."""
    found = {phase: settled(run, f"{phase}_ms") for phase in (*PHASES, "save")}
    return {phase: float(values.mean()) for phase, values in found.items() if len(values)}


def phase_bands(run: Run, axis: Axis, buckets: int = 120) -> tuple[list[float], dict[str, list[float]]]:
    """(places, milliseconds of each phase there): means of consecutive records."""
    rows = np.flatnonzero(np.isfinite(run.column("forward_ms") + places(run, axis)))
    groups = np.array_split(rows, min(buckets, len(rows))) if len(rows) else []

    def means(values: Floats) -> list[float]:
        return [float(np.nan_to_num(values[group], posinf=0.0, neginf=0.0).mean()) for group in groups]

    present = [phase for phase in PHASES if np.isfinite(run.column(f"{phase}_ms")).any()]
    return means(places(run, axis)), {phase: means(run.column(f"{phase}_ms")) for phase in present}


def settled(run: Run, key: str) -> Floats:
    """The finite values of a key of the training records, without a run's slow beginning."""
    values = run.column(key)[len(run.train) // 20 :]
    return values[np.isfinite(values)]


def middle(run: Run, key: str) -> float:
    """Their median; NaN where there is none."""
    values = settled(run, key)
    return float(np.median(values)) if len(values) else math.nan


def thin(xs: Floats, ys: Floats, buckets: int = BUCKETS) -> tuple[Floats, Floats]:
    """At most four points a bucket of equally many: its first, lowest, highest and last. Spikes stay."""
    if len(xs) <= 4 * buckets:
        return xs, ys
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(xs)), buckets):
        lowest, highest = int(ys[bucket].argmin()), int(ys[bucket].argmax())
        kept += sorted({bucket[0], bucket[lowest], bucket[highest], bucket[-1]})
    return xs[kept], ys[kept]


def smooth(ys: Floats) -> Floats:
    """Exponential mean over a quarter percent of the values, at least five, unbiased at its beginning (as Adam's)."""
    keep = 1.0 - 1.0 / max(5.0, len(ys) / 400)
    mean, weight, found = 0.0, 0.0, []
    for value in ys.tolist():
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return np.array(found)


class _Maker:
    def __init__(self, runs: Sequence[Run], axis: Axis) -> None:
        self._runs, self._axis = runs, axis

    def of(self, title: str, keys: Sequence[str], about: str, unit: Unit = "", part: Part = "train") -> Panel:
        """A panel of the keys as they are; the second one is dashed."""
        looks: tuple[Look, Look] = ("dots" if part == "evals" else "line", "dashed")
        curves = []
        for index, run in enumerate(self._runs):
            for key, look in zip(keys, looks, strict=False):
                xs, ys = self._points(run, key, part)
                if len(xs) and not _constant(key, ys):
                    label = run.name if len(keys) == 1 else f"{run.name}: {_words(key.removesuffix('_mb')).lower()}"
                    curves.append(Curve(label, index, look, *thin(xs, ys)))
        return Panel(title, unit, about, curves, _needs_log(curves))

    def smoothed(self, title: str, key: str, about: str, unit: Unit = "") -> Panel:
        """A panel of one key, where it is long with its smoothed course in front."""
        front, behind = [], []
        for index, run in enumerate(self._runs):
            xs, ys = self._points(run, key, "train")
            if len(xs) >= _SMOOTH_FROM:
                behind.append(Curve(f"{run.name}: each step", index, "faint", *thin(xs, ys)))
                ys = smooth(ys)
            front += [Curve(run.name, index, "line", *thin(xs, ys))] if len(xs) else []
        if behind:
            about = f"{about}; faint: each record" if about else "faint: each record"
        return Panel(title, unit, about, behind + front, _needs_log(behind + front))

    def end(self, title: str, key: str, about: str) -> Panel:
        """The smoothed course beyond a fifth of the axis, whose height the beginning and spikes take elsewhere."""
        curves = []
        points = [self._points(run, key, "train") for run in self._runs]
        # One place for all runs: the beginning of a short one would hide the others' ends again.
        fall = max(float(xs[-1]) for xs, _ in points if len(xs)) / 5
        for index, (run, (xs, ys)) in enumerate(zip(self._runs, points, strict=True)):
            late = xs >= fall
            if len(xs) >= _SMOOTH_FROM and late.any():
                curves.append(Curve(run.name, index, "line", *thin(xs[late], smooth(ys)[late])))
        return Panel(title, "", f"{about}; smoothed", curves)

    def _points(self, run: Run, key: str, part: Part) -> tuple[Floats, Floats]:
        xs, ys = places(run, self._axis, part), run.column(key, part)
        finite = np.isfinite(xs) & np.isfinite(ys)
        return xs[finite], ys[finite]


def _hides_its_end(panel: Panel) -> bool:
    """Most of a curve's height is its beginning."""
    return any(
        np.ptp(curve.ys) > 2.5 * np.ptp(curve.ys[len(curve.ys) // 5 :])
        for curve in panel.curves
        if len(curve.ys) > _SMOOTH_FROM
    )


def _others(runs: Sequence[Run], part: Part, known: set[str]) -> list[str]:
    """Numeric keys of the records that no panel of its own shows, in the order in which they appear."""
    keys: dict[str, None] = {}
    for run in runs:
        for record in run.train if part == "train" else run.evals:
            keys |= dict.fromkeys(record)
    return [key for key in keys if key not in known and any(np.isfinite(run.column(key, part)).any() for run in runs)]


def _constant(key: str, ys: Floats) -> bool:
    """Sizes of a step that never change are no curve."""
    return key in ("samples", "sequence_length", "patch", "kept_tokens") and ys.min() == ys.max()


def _needs_log(curves: Sequence[Curve]) -> bool:
    """Positive values that would be a flat line below a few spikes."""
    values = np.concatenate([curve.ys for curve in curves]) if curves else np.zeros(1)
    return bool(values.min() > 0 and values.max() / np.median(values) > _SPREAD_OF_LOG)


def _words(key: str) -> str:
    words = key.replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]
