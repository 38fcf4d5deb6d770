"""A teacher in shares: DeepSpeed's ZeRO-3 without an optimizer, whose modules are gathered when they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig


class Shares:
    """How the ranks of a group share a teacher: on their devices, or in their hosts' memory."""

    def __init__(self, dtype: torch.dtype, in_host_memory: bool, group: Any = None) -> None:
        """`group`: its ranks; None for all, which then also load it in shares. All run it at the same time."""
        self._group = group
        zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
        if in_host_memory:
            zero["offload_param"] = {"device": "cpu", "pin_memory": get_accelerator().device_name() != "cpu"}
        self._config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """`from_pretrained` in the block loads shares, where all ranks call it."""
        # transformers partitions while it loads only if such an object is alive.
        alive = HfDeepSpeedConfig(self._config) if self._group is None else None
        yield
        del alive

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the teacher in the block.

        DeepSpeed compares the order of its modules over all ranks (partitioned_param_coordinator.py, `reset_step`), of
        which only some have it where there is a group of them.
        """
        plain = partitioned_param_coordinator.assert_ints_same_as_other_ranks
        if self._group is not None:
            partitioned_param_coordinator.assert_ints_same_as_other_ranks = _no_comparison
        try:
            yield
        finally:
            partitioned_param_coordinator.assert_ints_same_as_other_ranks = plain

    def divide(self, model: nn.Module) -> None:
        """Leave a share of each parameter on this rank, and gather those of a module while it runs. Collective."""
        if self._group is not None:
            deepspeed.zero.Init(module=model, data_parallel_group=self._group, config_dict_or_path=self._config)
        parsed = deepspeed.DeepSpeedConfig(self._config).zero_config
        # Its hooks keep it alive.
        DeepSpeedZeRoOffload(
            model,
            timers=NoopTimer(),
            ds_config=self._config,
            prefetch_bucket_size=parsed.prefetch_bucket_size,
            max_reuse_distance=parsed.max_reuse_distance,
            max_live_parameters=parsed.max_live_parameters,
            param_persistence_threshold=parsed.param_persistence_threshold,
            model_persistence_threshold=parsed.model_persistence_threshold,
            offload_param_config=parsed.offload_param,
        )
        # Where its first entry would keep the model until the process ends (parameter_offload.py:315).
        FWD_MODULE_STACK.pop()


def _no_comparison(_: list[int]) -> None:
    """In place of DeepSpeed's comparison of the order of modules."""


def whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter as all ranks have it together. Collective where it is shared."""
    if parameter is None or not hasattr(parameter, "ds_id"):
        return parameter
    with deepspeed.zero.GatheredParameters([parameter]):
        # Not the parameter itself, which is let go of at the end of the block.
        return parameter.data
