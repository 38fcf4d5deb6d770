"""Fused Adam, AdamW and Adagrad: unscale, clip, decay, update and the 16-bit copy in one pass over memory.

For CPUs also attention (`attention`), cross-entropy (`entropy`) and an allocator (`memory`).

The CPU and CUDA libraries are plain C++ behind a C ABI, built with g++ in about a second, and with nvcc in ten, at
first use and kept per host (`python -m ds_kernels` builds them ahead of time). Without a compiler torch's own
optimizers do the same work.
"""

from ds_kernels.choice import Choice, choose, torchs
from ds_kernels.norm import global_norm, norm_and_flag
from ds_kernels.optimizers import FusedAdagrad, FusedAdam, FusedAdamW

__all__ = [
    "Choice", "FusedAdagrad", "FusedAdam", "FusedAdamW", "choose", "global_norm", "norm_and_flag", "torchs",
]  # fmt: skip
