"""The passes over gradients that DeepSpeed makes beside the update, handed to the fused kernels.

DeepSpeed multiplies every gradient by the unscale and clip factor before the optimizer reads it again, and copies each
to float64 for its norm. Here the factor goes into the pass of the update, and the norm is one pass over all gradients.
Everything else, the collectives among it, stays DeepSpeed's.
"""

from __future__ import annotations

from typing import Any

import torch
from ds_kernels import FusedAdagrad, FusedAdam, global_norm
from torch import Tensor


def fuse_passes(engine: Any) -> None:
    """Let the fused optimizer of `engine` (DeepSpeed's) unscale, clip and take norms; without one, change nothing."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    fused = engine.basic_optimizer
    if not isinstance(fused, FusedAdam | FusedAdagrad):
        return
    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        _scale_in_step(zero, fused)
        _norm_in_one_pass(zero)
    elif isinstance(zero, BF16_Optimizer):
        _clip_in_step(zero, fused)
    elif zero is fused:
        _clip_without_zero(engine, fused)


def clip_factor(norm: float, largest: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most `largest`; a `largest` of 0 never clips.

    As DeepSpeed's ZeRO has it (stage_1_and_2.py:3208): 0 for a norm that isn't a number, or below 0, its sign of that.
    """
    if largest == 0.0:
        return 1.0
    return 1.0 / max(1.0, (norm + 1e-6) / largest) if norm >= 0.0 else 0.0


def _scale_in_step(zero: Any, fused: Any) -> None:
    """ZeRO 1-3: instead of a pass over the gradients, `unscale_and_clip_grads` leaves a factor for the update."""

    def unscale_and_clip_grads(_: Any, total_norm: Tensor) -> None:
        norm = float(total_norm) / zero.loss_scale if zero.clip_grad else 0.0
        fused.grad_scale = clip_factor(norm, zero.clip_grad) / zero.loss_scale

    zero.unscale_and_clip_grads = unscale_and_clip_grads


def _norm_in_one_pass(zero: Any) -> None:
    """ZeRO 1-3 without offload: DeepSpeed's norm sees one number for each kind of parameter that it tells apart."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    original = zero.get_grad_norm_direct

    def get_grad_norm_direct(gradients: list[Any], params: list[Any], norm_type: float = 2) -> Any:
        kinds: dict[tuple[bool, bool], tuple[Any, list[Tensor]]] = {}
        own = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        for gradient, parameter in zip(own, params, strict=False):  # as DeepSpeed pairs them
            kind = (is_model_parallel_parameter(parameter), bool(getattr(parameter, "ds_pipe_replicated", False)))
            kinds.setdefault(kind, (parameter, []))[1].append(gradient)
        norms = [gradients[0].new_tensor([global_norm(members)], dtype=torch.float64) for _, members in kinds.values()]
        return original(norms, [parameter for parameter, _ in kinds.values()], norm_type)

    zero.get_grad_norm_direct = get_grad_norm_direct


def _clip_in_step(zero: Any, fused: Any) -> None:
    """DeepSpeed's bf16 optimizer: its own clipping pass is off, the update has the factor of the norm that it took.

    Off during a step alone: `clip_grad` goes into checkpoints, and comes back from them (bf16_optimizer.py:631, 676).
    """
    whole_step, update = zero.step, fused.step
    largest = 0.0

    def step(closure: Any = None) -> Any:
        nonlocal largest
        largest, zero.clip_grad = zero.clip_grad, 0.0
        try:
            return whole_step(closure)
        finally:
            zero.clip_grad = largest

    def scaled_update(closure: Any = None) -> Any:
        fused.grad_scale = clip_factor(float(zero._global_grad_norm), largest)
        return update(closure)

    zero.step, fused.step = step, scaled_update


def _clip_without_zero(engine: Any, fused: Any) -> None:
    """No ZeRO: the engine's clipping leaves the factor of the norm that optim/guard.py has taken."""

    def clip_fp32_gradients() -> None:
        fused.grad_scale = clip_factor(engine.get_global_grad_norm(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients
