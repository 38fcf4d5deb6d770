"""Without ZeRO a step whose gradient isn't finite is left out; the scaler of fp16 raises nothing."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_train.models.tasks import weighted
from ds_train.optim.guard import guard_steps


class Engine:
    """DeepSpeed's engine as far as its step without ZeRO goes (runtime/engine.py:3505)."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 2)
        self.optimizer = self.basic_optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.skipped_steps, self._global_grad_norm = 0, 0.0

    def _take_model_step(self, lr_kwargs: Any) -> None:
        self.optimizer.step()
        self.module.zero_grad()
        self.skipped_steps += getattr(self.optimizer, "overflow", False)


def norm(module: nn.Module) -> float:
    return math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in module.parameters()))  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_states(bad: float) -> None:
    engine = Engine()
    guard_steps(engine, norm)
    for factor, skipped in ((1.0, 0), (bad, 1), (1.0, 1)):
        before = [parameter.clone() for parameter in engine.module.parameters()]
        (engine.module(torch.ones(1, 2)).sum() * factor).backward()
        expected = norm(engine.module)
        engine._take_model_step(None)
        same = [torch.equal(old, new) for old, new in zip(before, engine.module.parameters(), strict=True)]
        assert same == [factor != 1.0] * 2
        assert engine.skipped_steps == skipped
        assert engine._global_grad_norm == pytest.approx(expected, nan_ok=True)
    assert {float(state["step"]) for state in engine.optimizer.state.values()} == {2.0}


def test_the_scaler_of_fp16_does_not_raise_at_its_end() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(1.0, scale_window=10, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    assert scaler.raise_error_at_min_scale, "DeepSpeed has mended it: the guard can go"
    guard_steps(SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler), basic_optimizer=None), norm)
    assert not scaler.raise_error_at_min_scale


def test_a_loss_without_a_number_has_a_gradient_without_one() -> None:
    for value in (3.0, math.inf, math.nan):
        weight = torch.tensor(2.0, requires_grad=True)
        # The gradient of the loss by itself is finite: 0 * weight + value.
        loss = weighted(0.5 * weight + value, 1.0)
        loss.backward()
        assert torch.equal(loss.detach().isfinite(), torch.tensor(math.isfinite(value)))
        assert weight.grad is not None
        assert float(weight.grad) == (0.5 if math.isfinite(value) else pytest.approx(math.nan, nan_ok=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_by_the_scale_that_the_loss_had(stage: int) -> None:
    """Where DeepSpeed lets the scale grow after the gradient is divided, the guard's own order can go."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    source = inspect.getsource(stage3 if stage == 3 else stage_1_and_2)
    assert source.index("self._update_scale(self.overflow)") < source.index("self.unscale_and_clip_grads(")
    zero = Scaled()
    guard_steps(SimpleNamespace(optimizer=zero, basic_optimizer=None), norm)
    for overflow, scale in ((False, 32.0), (False, 64.0), (True, 32.0), (False, 64.0)):
        loss_scale = zero.loss_scale
        zero.overflow = overflow
        zero.step()
        assert zero.divided_by == (None if overflow else loss_scale)
        assert zero.loss_scale == scale


class Scaled:
    """Steps as ZeRO does, with a scale that grows after each."""

    def __init__(self) -> None:
        self.loss_scale, self.overflow = 16.0, False
        self.divided_by: float | None = None

    def step(self) -> None:
        self.divided_by = None
        self._update_scale(self.overflow)
        if not self.overflow:
            self.divided_by = self.loss_scale

    def _update_scale(self, has_overflow: bool = False) -> None:
        self.loss_scale *= 0.5 if has_overflow else 2.0
