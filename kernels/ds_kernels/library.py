"""The built library as ctypes sees it, and which implementation is used here and why."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_kernels.build import ISAS, BuildError, build_cpu_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

TENSOR = np.dtype(
    [("p", "u8"), ("g", "u8"), ("m", "u8"), ("v", "u8"), ("copy", "u8"), ("n", "i8"), ("first", "i8"),
     ("p_type", "i4"), ("g_type", "i4"), ("state_type", "i4"), ("copy_type", "i4")]
)  # fmt: skip
"""opt_math.h's dsk_tensor."""


class Arguments(ctypes.Structure):
    """opt_math.h's dsk_args."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("scale", "beta1", "rest1", "beta2", "rest2")),
        *((name, ctypes.c_float) for name in ("inverse_root", "eps", "decay", "rate")),
        *((name, ctypes.c_int32) for name in ("rule", "decay_kind", "stochastic")),
        ("seed", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Choice:
    """What runs the optimizers on this host: `cpu-avx512`, `cpu-avx2`, `cpu-plain` or `torch`, and why."""

    name: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether our kernels run."""
        return self.name != "torch"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class CpuLibrary:
    """The functions of csrc/cpu.cpp."""

    def __init__(self) -> None:
        """Raises BuildError where it can't be built, OSError where it can't be loaded."""
        self._functions: Any = ctypes.CDLL(str(build_cpu_library()))
        self._functions.dsk_cpu_sum_of_squares.restype = ctypes.c_double
        self.isa: int = self._functions.dsk_cpu_isa()

    def step(self, tensors: np.ndarray, arguments: Arguments, threads: int, isa: int | None = None) -> None:
        """One update of `tensors` (TENSOR records, whose memory the caller keeps alive)."""
        self._functions.dsk_cpu_step(
            ctypes.c_void_p(tensors.ctypes.data), ctypes.c_int64(len(tensors)), ctypes.byref(arguments),
            ctypes.c_int32(threads), ctypes.c_int32(self.isa if isa is None else isa),
        )  # fmt: skip

    def sum_of_squares(self, tensors: np.ndarray, threads: int, isa: int | None = None) -> float:
        """Sum of the squares of the records' `g`."""
        return float(
            self._functions.dsk_cpu_sum_of_squares(
                ctypes.c_void_p(tensors.ctypes.data), ctypes.c_int64(len(tensors)), ctypes.c_int32(threads),
                ctypes.c_int32(self.isa if isa is None else isa),
            )
        )  # fmt: skip


@cache
def cpu_library() -> CpuLibrary | BuildError | OSError:
    """The library, or why there is none; tried once a process."""
    try:
        return CpuLibrary()
    except (BuildError, OSError) as error:
        return error


def choose(device: str = "cpu") -> Choice:
    """What would run a step of parameters on `device`."""
    if device != "cpu":
        return Choice("torch", f"the kernels are built for CPUs, and the parameters are on {device}")
    library = cpu_library()
    if isinstance(library, CpuLibrary):
        isa = list(ISAS)[library.isa]
        return Choice(f"cpu-{isa}", f"the widest instruction set of this processor is {isa}")
    return Choice("torch", f"the kernels can't be built: {str(library).splitlines()[0]}")


def records(gradients: Sequence[Tensor]) -> np.ndarray:
    """TENSOR records with `g`, `n` and `g_type` of contiguous tensors."""
    made = np.zeros(len(gradients), TENSOR)
    made["g"] = [gradient.data_ptr() for gradient in gradients]
    made["n"] = [gradient.numel() for gradient in gradients]
    made["g_type"] = [DTYPES[gradient.dtype] for gradient in gradients]
    return made
