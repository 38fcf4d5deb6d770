"""Parameter groups and the optimizer that is handed to DeepSpeed.

torch's fused optimizers are used everywhere: DeepSpeed takes them at every ZeRO stage and with offload
(`zero_force_ds_cpu_optimizer: false`), they run at the speed of memory, and nothing is compiled at start-up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_train.config.optimizer import OptimizerSection


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and biases, norms and other vectors without decay.

    ZeRO rebuilds Adagrad from its defaults as one group (`stage_1_and_2.py:946`), so it always gets one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if section.decay_all or section.weight_decay == 0.0 or section.kind == "adagrad":
        return [{"params": parameters, "weight_decay": section.weight_decay}]
    decayed = [parameter for parameter in parameters if _dimensions(parameter) > 1]
    kept = [parameter for parameter in parameters if _dimensions(parameter) <= 1]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of the recipe over the model's trainable parameters."""
    groups = parameter_groups(model, section)
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay, "fused": True}
    if section.kind == "adamw":
        return torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, **common)
    if section.kind == "adam":
        return torch.optim.Adam(groups, betas=section.betas, eps=section.eps, **common)
    if section.kind == "adagrad":
        return torch.optim.Adagrad(groups, eps=section.eps, **common)
    return torch.optim.SGD(groups, momentum=section.momentum, **common)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Write the learning rate of the coming step into every group; `optimizer` may be DeepSpeed's wrapper."""
    for group in optimizer.param_groups:
        group["lr"] = value


def _dimensions(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 has partitioned is an empty vector; its real shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
