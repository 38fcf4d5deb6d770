"""What is read from DeepSpeed's engine after a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from ds_train.engine.health import LossScale
from ds_train.engine.watch import loss_scale


def engine(scaler: Any, fp16: bool = True) -> Any:
    return SimpleNamespace(fp16_enabled=lambda: fp16, optimizer=SimpleNamespace(loss_scaler=scaler))


def test_a_dynamic_scale_can_fall_to_its_minimum() -> None:
    scaler = DynamicLossScaler(8.0, scale_window=10, min_scale=2.0, delayed_shift=1, consecutive_hysteresis=False)
    assert loss_scale(engine(scaler)) == LossScale(8.0, can_fall=True)
    scaler.cur_scale = 2.0
    assert loss_scale(engine(scaler)) == LossScale(2.0, can_fall=False)


def test_a_fixed_scale_cannot_fall_and_other_formats_have_none() -> None:
    assert loss_scale(engine(LossScaler(128.0))) == LossScale(128.0, can_fall=False)
    assert loss_scale(engine(LossScaler(1.0), fp16=False)) is None
