"""Budgets: units that compete over layers against a search of all choices, and models of layers of different sizes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ds_train.compress.budget import compete, relative
from ds_train.compress.cut import Cut
from ds_train.compress.gates import Gates
from ds_train.compress.structure import cut_model
from ds_train.config import RunConfig
from ds_train.engine.prunable import find_prunable
from ds_train.errors import UserError
from ds_train.models.load import build_model, outline
from ds_train.plan.topology import Layout

Make = Callable[..., RunConfig]
ALONE = Layout(1, 1, 1, 1)
GEMMA3N = {
    "arch": "gemma3n_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60, "sliding_window": 8,
}  # fmt: skip


def config_of() -> PreTrainedConfig:
    keys = {key: value for key, value in GEMMA3N.items() if key != "arch"}
    config = AutoConfig.for_model("gemma3n_text", vocab_size=60, pad_token_id=0, **keys)
    config.use_cache = False
    return config


def recipe_of(make: Make, **prune: Any) -> RunConfig:
    return make(model=GEMMA3N, compress={"prune": prune})


def cheapest(worth: dict[int, Tensor], gone: int) -> float:
    """The least that can be lost: of all ways to take `gone` units that leave one in every layer."""
    units = [(layer, float(value)) for layer, values in worth.items() for value in values]
    ways = itertools.combinations(range(len(units)), gone)
    sizes = {layer: len(values) for layer, values in worth.items()}
    return min(
        sum(units[place][1] for place in way)
        for way in ways
        if all(sum(units[place][0] == layer for place in way) < size for layer, size in sizes.items())
    )


@pytest.mark.parametrize("gone", [1, 4, 7, 9])
def test_the_units_of_least_worth_in_all_layers_go(gone: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        scale = {0: 1.0, 1: 0.1, 2: 3.0}
        worth = {layer: scale[layer] * torch.rand(4, dtype=torch.float64) for layer in scale}
        removed = compete(worth, gone, 1)
        lost = sum(float(worth[layer][units].sum()) for layer, units in removed.items())
        assert sum(map(len, removed.values())) == gone
        assert abs(lost - cheapest(worth, gone)) < 1e-12
        for layer, units in removed.items():
            assert units == sorted(units, key=lambda unit: float(worth[layer][unit])), "the lowest close first"


@pytest.mark.parametrize(("units", "step", "gone"), [(16, 4, 20), (18, 4, 20), (16, 1, 47), (10, 8, 5)])
def test_what_stays_is_a_multiple_and_every_layer_keeps_one(units: int, step: int, gone: int) -> None:
    torch.manual_seed(0)
    worth = {layer: torch.rand(units, dtype=torch.float64) ** (3 * layer + 1) for layer in range(3)}
    removed = compete(worth, gone, step)
    left = [units - len(removed[layer]) for layer in worth]
    assert all(count >= step and (count % step == 0 or count == units) for count in left)
    # Of 10 with blocks of 8 no layer has more than the first 2 to lose.
    assert min(gone, 3 * ((units - 1) // step * step or units % step)) <= sum(map(len, removed.values())) < gone + step
    for layer, gone_here in removed.items():
        assert set(gone_here) == set(worth[layer].argsort()[: len(gone_here)].tolist())


def test_layers_are_compared_by_their_norm() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = relative({0: values, 1: 1000 * values, 2: 0 * values})
    torch.testing.assert_close(found[0], values / values.square().sum().sqrt())
    torch.testing.assert_close(found[1], found[0])
    assert found[2].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shares", [[0.5, 0.0, 0.75, 0.25], {0: 0.5, 2: 0.75, 3: 0.25}])
def test_each_layer_loses_its_own_share(recipe: Make, shares: Any, tmp_path: Any) -> None:
    run, config = recipe_of(recipe, ffn=shares, budget="per-layer", multiple=4), config_of()
    found = find_prunable(run, config, ALONE)
    assert found.left["ffn"] == (24, 48, 12, 36)
    removed: dict[str, dict[int, list[int]]] = {"ffn": {}}
    for coupling, count in zip(found.structure.couplings, (24, 48, 12, 36), strict=True):
        torch.manual_seed(coupling.number)
        removed["ffn"][coupling.number] = torch.randperm(48)[: 48 - count].tolist()
    cut = Cut(found.structure, removed)
    model: Any = build_model(run, config, {}, 0).eval()
    smaller: Any = cut_model(run, config, model, cut).eval()
    assert smaller.config.intermediate_size == [24, 48, 12, 36]
    masked = copy.deepcopy(model)
    Gates(masked, found.structure).set_removed(found.structure, removed)
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = masked(input_ids=tokens).logits
        smaller.save_pretrained(tmp_path)
        again = type(smaller).from_pretrained(tmp_path).eval()
        for other in (smaller, again):
            logits = other(input_ids=tokens).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    shapes = {name: tuple(parameter.shape) for name, parameter in outline(run, config).named_parameters()}
    assert cut.parameters(shapes) == sum(parameter.numel() for parameter in smaller.parameters())


def test_layers_that_go_take_their_sizes_along() -> None:
    from ds_train.compress.cut import config_after

    record = {"cut": True, "sizes": {"ffn": [24, 12, 36]}, "layers": [0, 2, 3]}
    after = config_after(config_of(), record)
    assert (after.intermediate_size, after.num_hidden_layers) == ([24, 12, 36], 3)
    assert len(after.layer_types) == 3


def test_shares_of_layers_are_scaled_to_a_target(recipe: Make) -> None:
    run, config = recipe_of(recipe, ffn=[0.5, 0.0, 0.75, 0.25], budget="per-layer", multiple=1), config_of()
    whole = sum(parameter.numel() for parameter in outline(run, config).parameters())
    target = whole - 3 * 32 * 30  # thirty channels of 32 inputs and three matrices
    run = recipe_of(recipe, ffn=[0.5, 0.0, 0.75, 0.25], budget="per-layer", multiple=1, parameters=target)
    left = find_prunable(run, config, ALONE).left["ffn"]
    assert isinstance(left, tuple)
    gone = [48 - count for count in left]
    assert gone[1] == 0
    assert 30 <= sum(gone) <= 33
    assert abs(gone[0] - 2 * gone[3]) <= 2


@pytest.mark.parametrize("budget", ["global", "per-layer"])
def test_a_family_of_one_size_for_all_layers_is_refused(recipe: Make, budget: str) -> None:
    model = {"arch": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", vocab_size=60, **{key: model[key] for key in model if key != "arch"})
    config.use_cache = False
    ffn = 0.5 if budget == "global" else [0.5, 0.25]
    run = recipe(model=model, compress={"prune": {"ffn": ffn, "budget": budget}})
    words = rf"compress\.prune\.budget={budget}: a llama config has one number of its ffn for all layers\. Fix: set it"
    with pytest.raises(UserError, match=words):
        find_prunable(run, config, ALONE)


def test_ranks_must_be_able_to_share_every_layer(recipe: Make) -> None:
    run = recipe_of(recipe, ffn=[0.5, 0.25, 0.0, 0.0], budget="per-layer", multiple=1)
    assert find_prunable(run, config_of(), Layout(1, 1, 1, 4)).step == 4
    run = recipe_of(recipe, ffn=[0.5, 0.27, 0.0, 0.0], budget="per-layer", multiple=1)
    with pytest.raises(UserError, match=r"the 36 ffn of 48 that stay can't be shared by 8 ranks"):
        find_prunable(run, config_of(), Layout(1, 1, 1, 8))
