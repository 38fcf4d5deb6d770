"""What surrounds the loss is the same in every layout too: evaluation, padding, recomputation, the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import write_corpus, write_recipe, write_weights
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from ds_train.plan.topology import processor_has_fp16

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, layout on four ranks, sections of the recipe
    "pipeline-tensor": (
        "llama", {"pipeline": 2, "tensor": 2, "stage_layers": [1, 3]}, {"model": {"activation_checkpointing": True}},
    ),
    "pipeline-padded": ("gpt2", {"pipeline": 2}, {"data": {"packing": False}}),
    "tensor-zero3": ("gpt2", {"tensor": 2, "zero_stage": 3}, {"model": {"activation_checkpointing": True}}),
    "best-fit": ("llama", {"sequence": 2, "zero_stage": 1}, {"data": {"packing_by": "best-fit"}}),
    "padding-free": ("gpt2", {"pipeline": 2}, {"data": {"packing": False, "padding_free": True}}),
    "sequence-padded": (
        "qwen2", {"sequence": 2, "zero_stage": 2},
        {"data": {"packing": False}, "model": {"activation_checkpointing": True}},
    ),
    "bf16": ("llama", {"pipeline": 2, "tensor": 2}, {"precision": {"dtype": "bf16"}}),
    "bf16-offload-tied": (
        "gpt2", {"pipeline": 2, "tensor": 2, "offload_optimizer": "cpu"},
        {"precision": {"dtype": "bf16", "gradient_dtype": "bf16"}},
    ),
    "adagrad": (
        "llama", {"pipeline": 2, "tensor": 2}, {"optimizer": {"kind": "adagrad", "weight_decay": 0.0}},
    ),
    "lr-factors-tied": (
        "llama", {"pipeline": 2, "tensor": 2},
        {"optimizer": {"lr_factors": {"*embed_tokens*": 0.2, "*.0.mlp.*": 3.0, "*norm*": 0.5}}},
    ),
    "sgd": ("llama", {"tensor": 2, "zero_stage": 2}, {"optimizer": {"kind": "sgd", "lr": 0.03}}),
}  # fmt: skip

if processor_has_fp16():
    fp16 = {"dtype": "fp16", "loss_scale": 1024.0, "gradient_dtype": "fp16"}
    CASES["fp16-tied"] = ("gpt2", {"pipeline": 2, "tensor": 2}, {"precision": fp16})


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("kind", "step", "loss", "loss_odd", "grad_norm", "accuracy", "labels", "real_tokens", "tokens")
    return [{key: record[key] for key in keys if key in record} for record in map(json.loads, lines)]


def check_clock(folder: Path, name: str, has_stages: bool) -> None:
    """The phases of every step make it up, and the ones that any layout has took some time."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        if record["kind"] == "train":
            spent = {key: record[key] for key in record if key.endswith("_ms") and key not in ("step_ms", "save_ms")}
            assert sum(spent.values()) == pytest.approx(record["step_ms"], rel=0.05), name
            assert ("pipeline_ms" in spent) == has_stages
            busy = ("forward_ms", "backward_ms", "optimizer_ms", "collectives_ms", *(["pipeline_ms"] * has_stages))
            assert all(spent[phase] > 0 for phase in busy), (name, spent)
            assert record["imbalance"] >= 1
            assert 0 <= record["slowest_rank"] < 4


@torch.no_grad()
def exported_logits(folder: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / name / "export", dtype=torch.float32)
    return model(torch.arange(60).view(2, 30) * 7 % 300).logits


SAMPLE = (
    "pipeline-tensor", "pipeline-padded", "tensor-zero3", "best-fit", "sequence-padded", "bf16-offload-tied",
    "lr-factors-tied",
)  # fmt: skip


@pytest.mark.parametrize("names", [SAMPLE, pytest.param(tuple(CASES), marks=pytest.mark.exhaustive)], ids=len)
def test_a_run_is_the_same_in_every_layout(names: tuple[str, ...], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    recipes: dict[str, list[Path]] = {"one": [], "four": []}
    for name, (family, layout, sections) in ((name, CASES[name]) for name in names):
        weights = tmp_path / family
        if not weights.exists():
            write_weights(weights, family, vocabulary=301)  # which no ranks can share
        more = {
            "data": {"validation_fraction": 0.2} | sections.get("data", {}),
            "checkpoint": {"export": True},
            "track": {"eval_every_steps": 5, "eval_samples": 11, "eval_sources": {"odd": "*[13579].txt"}},
            "batch": {"micro_samples": 2, "eval_micro_samples": 3},
            "model": sections.get("model", {}),
            "precision": sections.get("precision", {}),
            "optimizer": sections.get("optimizer", {}),
        }
        for ranks, parallel in (("one", {}), ("four", layout)):
            recipe = write_recipe(tmp_path, f"{name}-{ranks}", corpus, weights, family, parallel, **more)
            recipes[ranks].append(recipe)
    for ranks, count in (("one", 1), ("four", 4)):
        run_ranks(count, ["tests/parity/train_many.py", *map(str, recipes[ranks])], timeout_s=600).check()
    for name in names:
        sections = CASES[name][2]
        tolerance = 2e-2 if "precision" in sections else 1e-5
        check_clock(tmp_path, f"{name}-four", "pipeline" in CASES[name][1])
        expected, found = records(tmp_path, f"{name}-one"), records(tmp_path, f"{name}-four")
        assert [list(record) for record in found] == [list(record) for record in expected]
        assert "loss_odd" in expected[-1]
        for here, there in zip(found, expected, strict=True):
            for key, value in there.items():
                if key in ("kind", "step", "labels", "real_tokens", "tokens"):
                    assert here[key] == value
                else:
                    # Accuracy counts labels: in 16 bits a few near ties fall the other way.
                    near = 1e-2 if key == "accuracy" and "precision" in sections else 0.0
                    np.testing.assert_allclose(
                        here[key], value, rtol=tolerance, atol=near, err_msg=f"{name} {key} {there['step']}"
                    )
        # Not weights: a key's bias has no gradient but rounding, which Adam blows up.
        logits, expected_logits = exported_logits(tmp_path, f"{name}-four"), exported_logits(tmp_path, f"{name}-one")
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=10 * tolerance)


def test_tensor_ranks_drop_out_different_heads_and_the_same_hidden_states(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), tmp_path / "gpt2"
    write_weights(weights, "gpt2")
    model = {"path": str(weights), "attention": "eager", "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    recipe = write_recipe(tmp_path, "dropout", corpus, weights, "gpt2", {"tensor": 2}, model=model)
    ended = run_ranks(2, ["tests/parity/dropout_of_ranks.py", str(recipe)]).check()
    lines = [line for output in ended.outputs for line in output.splitlines() if line.startswith("RANK ")]
    rows = [json.loads(line.removeprefix("RANK ")) for line in lines]
    of = {(recomputed, rank): (loss, gradient, seen) for recomputed, rank, loss, gradient, seen in rows}
    (loss, gradient, first), (other_loss, other_gradient, second) = of[False, 0], of[False, 1]
    assert (loss, gradient) == pytest.approx((other_loss, other_gradient), rel=1e-6)
    assert first["resid_dropout"] == second["resid_dropout"]
    assert not set(first["attn_dropout"]) & set(second["attn_dropout"])
    for rank in range(2):  # recomputed layers drop out the same
        assert of[True, rank][:2] == pytest.approx(of[False, rank][:2], rel=1e-6)
