"""Fused Adam, AdamW and Adagrad: unscale, clip, decay, update and the 16-bit copy in one pass over memory.

The CPU library is plain C++ behind a C ABI, built with g++ in about a second at first use and kept per host
(`python -m ds_kernels` builds it ahead of time). Without a compiler torch's own optimizers do the same work.
"""

from ds_kernels.library import Choice, choose
from ds_kernels.norm import global_norm
from ds_kernels.optimizers import FusedAdagrad, FusedAdam, FusedAdamW

__all__ = ["Choice", "FusedAdagrad", "FusedAdam", "FusedAdamW", "choose", "global_norm"]
