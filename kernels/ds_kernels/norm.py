"""The L2 norm of many tensors in one pass over memory, summed in double and the same on any device or threads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_kernels.choice import library_of
from ds_kernels.library import DTYPES, torch_norm


def global_norm(tensors: Iterable[Tensor]) -> float:
    """sqrt of the sum of squares of all elements (fp32, bf16 or fp16, any shape); NaN or infinite if any of them is."""
    return float(norm_and_flag(tensors)[0])


def norm_and_flag(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """`global_norm` as a float64 scalar, and an int32 one that is 1 where it isn't finite: an optimizer's `skip`.

    Both are on the device of the first tensor, and nothing waits for it.
    """
    given = [tensor.detach() for tensor in tensors]
    device = given[0].device if given else torch.device("cpu")
    library = library_of(device)
    if given and not isinstance(library, Exception) and all(fits(tensor, device) for tensor in given):
        return library.norm([tensor.contiguous() for tensor in given])
    return torch_norm(given, device)


def fits(tensor: Tensor, device: torch.device) -> bool:
    """Whether the kernels of `device` take it."""
    return tensor.device == device and tensor.dtype in DTYPES and not tensor.is_sparse
