"""Large freed blocks of torch's CPU memory, kept for the next tensors of their size instead of given back.

On a fresh mapping every page is a fault: the sum of two tensors of 2 MB takes 0.9 ms instead of 0.2. See
csrc/cpu_memory.cpp for how much is kept: never more than was in use at once.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_kernels.build import BuildError, build_memory_library

_in_use: list[bool] = []


@dataclass(frozen=True)
class MemoryCounts:
    """Bytes of large blocks: in use, idle, at most in use at once, and how many were got from the system in all."""

    live: int
    idle: int
    most_live: int
    fresh: int


def reuse_memory() -> Exception | None:
    """Let tensors on the CPU take large blocks that others have left, from now on. Why not, where it can't be."""
    library = memory_library()
    if isinstance(library, Exception):
        return library
    library.dsk_reuse_memory()
    _in_use.append(True)
    return None


def hand_back_memory() -> None:
    """Give all idle pages to the system, as when something is over that needed more than what follows it."""
    library = memory_library() if _in_use else None
    if library is not None:
        library.dsk_hand_back_memory()


def memory_counts() -> MemoryCounts:
    """What the allocator has done; nothing where it isn't there."""
    counts = (ctypes.c_uint64 * 4)()
    library = memory_library()
    if not isinstance(library, Exception):
        library.dsk_memory_counts(counts)
    return MemoryCounts(*counts)


@cache
def memory_library() -> Any:
    """The library, or the exception that says why there is none here; tried once a process."""
    if sys.platform != "linux":
        return BuildError("it is written for Linux")
    try:
        return ctypes.CDLL(str(build_memory_library()))
    except (BuildError, OSError) as error:
        return error
