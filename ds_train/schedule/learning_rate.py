"""The learning rate as a pure function of tokens consumed, and the length of a run in steps."""

from __future__ import annotations

import math
from fractions import Fraction

from ds_train.config.schedule import ScheduleSection


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """Share of the peak learning rate, in [0, 1], of the step that ends at `tokens` consumed out of `total_tokens`.

    A step is placed at its end, so the first one already has a learning rate above 0 and the last one ends exactly at
    `final_ratio`. Warm-up rises linearly from 0; `cosine` and `linear` then fall over the rest, `wsd` over its last
    `decay_fraction` (linearly, arXiv 2404.06395), `constant` stays.
    """
    place = min(1.0, tokens / total_tokens)
    if place < schedule.warmup_fraction:
        return place / schedule.warmup_fraction
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_fraction
    if schedule.kind == "wsd":
        start = max(start, 1.0 - schedule.decay_fraction)  # a decay longer than what is left begins at the peak
    if place <= start:
        return 1.0
    fallen = (place - start) / (1.0 - start)
    left = 0.5 * (1.0 + math.cos(math.pi * fallen)) if schedule.kind == "cosine" else 1.0 - fallen
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * left


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
