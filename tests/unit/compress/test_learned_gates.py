"""Learned gates against torch's own distributions and autograd, and on units whose worth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from ds_train.compress.coupling import Coupling, Gate, Member, Structure
from ds_train.compress.gates import Gates
from ds_train.compress.learned import LearnedGates, Shared, hard_concrete, open_probability, units_of, with_open
from ds_train.compress.structure import find_structure
from ds_train.config import RunConfig
from ds_train.models.load import build_model

Make = Callable[..., RunConfig]
PLACE = ("ffn", 0)
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_gates_are_the_stretched_concrete_distribution() -> None:
    """Eqs. 10 to 12 of the paper: a relaxed Bernoulli, stretched to (-0.1, 1.1) and clamped."""
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    noise = torch.rand(200_000, 5, dtype=torch.float64)
    found, _ = hard_concrete(log_alpha, noise)
    relaxed = torch.distributions.RelaxedBernoulli(torch.tensor(2 / 3, dtype=torch.float64), logits=log_alpha)
    for edge in (0.1, 0.35, 0.5, 0.9):
        logit = torch.logit(torch.tensor((edge + 0.1) / 1.2, dtype=torch.float64))
        expected = torch.sigmoid(logit * 2 / 3 - log_alpha)  # its logit is a logistic variable
        torch.testing.assert_close((found < edge).double().mean(0), expected, rtol=0, atol=5e-3)
    stretched = relaxed.sample((200_000,)) * 1.2 - 0.1
    torch.testing.assert_close(open_probability(log_alpha), (stretched > 0).double().mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.mean(0), stretched.clamp(0, 1).mean(0), rtol=0, atol=5e-3)


def test_their_derivative_is_that_of_autograd() -> None:
    log_alpha = torch.linspace(-3, 3, 40, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(40, dtype=torch.float64)
    soft = torch.sigmoid((torch.logit(noise) + log_alpha) / (2 / 3))
    (expected,) = torch.autograd.grad((soft * 1.2 - 0.1).clamp(0, 1).sum(), log_alpha)
    torch.testing.assert_close(hard_concrete(log_alpha.detach(), noise)[1], expected)


@pytest.mark.parametrize("count", [0.3, 7.0, 9.9])
def test_the_expected_number_of_open_gates_is_met(count: float) -> None:
    values = 20 * torch.randn(10, dtype=torch.float64)
    moved = with_open(values, count)
    assert math.isclose(float(open_probability(moved).sum()), count, rel_tol=1e-9)
    torch.testing.assert_close(moved - values, (moved - values)[:1].expand(10))


def test_noise_depends_on_seed_step_and_unit_alone() -> None:
    def drawn(units: int, seed: int = 1, step: int = 3, place: tuple[str, int] = PLACE) -> Tensor:
        return LearnedGates([Shared({place: units}, 2)], 10, seed)._noise(step, place, units)

    assert torch.equal(drawn(8), drawn(8))
    assert torch.equal(drawn(8), drawn(20)[:8])
    for other in (drawn(8, seed=2), drawn(8, step=4), drawn(8, place=("ffn", 1)), drawn(8, place=("heads", 0))):
        assert not torch.isclose(other, drawn(8)).any()


def test_units_that_the_loss_needs_stay_and_what_is_not_finite_teaches_nothing() -> None:
    torch.manual_seed(0)
    worth = torch.rand(64, dtype=torch.float64).square()
    order = torch.randperm(64)
    worth[order[:32]] += 1.0

    def learned(steps: int, noise: float) -> LearnedGates:
        gates = LearnedGates([Shared({PLACE: 64}, 32)], steps, 0)
        for step in range(steps):
            # The loss falls by a unit's worth as its gate opens.
            gates.learn(step, {PLACE: -worth + noise * torch.randn(64, dtype=torch.float64)})
        return gates

    for steps, noise, right in ((16, 0.2, 26), (400, 1.0, 29)):
        stay = set(learned(steps, noise).log_alpha[PLACE].topk(32).indices.tolist())
        assert len(stay & set(order[:32].tolist())) >= right, steps
    gates = LearnedGates([Shared({PLACE: 64}, 32)], 16, 0)
    gates.learn(0, {PLACE: -worth})
    before = gates.log_alpha[PLACE]
    gates.learn(1, {PLACE: torch.full((64,), torch.nan, dtype=torch.float64)})
    moved = gates.log_alpha[PLACE] - before
    torch.testing.assert_close(moved, moved[:1].expand(64))  # the number that is open falls all the same


def test_a_layer_whose_gradient_is_rounding_moves_no_further() -> None:
    places = {("experts", layer): 4 for layer in range(2)}
    gates = LearnedGates([Shared({place: units}, 2) for place, units in places.items()], 100, 0)
    before = dict(gates.log_alpha)
    gates.learn(
        0, {("experts", 0): torch.tensor([3.0, -2.0, 1.0, 5.0]).double(), ("experts", 1): torch.full((4,), 1e-8)}
    )
    moved = gates.log_alpha["experts", 1] - before["experts", 1]
    torch.testing.assert_close(moved, moved.mean().expand(4), rtol=0, atol=1e-7)


def test_open_units_fall_in_a_line_to_those_that_stay_and_layers_may_share_them() -> None:
    places = {("ffn", 0): 10, ("ffn", 1): 10}
    gates = LearnedGates([Shared(places, 8), Shared({("heads", 0): 4}, 4)], 4, 0)
    assert set(gates.log_alpha) == set(places), "what all stay isn't gated"
    seen = []
    for step in range(5):
        seen.append(sum(float(open_probability(values).sum()) for values in gates.log_alpha.values()))
        if step < 4:
            push = {("ffn", 0): torch.full((10,), -1.0), ("ffn", 1): torch.full((10,), 1.0)}
            gates.learn(step, {place: values.double() for place, values in push.items()})
    torch.testing.assert_close(torch.tensor(seen), torch.linspace(19, 8, 5))
    first, second = (float(open_probability(values).sum()) for values in gates.log_alpha.values())
    assert first > second + 2


def test_it_goes_on_from_its_state_to_the_same_bits() -> None:
    def made() -> LearnedGates:
        return LearnedGates([Shared({PLACE: 12}, 5)], 6, 3)

    def learn(gates: LearnedGates, first: int, stop: int) -> None:
        for step in range(first, stop):
            torch.manual_seed(step)
            gates.learn(step, {PLACE: torch.randn(12, dtype=torch.float64)})

    whole, broken = made(), made()
    learn(whole, 0, 6)
    learn(broken, 0, 3)
    again = made()
    again.load_state(broken.state())
    learn(again, 3, 6)
    assert torch.equal(again.log_alpha[PLACE], whole.log_alpha[PLACE])
    assert torch.equal(again.draw(7)[PLACE], whole.draw(7)[PLACE])


def gated(make: Make, family: str, kinds: tuple[str, ...], **sizes: Any) -> tuple[Any, Structure, Gates, Any]:
    run = make(model={"arch": family}, task={"kind": "masked-lm" if family == "bert" else "causal-lm"})
    known = AutoConfig.for_model(family).to_dict()
    plain = {key: 0.0 for key, value in known.items() if isinstance(value, float) and "drop" in key}
    config = AutoConfig.for_model(family, **(SIZES | sizes | plain))
    config.use_cache = False
    structure = find_structure(run, config, kinds)
    model: Any = build_model(run, config, {}, 0).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    gates = Gates(model, structure, "gates")
    tokens = torch.randint(3, 50, (2, 9))

    def loss() -> Tensor:
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return model, structure, gates, loss


@pytest.mark.parametrize(
    ("family", "kinds", "sizes"),
    [
        ("llama", ("heads", "ffn", "hidden"), {}),
        ("bert", ("heads", "hidden", "ffn"), {}),
        ("mixtral", ("experts",), {"num_local_experts": 4}),
    ],
)
def test_gradients_by_gates_are_differences_of_the_loss(
    recipe: Make, family: str, kinds: tuple[str, ...], sizes: dict[str, int]
) -> None:
    torch.manual_seed(3)
    _, structure, gates, loss = gated(recipe, family, kinds, **sizes)
    for coupling in structure.couplings:
        gates.gradient_scale = 4.0
        values = torch.rand(coupling.units, dtype=torch.float64) * 0.8 + 0.1
        gates.learn(coupling.kind, coupling.number, values)
        (loss() * 4.0).backward()
        taken = gates.take_gradients()
        found = units_of(
            (taken[coupling.kind, coupling.number, gate.module] for gate in coupling.gates), coupling.units
        )
        assert not gates.take_gradients()
        for unit in range(0, coupling.units, max(1, coupling.units // 4)):
            sides = []
            for step in (-1e-3, 1e-3):
                changed = values.clone()
                changed[unit] += step
                gates.set(coupling.kind, coupling.number, changed.tolist())
                sides.append(loss().item())
            expected = (sides[1] - sides[0]) / 2e-3
            assert abs(float(found[unit]) - expected) < 1e-4 * (1e-1 + abs(expected)), (coupling.kind, unit)
        gates.set(coupling.kind, coupling.number, [1.0] * coupling.units)


@pytest.mark.parametrize("learned", [True, False])
def test_closed_channels_of_a_layer_norm_are_nothing_at_all(learned: bool) -> None:
    """Rounding in them is another one in every layout, and Adam steps as far for it as for a gradient."""
    norm = torch.nn.LayerNorm(12)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    members = (Member("norm.weight", 0, 1), Member("norm.bias", 0, 1))
    structure = Structure((Coupling("hidden", 0, 12, members, (Gate("norm", "norm"),)),), "layers", 1)
    gates = Gates(torch.nn.ModuleDict({"norm": norm}), structure)
    values = (torch.rand(12) + 0.2) * torch.tensor([0.0, 1.0, 1.0] * 4)
    if learned:
        gates.learn("hidden", 0, values)
    else:
        gates.set("hidden", 0, values.tolist())
    hidden, upstream = (1 + torch.randn(50, 12)).requires_grad_(), torch.randn(50, 12)
    found = norm(hidden)
    (found * upstream).sum().backward()
    closed = values == 0
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert hidden.grad is not None
    for tensor in (found, norm.weight.grad, norm.bias.grad, hidden.grad):
        assert not tensor[..., closed].any()
        assert tensor[..., ~closed].all()


def test_what_is_evaluated_has_no_gates(recipe: Make) -> None:
    model, _, gates, loss = gated(recipe, "llama", ("ffn",))
    plain = loss().item()
    gates.learn("ffn", 0, torch.zeros(48))
    assert loss().item() != plain
    model.eval()
    assert loss().item() == plain


def test_no_device_is_waited_for_to_close_units() -> None:
    """Tensors without values can't be looked at: what runs on them never asks a device for one."""
    modules = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "layer": torch.nn.Linear(4, 4)}).to("meta")
    couplings = (
        Coupling("hidden", 0, 4, (), (Gate("norm", "norm"),)),
        Coupling("layers", 0, 1, (), (Gate("layer", "layer", unit=0),)),
    )
    gates = Gates(modules, Structure(couplings, "layers", 1))
    gates.set("hidden", 0, [1.0, 0.0, 0.5, 1.0])
    gates.set("layers", 0, [0.5])
    modules["layer"](modules["norm"](torch.empty(3, 4, device="meta"))).sum().backward()
    assert modules["layer"].weight.grad is not None
