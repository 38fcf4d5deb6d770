"""The learning rate as a pure function of tokens consumed, and the length of a run in steps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

from ds_train.config.schedule import ScheduleSection

Curve = Callable[[ScheduleSection, float, float], float]


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """Share of the peak learning rate, in [0, 1], of the step that ends at `tokens` consumed out of `total_tokens`.

    A step is placed at its end, so the first one already has a learning rate above 0 and the last one ends where the
    curve, or the cool-down, does.
    """
    place = min(1.0, tokens / total_tokens)
    warmup, end = schedule.warmup_fraction, 1.0 - schedule.cooldown_fraction
    if place < warmup:
        risen = place / warmup
        if schedule.kind == "one-cycle":
            risen = 0.5 * (1.0 - math.cos(math.pi * risen))
        return schedule.initial_ratio + (1.0 - schedule.initial_ratio) * risen
    curve = _CURVES[schedule.kind]
    if place <= end:
        progress = 0.0 if place == warmup else (place - warmup) / (end - warmup)
        return curve(schedule, progress, place)
    ended = curve(schedule, 1.0 if end > warmup else 0.0, end)
    return ended + (schedule.cooldown_ratio - ended) * (place - end) / schedule.cooldown_fraction


def plan_length(schedule: ScheduleSection, tokens_per_step: int, samples_per_epoch: int, global_samples: int) -> int:
    """Optimizer steps of the run; tokens and epochs are rounded up to whole steps."""
    if schedule.steps is not None:
        return schedule.steps
    if schedule.tokens is not None:
        return math.ceil(schedule.tokens / tokens_per_step)
    if schedule.epochs is not None:
        # As a decimal: 1.1 x 100 samples in floats is a little over 110, which can be a step more.
        return math.ceil(Fraction(str(schedule.epochs)) * samples_per_epoch / global_samples)
    raise ValueError("a schedule has a length")  # the schema has seen to it


# A curve takes the progress between warm-up and cool-down, and the place in the whole run, both in [0, 1].


def _falling(schedule: ScheduleSection, left: float) -> float:
    """Between the peak (`left` 1) and the final ratio (0)."""
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * left


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd(schedule: ScheduleSection, progress: float, place: float) -> float:
    end = 1.0 - schedule.cooldown_fraction
    # A decay longer than what is left begins at the peak.
    start = max(schedule.warmup_fraction, end - schedule.decay_fraction)
    return 1.0 if place <= start else _falling(schedule, max(0.0, 1.0 - (place - start) / (end - start)))


def _restarts(schedule: ScheduleSection, progress: float, place: float) -> float:
    lengths = [schedule.cycle_growth**cycle for cycle in range(schedule.cycles)]
    along, cycle = progress * sum(lengths), 0
    # A step that ends with a cycle belongs to it, also where the sum of floats is a hair longer.
    while cycle + 1 < schedule.cycles and along > lengths[cycle] * (1.0 + 1e-9):
        along -= lengths[cycle]
        cycle += 1
    peak, low = schedule.cycle_peak**cycle, schedule.final_ratio
    return low + (max(peak, low) - low) * _half_cosine(min(1.0, along / lengths[cycle]))


def _inverse_sqrt(schedule: ScheduleSection, progress: float, place: float) -> float:
    return math.sqrt(schedule.warmup_fraction / place)


def _step(schedule: ScheduleSection, progress: float, place: float) -> float:
    return float(schedule.step_factor ** bisect_left(schedule.milestones, place))


_CURVES: dict[str, Curve] = {
    "constant": lambda schedule, progress, place: 1.0,
    "linear": lambda schedule, progress, place: _falling(schedule, 1.0 - progress),
    "cosine": lambda schedule, progress, place: _falling(schedule, _half_cosine(progress)),
    "cosine-restarts": _restarts,
    "wsd": _wsd,
    "inverse-sqrt": _inverse_sqrt,
    "polynomial": lambda schedule, progress, place: _falling(schedule, (1.0 - progress) ** schedule.power),
    "one-cycle": lambda schedule, progress, place: _falling(schedule, _half_cosine(progress)),
    "step": _step,
}
