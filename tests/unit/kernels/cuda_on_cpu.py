"""The CUDA library on the CPU: csrc/cuda.cu itself, compiled by g++ with cuda_shim/cuda_runtime.h for CUDA's header."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from ds_kernels.build import SOURCES
from ds_kernels.cuda import CudaLibrary
from torch import Tensor

# Undefined behaviour ends the process, and with it the test.
FLAGS = (
    "-std=c++17", "-O1", "-mfma", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-w",
    "-fsanitize=undefined", "-fno-sanitize-recover=all",
)  # fmt: skip


def build_shim(folder: Path) -> Path:
    library = folder / "shim.so"
    headers = Path(__file__).with_name("cuda_shim")
    command = ["g++", *FLAGS, f"-I{headers}", "-x", "c++", str(SOURCES / "cuda.cu"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


class Shim(CudaLibrary):
    """All of `CudaLibrary` but torch's own calls about devices and streams."""

    capturing = False
    uploads = 0

    def _upload(self, array: Tensor, device: torch.device) -> Tensor:
        self.uploads += 1
        return array.clone()

    def _capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def _launching(self, device: torch.device) -> Iterator[ctypes.c_uint64]:
        yield ctypes.c_uint64(0)
