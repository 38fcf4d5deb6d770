"""The passes over gradients that DeepSpeed makes beside the update, handed to the fused kernels.

DeepSpeed multiplies every gradient by the unscale and clip factor before the optimizer reads it again, copies each to
float64 for its norm, and copies the updated parameters to 16 bits. Here factor and copy go into the pass of the update,
and the norm is one pass over all gradients; the bits are those of DeepSpeed's passes. Everything else, the collectives
among it, stays DeepSpeed's, and so does the 16-bit copy of ZeRO 2, which stands in the middle of `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ds_kernels import FusedAdagrad, FusedAdam, norm_and_flag
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
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            stepping = _stepping(zero)
            _gradients_as_they_lie(zero, stepping)
            _copy_in_step_of_stage_3(zero, fused, stepping)
    elif isinstance(zero, BF16_Optimizer):
        _clip_in_step(zero, fused)
        _copy_in_step_of_bf16(zero, fused)
    elif zero is fused:
        _clip_without_zero(engine, fused)


def clip_factor(norm: float | Tensor, largest: float, scale: float = 1.0) -> float:
    """What gradients of this norm are multiplied by: 1 / `scale`, and so that the norm is at most `largest` then.

    As DeepSpeed's ZeRO has it, in its order and precision, that of `norm` (stage_1_and_2.py, `unscale_and_clip_grads`):
    a `largest` of 0 never clips; 0 for a norm that isn't a number, or below 0, its sign of that.
    """
    if largest == 0.0:
        return 1.0 / scale
    total = torch.as_tensor(norm).cpu()  # a device is waited for once
    clip = torch.clamp((total / scale + 1e-6) / largest, min=1.0) * scale
    return float(1.0 / clip) if total >= 0.0 else 0.0


def _scale_in_step(zero: Any, fused: Any) -> None:
    """ZeRO 1-3: instead of a pass over the gradients, `unscale_and_clip_grads` leaves a factor for the update."""

    def unscale_and_clip_grads(_: Any, total_norm: Tensor) -> None:
        fused.grad_scale = clip_factor(total_norm, zero.clip_grad, zero.loss_scale)

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
        norms = [norm_and_flag(members)[0].reshape(1) for _, members in kinds.values()]
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
        fused.grad_scale = clip_factor(zero._global_grad_norm, largest)
        return update(closure)

    zero.step, fused.step = step, scaled_update


def _gradients_as_they_lie(zero: Any, stepping: Callable[[], bool]) -> None:
    """ZeRO 3: the gradients of a sub-group lie one after the other in one buffer, which needs no flat copy."""
    original = zero.flatten

    def flatten(tensors: list[Tensor]) -> Tensor:
        whole = joined(tensors) if stepping() else None
        return original(tensors) if whole is None else whole

    zero.flatten = flatten


def joined(tensors: list[Tensor]) -> Tensor | None:
    """The one-dimensional view of tensors that follow each other in one storage; None if they don't."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and tensor.dtype == first.dtype
        if not same or tensor.storage_offset() != end or not tensor.is_contiguous():
            return None
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def _copy_in_step_of_stage_3(zero: Any, fused: Any, stepping: Callable[[], bool]) -> None:
    """ZeRO 3: the update writes the 16-bit partition, where it lies beside the fp32 one (stage3.py, `step`)."""
    if zero.partial_offload != 1.0:
        return  # another optimizer updates some sub-groups
    for wide, narrow in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        if _takes_copy(wide, narrow):
            fused.copies[wide] = narrow
    original = zero._reassign_or_swap_out_partitioned_parameters

    def reassign(sub_group_id: int) -> None:
        narrow = zero.fp16_partitioned_groups_flat[sub_group_id]
        written = fused.copies.get(zero.fp32_partitioned_groups_flat[sub_group_id])
        if stepping() and narrow is not None and written is narrow:
            zero._unflatten_partitioned_parameters(sub_group_id)
        else:
            original(sub_group_id)

    zero._reassign_or_swap_out_partitioned_parameters = reassign


def _copy_in_step_of_bf16(zero: Any, fused: Any) -> None:
    """DeepSpeed's bf16 optimizer: the update writes the 16-bit partition; the copy onto itself that is left is none."""
    own = [
        partitions[torch.distributed.get_rank(group=group)]
        for partitions, group in zip(zero.bf16_partitioned_groups, zero.real_dp_process_group, strict=True)
    ]
    pairs = list(zip(zero.fp32_groups_flat_partition, own, strict=True))
    fused.copies |= {wide: narrow for wide, narrow in pairs if _takes_copy(wide, narrow)}
    original, stepping = zero.update_lp_params, _stepping(zero)

    def update_lp_params() -> None:
        kept = zero.fp32_groups_flat_partition
        if stepping():
            zero.fp32_groups_flat_partition = [fused.copies.get(wide, wide) for wide in kept]
        try:
            original()
        finally:
            zero.fp32_groups_flat_partition = kept

    zero.update_lp_params = update_lp_params


def _stepping(zero: Any) -> Callable[[], bool]:
    """Whether `zero` is in a step: parameters that were loaded are to be copied as ever."""
    whole_step, now = zero.step, [False]

    def step(closure: Any = None) -> Any:
        now[0] = True
        try:
            return whole_step(closure)
        finally:
            now[0] = False

    zero.step = step
    return lambda: now[0]


def _takes_copy(wide: Tensor, narrow: Tensor | None) -> bool:
    return (
        narrow is not None
        and narrow.device == wide.device
        and narrow.dtype in (torch.bfloat16, torch.float16)
        and narrow.is_contiguous()
        and narrow.numel() == wide.numel()
    )


def _clip_without_zero(engine: Any, fused: Any) -> None:
    """No ZeRO: the engine's clipping leaves the factor of the norm that optim/guard.py has taken."""

    def clip_fp32_gradients() -> None:
        fused.grad_scale = clip_factor(engine.get_global_grad_norm(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients
