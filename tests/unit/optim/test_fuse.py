"""What the fused passes leave of DeepSpeed's optimizers as it was."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_train.optim.fuse import _clip_in_step, _copy_in_step_of_stage_3, _stepping, clip_factor, joined


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


def test_tensors_that_follow_each_other_are_one_view_and_others_are_not() -> None:
    flat = torch.arange(10.0)
    whole = joined([flat[2:5], flat[5:5], flat[5:9].view(2, 2)])
    assert whole is not None
    assert whole.data_ptr() == flat[2:].data_ptr()
    assert whole.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert joined([flat[2:5], flat[6:9]]) is None
    assert joined([flat[5:9], flat[2:5]]) is None
    assert joined([flat[:4].view(2, 2).t(), flat[4:]]) is None
    assert joined([flat[:5], torch.arange(10.0)[5:]]) is None


class Stage3:
    """ZeRO 3 as far as its 16-bit copy goes (runtime/zero/stage3.py, `step`)."""

    partial_offload = 1.0

    def __init__(self) -> None:
        self.fp32_partitioned_groups_flat = [torch.ones(4), torch.ones(4)]
        self.fp16_partitioned_groups_flat = [torch.zeros(4, dtype=torch.bfloat16), None]
        self.copied: list[int] = []

    def step(self, closure: Any = None) -> None:
        for number in range(2):
            self._reassign_or_swap_out_partitioned_parameters(number)

    def _reassign_or_swap_out_partitioned_parameters(self, number: int) -> None:
        self.copied.append(number)

    def _unflatten_partitioned_parameters(self, number: int) -> None: ...


def test_the_copy_is_left_out_only_where_the_update_has_written_it() -> None:
    zero, fused = Stage3(), SimpleNamespace(copies={})
    _copy_in_step_of_stage_3(zero, fused, _stepping(zero))
    assert list(fused.copies.values()) == [zero.fp16_partitioned_groups_flat[0]]
    zero.step()
    assert zero.copied == [1]
    zero._reassign_or_swap_out_partitioned_parameters(0)  # after weights were loaded
    assert zero.copied == [1, 0]
    partial, untouched = Stage3(), SimpleNamespace(copies={})
    partial.partial_offload = 0.5
    _copy_in_step_of_stage_3(partial, untouched, _stepping(partial))
    assert not untouched.copies


def test_the_clip_factor_is_deepspeeds_in_its_own_precision() -> None:
    for norm in (torch.tensor(7.3), torch.tensor(7.3, dtype=torch.float64), torch.tensor(1e-3)):
        expected = 1.0 / (torch.clamp((norm / 128.0 + 1e-6) / 0.05, min=1.0) * 128.0)
        assert clip_factor(norm, 0.05, 128.0) == float(expected)
    assert clip_factor(torch.tensor(7.3), 0.0, 128.0) == 1 / 128.0
