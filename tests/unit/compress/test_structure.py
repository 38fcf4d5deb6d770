"""What can be cut of a family is found and proved: a masked model and a cut one give the same logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ds_train.compress import cut as cut_room
from ds_train.compress.coupling import Coupling, Structure
from ds_train.compress.cut import Cut, CutSource, resized
from ds_train.compress.gates import Gates
from ds_train.compress.structure import check_shapes, cut_model, find_structure
from ds_train.config import RunConfig
from ds_train.models.load import build_model

Make = Callable[..., RunConfig]
SIZES = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 60, "max_position_embeddings": 32, "num_local_experts": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROVED: dict[str, tuple[str, ...]] = {
    "llama": ("heads", "ffn", "hidden", "layers"),
    "qwen3": ("heads", "ffn", "hidden", "layers"),
    "gemma3_text": ("heads", "ffn", "layers"),
    "gpt_neox": ("heads+hidden", "ffn", "layers"),
    "gpt2": ("heads+hidden", "ffn", "layers"),
    "bert": ("heads+hidden", "ffn", "layers"),
    "mixtral": ("heads", "experts", "hidden", "layers"),
    "phi3": ("ffn", "layers"),
}
CASES = [(family, kinds) for family, all_kinds in PROVED.items() for kinds in (*all_kinds, "+".join(all_kinds))]


def small(family: str) -> PreTrainedConfig:
    known = AutoConfig.for_model(family).to_dict()
    renamed = AutoConfig.for_model(family).attribute_map
    sizes = {key: value for key, value in SIZES.items() if renamed.get(key, key) in known}
    dropout = {key: 0.0 for key, value in known.items() if isinstance(value, float) and "drop" in key}
    lists = {"layer_types": None} if "layer_types" in known else {}
    config = AutoConfig.for_model(family, **(sizes | dropout | lists))
    config.use_cache = False
    return config


def recipe_of(make: Make, family: str, **task: Any) -> RunConfig:
    kind = {"kind": "masked-lm"} if family == "bert" else {}
    return make(model={"arch": family}, task=kind | task)


def model_of(run: RunConfig, config: PreTrainedConfig) -> Any:
    model: Any = in_fp64(build_model(run, config, {}, 0))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def in_fp64(model: Any) -> Any:
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("eager")  # torch's grouped products know no fp64
    return model.eval().double()


def removed_of(structure: Structure) -> dict[str, dict[int, list[int]]]:
    """A third of the units, half of the hidden size where heads stay, other ones in every layer."""
    removed: dict[str, dict[int, list[int]]] = {}
    alone = not structure.of_kind("heads")
    for coupling in structure.couplings:
        count = max(1, coupling.units // (2 if coupling.kind == "hidden" and alone else 3))
        torch.manual_seed(coupling.number)
        removed.setdefault(coupling.kind, {})[coupling.number] = torch.randperm(coupling.units)[:count].tolist()
    return removed


@pytest.mark.parametrize(("family", "kinds"), CASES)
def test_masked_and_cut_logits_are_equal(recipe: Make, family: str, kinds: str) -> None:
    run, config = recipe_of(recipe, family), small(family)
    structure = find_structure(run, config, kinds.split("+"))
    model, removed = model_of(run, config), removed_of(structure)
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        smaller = in_fp64(cut_model(run, config, model, Cut(structure, removed)))
        for name, parameter in smaller.named_parameters():  # `cut_model` made it in fp32
            cut, whole = Cut(structure, removed), dict(model.named_parameters(remove_duplicate=False))
            parameter.copy_(cut.apply(cut.origin(name), whole[cut.origin(name)]))
        plain, masked = model(input_ids=tokens).logits, copy.deepcopy(model)
        gates = Gates(masked, structure)
        gates.set_removed(structure, removed)
        expected, found = masked(input_ids=tokens).logits, smaller(input_ids=tokens).logits
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
        assert (plain - expected).abs().max() > 1e-3 * expected.abs().max(), "nothing was masked"
        gates.set_removed(structure, removed, 1.0)
        assert torch.equal(masked(input_ids=tokens).logits, plain)
        gates.set_removed(structure, removed, 1e-9)  # masks close smoothly
        almost = masked(input_ids=tokens).logits
        assert (almost - expected).abs().max() < (0.3 if "experts" in kinds else 1e-4) * expected.abs().max()
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", PROVED)
def test_the_cut_model_is_a_stock_one_that_from_pretrained_loads(recipe: Make, family: str, tmp_path: Any) -> None:
    run, config = recipe_of(recipe, family), small(family)
    structure = find_structure(run, config, "+".join(PROVED[family]).split("+"))
    smaller: Any = cut_model(run, config, model_of(run, config), Cut(structure, removed_of(structure))).eval()
    smaller.save_pretrained(tmp_path)
    again: Any = type(smaller).from_pretrained(tmp_path).eval()
    tokens = torch.randint(3, 60, (2, 9))
    assert torch.equal(again(input_ids=tokens).logits, smaller(input_ids=tokens).logits)
    assert again.config.num_hidden_layers == 2


def test_a_classifier_loses_what_its_pooler_reads(recipe: Make) -> None:
    run, config = recipe_of(recipe, "bert", kind="sequence-classification", num_labels=2), small("bert")
    structure = find_structure(run, config, ("heads", "hidden"))
    gates = {gate.module: gate.how for gate in structure.of_kind("hidden")[0].gates}
    assert gates["classifier"] == gates["bert.pooler.dense"] == "input"


@pytest.mark.parametrize(
    ("family", "kinds", "words"),
    [
        ("gemma3_text", ["hidden"], "doesn't compute what one with them masked does"),  # embeddings scaled by the width
        ("gpt2", ["heads"], "heads and hidden go together"),
        ("mixtral", ["ffn"], "its experts"),
        ("llama", ["experts"], "says nothing of its experts"),
        ("phi3", ["heads"], "share for each of its heads"),
        ("mamba", ["layers", "heads"], "a mamba config says nothing of its heads"),
        ("ernie4_5_moe", ["ffn"], "e_score_correction_bias isn't trained"),
        ("rwkv", ["layers"], "layer 1 would be another one at place 0"),  # the first has a norm more
        ("openai-gpt", ["layers"], r"can be built and compared \(AttributeError"),  # its layers give lists
    ],
)
def test_what_cannot_be_proved_is_refused(recipe: Make, family: str, kinds: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_structure(recipe_of(recipe, family), small(family), kinds)


def test_experts_that_are_chosen_by_groups_are_refused(recipe: Make) -> None:
    """Those that are left would be dealt to the groups anew, and a token would be sent to others."""
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    groups = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")}
    config = AutoConfig.for_model("deepseek_v2", num_hidden_layers=3, **sizes, **experts, **groups)
    with pytest.raises(ValueError, match="experts lie in 4 groups"):
        find_structure(recipe_of(recipe, "deepseek_v2"), config, ["experts"])


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_layers_of_two_kinds_stay_what_they_are(recipe: Make, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")}
    config = AutoConfig.for_model(
        "deepseek_v2", first_k_dense_replace=2, num_hidden_layers=4, **sizes, **experts, **ranks
    )
    config.use_cache = False
    run = recipe_of(recipe, "deepseek_v2")
    structure = find_structure(run, config, ["layers"])
    model: Any = build_model(run, config, {}, 0).eval()
    cut = Cut(structure, {"layers": {0: [gone]}})
    smaller, tokens = cut_model(run, config, model, cut).eval(), torch.randint(3, 60, (2, 9))
    assert smaller.config.first_k_dense_replace == (1 if gone < 2 else 2)
    check_shapes(run, config, cut)
    found = smaller(input_ids=tokens).logits
    # The oracle: the whole model, whose layer hands on what it gets.
    model.model.layers[gone].forward = lambda hidden_states, *_, **__: hidden_states
    torch.testing.assert_close(found, model(input_ids=tokens).logits)
    if gone < 2:
        monkeypatch.setattr(cut_room, "said_of_layers", lambda *_: {})
        with pytest.raises(ValueError, match=r"layers\.1\.mlp.* would be left with the shape"):
            check_shapes(run, config, cut)


def test_a_wrong_coupling_is_seen(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof isn't the finding over again: without one of the members that go together it fails."""
    from ds_train.compress import structure as room

    original = room._members

    def without_up(*arguments: Any) -> Any:
        for member in original(*arguments):
            yield room.replace(member, parts=2) if "q_proj" in member.name else member

    monkeypatch.setattr(room, "_members", without_up)
    monkeypatch.setattr(room, "_ordered", lambda structure, order: structure)
    with pytest.raises(ValueError, match="doesn't compute"):
        find_structure(recipe_of(recipe, "llama"), small("llama"), ["heads"])


def test_a_cut_source_gives_slices_of_weights_and_states(recipe: Make) -> None:
    class Files:
        shapes: Any = dict.fromkeys(["model.layers.0.a.weight", "model.layers.1.a.weight", "head.weight"])

        def whole(self, name: str, kind: str = "weight") -> torch.Tensor:
            base = torch.arange(12.0).view(4, 3) + (100 if "1" in name else 0)
            return base if kind == "weight" else -base

    from ds_train.compress.coupling import Member

    member = Member("model.layers.1.a.weight", 0, 2)
    structure = Structure((Coupling("ffn", 1, 2, (member,), ()),), "model.layers", 2)
    source = CutSource(Cut(structure, {"ffn": {1: [0]}, "layers": {0: [0]}}), Files())
    assert list(source.shapes) == ["model.layers.0.a.weight", "head.weight"]
    expected = torch.tensor([[106.0, 107.0, 108.0], [109.0, 110.0, 111.0]])
    assert torch.equal(source.whole("model.layers.0.a.weight"), expected)
    assert torch.equal(source.whole("model.layers.0.a.weight", "exp_avg"), -expected)
    assert torch.equal(source.whole("head.weight"), Files().whole("head.weight"))


def test_a_config_keeps_what_would_follow_from_the_hidden_size() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=48, n_head=6)
    less = resized(config, {"heads": 4, "hidden": 32})
    assert (less.n_embd, less.n_head, less.n_inner) == (32, 4, 192)
    llama = resized(AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=6), {"hidden": 36})
    assert (llama.head_dim, llama.num_attention_heads, llama.hidden_size) == (8, 6, 36)
    assert isinstance(AutoModelForCausalLM.from_config(llama).model.layers, nn.ModuleList)
