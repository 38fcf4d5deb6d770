"""Parameter groups: who is decayed, whose learning rate differs, and as many groups on every part of a model."""

from __future__ import annotations

import pytest
import torch
from ds_kernels import Choice
from torch import nn

from ds_train.config.optimizer import OptimizerSection
from ds_train.errors import UserError
from ds_train.optim.build import build_optimizer, choose_kernel, parameter_groups, set_learning_rate


class Tied(nn.Module):
    """An embedding, two layers and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def section(**keys: object) -> OptimizerSection:
    return OptimizerSection.model_validate(keys)


def by_name(model: nn.Module, groups: list[dict[str, object]]) -> dict[str, tuple[object, object]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_factor"])
        for group in groups
        for parameter in group["params"]  # type: ignore[attr-defined]
    }


def test_each_parameter_has_its_decay_and_its_first_matching_factor() -> None:
    model = Tied()
    groups = parameter_groups(model, section(lr_factors={"*.0.*": 2.0, "*weight": 0.5}))
    assert by_name(model, groups) == {
        "embed.weight": (0.1, 0.5),
        "layers.0.weight": (0.1, 2.0),
        "layers.0.bias": (0.0, 2.0),
        "layers.1.weight": (0.1, 0.5),
        "layers.1.bias": (0.0, 1.0),
    }


def test_parts_of_a_model_have_as_many_groups_as_the_whole_and_shared_weights_one_factor() -> None:
    whole, part, last = Tied(), Tied(), Tied()
    keys = section(lr_factors={"embed*": 0.5, "*.0.bias": 3.0})
    assert len(parameter_groups(whole, keys)) == 4
    del part.embed
    groups = parameter_groups(part, keys, whole)
    assert len(groups) == 4
    assert by_name(part, groups)["head.weight"] == (0.1, 0.5)
    del last.embed
    last.layers[0].register_parameter("bias", None)  # so one group has nobody here
    groups = parameter_groups(last, keys, whole)
    assert len(groups) == 4
    assert by_name(last, groups) == {
        "layers.0.weight": (0.1, 1.0),
        "layers.1.weight": (0.1, 1.0),
        "layers.1.bias": (0.0, 1.0),
        "head.weight": (0.1, 0.5),
    }
    last.layers[0].register_parameter("weight", None)
    with pytest.raises(UserError, match="fewer than 4 parameters"):
        parameter_groups(last, keys, whole)


def test_a_pattern_without_a_parameter_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"optimizer.lr_factors=\*embd\*.*embed.weight"):
        parameter_groups(Tied(), section(lr_factors={"*embd*": 0.5}))


def test_the_learning_rate_of_a_step_is_multiplied_by_the_groups_factor() -> None:
    model = Tied()
    keys = section(kind="sgd", momentum=0.0, weight_decay=0.0, lr_factors={"embed*": 0.5})
    optimizer = build_optimizer(model, keys, choose_kernel(keys, "cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] - (0.05 if name == "embed.weight" else 0.1)
        torch.testing.assert_close(parameter.detach(), expected)


def test_a_demanded_kernel_that_is_missing_is_the_users_error_and_else_torchs_do_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = Choice("torch-fused", "there is no nvcc here")
    monkeypatch.setattr("ds_train.optim.build.choose", lambda device: missing)
    with pytest.raises(UserError, match=r"optimizer.kernel=fused.*no nvcc here.*optimizer.kernel=auto"):
        choose_kernel(section(kernel="fused"), "cuda")
    assert choose_kernel(section(), "cuda") == missing
    assert choose_kernel(section(kernel="torch"), "npu").name == "torch-foreach"
    for name, key in (("torch-fused", "fused"), ("torch-foreach", "foreach")):
        optimizer = build_optimizer(Tied(), section(kernel="torch"), Choice(name, ""))
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults[key]


def test_a_bias_for_each_expert_is_not_decayed() -> None:
    experts = nn.Module()
    experts.gate_up_proj, experts.gate_up_proj_bias = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    found = by_name(experts, parameter_groups(experts, section()))
    assert found == {"gate_up_proj": (0.1, 1.0), "gate_up_proj_bias": (0.0, 1.0)}
