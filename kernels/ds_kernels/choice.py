"""Which implementation updates parameters on a device, and why: CUDA, AVX-512, AVX2, plain, or torch's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ds_kernels.cuda import CudaLibrary, cuda_library
from ds_kernels.library import CpuLibrary, cpu_library

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """`cuda-sm_90`, `cpu-avx512`, `cpu-avx2`, `cpu-plain`, `torch-fused` or `torch-foreach`, and why it is that one."""

    name: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether our kernels run."""
        return not self.name.startswith("torch")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@cache
def choose(device: str = "cpu") -> Choice:
    """What would run a step of parameters on `device` ("cpu", "cuda" or "cuda:1"); logged once."""
    kind = device.partition(":")[0]
    library = library_of(torch.device(device)) if kind in ("cpu", "cuda") else _others(kind)
    if isinstance(library, CudaLibrary):
        choice = Choice(library.name, "it gives the CPU build's bits on this device")
    elif isinstance(library, CpuLibrary):
        choice = Choice(library.name, f"the widest instruction set of this processor is {library.name[4:]}")
    else:
        choice = torchs(device, str(library).splitlines()[0])
    log.info("optimizer kernel on %s: %s", device, choice)
    return choice


def torchs(device: str, reason: str) -> Choice:
    """torch's fused optimizers where it has them for `device`, else foreach."""
    fused = device.partition(":")[0] in _get_fused_kernels_supported_devices()
    return Choice("torch-fused" if fused else "torch-foreach", reason)


def library_of(device: torch.device) -> CpuLibrary | CudaLibrary | Exception:
    """The kernels of `device`, or why there are none."""
    if device.type == "cpu":
        return cpu_library()
    if device.type == "cuda":
        return cuda_library(device.index if device.index is not None else _current())
    return _others(device.type)


def _others(kind: str) -> Exception:
    return RuntimeError(f"there are kernels for CPUs and CUDA, and the parameters are on {kind}")


def _current() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0
