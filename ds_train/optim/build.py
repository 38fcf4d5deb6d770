"""Parameter groups and the optimizer that is handed to DeepSpeed: ours from ds_kernels, or torch's fused ones.

DeepSpeed takes both at every ZeRO stage and with offload (`zero_force_ds_cpu_optimizer: false`) and compiles nothing.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from ds_kernels import Choice, FusedAdagrad, FusedAdam, FusedAdamW, choose, torchs
from torch import nn

from ds_train.config.optimizer import OptimizerSection
from ds_train.errors import user_error

_GroupKey = tuple[float, float]
"""(weight decay, learning-rate factor)."""

_FUSED = {"adamw": FusedAdamW, "adam": FusedAdam, "adagrad": FusedAdagrad}


def parameter_groups(
    model: nn.Module, section: OptimizerSection, whole: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one weight decay and one learning-rate factor (`lr_factor`).

    Matrices are decayed; biases, norms and other vectors aren't, unless `decay_all`. ZeRO rebuilds torch's Adagrad
    from its defaults as one group (`stage_1_and_2.py:946`), so it gets one.

    Args:
        whole: the model that `model` is a part of (its outline will do). DeepSpeed sums the gradient norm over the
            stages of a pipeline group by group, so every part must have as many groups as the whole.

    Raises:
        UserError: a pattern of `lr_factors` that no parameter of `whole` has.
    """
    whole = model if whole is None else whole
    _check_patterns(whole, section)
    # A weight that embedding and head share goes by its first name, also on a stage that has it by its second.
    by_name = dict(whole.named_parameters(remove_duplicate=False))
    first_names = {id(parameter): name for name, parameter in reversed(by_name.items())}

    def key(name: str, parameter: nn.Parameter) -> _GroupKey:
        return _group_key(first_names.get(id(by_name.get(name)), name), parameter, section)

    members: dict[_GroupKey, list[nn.Parameter]] = {key(*named): [] for named in _trainable(whole)}
    wanted = len(members)
    for name, parameter in _trainable(model):
        members[key(name, parameter)].append(parameter)
    groups = [_group(key, parameters) for key, parameters in members.items() if parameters]
    while len(groups) < wanted:
        largest = max(groups, key=lambda group: len(group["params"]))
        if len(largest["params"]) == 1:
            reason = f"a pipeline stage has fewer than {wanted} parameters to make as many groups of"
            raise user_error("optimizer.lr_factors", reason, "write fewer factors", section.lr_factors)
        groups.append({**largest, "params": [largest["params"].pop()]})
    return groups


def choose_kernel(section: OptimizerSection, device: str) -> Choice:
    """What updates parameters whose fp32 values lie on `device`.

    Raises:
        UserError: the recipe demands the fused kernels and this host has none.
    """
    if section.kind not in _FUSED:
        return torchs(device, f"there is no fused kernel for {section.kind}")
    if section.kernel == "torch":
        return torchs(device, "the recipe asks for it")
    choice = choose(device)
    if section.kernel == "fused" and not choice.fused:
        raise user_error("optimizer.kernel", choice.reason, "set optimizer.kernel=auto", "fused")
    return choice


def build_optimizer(
    model: nn.Module, section: OptimizerSection, choice: Choice, whole: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the recipe over the model's trainable parameters, by what `choose_kernel` chose.

    `whole`: see `parameter_groups`.
    """
    groups = parameter_groups(model, section, whole)
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    if choice.fused:
        _register()
        if section.kind != "adagrad":
            common["betas"] = section.betas
        return _FUSED[section.kind](groups, eps=section.eps, **common)
    common["fused" if choice.name == "torch-fused" else "foreach"] = True
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
        group["lr"] = value * group.get("lr_factor", 1.0)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _group_key(name: str, parameter: nn.Parameter, section: OptimizerSection) -> _GroupKey:
    everything = section.decay_all or (section.kind == "adagrad" and section.kernel != "fused")
    # A mixture's biases are matrices, a row for each expert.
    decayed = everything or (_dimensions(parameter) > 1 and not name.endswith("bias"))
    factors = (factor for pattern, factor in section.lr_factors.items() if fnmatchcase(name, pattern))
    return section.weight_decay if decayed else 0.0, next(factors, 1.0)


def _group(key: _GroupKey, parameters: list[nn.Parameter]) -> dict[str, Any]:
    weight_decay, factor = key
    return {"params": parameters, "weight_decay": weight_decay, "lr_factor": factor}


def _check_patterns(model: nn.Module, section: OptimizerSection) -> None:
    names = [name for name, _ in _trainable(model)]
    unused = [pattern for pattern in section.lr_factors if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        fix = f"names look like {', '.join(names[:2])} and {names[-1]}"
        raise user_error("optimizer.lr_factors", "no parameter of the model has such a name", fix, unused[0])


def _register() -> None:
    """Tell DeepSpeed's ZeRO that it works with ours: it asks for the exact type (runtime/zero/utils.py:77)."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    ZERO_SUPPORTED_OPTIMIZERS.extend(kind for kind in _FUSED.values() if kind not in ZERO_SUPPORTED_OPTIMIZERS)


def _dimensions(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 has partitioned is an empty vector; its real shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
