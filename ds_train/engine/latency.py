"""How long a model's forward pass takes on this rank's device, and how many units may stay for a time to be met."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.errors import first_line, user_error
from ds_train.models.load import initialize_weights, outline, without_weights
from ds_train.plan.prune import Count

Left = Mapping[str, Count]

_SCALES = 256  # between nothing and all but the last: a time is met within this share of the way
_WARM_UP, _LEAST_PASSES, _MOST_PASSES, _ENOUGH_S = 3, 9, 50, 1.0


def forward_seconds(run: RunConfig, config: PreTrainedConfig, device: torch.device | str) -> float:
    """Median time of a forward pass of a model of this config, of random weights, as `compress.prune` asks for it.

    Raises:
        UserError: there isn't enough memory for it.
    """
    section = run.compress.prune
    try:
        model: Any = outline(without_weights(run, config), config).to_empty(device=device)
        initialize_weights(model, run.seed)
        model.eval()
        length = section.latency_length or run.data.sequence_length
        draw = torch.Generator().manual_seed(run.seed)
        tokens = torch.randint(int(config.vocab_size), (section.latency_samples, length), generator=draw).to(device)
        return statistics.median(_passes(lambda: model(input_ids=tokens), tokens.device))
    except RuntimeError as error:  # of every device its own
        key, fix = "compress.prune.latency_samples", "lower it or compress.prune.latency_length"
        raise user_error(key, f"no forward pass can be measured: {first_line(error)}", fix) from error


def _passes(forward: Callable[[], Any], device: torch.device) -> list[float]:
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(_WARM_UP):
            forward()
        while len(times) < _LEAST_PASSES or (len(times) < _MOST_PASSES and sum(times) < _ENOUGH_S):
            _finish(device)
            started = time.perf_counter()
            forward()
            _finish(device)
            times.append(time.perf_counter() - started)
    return times


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def left_for_latency(
    section: PruneSection, whole: float, left_at: Callable[[float], Left], seconds: Callable[[Left], float]
) -> tuple[Left, str]:
    """The most units that stay within the time that the recipe asks for, and what has been measured, in words.

    Args:
        whole: seconds of the model as it is.
        left_at: units that stay at a share, from 0 to 1, of all that can go; fewer the higher it is.
        seconds: what a model with so many units takes. It is asked for a few, by halving.

    Raises:
        UserError: the time can't be reached, or the whole model takes no longer.
    """
    key = "latency" if section.latency is not None else "latency_ms"
    target = whole * section.latency if section.latency is not None else (section.latency_ms or 0.0) / 1e3

    @cache
    def taken(sizes: tuple[tuple[str, Count], ...]) -> float:
        return seconds(dict(sizes))

    def time_at(index: int) -> float:
        return taken(tuple(left_at(index / _SCALES).items()))

    if whole <= target:
        reason = f"the model as it is takes {1e3 * whole:.3g} ms"
        raise user_error(f"compress.prune.{key}", reason, "ask for less, or prune nothing", getattr(section, key))
    least = time_at(_SCALES)
    if least > target:
        reason = f"with all but the last of these gone it would take {1e3 * least:.3g} ms of {1e3 * whole:.3g}"
        fix = "ask for more, or let more kinds of units go"
        raise user_error(f"compress.prune.{key}", reason, fix, getattr(section, key))
    index = bisect_left(range(_SCALES), True, key=lambda place: time_at(place) <= target)
    left = left_at(index / _SCALES)
    sizes = ", ".join(f"{kind} {count}" for kind, count in left.items())
    found = f"{1e3 * time_at(index):.3g} ms of {1e3 * whole:.3g}, and {1e3 * target:.3g} are asked for"
    return left, f"forward pass: {found} ({sizes})"
