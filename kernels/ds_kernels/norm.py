"""The L2 norm of many tensors in one pass over memory, summed in double and the same on any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ds_kernels.library import DTYPES, CpuLibrary, cpu_library, records


def global_norm(tensors: Iterable[Tensor]) -> float:
    """sqrt of the sum of squares of all elements (fp32, bf16 or fp16, any shape); NaN or infinite if any of them is."""
    given = [tensor.detach() for tensor in tensors]
    library = cpu_library()
    if not isinstance(library, CpuLibrary) or any(not fits(tensor) for tensor in given):
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in given]
        return float(torch.stack(norms).norm()) if norms else 0.0
    return math.sqrt(
        library.sum_of_squares(records([tensor.contiguous() for tensor in given]), torch.get_num_threads())
    )


def fits(tensor: Tensor) -> bool:
    """Whether the CPU kernels take it."""
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES
