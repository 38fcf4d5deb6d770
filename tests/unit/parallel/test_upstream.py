"""What DeepSpeed does that we work around. When one of these fails, the workaround that it names can go."""

from __future__ import annotations

import inspect

import pytest
import torch


def test_the_16_bit_optimizer_clears_gradients_at_the_first_backward_hook() -> None:
    """Why a pipeline's last stage computes the loss in its forward pass: parallel/pipeline.py, TRAVELLERS."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    assert "clear_lp_grads" in inspect.getsource(BF16_Optimizer.backward_prologue)


def test_stage_3_averages_over_all_ranks_in_one_path_and_over_data_ranks_in_the_other() -> None:
    """Why DeepSpeed isn't told of sequence ranks: parallel/mesh.py."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import stage3

    assert "div_(world_sz)" in inspect.getsource(coalesced_collectives)
    assert "averaging_world_sz / float(self.sequence_parallel_size)" in inspect.getsource(stage3)


def test_column_parallel_sums_a_copy_of_a_gradient_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why parallel/tensor.py sums gradients by a hook of its own."""
    from deepspeed.module_inject import layers

    monkeypatch.setattr(layers.pg_utils, "is_parallel", lambda group: True)
    monkeypatch.setattr(layers.dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    gradient = torch.ones(3, 4).t()
    hidden = torch.ones(4, 3, requires_grad=True)
    layers.ColumnParallel.apply(None, hidden).backward(gradient)
    assert hidden.grad is not None
    assert hidden.grad[0, 0] == 1  # on two ranks it should be 2


def test_autoep_asks_transformers_for_what_is_not_there() -> None:
    """Why `deepspeed.expert_parallel` is refused: plan/deepspeed_keys.py."""
    from deepspeed.module_inject.auto_ep_presets import base
    from transformers.utils import output_capturing

    assert "registry.get(registry_key, _MISSING_REGISTRY_ENTRY)" in inspect.getsource(base)
    with pytest.raises(TypeError):
        output_capturing._CAN_RECORD_REGISTRY.get("a key", "a default")  # type: ignore[call-arg]


def test_zero_init_takes_no_dtype_where_there_is_no_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why models/load.py leaves it to the JSON: a model from scratch in fp32 became one in bf16."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    init = object.__new__(Init)
    init._set_dtype(None, torch.float32)
    assert init.dtype == torch.bfloat16
