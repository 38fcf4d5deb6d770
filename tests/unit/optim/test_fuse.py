"""What the fused passes leave of DeepSpeed's optimizers as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ds_train.optim.fuse import _clip_in_step, clip_factor


class Bf16:
    """DeepSpeed's bf16 optimizer as far as its clipping goes (runtime/bf16_optimizer.py:384)."""

    def __init__(self, fused: Any) -> None:
        self.clip_grad, self._global_grad_norm, self.optimizer = 0.5, 4.0, fused
        self.clipped = False

    def step(self, closure: Any = None) -> None:
        self.clipped = self.clip_grad > 0.0
        self.optimizer.step()


class Fused:
    def __init__(self) -> None:
        self.grad_scale, self.used = 1.0, 0.0

    def step(self, closure: Any = None) -> None:
        self.used = self.grad_scale


def test_the_bf16_optimizers_clipping_is_off_in_a_step_and_in_checkpoints_as_it_was() -> None:
    fused = Fused()
    zero = Bf16(fused)
    _clip_in_step(zero, fused)
    for largest in (0.5, 2.0, 0.0):
        zero.clip_grad = largest  # what a loaded checkpoint brings
        zero.step()
        assert not zero.clipped
        assert fused.used == pytest.approx(largest / 4.0 if largest else 1.0, rel=1e-6)
        assert zero.clip_grad == largest


def test_a_norm_that_is_no_number_leaves_nothing_of_the_gradient() -> None:
    assert clip_factor(math.nan, 1.0) == clip_factor(-1.0, 1.0) == clip_factor(math.inf, 1.0) == 0.0
    assert clip_factor(0.3, 1.0) == clip_factor(math.inf, 0.0) == 1.0
