"""Causal attention in bf16 on processors with AVX512_BF16, by csrc/cpu_attention.cpp.

Shapes: B samples, H heads of the queries, G of the keys and values (H is a multiple of G), T positions, D of a head.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_kernels.build import BuildError, build_attention_library

_LANES = 16
_WIDEST = 256


@cache
def attention_library() -> Any:
    """The library, or the exception that says why there is none here; tried once a process."""
    if platform.machine() != "x86_64" or not torch.cpu._is_avx512_bf16_supported():
        return BuildError("this processor has no AVX512_BF16")
    try:
        return ctypes.CDLL(str(build_attention_library()))
    except (BuildError, OSError) as error:
        return error


def takes(query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> bool:
    """Whether `causal_attention` can be given these; and has a head of the keys for each thread."""
    batch, heads, length, width = query_BHTD.shape
    same = (batch, key_BGTD.shape[1], length, width)
    return (
        query_BHTD.dtype == key_BGTD.dtype == value_BGTD.dtype == torch.bfloat16
        and query_BHTD.device.type == "cpu"
        and key_BGTD.shape == value_BGTD.shape == same
        and heads % same[1] == 0
        and width % _LANES == 0
        and width <= _WIDEST
        and batch * same[1] >= torch.get_num_threads()
    )


def causal_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, first_BT: Tensor | None, scale: float
) -> Tensor:
    """softmax(`scale` q k^T) v as (B, T, H, D), where a query sees the keys from `first_BT` up to itself.

    `first_BT` is int32, contiguous, never falls along a sample and never exceeds the query's own place; None is all 0.
    Products of bf16 are summed in fp32, the softmax is fp32, its weights are rounded to bf16 for their product. `takes`
    says what it can be given.
    """
    return _Attention.apply(query_BHTD, key_BGTD, value_BGTD, first_BT, scale)


class _Tensor(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "position"))]


class _Arguments(ctypes.Structure):
    """cpu_attention.cpp's dsk_attention."""

    _fields_ = [
        *((name, _Tensor) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "first")),
        *((name, ctypes.c_int64) for name in ("batches", "heads", "key_heads", "length", "width")),
        ("scale", ctypes.c_float),
    ]


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, first: Tensor | None, scale: float,
    *gradients: Tensor,
) -> _Arguments:  # fmt: skip
    """The tensors (B, heads, T, D) by address and strides; whoever calls keeps them alive."""
    given = [_Tensor(tensor.data_ptr(), *tensor.stride()[:3]) for tensor in (query, key, value, out, *gradients)]
    given += [_Tensor()] * (8 - len(given))
    batch, heads, length, width = query.shape
    starts = None if first is None else first.data_ptr()
    return _Arguments(*given, log_sum.data_ptr(), starts, batch, heads, key.shape[1], length, width, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, scale: float
    ) -> Tensor:  # fmt: skip
        query, key, value = _with_rows(query), _with_rows(key), _with_rows(value)
        batch, heads, length, width = query.shape
        out_BTHD = query.new_empty(batch, length, heads, width)
        log_sum_BHT = query.new_empty(batch, heads, length, dtype=torch.float32)
        arguments = _arguments(query, key, value, out_BTHD.transpose(1, 2), log_sum_BHT, first, scale)
        attention_library().dsk_attention_forward(ctypes.byref(arguments), torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out_BTHD, log_sum_BHT, first)
        ctx.scale = scale
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out_BTHD, log_sum_BHT, first = ctx.saved_tensors
        grad_out = _with_rows(upstream[0]).transpose(1, 2)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        out = out_BTHD.transpose(1, 2)
        arguments = _arguments(query, key, value, out, log_sum_BHT, first, ctx.scale, grad_out, *grads)
        attention_library().dsk_attention_backward(ctypes.byref(arguments), torch.get_num_threads())
        return grads[0], grads[1], grads[2], None, None


def _with_rows(tensor: Tensor) -> Tensor:
    """With the numbers of a position side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
