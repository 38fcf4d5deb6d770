"""The hooks that look for the first non-finite value, on small modules that break in known places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_train.engine.diagnosis import NonfiniteHooks


class Squash(nn.Module):
    """Square roots, whose gradient at 0 is infinite."""

    def forward(self, values: Tensor) -> Tensor:
        return values.sqrt()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.squash, self.down = nn.Linear(4, 6), Squash(), nn.Linear(6, 4)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden + self.down(self.squash(self.up(hidden).relu()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, mask = self.embed(tokens), torch.full((5, 5), -torch.inf)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        return hidden.sum()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    model = Model()
    for layer in model.layers:  # far from the root's bad place
        layer.up.bias.data.fill_(9.0)
    return model


TOKENS = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [5, 6, 7, 5, 6]])


def test_nothing_is_found_where_everything_is_finite(model: Model) -> None:
    with NonfiniteHooks(model) as hooks:
        model(TOKENS).backward()
    assert hooks.found is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_parameter_is_named_with_the_rows_that_it_breaks(model: Model) -> None:
    model.embed.weight.data[7, 2] = torch.nan
    with NonfiniteHooks(model) as hooks:
        for _ in range(2):
            model(TOKENS)
    found = hooks.found
    assert found is not None
    assert (found.phase, found.module, found.module_class) == ("forward", "embed", "Embedding")
    assert (found.tensor, found.micro_batch, found.rows) == ("its parameter weight", 0, (2,))


def test_a_teacher_is_watched_too(model: Model) -> None:
    model.requires_grad_(False)
    model.layers[0].down.weight.data[1, 1] = torch.inf
    with torch.no_grad(), NonfiniteHooks(model) as hooks:
        model(TOKENS)
    found = hooks.found
    assert found is not None
    assert (found.module, found.tensor, found.rows) == ("layers.0.down", "its parameter weight", (0, 1, 2))
    words = "the teacher's layers.0.down (Linear), its parameter weight, in the forward pass of micro-batch 0 on rank 0"
    assert str(replace(found, of_teacher=True)).startswith(words)


def test_the_innermost_module_is_named_and_masks_are_no_reason(model: Model) -> None:
    model.layers[1].up.bias.data.fill_(-9.0)
    model.layers[1].squash.forward = lambda values: (values - 1.0).sqrt()  # type: ignore[method-assign]
    with NonfiniteHooks(model) as hooks:
        model(TOKENS)
    found = hooks.found
    assert found is not None
    assert (found.module, found.tensor, found.from_finite) == ("layers.1.squash", "its output", True)
    assert found.rows == (0, 1, 2)


def test_a_gradient_is_named_by_the_module_whose_input_it_belongs_to(model: Model) -> None:
    model.layers[0].up.bias.data.fill_(-9.0)  # the roots of zeros: finite forwards, infinite times zero backwards
    with NonfiniteHooks(model) as hooks:
        model(TOKENS[:1])
        model(TOKENS).backward()
    found = hooks.found
    assert found is not None
    assert (found.phase, found.module, found.tensor) == ("backward", "layers.0.squash", "the gradient of its input")
    assert (found.micro_batch, found.rows) == (1, (0, 1, 2))


def test_a_compiled_module_is_looked_into(model: Model) -> None:
    model.layers[0].compile(backend="eager")
    model.layers[0].down.weight.data[0, 0] = torch.inf
    compiled = model.layers[0]._compiled_call_impl
    with NonfiniteHooks(model) as hooks:
        model(TOKENS)
    assert hooks.found is not None
    assert hooks.found.module == "layers.0.down"
    assert model.layers[0]._compiled_call_impl is compiled
