"""No gradient that isn't finite, or has lost its scale, reaches the weights, in any stage and number format.

DeepSpeed's ZeRO and 16-bit optimizers look at the norm before they update, and skip the step; without ZeRO nobody does,
and one NaN is in every weight (engine.py:3505). Its scaler of fp16 raises when it can't shrink any more
(fp16/loss_scaler.py:257), and here the run says itself what is wrong. In the step after which the scale grows it
divides the gradient by the new one (stage_1_and_2.py:3047, stage3.py:2891).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn


def guard_steps(engine: Any, norm: Callable[[nn.Module], float]) -> None:
    """Let `engine` (DeepSpeed's) skip every step whose gradient isn't finite; `was_step_applied` says whether it did.

    `norm` gives the gradient norm of the whole model where there is no ZeRO; `get_global_grad_norm` has it afterwards.
    """
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False
    if hasattr(engine.optimizer, "_update_scale"):
        _keep_scale_in_step(engine.optimizer)
    if engine.optimizer is engine.basic_optimizer:
        _guard_without_zero(engine, engine.optimizer, norm)


def _keep_scale_in_step(optimizer: Any) -> None:
    """The scale grows when the step is over; that it shrinks means there is none."""
    update, whole_step = optimizer._update_scale, optimizer.step
    applied = False

    def update_scale(overflow: bool = False) -> None:
        nonlocal applied
        if overflow:
            update(True)
        else:
            applied = True

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal applied
        result = whole_step(*arguments, **named)
        if applied:
            applied = False
            update(False)
        return result

    optimizer._update_scale, optimizer.step = update_scale, step


def _guard_without_zero(engine: Any, optimizer: Any, norm: Callable[[nn.Module], float]) -> None:
    whole_step, update = engine._take_model_step, optimizer.step

    def take_model_step(lr_kwargs: Any) -> None:
        engine._global_grad_norm = norm(engine.module)
        # By this name the engine looks for what its own optimizers found.
        optimizer.overflow = not math.isfinite(engine._global_grad_norm)
        whole_step(lr_kwargs)

    def step(closure: Any = None) -> Any:
        return None if optimizer.overflow else update(closure)

    engine._take_model_step, optimizer.step = take_model_step, step
