"""No non-finite gradient reaches the weights, in any stage and number format.

DeepSpeed's ZeRO and 16-bit optimizers look at the norm before they update, and skip the step; without ZeRO nobody does,
and one NaN is in every weight (engine.py:3505). Its scaler of fp16 raises when it can't shrink any more
(fp16/loss_scaler.py:257), and here the run says itself what is wrong.
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
    if engine.optimizer is engine.basic_optimizer:
        _guard_without_zero(engine, engine.optimizer, norm)


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
