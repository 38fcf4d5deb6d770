"""The learning-rate range test: a sweep, then a search for the largest rate at which training stays stable.

Sweep: the rate rises exponentially, a step each (arXiv 1506.01186). It shows where the loss falls fastest and brackets
the limit, but overshoots it: just above the limit a loss grows slowly. So short runs at constant rates, each from
the start, bisect the bracket. Nothing here knows what is trained: `Train` is the engine, or a formula in a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Train = Callable[[Sequence[float]], Iterator[float]]
"""Trains from the start, a step per learning rate, and gives the loss before each update; may be left early."""

_SMOOTHING = 0.9
_LOST = 0.5
"""A sweep has diverged when the smoothed loss has lost this share of its fall, or risen by it above a flat start."""
_RISEN = 0.1
"""A run at a constant rate is unstable when it ends this share of its fall, or more, above its lowest loss."""
_WARMUP = 0.2
_RESOLUTION = 1.08
_MOST_PROBES = 24


class UnstableError(ValueError):
    """Training is unstable at the lowest learning rate of the range."""


@dataclass(frozen=True)
class Probe:
    """A short run at one learning rate: smoothed losses at its start, lowest and end, and what follows."""

    rate: float
    start: float
    lowest: float
    end: float
    stable: bool


@dataclass(frozen=True)
class Finding:
    """`value` is the learning rate to train with; the rest is how it was found.

    `rates`, `losses` and `smoothed` are the sweep's, up to where it diverged. `steepest` is the rate at which the
    smoothed loss fell fastest per decade of the rate, None where it never fell. `largest_stable` is within 8 % of the
    smallest rate that was seen to be unstable, unless `bounded` says that the sweep's end was stable still.
    """

    value: float
    reasoning: str
    steepest: float | None
    largest_stable: float
    bounded: bool
    safety: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    probes: tuple[Probe, ...]


def find_learning_rate(
    train: Train, lowest: float, highest: float, sweep_steps: int, probe_steps: int, safety: float, sharp: bool = True
) -> Finding:
    """Find the largest stable learning rate between `lowest` and `highest`, and a value to train with below it.

    `sharp`: the limit is the curvature's, as gradient descent's is; the value is the limit divided by `safety`.
    Otherwise, as Adam's updates are as large as the rate says whatever the gradient is, training goes on far above
    the best rate. Then runs at halved rates follow, past the sweep's steepest one, and the value is the rate that ended
    with the lowest loss, at most the limit divided by `safety`.

    Raises:
        UnstableError: training is unstable at `lowest` already.
    """
    rates = exponential(lowest, highest, sweep_steps)
    losses = list(_until(lambda seen: diverged(smooth(seen)), train(rates)))
    smoothed = smooth(losses)
    finite = [value if math.isfinite(value) else math.inf for value in smoothed]
    probes: list[Probe] = []

    def stable(rate: float) -> bool:
        warmup = max(1, round(_WARMUP * probe_steps))
        ramp = [rate * min(1.0, (step + 1) / warmup) for step in range(probe_steps)]
        probes.append(judge(rate, list(_until(lambda seen: not math.isfinite(seen[-1]), train(ramp)))))
        return probes[-1].stable

    low, unstable = rates[finite.index(min(finite))], math.inf
    while not stable(low):
        low, unstable = low / 2.0, low
        if low < lowest:
            raise UnstableError(f"training is unstable at the lowest learning rate, {lowest:g}")
    while low < highest and math.isinf(unstable):
        higher = min(2.0 * low, highest)
        low, unstable = (higher, unstable) if stable(higher) else (low, higher)
    high = low if math.isinf(unstable) else unstable
    while high / low > _RESOLUTION and len(probes) < _MOST_PROBES:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    bounded = high == low
    steepest = steepest_rate(rates, smoothed)
    value, why = low / safety, f"divided by the safety factor {safety:g}"
    if not sharp:
        best = _halve(stable, probes, low, lowest, steepest or low)
        value = min(value, best.rate)
        why = f"of all runs the one at {best.rate:.3g} ended with the lowest loss, {best.end:.4g}"
    reasoning = _reasoning(low, high, bounded, why, steepest, len(probes), probe_steps)
    kept = rates[: len(losses)]
    return Finding(
        value, reasoning, steepest, low, bounded, safety, tuple(kept), tuple(losses), tuple(smoothed),
        tuple(probes),
    )  # fmt: skip


def _halve(stable: Callable[[float], bool], probes: list[Probe], rate: float, lowest: float, steepest: float) -> Probe:
    """The stable run that ended lowest, with runs at halved rates until two below `steepest` were worse than it."""
    worse = 0
    while (worse < 2 or rate > steepest / 2.0) and rate / 2.0 >= lowest:
        rate /= 2.0
        stable(rate)
        best = min((probe for probe in probes if probe.stable), key=lambda probe: probe.end)
        worse = 0 if best.rate <= rate else worse + 1
    return min((probe for probe in probes if probe.stable), key=lambda probe: probe.end)


def exponential(lowest: float, highest: float, steps: int) -> list[float]:
    """`steps` rates from `lowest` to `highest`, each the same multiple of the one before."""
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


def smooth(losses: Sequence[float], beta: float = _SMOOTHING) -> list[float]:
    """Exponential moving average without the bias towards 0 of its start (arXiv 1412.6980)."""
    average, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = beta * average + (1.0 - beta) * loss
        found.append(average / (1.0 - beta**count))
    return found


def diverged(smoothed: Sequence[float]) -> bool:
    """Whether a sweep has lost half of what it had gained, or more than that."""
    start, last = smoothed[0], smoothed[-1]
    if not math.isfinite(last):
        return True
    fall = start - min(smoothed)
    return last - min(smoothed) > max(_LOST * fall, _LOST * abs(start) * (1.0 if fall < 0.01 * abs(start) else 0.0))


def judge(rate: float, losses: Sequence[float]) -> Probe:
    """Whether a run at `rate` ended well below its start, and close to its lowest loss."""
    beta = 1.0 - 4.0 / max(8, len(losses))
    smoothed = smooth(losses, beta)
    start, lowest, end = losses[0], min(smoothed), smoothed[-1]
    ended_well = math.isfinite(end) and end < start and end - lowest <= _RISEN * (start - lowest)
    return Probe(rate, start, lowest, end, ended_well)


def steepest_rate(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate in whose neighbourhood the smoothed loss falls most per step of the sweep; None where it never falls."""
    slopes = [
        (smoothed[step + 1] - smoothed[step - 1], rates[step])
        for step in range(1, len(smoothed) - 1)
        if math.isfinite(smoothed[step + 1])
    ]
    slope, rate = min(slopes, default=(0.0, None))
    return rate if slope < 0.0 else None


def _until(over: Callable[[list[float]], bool], losses: Iterable[float]) -> Iterator[float]:
    """The losses up to the first after which `over` is true, that one included."""
    seen: list[float] = []
    for loss in losses:
        seen.append(loss)
        yield loss
        if over(seen):
            return


def _reasoning(
    low: float, high: float, bounded: bool, why: str, steepest: float | None, probes: int, steps: int
) -> str:
    limit = (
        f"training is stable up to {low:.3g}, the end of the range"
        if bounded
        else f"training is stable at {low:.3g} and not at {high:.3g}"
    )
    fall = "the sweep's loss never fell" if steepest is None else f"the sweep's loss fell fastest at {steepest:.3g}"
    return f"{limit} ({probes} runs of {steps} steps); {why}; {fall}."
