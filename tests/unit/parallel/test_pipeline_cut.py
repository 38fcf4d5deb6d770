"""Cuts of models into stages, checked in one process: loss and gradients of the chain are the whole model's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from ds_train.config import RunConfig
from ds_train.parallel import check
from ds_train.plan.stages import balance
from ds_train.plan.topology import Layout

NO_GROUPS: Any = SimpleNamespace(tensor=None, sequence=None)
"""The mesh of one process: a pipeline's cut is checked without any group."""


def difference(arch: str, stages: int, **sections: object) -> str | None:
    run = RunConfig.model_validate({"model": {"arch": arch}, "schedule": {"steps": 1}, **sections})
    return check.difference(run, AutoConfig.for_model(arch), Layout(stages, 1, 1, 1), NO_GROUPS)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_cut_model_equals_the_whole_one(arch: str, stages: int, packing: bool) -> None:
    assert difference(arch, stages, data={"packing": packing}) is None


def test_a_wrong_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    entrance = check.Stage.call_with

    def doubled(self: check.Stage, input_ids: object, **others: object) -> object:
        return entrance(self, input_ids if self.is_first else 2 * input_ids, **others)  # type: ignore[operator, arg-type]

    monkeypatch.setattr(check.Stage, "call_with", doubled)
    assert "its loss would be" in str(difference("llama", 2))


def test_a_lost_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = check.Stage.forward

    def torn(self: check.Stage, inputs: tuple[torch.Tensor, ...]) -> object:
        return forward(self, tuple(tensor.detach() for tensor in inputs))

    monkeypatch.setattr(check.Stage, "forward", torn)
    assert "would get no gradient" in str(difference("llama", 2))


def test_stages_are_as_even_as_any_partition() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        layers, stages = int(random.integers(4, 9)), int(random.integers(1, 5))
        costs, last = random.integers(1, 9, layers).tolist(), int(random.integers(0, 9))

        def worst(bounds: tuple[int, ...], costs: list[int] = costs, last: int = last) -> int:
            sums = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
            return max([*sums[:-1], sums[-1] + last])

        cuts = itertools.combinations(range(1, layers), stages - 1)
        best = min(worst((0, *cut, layers)) for cut in cuts)
        sizes = balance(costs, last, stages)
        assert len(sizes) == stages
        assert min(sizes) > 0
        assert worst((0, *itertools.accumulate(sizes))) == best
