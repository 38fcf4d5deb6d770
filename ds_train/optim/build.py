"""Parameter groups and the optimizer that is handed to DeepSpeed: ours from ds_kernels, or torch's fused ones.

DeepSpeed takes both at every ZeRO stage and with offload (`zero_force_ds_cpu_optimizer: false`) and compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from ds_kernels import Choice, FusedAdagrad, FusedAdam, FusedAdamW, choose
from torch import nn

from ds_train.config.optimizer import OptimizerSection
from ds_train.errors import user_error

_FUSED = {"adamw": FusedAdamW, "adam": FusedAdam, "adagrad": FusedAdagrad}


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed matrices, and biases, norms and other vectors without decay.

    ZeRO rebuilds torch's Adagrad from its defaults as one group (`stage_1_and_2.py:946`), so it gets one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one_group = section.kind == "adagrad" and section.kernel != "fused"
    if section.decay_all or section.weight_decay == 0.0 or one_group:
        return [{"params": parameters, "weight_decay": section.weight_decay}]
    decayed = [parameter for parameter in parameters if _dimensions(parameter) > 1]
    kept = [parameter for parameter in parameters if _dimensions(parameter) <= 1]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def choose_kernel(section: OptimizerSection, device: str) -> Choice:
    """What updates parameters whose fp32 values lie on `device`.

    Raises:
        UserError: the recipe demands the fused kernels and this host has none.
    """
    if section.kind not in _FUSED:
        return Choice("torch", f"there is no fused kernel for {section.kind}")
    if section.kernel == "torch":
        return Choice("torch", "the recipe asks for it")
    choice = choose(device)
    if section.kernel == "fused" and not choice.fused:
        raise user_error("optimizer.kernel", choice.reason, "set optimizer.kernel=auto", "fused")
    return choice


def build_optimizer(model: nn.Module, section: OptimizerSection, choice: Choice) -> torch.optim.Optimizer:
    """The optimizer of the recipe over the model's trainable parameters, by what `choose_kernel` chose."""
    groups = parameter_groups(model, section)
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    if choice.fused:
        _register()
        if section.kind != "adagrad":
            common["betas"] = section.betas
        return _FUSED[section.kind](groups, eps=section.eps, **common)
    common["fused"] = True
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


def _register() -> None:
    """Tell DeepSpeed's ZeRO that it works with ours: it asks for the exact type (runtime/zero/utils.py:77)."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    ZERO_SUPPORTED_OPTIMIZERS.extend(kind for kind in _FUSED.values() if kind not in ZERO_SUPPORTED_OPTIMIZERS)


def _dimensions(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 has partitioned is an empty vector; its real shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
