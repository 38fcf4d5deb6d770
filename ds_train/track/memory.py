"""Memory of this rank: of its device where it has one, of its process otherwise."""

from __future__ import annotations

import resource
import sys
from functools import cache
from typing import Any

import psutil


@cache
def _process() -> psutil.Process:
    return psutil.Process()


def memory(device: str) -> dict[str, float]:
    """{"memory_mb", "memory_peak_mb"}: now and at most since the start, in MiB."""
    if device == "cpu":
        # Linux counts in KiB, macOS in bytes.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        current = _process().memory_info().rss
        peak = max(peak, current)  # Linux brings its count of the peak up to date now and then
    else:
        import torch

        module: Any = getattr(torch, device)
        current, peak = module.memory_allocated(), module.max_memory_allocated()
    return {"memory_mb": current / 2**20, "memory_peak_mb": peak / 2**20}
