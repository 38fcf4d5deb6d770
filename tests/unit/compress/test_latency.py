"""A target of time: the most units within it, by an exhaustive search, and real forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from ds_train.config import RunConfig
from ds_train.engine import prunable
from ds_train.engine.latency import forward_seconds
from ds_train.engine.prunable import find_prunable
from ds_train.errors import UserError
from ds_train.plan.topology import Layout

Make = Callable[..., RunConfig]
ALONE = Layout(1, 1, 1, 1)
MODEL = {
    "arch": "llama", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 4,
}  # fmt: skip


def config_of(**changes: Any) -> PreTrainedConfig:
    config = AutoConfig.for_model(**({"model_type": "llama", "vocab_size": 50} | MODEL | changes | {"arch": None}))
    config.use_cache = False
    return config


def made_up(config: PreTrainedConfig) -> float:
    """Seconds of a machine on which time is work."""
    layer = config.intermediate_size * 3.0 + config.num_attention_heads * 10.0
    return 1e-3 + 1e-5 * config.num_hidden_layers * config.hidden_size * layer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedConfig]:
    """Configs whose time was asked for."""
    configs: list[PreTrainedConfig] = []

    def seconds(_: Any, config: PreTrainedConfig, device: Any) -> float:
        configs.append(config)
        return made_up(config)

    monkeypatch.setattr(prunable, "forward_seconds", seconds)
    return configs


def left_in(make: Make, prune: Mapping[str, Any], after: Layout = ALONE) -> Mapping[str, int]:
    return find_prunable(make(model=MODEL, compress={"prune": prune}), config_of(), after).left


@pytest.mark.parametrize("kinds", [{"ffn": 0.5}, {"ffn": 0.3, "heads": 0.5}, {"ffn": 0.6, "layers": 1}])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_most_units_within_the_time_stay(
    recipe: Make, asked: list[PreTrainedConfig], kinds: dict[str, Any], tensor: int, share: float
) -> None:
    prune = kinds | {"latency": share, "multiple": 1}
    target = share * made_up(config_of())
    found = left_in(recipe, prune, Layout(1, 1, 1, tensor))
    assert len(asked) <= 11, "as few as halving takes"

    def time_of(left: Mapping[str, int]) -> float:
        heads = left.get("heads", 8)
        sizes = {
            "intermediate_size": left.get("ffn", 96), "num_attention_heads": heads, "num_key_value_heads": heads,
            "num_hidden_layers": left.get("layers", 3),
        }  # fmt: skip
        return made_up(config_of(**sizes))

    units, largest = {"ffn": 96, "heads": 8}, max(kinds.get("ffn", 0), kinds.get("heads", 0))
    for number in range(257):  # of 256 parts of the way from all to the last ones
        left = {
            kind: 3 - share
            if kind == "layers"
            else math.ceil((1 - number / 256 * share / largest) * units[kind] / tensor + 1e-6) * tensor
            for kind, share in kinds.items()
        }
        left = {kind: min(count, units.get(kind, 3)) for kind, count in left.items()}
        if "heads" in left:  # Llama's config wants numbers that divide the hidden size
            left["heads"] = min(number for number in (1, 2, 4, 8) if number >= left["heads"])
        if time_of(left) <= target:
            assert found == left
            return
    pytest.fail("there is one")


def test_milliseconds_are_asked_for_likewise_and_the_choice_is_kept(
    recipe: Make, asked: list[PreTrainedConfig]
) -> None:
    share = left_in(recipe, {"ffn": 0.5, "latency": 0.7})
    milliseconds = 0.7 * made_up(config_of()) * 1e3
    assert left_in(recipe, {"ffn": 0.5, "latency_ms": milliseconds}) == share
    asked.clear()
    run = recipe(model=MODEL, compress={"prune": {"ffn": 0.5, "latency": 0.7}})
    again = find_prunable(run, config_of(), ALONE, left={"ffn": 16})
    assert (again.left, asked) == ({"ffn": 16}, []), "a run that goes on measures nothing"


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({"ffn": 0.5, "latency": 0.001}, r"compress\.prune\.latency=0\.001: with all but the last of these gone it"),
        (
            {"ffn": 0.5, "latency_ms": 1e6},
            r"compress\.prune\.latency_ms=1e\+06: the model as it is takes \d\d\d ms",
        ),
        ({"hidden": 0.5, "latency_ms": 1e-6}, r"all but the last .* would take"),
    ],
)
def test_what_cannot_be_reached_is_refused(
    recipe: Make, asked: list[PreTrainedConfig], prune: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        left_in(recipe, prune)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_real_forward_pass_is_timed_at_the_samples_and_length_asked_for(
    recipe: Make, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    original = torch.nn.Embedding.forward

    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape)
        return original(self, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    labels = {"num_labels": 2} if task == "sequence-classification" else {}
    prune = {"ffn": 0.5, "latency": 0.7, "latency_samples": 3, "latency_length": 5}
    run = recipe(model=MODEL, task={"kind": task} | labels, compress={"prune": prune})
    before = torch.get_rng_state()
    assert 0.0 < forward_seconds(run, config_of(pad_token_id=0), "cpu") < 1.0
    assert set(seen) == {torch.Size((3, 5))}
    assert len(seen) >= 12
    assert torch.equal(torch.get_rng_state(), before), "what is measured draws nothing from the run"


def test_a_pass_that_does_not_fit_says_so(recipe: Make) -> None:
    run = recipe(model=MODEL, compress={"prune": {"ffn": 0.5, "latency": 0.7, "latency_samples": 1 << 50}})
    with pytest.raises(UserError, match=r"latency_samples=?.*: no forward pass can be measured"):
        forward_seconds(run, config_of(), "cpu")
