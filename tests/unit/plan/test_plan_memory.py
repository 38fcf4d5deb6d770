"""Predicted bytes against formulas of papers and of DeepSpeed's own documentation, written out here once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from ds_train.plan.facts import Facts
from ds_train.plan.make import make_plan
from ds_train.plan.memory import Choice, MemoryModel
from ds_train.plan.predict import Predictor
from ds_train.plan.topology import Cluster, Layout

WIDE = {
    "model.hidden_size": 1024, "model.intermediate_size": 4096, "model.num_hidden_layers": 12,
    "model.num_attention_heads": 16, "model.num_key_value_heads": 16, "model.vocab_size": 32000,
    "data.sequence_length": 1024,
}  # fmt: skip
PARAMETERS = 12 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 2 * 32000 * 1024 + 1024


def model(changes: dict[str, Any], device: str = "cuda", ranks: int = 8) -> MemoryModel:
    kind = "H100" if device == "cuda" else None
    facts = Facts(recipe(WIDE | changes), Cluster(ranks, 8, device, here=False, kind=kind))  # type: ignore[arg-type]
    predictor = Predictor.of(facts)
    assert predictor is not None
    return predictor.memory


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_follow_the_zero_paper(stage: int, ranks: int) -> None:
    """arXiv 1910.02054, section 3: 2 + 2 + 12 bytes a parameter, of which a stage shards more and more."""
    fp16 = {"precision.dtype": "fp16", "precision.gradient_dtype": "fp16"}
    device = model(fp16).worst(Choice(Layout(1, ranks, 1, 1), stage, 1, 1)).device
    shared = {1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}[stage]
    for name, each, share in zip(("parameters", "gradients", "optimizer"), (2, 2, 12), shared, strict=True):
        assert device[name] == pytest.approx(each * PARAMETERS / share, rel=0.002), name


@pytest.mark.parametrize(
    ("kind", "moments"), [({"kind": "adamw"}, 2), ({"kind": "sgd"}, 1), ({"kind": "sgd", "momentum": 0.0}, 0),
                          ({"kind": "adagrad", "weight_decay": 0.0}, 1)],
)  # fmt: skip
def test_optimizers_keep_their_moments(kind: dict[str, Any], moments: int) -> None:
    changes = {f"optimizer.{name}": value for name, value in kind.items()} | {"precision.dtype": "fp32"}
    choice = Choice(Layout(1, 4, 1, 1), 1, 1, 2)
    device = model(changes).worst(choice).device
    assert device["optimizer"] == pytest.approx(4 * (1 + moments) * PARAMETERS / 4, rel=0.001)
    plain = model(changes | {"parallel.zero_stage": 0}).worst(Choice(Layout(1, 4, 1, 1), 0, 1, 2)).device
    assert plain.get("optimizer", 0) == pytest.approx(4 * moments * PARAMETERS, rel=0.001)


def test_bf16_with_fp32_accumulation_keeps_gradients_in_both_formats() -> None:
    device = model({}).worst(Choice(Layout(1, 8, 1, 1), 1, 1, 4)).device
    assert device["gradients"] == pytest.approx(6 * PARAMETERS, rel=0.001)


def test_offload_moves_states_to_the_host() -> None:
    for stage in (2, 3):
        here = model({}).worst(Choice(Layout(1, 8, 1, 1), stage, 1, 4))
        away = model({"parallel.offload_optimizer": "cpu"}).worst(
            Choice(Layout(1, 8, 1, 1), stage, 1, 4, offload_optimizer="cpu")
        )
        assert here.host_bytes == 0
        assert "optimizer" not in away.device
        assert away.host["optimizer"] == here.device["optimizer"]


def activations(device: str, changes: dict[str, Any], tensor: int, sequence: int = 1) -> float:
    memory = model(changes, device)
    (share,) = memory.shares.stages(1, tensor)
    work = memory.work(Choice(Layout(1, 1, sequence, tensor), 1, 2, 4))
    return memory.activations.stage(share, work)[0]


GPT = {
    "model.arch": "gpt2", "model.hidden_size": None, "model.intermediate_size": None, "model.num_hidden_layers": None,
    "model.num_attention_heads": None, "model.num_key_value_heads": None, "model.max_position_embeddings": None,
    "model.n_embd": 1024, "model.n_layer": 12, "model.n_head": 16, "model.activation_function": "gelu",
}  # fmt: skip
MASKS = 12 * 2 * 1024**2 * 2
"""Of scaled-dot-product attention beside a mask of booleans, each of twelve layers keeps its own mask of numbers."""


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_activations_follow_the_recomputation_paper(tensor: int) -> None:
    """arXiv 2205.05198, equations 1 and 2 without the scores, which fused attention doesn't keep: sbh (10 + 24 / t)."""
    found = activations("cuda", GPT, tensor)
    assert found == pytest.approx(12 * 2 * 1024 * 1024 * (10 + 24 / tensor) + MASKS, rel=1e-6)


def test_scores_are_kept_by_eager_attention() -> None:
    """The same paper counts 5 as / h for a 16-bit softmax, its mask and its output; transformers' softmax is fp32."""
    more = activations("cuda", GPT | {"model.attention": "eager"}, 1) - activations("cuda", GPT, 1)
    assert more == pytest.approx(12 * 2 * 16 * 1024**2 * (5 + 2) - MASKS, rel=1e-6)


def test_sequence_ranks_share_tokens() -> None:
    found, whole = (activations("cuda", {}, 1, sequence=ranks) for ranks in (4, 1))
    assert found - MASKS == pytest.approx((whole - MASKS) / 4)


def test_groups_are_repeated_for_their_heads_beside_a_mask() -> None:
    grouped, each = ({"model.num_attention_heads": 16, "model.num_key_value_heads": heads} for heads in (2, 16))
    assert activations("cuda", grouped, 1) == activations("cuda", each, 1)
    fused = {"model.attention": "flash_attention_2", "batch.micro_samples": 1}
    more = activations("cuda", each | fused, 1) - activations("cuda", grouped | fused, 1)
    assert more == 12 * 2 * 1024 * 2 * 1024 * (1 - 2 / 16) * 2


def test_the_heap_of_cpu_ranks_grows_with_tensors_below_the_mapped_size() -> None:
    """bf16 hidden states of two samples of 128 tokens are half a MiB, those of 1,024 are 4 MiB."""
    small, large = (
        model({"data.sequence_length": length}, "cpu").worst(Choice(Layout(1, 2, 1, 1), 2, 2, 4)).device
        for length in (128, 1024)
    )
    assert small["gaps"] > 50 * 2**20
    assert large.get("gaps", 0) == 0


def test_checkpointing_keeps_a_hidden_state_a_layer() -> None:
    memory = model({"model.activation_checkpointing": True})
    (share,) = memory.shares.stages(1, 1)
    kept, again = memory.activations.stage(share, memory.work(Choice(Layout(1, 1, 1, 1), 1, 2, 4, checkpointing=True)))
    assert kept == 12 * 2 * 1024 * 1024 * 2
    assert again == pytest.approx(activations("cuda", {"model.lean_activations": False}, 1) / 12)


def test_lean_layers_keep_neither_what_is_normed_in_fp32_nor_the_gated_product() -> None:
    less = activations("cuda", {"model.lean_activations": False}, 1) - activations("cuda", {}, 1)
    hidden, wide = WIDE["model.hidden_size"], WIDE["model.intermediate_size"]
    assert less == pytest.approx(12 * 2 * 1024 * (2 * hidden * 4 + 2 * wide * 2))


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_early_stages_hold_more_micro_batches(accumulation: int) -> None:
    """1F1B: stage s of p holds min(p - s, m) micro-batches (arXiv 1806.03377)."""
    choice = Choice(Layout(4, 2, 1, 1), 1, 1, accumulation)
    assert [choice.in_flight(stage) for stage in range(4)] == [min(4 - stage, accumulation) for stage in range(4)]


def test_a_plan_says_what_it_needs() -> None:
    planned = make_plan(recipe(WIDE), Cluster(8, 8, "cuda", here=False, kind="H100"))
    assert planned.predicted is not None
    assert planned.predicted.limit_bytes == 80 * 2**30
    assert planned.predicted.shortage is None
    huge = WIDE | {"model.num_hidden_layers": 1200, "batch.global_samples": 64}
    short = make_plan(recipe(huge), Cluster(8, 8, "cuda", here=False, kind="H100"))
    assert short.predicted is not None
    assert short.predicted.shortage is not None
    assert short.predicted.shortage.endswith("GiB of 80.0")
    assert any("may run out of memory" in note for note in short.notes)


def test_sizes_that_arent_known_are_not_predicted() -> None:
    run = recipe({"model.arch": None, "model.path": "nobody/nothing", "data.tokenizer": "model"} | {
        f"model.{name}": None for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                           "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    })  # fmt: skip
    assert make_plan(run, Cluster(2, 2, "cpu", here=False)).predicted is None


def test_a_teacher_takes_memory_and_time_where_the_loss_is_taken(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = {"model_type": "llama", "vocab_size": 259, "num_key_value_heads": 8, "tie_word_embeddings": True} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters = 259 * 256 + 256 + 6 * (4 * 256**2 + 3 * 256 * 1024 + 2 * 256)
    taught = {"compress.distill.teacher": str(tmp_path), "compress.distill.logits": "js"}
    for changes, pipe, widths in [({}, 1, [2]), ({"compress.distill.dtype": "fp32"}, 2, [0, 4])]:
        choice = Choice(Layout(pipe, 1, 1, 1), 1, 1, 1)
        ranks = model(taught | changes).ranks(choice)
        found = [rank.device.get("teacher", 0) for rank in ranks]
        assert found == pytest.approx([width * parameters for width in widths], rel=0.03)
    assert "teacher" not in model(taught | {"compress.distill.cache_top": 8}).worst(choice).device
    # In shares, it is there once for all ranks that run it, beside what is gathered ahead: here, all of it.
    choice, width = Choice(Layout(2, 4, 1, 1), 1, 1, 1), 2
    on_stages = {"compress.distill.relations": 1.0, "compress.distill.relation_layers": [[0, 1]]}
    for placement, where in (("sharded", 1 + 1 / 4), ("offloaded", 1.0)):
        changes = taught | on_stages | {"compress.distill.placement": placement}
        ranks = model(changes).ranks(choice)
        found = [rank.device.get("teacher", 0) / (width * parameters) for rank in ranks]
        assert found == pytest.approx([where, where], rel=0.03)
        hosts = [rank.host.get("teacher", 0) / (width * parameters) for rank in ranks]
        assert hosts == pytest.approx([1 / 4 if placement == "offloaded" else 0] * 2, rel=0.03)
    facts = [
        Facts(recipe(WIDE | more), Cluster(8, 8, "cuda", here=False, kind="H100")) for more in ({}, taught)
    ]  # fmt: skip
    alone, both = (Predictor.of(one) for one in facts)
    assert alone is not None
    assert both is not None
    assert alone.time is not None
    assert both.time is not None
    choice = Choice(Layout(1, 1, 1, 1), 1, 1, 1)
    more = both.time.step(choice).products - alone.time.step(choice).products
    assert more / alone.time.step(choice).products == pytest.approx(parameters / (3 * PARAMETERS), rel=0.2)
