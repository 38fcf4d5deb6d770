"""Distillation: the losses of a plain PyTorch loop in float64, in every layout, with the teacher beside or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import (
    SEED,
    STEPS,
    TWO_RANKS,
    history_of,
    load_plain,
    plain_steps,
    train_on_two_ranks,
    write_corpus,
    write_recipe,
    write_weights,
)
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from ds_train.config import load
from ds_train.schedule.seeds import fold_seed

pytestmark = pytest.mark.parity


def without(*names: str) -> dict[str, dict[str, Any]]:
    return {name: layout for name, layout in TWO_RANKS.items() if name not in names}


PAIRS = [[0, 1], [3, 1]]
FOUR_RANKS: dict[str, dict[str, Any]] = {"pipeline2-tensor2": {"pipeline": 2, "tensor": 2}}
TEMPERATURE, ALPHA, ALPHA_END, TOP, HIDDEN = 2.0, 0.8, 0.2, 5, 0.3
CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "forward": ({"logits": "forward-kl", "alpha_end": ALPHA_END}, TWO_RANKS),
    "cached": ({"logits": "reverse-kl", "alpha_end": ALPHA_END, "cache_top": TOP}, without("sequence2")),
    "hidden": ({"logits": "js", "alpha_end": ALPHA_END, "hidden": HIDDEN}, TWO_RANKS),
    "sharded": ({"logits": "js", "alpha_end": ALPHA_END, "hidden": HIDDEN, "placement": "sharded"}, TWO_RANKS),
    "offloaded": ({"logits": "js", "alpha_end": ALPHA_END, "hidden": HIDDEN, "placement": "offloaded"}, TWO_RANKS),
    "relations": (
        {"relations": 2.0, "relation_layers": PAIRS, "relation_kinds": ["attention", "query", "key", "value"]},
        without("sequence2"),
    ),
}


PLACED = ("sharded", "offloaded")


def kl(target: Tensor, other: Tensor) -> Tensor:
    return functional.kl_div(other, target, reduction="sum", log_target=True)


def divergence(kind: str, p: Tensor, q: Tensor) -> Tensor:
    if kind != "js":
        return kl(p, q) if kind == "forward-kl" else kl(q, p)
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


def with_rest(logp: Tensor, top: Tensor) -> Tensor:
    known = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, top, True)
    return torch.cat([logp.gather(-1, top), logp.exp().masked_fill(known, 0.0).sum(-1, keepdim=True).log()], -1)


def projections(own: int, other: int, count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(fold_seed(SEED, "distill_projections"))
    weights = [torch.randn(other, own, generator=draw) * own**-0.5 for _ in range(count)]
    for weight in weights:
        weight[: min(own, other)] = torch.eye(min(own, other), own)
    return [weight.double().requires_grad_() for weight in weights]


class Attention:
    """Queries, keys and values of each layer as its attention gets them, (B, H, T, K), from its matrices alone."""

    def __init__(self, model: Any) -> None:
        self.seen: list[dict[str, Tensor]] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._take, with_kwargs=True)

    def _take(self, module: Any, args: Any, kwargs: dict[str, Any], _: Any) -> None:
        hidden = kwargs["hidden_states"]
        states = {
            kind: getattr(module, f"{kind[0]}_proj")(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for kind in ("query", "key", "value")
        }
        rotary = modeling_llama.apply_rotary_pos_emb(states["query"], states["key"], *kwargs["position_embeddings"])
        self.seen.append(dict(zip(("query", "key"), rotary, strict=True)) | {"value": states["value"]})


def relation(states: dict[str, Tensor], kind: str, seen: Tensor) -> Tensor:
    """Log-probabilities (B, heads, T, T) of how tokens relate; 4 heads."""
    if kind == "attention":
        one, other = states["query"], states["key"].repeat_interleave(2, 1)
    else:
        joined = states[kind].transpose(1, 2).flatten(2)
        one = other = torch.stack(joined.chunk(4, -1), 1)
    scores = one @ other.transpose(2, 3) / one.shape[-1] ** 0.5
    return torch.log_softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1)


def relations_apart(ours: Attention, theirs: Attention, section: Any, batch: dict[str, Tensor], counts: Tensor) -> Any:
    document = (batch["position_ids"] == 0).cumsum(-1)
    seen = (document[:, :, None] == document[:, None]).tril()
    total: Any = 0.0
    for own, other in PAIRS:
        for kind in section.relation_kinds:
            q, p = (relation(states.seen[at], kind, seen) for states, at in ((ours, own), (theirs, other)))
            apart = torch.where(seen[:, None], p.exp() * (p - q), 0.0).sum(-1).mean((1, 2))
            total = total + (apart * counts).sum() / len(PAIRS) / len(section.relation_kinds)
    return section.relations * total


def plain_loop(recipe: Path, teacher_folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, with whole logits of the whole global batch."""
    run = load(str(recipe))
    section = run.compress.distill
    model, teacher = load_plain(str(run.model.path)), load_plain(teacher_folder)
    seen: dict[str, list[Tensor]] = {"model": [], "teacher": []}
    for name, one in (("model", model), ("teacher", teacher)):
        for layer in one.model.layers:
            layer.register_forward_hook(lambda _, __, output, name=name: seen[name].append(output))
    attention = Attention(model), Attention(teacher)
    extra = projections(32, 24, 4) if section.hidden else []

    def loss_of(step: int, batch: dict[str, Any], labels: Tensor) -> Tensor:
        kept = labels != -100
        seen.update(model=[], teacher=[])
        for one in attention:
            one.seen.clear()
        output = model(**batch)
        with torch.no_grad():
            theirs = teacher(**batch)
        p, q = (torch.log_softmax(out.logits[kept] / TEMPERATURE, -1) for out in (theirs, output))
        if section.cache_top:
            top = theirs.logits[kept].topk(TOP).indices
            p, q = with_rest(p, top), with_rest(q, top)
        alpha = 0.0 if section.logits == "none" else ALPHA + (ALPHA_END - ALPHA) * step / STEPS
        loss = (1 - alpha) * functional.cross_entropy(output.logits[kept], labels[kept], reduction="sum")
        if section.logits != "none":
            loss = loss + alpha * TEMPERATURE**2 * divergence(section.logits, p, q)
        for layer, weight in enumerate(extra):
            square = (seen["model"][layer] @ weight.t() - seen["teacher"][layer // 2]).square().mean(-1).mean(-1)
            loss = loss + HIDDEN / len(extra) * (square * kept.sum(-1)).sum()
        if section.relations:
            loss = loss + relations_apart(*attention, section, batch, kept.sum(-1))
        return loss / kept.sum()

    return plain_steps(recipe, [*model.parameters(), *extra], loss_of)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus, a Llama of 4 layers and its teacher of 2 other ones."""
    root = tmp_path_factory.mktemp("distill")
    config = LlamaConfig(
        vocab_size=300, hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(8)
    LlamaForCausalLM(config).save_pretrained(root / "teacher")
    return {
        "corpus": write_corpus(root / "corpus"), "weights": write_weights(root / "llama", "llama"),
        "teacher": root / "teacher",
    }  # fmt: skip


def write_case(folder: Path, folders: dict[str, Path], case: str, layout: str, parallel: dict[str, Any]) -> Path:
    own = CASES[case][0]
    of_logits = {"temperature": TEMPERATURE, "alpha": ALPHA} if "logits" in own else {}
    section = {"teacher": str(folders["teacher"]), **of_logits, **own}
    return write_recipe(
        folder, f"{case}-{layout}", folders["corpus"], folders["weights"], "llama", parallel,
        compress={"distill": section}, schedule={"kind": "constant"},
    )  # fmt: skip


def check(folder: Path, folders: dict[str, Path], chosen: dict[str, list[str]], ranks: int = 2) -> None:
    recipes = {
        (case, layout): write_case(folder, folders, case, layout, (CASES[case][1] | FOUR_RANKS)[layout])
        for case, layouts in chosen.items()
        for layout in layouts
    }
    run_ranks(ranks, ["tests/parity/train_many.py", *map(str, recipes.values())], timeout_s=900).check()
    for case, layouts in chosen.items():
        expected = plain_loop(recipes[case, layouts[0]], folders["teacher"])
        for layout in layouts:
            found = history_of(folder, f"{case}-{layout}")
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{case} {layout}")


def test_a_sample_of_layouts(folders: dict[str, Path], tmp_path: Path) -> None:
    check(
        tmp_path,
        folders,
        {
            "forward": ["zero3"],
            "cached": ["tensor2"],
            "hidden": ["pipeline2"],
            "relations": ["tensor2"],
            "sharded": ["zero3"],
        },
    )


@pytest.mark.exhaustive
def test_a_run_goes_on_in_another_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    """Projections and all: taught by hidden states while rounded to 4 bits, stopped half-way."""
    section = {"teacher": str(folders["teacher"]), "logits": "js", "alpha_end": 0.1, "hidden": HIDDEN}
    compress = {"distill": section, "quantize": {"weights": "int4", "group": 8, "start": 0.3}}
    recipes = {
        name: write_recipe(
            tmp_path, name, folders["corpus"], folders["weights"], "llama", TWO_RANKS[name], compress=compress,
            checkpoint={"every_steps": 5, "export": True},
        )
        for name in ("zero2", "zero3", "tensor2", "pipeline2")
    }  # fmt: skip
    train_on_two_ranks([recipes["zero2"]])
    checkpoint = tmp_path / "runs" / "zero2" / "checkpoints" / "step-00000005"
    others = [str(recipes[name]) for name in ("zero3", "tensor2", "pipeline2")]
    run_ranks(2, ["tests/parity/go_on.py", str(checkpoint), *others], timeout_s=600).check()
    expected = history_of(tmp_path, "zero2")
    for name in ("zero3", "tensor2", "pipeline2"):
        np.testing.assert_allclose(history_of(tmp_path, name), expected[5:], rtol=1e-5, err_msg=name)
    tokens = torch.arange(40)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / name / "export", dtype=torch.float32)(tokens).logits
        for name in recipes
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-3)


@pytest.mark.exhaustive
def test_stages_of_several_ranks_share_their_teachers(folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = {case: ["pipeline2"] for case in ("sharded", "offloaded")}
    check(tmp_path, folders, chosen | {case: ["pipeline2", *FOUR_RANKS] for case in ("hidden", "relations")}, ranks=4)
    expected = history_of(tmp_path, "hidden-pipeline2")
    for case in ("sharded", "offloaded"):
        assert history_of(tmp_path, f"{case}-pipeline2") == expected


@pytest.mark.exhaustive
def test_a_teacher_in_shares_fills_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    histories = []
    for placement in ("memory", "sharded"):
        section = {
            "teacher": str(folders["teacher"]), "logits": "forward-kl", "cache_top": TOP, "placement": placement,
            "temperature": TEMPERATURE, "dtype": "bf16",
        }  # fmt: skip
        recipe = write_recipe(
            tmp_path, placement, folders["corpus"], folders["weights"], "llama", {"zero_stage": 2},
            compress={"distill": section}, data={"cache_dir": str(tmp_path / placement)},
        )  # fmt: skip
        train_on_two_ranks([recipe])
        histories.append(history_of(tmp_path, placement))
    assert histories[0] == histories[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if case not in PLACED])
def test_every_layout(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    check(tmp_path, folders, {case: list(CASES[case][1])})


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_it_does_not_matter_where_a_teacher_is(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    check(tmp_path, folders, {case: [layout] for case in ("hidden", *PLACED)})
    for case in PLACED:
        assert history_of(tmp_path, f"{case}-{layout}") == history_of(tmp_path, f"hidden-{layout}"), case
