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


def test_stage_3_keeps_the_module_of_every_engine() -> None:
    """Why the last engine's is taken out of a list of DeepSpeed's: engine/build.py."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    hooks = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload)
    assert "FWD_MODULE_STACK.append(self.module)" in hooks
    assert "FWD_MODULE_STACK.clear" not in hooks
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    assert "lru_cache(maxsize=None)\n    def __params_to_release" in inspect.getsource(coordinator)


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


def test_gradients_of_parameters_that_are_not_used_stay_from_earlier_steps() -> None:
    """Why optim/unused.py clears them."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    assert "if self.micro_step_id == 0:  # don't accumulate" in inspect.getsource(stage3)
    offload = stage_1_and_2.DeepSpeedZeroOptimizer
    assert "norm_for_param_grads = {}" in inspect.getsource(offload.reset_cpu_buffers)
    assert "zero_" not in inspect.getsource(offload.reset_cpu_buffers)


def test_zero_3_compares_the_order_of_modules_over_all_ranks() -> None:
    """Why compress/teacher_shares.py leaves that out where some ranks have a teacher, and lets go of its model."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator, utils

    assert "dist.broadcast(lst_tensor, src=0, async_op=False)" in inspect.getsource(utils.get_lst_from_rank0)
    reset = inspect.getsource(partitioned_param_coordinator.PartitionedParameterCoordinator.reset_step)
    assert "assert_ints_same_as_other_ranks" in reset
    hooks = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload.setup_zero_stage3_hooks)
    assert "FWD_MODULE_STACK.append(self.module)" in hooks


def test_zero_imports_a_muon_that_is_compiled_as_it_is_read() -> None:
    """Why `meet` imports it first: engine/ranks.py, `_import_muon`."""
    from deepspeed.runtime.zero import utils
    from deepspeed.runtime.zero.muon import original_muon

    assert "from deepspeed.runtime.zero.muon.muon_optimizer import" in inspect.getsource(
        utils.is_zero_supported_optimizer
    )
    assert "\n@compiler.compile()" in inspect.getsource(original_muon)


def test_the_16_bit_optimizer_prints_whatever_the_loggers_level() -> None:
    """Why engine/ranks.py takes its `see_memory_usage` away."""
    from deepspeed.runtime import bf16_optimizer, utils

    assert "force=True" in inspect.getsource(bf16_optimizer.BF16_Optimizer.__init__)
    assert "    print(message)" in inspect.getsource(utils.see_memory_usage)


def test_the_pipeline_forgets_the_times_of_its_steps_only_when_it_prints_them() -> None:
    """Why parallel/pipeline.py does after each step."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    step = inspect.getsource(PipelineEngine.train_batch)
    assert "timers(TRAIN_BATCH_TIMER).stop()\n\n        if self.steps_per_print() is not None" in step
