"""`precision`: number formats of compute, gradients and loss scaling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Section


class PrecisionSection(Section):
    """Weights of the forward pass; the optimizer always keeps fp32 master weights."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format of weights and activations."""

    gradient_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format in which gradients are accumulated over micro-batches; with one micro-batch a step nothing is."""

    loss_scale: Annotated[float, Field(gt=0.0)] | Literal["dynamic"] = "dynamic"
    """fp16 only: a fixed loss scale, or one that doubles while steps are finite and halves when one is not."""

    initial_loss_scale_power: int = Field(default=16, ge=0, le=32)
    """fp16 with a dynamic scale: the scale starts at 2 to this power."""

    tf32: bool = True
    """Let CUDA devices use TF32 in fp32 matrix products."""
