"""A device's attainable peak, measured by one matrix product: the denominator of MFU where none is stated."""

from __future__ import annotations

import time
from typing import Any

import torch

_TIME_S = 0.3


def measure_peak_flops(dtype: torch.dtype, device: Any) -> float:
    """Best FLOP/s of square matrix products of `dtype` on `device` within about a third of a second."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    best = 0.0
    deadline = time.perf_counter() + _TIME_S
    torch.mm(a, b)
    while True:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        end = time.perf_counter()
        best = max(best, 2.0 * size**3 / (end - start))
        if end > deadline:
            return best


def _wait(device: Any) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
