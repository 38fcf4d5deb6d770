"""The CUDA library: launches on torch's current stream, and nothing that waits for the device.

It is used on a device once it has shown there that it gives the CPU build's bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_kernels.build import BuildError, build_cuda_library
from ds_kernels.library import (
    TENSOR,
    Arguments,
    CpuLibrary,
    DeviceStep,
    Rates,
    Table,
    chunks_before,
    cpu_library,
    records,
    torch_norm,
)


class CudaError(RuntimeError):
    """CUDA refused a call, in its own words, or gave other bits than the CPU build."""


class CudaLibrary:
    """The functions of csrc/cuda.cu, for devices of one architecture."""

    def __init__(self, path: Path, name: str, index: int = 0) -> None:
        """`index` is the device that is asked whether it is there: another would get a context, and hold memory.

        Raises OSError where the library can't be loaded, CudaError where there is no driver or device.
        """
        self.name = name
        self._functions: Any = ctypes.CDLL(str(path))
        self._functions.dsk_cuda_error.restype = ctypes.c_char_p
        self._check(self._functions.dsk_cuda_load(ctypes.c_int32(index)))

    def update(self, table: Table, rates: Rates, step: int, factor: float) -> None:
        """Step number `step` of the table's tensors, whose gradients are multiplied by `factor`."""
        arguments = Arguments()
        self._functions.dsk_cuda_arguments(
            ctypes.byref(rates), ctypes.c_double(step), ctypes.c_double(factor), ctypes.byref(arguments)
        )
        with self._launching(table.device) as stream:
            self._step(table, arguments, None, None, stream)

    def update_by_device(self, table: Table, rates: Rates, step: DeviceStep) -> None:
        """The step after `step.count`, which is counted on the device; where `step.skip` isn't 0, nothing."""
        # The rule and the kind of decay choose the kernel, on the host.
        arguments = Arguments(rule=rates.rule, decay_kind=rates.decay_kind)
        with self._launching(table.device) as stream:
            self._check(
                self._functions.dsk_cuda_prepare(
                    ctypes.byref(rates), _place(step.count), _place(step.lr), _place(step.factor), _place(step.skip),
                    _place(step.arguments), stream,
                )
            )  # fmt: skip
            self._step(table, arguments, step.arguments, step.skip, stream)

    def norm(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`norm_and_flag` of contiguous tensors of one device."""
        if self._capturing():
            return torch_norm(gradients, gradients[0].device)  # which needs no table
        table = Table(records(gradients), gradients[0].device)
        chunks = int(chunks_before(table.records)[-1])
        sums = torch.empty(chunks, dtype=torch.float64, device=table.device)
        total = torch.empty((), dtype=torch.float64, device=table.device)
        not_finite = torch.empty((), dtype=torch.int32, device=table.device)
        with self._launching(table.device) as stream:
            self._check(
                self._functions.dsk_cuda_sum_of_squares(
                    *self._list(table), _place(sums), _place(total), _place(not_finite), stream
                )
            )
        return total.sqrt(), not_finite

    def _step(
        self, table: Table, arguments: Arguments, on_device: Tensor | None, skip: Tensor | None, stream: ctypes.c_uint64
    ) -> None:
        what = (ctypes.byref(arguments), _place(on_device), _place(skip), stream)
        if len(table.records) > 1 and not self._capturing():
            self._check(self._functions.dsk_cuda_step_list(*self._list(table), *what))
            return
        # Described by value: a graph that is being captured must not point to a table that may be freed.
        for number in range(len(table.records)):
            record = ctypes.c_void_p(table.records.ctypes.data + number * TENSOR.itemsize)
            self._check(self._functions.dsk_cuda_step(record, *what))

    def _list(self, table: Table) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
        """The table as dsk_cuda_step_list takes it; it travels to the device only when it has changed."""
        chunks = chunks_before(table.records)
        if table.uploaded is None:
            arrays = (torch.from_numpy(table.records.view(np.uint8)), torch.from_numpy(chunks))
            table.uploaded = (self._upload(arrays[0], table.device), self._upload(arrays[1], table.device))
        listed, before = table.uploaded
        return _place(listed), _place(before), ctypes.c_int64(len(table.records)), ctypes.c_int64(int(chunks[-1]))

    def _upload(self, array: Tensor, device: torch.device) -> Tensor:
        # torch keeps the pinned copy until the stream has read it.
        return array.pin_memory().to(device, non_blocking=True)

    def _capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def _launching(self, device: torch.device) -> Iterator[ctypes.c_uint64]:
        """`device` is the current one; the current stream as an integer."""
        with torch.cuda.device(device):
            # The library has a CUDA runtime of its own, which knows nothing of torch's current device.
            self._use(torch.cuda.current_device())
            yield ctypes.c_uint64(torch.cuda.current_stream().cuda_stream)

    def _use(self, device: int) -> None:
        self._check(self._functions.dsk_cuda_use(ctypes.c_int32(device)))

    def _check(self, error: int) -> None:
        if error:
            raise CudaError(f"CUDA: {self._functions.dsk_cuda_error(ctypes.c_int(error)).decode()}")


@cache
def cuda_library(index: int) -> CudaLibrary | BuildError | OSError | CudaError:
    """The library for device `index`, or why there is none; tried once a process."""
    try:
        if not torch.cuda.is_available():
            raise CudaError("torch sees no CUDA device")
        major, minor = torch.cuda.get_device_capability(index)
        architecture = f"sm_{major}{minor}"
        library = CudaLibrary(build_cuda_library(architecture), f"cuda-{architecture}", index)
        compare_with_cpu(library, torch.device("cuda", index))
    except (BuildError, OSError, CudaError) as error:
        return error
    return library


def compare_with_cpu(library: CudaLibrary, device: torch.device) -> None:
    """One step of two tensors and their norm on `device` and by the CPU build.

    Raises:
        CudaError: they differ by a bit, there is no CPU build, or CUDA refuses.
    """
    reference = cpu_library()
    if not isinstance(reference, CpuLibrary):
        raise CudaError(f"there is no CPU build to compare it with: {reference}")
    rates = Rates(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, sign=1.0, decay_kind=2)
    generator = torch.Generator().manual_seed(0)
    start = [[torch.randn(size, generator=generator).abs() for _ in "pgmv"] for size in (3001, 20_000)]
    results, norms = [], []
    for one, where in ((reference, torch.device("cpu")), (library, device)):
        tensors = [[tensor.to(where, copy=True) for tensor in row] for row in start]
        made = records([row[1] for row in tensors])
        for at, name in enumerate("pgmv"):
            made[name] = [row[at].data_ptr() for row in tensors]
        one.update(Table(made, where), rates, 3, 0.5)
        results.append([tensor.cpu() for row in tensors for tensor in row])
        norms.append(one.norm([row[1] for row in tensors])[0].cpu())
    if not all(map(torch.equal, *results)) or not torch.equal(*norms):
        raise CudaError("a step on this device differs from the CPU build's")


def _place(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
