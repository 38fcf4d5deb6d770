"""Parameters that a step doesn't use: their gradient is zero, and not what DeepSpeed's buffers still hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def without_gradient(engine: Any, parameters: Iterable[Any]) -> None:
    """Let the gradients of this step be zero for `parameters`, which its forward pass leaves out.

    Before the step's first micro-batch. ZeRO 3's buffer of a parameter is written by whatever gradient comes first
    (stage3.py, `partition_grads`), and host memory by the last one (stage_1_and_2.py,
    `async_inplace_copy_grad_to_fp32_buffer_from_gpu`): where none comes, an earlier step's would be applied again.
    """
    from deepspeed.utils import safe_set_local_grad

    zero = engine.optimizer
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
        elif engine.zero_optimization_stage() == 0:
            parameter.grad = torch.zeros_like(parameter)
        elif getattr(zero, "cpu_offload", False):
            place = zero.grad_position.get(zero.get_param_id(parameter))
            if place is not None:  # else it is another rank's
                group, _, start, count = place
                gradient = zero.single_partition_of_fp32_groups[group].grad
                if gradient is not None:
                    gradient.view(-1).narrow(0, start, count).zero_()
