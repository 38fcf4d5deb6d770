"""The C ABI as Python sees it, and the CPU library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_kernels.build import ISAS, BuildError, build_cpu_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORM_BLOCK = 16384
"""opt_math.h's DSK_NORM_BLOCK, and kernels.cuh's kListChunk."""

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


class Rates(ctypes.Structure):
    """opt_math.h's dsk_rates."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "lr_decay", "sign")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("rule", "decay_kind", "stochastic")),
    ]


class Entropy(ctypes.Structure):
    """cpu_layers.h's dsk_entropy."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "label")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "labels", "ignored")),
        *((name, ctypes.c_int32) for name in ("type", "gradient")),
    ]


@dataclass(frozen=True)
class DeviceStep:
    """Where a step that doesn't wait for the host finds its numbers on the device.

    `count`, `lr` and `factor` are fp32 scalars, `skip` an int32; `arguments` is room for a dsk_args.
    """

    count: Tensor
    arguments: Tensor
    lr: Tensor | None
    factor: Tensor | None
    skip: Tensor | None


@dataclass
class Table:
    """Tensors of one device that are updated together; whoever makes it keeps their memory alive."""

    records: np.ndarray
    device: torch.device
    uploaded: tuple[Tensor, Tensor] | None = None
    """The records and `chunks_before` them, on a GPU; None where they have changed."""


class CpuLibrary:
    """The functions of csrc/cpu.cpp."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be loaded."""
        self._functions: Any = ctypes.CDLL(str(path))
        self._functions.dsk_cpu_sum_of_squares.restype = ctypes.c_double
        self._functions.dsk_cpu_entropy.restype = ctypes.c_double
        self.isa: int = self._functions.dsk_cpu_isa()

    @property
    def name(self) -> str:
        """`cpu-` and the instruction set that it uses."""
        return f"cpu-{list(ISAS)[self.isa]}"

    def update(self, table: Table, rates: Rates, step: int, factor: float) -> None:
        """Step number `step` of the table's tensors, whose gradients are multiplied by `factor`."""
        arguments = Arguments()
        self._functions.dsk_cpu_arguments(
            ctypes.byref(rates), ctypes.c_double(step), ctypes.c_double(factor), ctypes.byref(arguments)
        )
        self.step(table.records, arguments, torch.get_num_threads())

    def norm(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`norm_and_flag` of contiguous tensors."""
        squares = torch.tensor(self.sum_of_squares(records(gradients), torch.get_num_threads()), dtype=torch.float64)
        return squares.sqrt(), (~squares.isfinite()).to(torch.int32)

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

    def entropy(self, arguments: Entropy, threads: int, isa: int | None = None) -> float:
        """Summed cross-entropy; the caller keeps the memory alive."""
        wanted = ctypes.c_int32(self.isa if isa is None else isa)
        return float(self._functions.dsk_cpu_entropy(ctypes.byref(arguments), ctypes.c_int32(threads), wanted))


@cache
def cpu_library() -> CpuLibrary | BuildError | OSError:
    """The library, or why there is none; tried once a process."""
    try:
        return CpuLibrary(build_cpu_library())
    except (BuildError, OSError) as error:
        return error


def torch_norm(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """`norm_and_flag` without kernels."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64).to(device) for tensor in tensors]
    total = torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64, device=device)
    return total, (~total.isfinite()).to(torch.int32)


def records(gradients: Sequence[Tensor]) -> np.ndarray:
    """TENSOR records with `g`, `n` and `g_type` of contiguous tensors."""
    made = np.zeros(len(gradients), TENSOR)
    made["g"] = [gradient.data_ptr() for gradient in gradients]
    made["n"] = [gradient.numel() for gradient in gradients]
    made["g_type"] = [DTYPES[gradient.dtype] for gradient in gradients]
    return made


def chunks_before(tensors: np.ndarray) -> np.ndarray:
    """Number of chunks of NORM_BLOCK elements before each record, and that of all (int64)."""
    return np.concatenate([[0], np.cumsum((tensors["n"] + NORM_BLOCK - 1) // NORM_BLOCK)]).astype(np.int64)
