"""liger's kernels in Triton's interpreter, which takes tensors of the CPU; TRITON_INTERPRET=1 must be set before."""

from __future__ import annotations

from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Give the interpreter what it lacks: numbers that are tensors, and functions of CUDA's libdevice."""
    patch.setattr(interpreter, "_implicit_cvt", _with_numbers)
    patch.setattr(liger_kernel.ops.rms_norm, "rsqrt", _rsqrt)
    patch.setattr(liger_kernel.ops.geglu, "tanh", _tanh)


def _with_numbers(argument: Any) -> Any:
    if not isinstance(argument, float):
        return _convert(argument)
    return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
