"""Cross-entropy on CPUs whose gradient takes the place of the logits: no other tensor of their size is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels.library import DTYPES, CpuLibrary, Entropy, cpu_library

_MOST_LABELS = 16
_DTYPES = (torch.float32, torch.bfloat16)


def entropy_takes(logits_CV: Tensor, labels: Tensor) -> bool:
    """Whether `entropy_in_place` can be given these."""
    return (
        logits_CV.device.type == "cpu"
        and logits_CV.dtype in _DTYPES
        and logits_CV.is_contiguous()
        and labels.dtype == torch.int64
        and (labels.dim() == 1 or labels.shape[1] <= _MOST_LABELS)
        and isinstance(cpu_library(), CpuLibrary)
    )


def entropy_in_place(logits_CV: Tensor, labels: Tensor, ignored: int, gradient: bool, isa: int | None = None) -> Tensor:
    """Cross-entropy of logits against labels (C,), or (C, K) that each row predicts, summed: a scalar in fp32.

    A label of `ignored` is left out. With `gradient` the logits become that of the sum; else they stay. `entropy_takes`
    says what it can be given.

    Raises:
        IndexError: a label beyond the logits.
    """
    library = cpu_library()
    assert isinstance(library, CpuLibrary)
    labels = labels.contiguous()
    rows, width = logits_CV.shape
    beyond = (labels != ignored) & ((labels < 0) | (labels >= width))
    if bool(beyond.any()):
        raise IndexError(f"label {int(labels[beyond][0])} is beyond the {width} logits")
    arguments = Entropy(
        logits_CV.data_ptr(), labels.data_ptr(), rows, width, labels.numel() // max(1, rows), ignored,
        DTYPES[logits_CV.dtype], gradient,
    )  # fmt: skip
    return torch.tensor(library.entropy(arguments, torch.get_num_threads(), isa), dtype=torch.float32)
