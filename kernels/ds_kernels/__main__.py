"""`python -m ds_kernels [sm_80 sm_90 ...]`: build this host's kernels, and those of other GPUs, ahead of time."""

from __future__ import annotations

import sys

import torch

from ds_kernels.attention import attention_library
from ds_kernels.build import BuildError, build_cuda_library
from ds_kernels.choice import choose
from ds_kernels.memory import memory_library


def main(architectures: list[str]) -> int:
    """Say what is built and used; 1 if a library that was asked for can't be built."""
    print(choose())
    for name, reason in (("attention", attention_library()), ("memory", memory_library())):
        print(f"{name}: {reason if isinstance(reason, Exception) else 'built'}")
    for index in range(torch.cuda.device_count()):
        print(choose(f"cuda:{index}"))
    for architecture in architectures:
        try:
            print(build_cuda_library(architecture))
        except BuildError as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
