"""A device's attainable peak, measured by one matrix product: the denominator of MFU where none is stated."""

from __future__ import annotations

import time
from typing import Any

import torch

_TIME_S = 0.3
_SMALLEST = 256
_LARGEST = {"cpu": 2048}
_LARGEST_ON_DEVICES = 8192


def measure_peak_flops(dtype: torch.dtype, device: Any) -> float:
    """Best FLOP/s of square matrix products of `dtype` on `device` within about a third of a second.

    The size doubles as long as the next product should take less than a third of that time: a processor without
    arithmetic of `dtype` is measured at a small one, and doesn't hold up the start of a run.
    """
    kind = torch.device(device).type
    size, largest = _SMALLEST, _LARGEST.get(kind, _LARGEST_ON_DEVICES)
    a, b = _operands(size, dtype, device)
    torch.mm(a, b)  # the first product sets the library up
    best, deadline = 0.0, time.perf_counter() + _TIME_S
    while True:
        seconds = _product_seconds(a, b)
        best = max(best, 2.0 * size**3 / seconds)
        if time.perf_counter() > deadline:
            return best
        if size < largest and 8 * seconds < _TIME_S / 3:
            size *= 2
            a, b = _operands(size, dtype, device)


def _operands(size: int, dtype: torch.dtype, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Random, as devices clock higher on constants; from a generator of its own, as a run's draws must not depend on
    # how many sizes there was time for.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    return a, b


def _product_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
