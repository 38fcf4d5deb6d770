"""16-bit models on CPUs that don't multiply 16 bits: products in fp32, which are faster there and round no worse.

Such a CPU multiplies bf16 at about 0.6 of its fp32 speed (2048 x 512 x 1408 on one core of a Xeon with AVX-512 but
neither AMX nor AVX512_BF16: 75 against 130 GFLOP/s), and bf16 attention at 0.7. So weights and activations stay in 16
bits, with their memory and their rounding, and only the operands of a product are widened while it is computed. With
AVX512_BF16 it is the other way round (one core of an EPYC with Zen 4: 219 against 99).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_train.models.attention import attend_by


def fp32_products_are_faster(device: Any, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` on `device` are slower than fp32 ones: 16 bits on a CPU that has no unit for them.

    A property of the machine and not a measurement, so that a resumed run computes what the first one did.
    """
    if torch.device(device).type != "cpu" or dtype.itemsize != 2:
        return False
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return not torch.cpu._is_amx_fp16_supported()


def use_fp32_products(model: PreTrainedModel) -> None:
    """Let the linear layers and scaled-dot-product attention of `model` widen their operands."""
    for module in model.modules():
        # A head that gives the loss (models/tasks.py) has a forward of its own and widens by itself.
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
    attend_by(model, _attention)


def _linear(module: nn.Linear, hidden: Tensor) -> Tensor:
    return _WideLinear.apply(hidden, module.weight, module.bias)


class _WideLinear(torch.autograd.Function):
    """`functional.linear` that keeps 16-bit operands for the backward pass and widens them again there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = upstream[0].float()
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_hidden = (gradient @ weight.float()).to(hidden.dtype) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            grad_weight = (rows.t() @ hidden.reshape(-1, hidden.shape[-1]).float()).to(weight.dtype)
        return grad_hidden, grad_weight, rows.sum(0).to(weight.dtype) if needs_bias else None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    dtype = query.dtype

    def pack(saved: Tensor) -> Tensor:
        # Queries, keys and values lose nothing; the output is rounded as 16-bit attention rounds it.
        return saved.to(dtype) if saved.shape in (query.shape, key.shape) and saved.dtype == torch.float32 else saved

    def unpack(packed: Tensor) -> Tensor:
        return packed.float() if packed.dtype == dtype else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(dtype), weights
