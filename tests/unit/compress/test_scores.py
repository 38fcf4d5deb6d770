"""Scores against what they are defined as: derivatives by a mask, and sums over tokens, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedConfig

from ds_train.compress.coupling import LAYERS, Coupling, Gate, Structure
from ds_train.compress.gates import Gates, lowest, worth
from ds_train.compress.structure import find_structure
from ds_train.config import RunConfig
from ds_train.engine.prunable import find_prunable
from ds_train.errors import UserError
from ds_train.models.cpu_products import use_fp32_products
from ds_train.models.load import build_model, outline
from ds_train.plan.topology import Layout

Make = Callable[..., RunConfig]
ALONE = Layout(1, 1, 1, 1)
MODEL = {
    "arch": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def config_of(**changes: Any) -> PreTrainedConfig:
    config = AutoConfig.for_model(**({"model_type": "llama", "vocab_size": 50} | MODEL | changes | {"arch": None}))
    config.use_cache = False
    return config


def scored(
    make: Make, score: str, kinds: tuple[str, ...], recomputed: bool = False
) -> tuple[Any, Structure, Gates, Tensor]:
    """A model, trained for two micro-batches under its gates, with their tokens (the second half is padding)."""
    run, config = make(model=MODEL), config_of()
    structure = find_structure(run, config, kinds)
    model: Any = build_model(run, config, {}, 0)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gates = Gates(model, structure, score)
    gates.collecting, gates.gradient_scale = True, 0.25
    torch.manual_seed(2)
    tokens = torch.randint(3, 50, (2, 1, 10))
    for batch in tokens:
        (loss_of(model, batch) * 0.25).backward()
    return model, structure, gates, tokens


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Of the first five tokens alone, so that the others don't count."""
    logits = model(input_ids=tokens).logits[:, :5]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:6].flatten(), reduction="sum")


def by_mask(model: Any, coupling: Coupling, tokens: Tensor) -> Tensor:
    """Derivative of the loss by a factor at each token and unit of a gate's input: (tokens, units)."""
    (gate,) = coupling.gates
    factors = torch.ones(tokens.shape[1], coupling.units, requires_grad=True)

    def hook(_: Any, inputs: Any) -> Any:
        return (inputs[0] * factors.repeat_interleave(gate.each, -1),)

    handle = model.get_submodule(gate.module).register_forward_pre_hook(hook)
    (gradient,) = torch.autograd.grad(loss_of(model, tokens), factors)
    handle.remove()
    return gradient


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_taylor_and_fisher_are_the_derivative_by_a_mask(recipe: Make, score: str, kind: str) -> None:
    model, structure, gates, tokens = scored(recipe, score, (kind,))
    for coupling in structure.couplings:
        gates.collecting = False
        slopes = torch.cat([by_mask(model, coupling, batch) for batch in tokens])
        expected = slopes.sum(0).abs() if score == "taylor" else slopes.square().sum(0)
        found = worth(coupling, score, gates.sums, None)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-8)


def test_activations_are_norms_over_the_tokens_that_count(recipe: Make) -> None:
    model, structure, gates, tokens = scored(recipe, "activation", ("heads",))
    gates.collecting = False
    coupling = structure.couplings[1]
    seen: list[Tensor] = []
    hook = lambda _, inputs: seen.append(inputs[0].detach()[:, :5])  # noqa: E731
    model.get_submodule(coupling.gates[0].module).register_forward_pre_hook(hook)
    for batch in tokens:
        model(input_ids=batch)
    expected = torch.cat(seen).view(-1, coupling.units, coupling.gates[0].each).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(worth(coupling, "activation", gates.sums, None).float(), expected)
    weights = torch.tensor([2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(worth(coupling, "wanda", gates.sums, weights).float(), expected * weights.float())


@pytest.mark.parametrize("score", ["taylor", "activation"])
def test_recomputed_layers_count_once(recipe: Make, score: str) -> None:
    kinds = ("heads", "ffn", "hidden", "layers")
    once, again = (scored(recipe, score, kinds, recomputed)[2].sums for recomputed in (False, True))
    assert once.keys() == again.keys()
    for key, sums in once.items():
        torch.testing.assert_close(again[key], sums, msg=lambda text, key=key: f"{key}: {text}")


def test_scoring_keeps_nothing_that_is_recomputed(recipe: Make) -> None:
    """Else the first scored step takes the memory that activation checkpointing saves."""
    model, _, _, tokens = scored(recipe, "taylor", ("heads", "ffn", "hidden"), recomputed=True)
    seen: list[StorageWeakRef] = []
    for layer in model.model.layers:
        for reader in (layer.self_attn.o_proj, layer.mlp.down_proj, layer.post_attention_layernorm):
            reader.register_forward_pre_hook(lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage())))
    loss = loss_of(model, tokens[0])
    assert len(seen) == 9
    assert all(storage.expired() for storage in seen)
    loss.backward()


def test_a_layer_is_worth_what_it_turns(recipe: Make) -> None:
    model, structure, gates, tokens = scored(recipe, "magnitude", ("layers",))
    gates.collecting = False
    with torch.no_grad():
        hidden = [torch.stack(model(input_ids=batch, output_hidden_states=True).hidden_states) for batch in tokens]
    changes = [(1 - torch.cosine_similarity(h[:-1], h[1:], dim=-1))[:, :, :5].flatten(1) for h in hidden]
    change = torch.cat(changes, 1).mean(1)
    # The last of transformers' hidden states has passed the final norm.
    found = worth(structure.couplings[0], "magnitude", gates.sums, None)
    torch.testing.assert_close(found[:-1].float(), change[:-1], rtol=1e-4, atol=1e-6)


def test_a_layer_is_worth_as_much_whatever_tokens_count_in_it() -> None:
    coupling = Coupling(LAYERS, 0, 2, (), (Gate("first", "layer", unit=0), Gate("last", "layer", unit=1)))
    sums = {(LAYERS, 0, "first"): torch.tensor([3.0, 60.0]), (LAYERS, 0, "last"): torch.tensor([1.0, 2.0])}
    assert worth(coupling, "magnitude", sums, None).tolist() == pytest.approx([0.05, 0.5])


def test_experts_are_scored_by_their_logits(recipe: Make) -> None:
    run = recipe(model={"arch": "mixtral"})
    config = AutoConfig.for_model(
        "mixtral", vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    structure = find_structure(run, config, ("experts",))
    model: Any = build_model(run, config, {}, 0)
    gates = Gates(model, structure, "taylor")
    gates.collecting = True
    tokens = torch.randint(3, 50, (1, 10))
    loss_of(model, tokens).backward()
    gates.collecting = False
    coupling, step = structure.couplings[0], 1e-3
    found = gates.sums["experts", 0, coupling.gates[0].module].float()
    for expert in range(4):
        changed = []
        for factor in (1 - step, 1 + step):
            gates.set("experts", 0, [factor if unit == expert else 1.0 for unit in range(4)])
            changed.append(loss_of(model, tokens).item())
        assert abs(float(found[expert]) - (changed[1] - changed[0]) / (2 * step)) < 2e-2


def test_the_lowest_are_chosen_and_of_equal_ones_the_first() -> None:
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 3) == [1, 3, 2]
    coupling = Coupling("ffn", 0, 2, (), (Gate("a", "input"), Gate("b", "input")))
    sums = {("ffn", 0, "a"): torch.tensor([-3.0, 1.0]).double(), ("ffn", 0, "b"): torch.tensor([1.0, -1.0]).double()}
    assert worth(coupling, "taylor", sums, None).tolist() == [4.0, 2.0]


@pytest.mark.parametrize("kinds", [{"ffn": 0.4}, {"ffn": 0.6, "heads": 0.5}, {"heads": 0.5, "ffn": 0.8, "layers": 1}])
def test_a_target_of_parameters_is_reached_and_hardly_more(recipe: Make, kinds: dict[str, Any]) -> None:
    config = config_of(
        intermediate_size=512, num_attention_heads=16, num_key_value_heads=16, head_dim=4, hidden_size=64
    )
    whole = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    target = whole // 2
    run = recipe(model=MODEL, compress={"prune": kinds | {"parameters": target, "multiple": 1}})
    found = find_prunable(run, config, ALONE)
    from ds_train.compress.cut import Cut

    removed: dict[str, dict[int, range]] = {}
    for coupling in found.structure.couplings:
        removed.setdefault(coupling.kind, {})[coupling.number] = range(found.left[coupling.kind], coupling.units)
    small = outline(run, Cut(found.structure, removed).config(config))
    count = sum(p.numel() for p in small.parameters())
    assert 0.8 * target < count <= target


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({"layers": 3}, "compress.prune.layers=3: none of the 3 layers would be left"),
        ({"heads": 0.1}, "compress.prune.heads=0.1: all of the 2 heads would stay"),
        ({"experts": 0.5}, "compress.prune.experts=0.5: llama can't lose these: a llama config says nothing"),
        ({"ffn": 0.5, "parameters": 100}, "compress.prune.parameters=100: with all but the last of these gone it"),
        ({"ffn": 0.5, "parameters": 10**6}, "compress.prune.parameters=1000000: the model as it is has 26,464. Fix: "),
    ],
)
def test_refusals_are_one_line_with_a_fix(recipe: Make, prune: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        find_prunable(recipe(model=MODEL, compress={"prune": prune}), config_of(), ALONE)
    (problem,) = caught.value.problems
    assert words in str(problem)
    assert "\n" not in str(problem)


def test_heads_that_the_tensor_ranks_cannot_share_are_refused(recipe: Make) -> None:
    config = config_of(num_attention_heads=8, num_key_value_heads=4)
    run = recipe(model=MODEL, compress={"prune": {"heads": 0.25}})
    with pytest.raises(UserError, match=r"the 3 heads of 4 that stay can't be shared by 2 ranks\. Fix: 0\.5 leaves 2"):
        find_prunable(run, config, Layout(1, 1, 1, 2))


def test_a_router_that_is_a_linear_layer_of_another_forward() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16))
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = model(hidden)
    use_fp32_products(model)  # type: ignore[arg-type]
    coupling = Coupling("experts", 0, 4, (), (Gate("0", "router"),))
    gates = Gates(model, Structure((coupling,), "", 1), "activation")
    gates.collecting = True
    gates.set("experts", 0, [1.0, 0.0, 1.0, 1.0])
    found = model(hidden)
    found[:, ::2].float().square().sum().backward()
    assert torch.equal(found[:, 1], torch.full((3,), -torch.inf, dtype=torch.bfloat16))
    torch.testing.assert_close(found[:, ::2], expected[:, ::2])
    assert gates.sums["experts", 0, "0"].shape == (4,)


def test_a_router_under_what_zero_3_puts_in_place_of_the_linear_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, hidden: Tensor) -> Tensor:
            other = torch.nn.functional.linear(hidden, torch.ones(4, 8))
            return torch.nn.functional.linear(hidden, self.weight).softmax(-1) + 0.0 * other

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    model, hidden = torch.nn.Sequential(Router()), torch.randn(3, 8)
    coupling = Coupling("experts", 0, 4, (), (Gate("0", "router"),))
    gates = Gates(model, Structure((coupling,), "", 1))
    gates.set("experts", 0, [1.0, 0.0, 1.0, 1.0])
    found = model(hidden)
    expected = (hidden @ model[0].weight.T)[:, [0, 2, 3]].softmax(-1)
    torch.testing.assert_close(found[:, [0, 2, 3]], expected)
    assert (found[:, 1] == 0).all()
    assert torch.nn.functional.linear is zero3_linear_wrap
