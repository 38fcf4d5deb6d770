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

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, layout on four ranks, sections of the recipe
    "pipeline-tensor": (
        "llama", {"pipeline": 2, "tensor": 2, "stage_layers": [1, 3]}, {"model": {"activation_checkpointing": True}},
    ),
    "pipeline-padded": ("gpt2", {"pipeline": 2}, {"data": {"packing": False}}),
    "tensor-zero3": ("gpt2", {"tensor": 2, "zero_stage": 3}, {"model": {"activation_checkpointing": True}}),
    "sequence-padded": (
        "qwen2", {"sequence": 2, "zero_stage": 2},
        {"data": {"packing": False}, "model": {"activation_checkpointing": True}},
    ),
    "bf16": ("llama", {"pipeline": 2, "tensor": 2}, {"precision": {"dtype": "bf16"}}),
}  # fmt: skip


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    keys = ("kind", "step", "loss", "grad_norm", "accuracy", "labels", "real_tokens", "tokens")
    return [{key: record[key] for key in keys if key in record} for record in map(json.loads, lines)]


@torch.no_grad()
def exported_logits(folder: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / name / "export", dtype=torch.float32)
    return model(torch.arange(60).view(2, 30) * 7 % 300).logits


def test_a_run_is_the_same_in_every_layout(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    recipes: dict[str, list[Path]] = {"one": [], "four": []}
    for name, (family, layout, sections) in CASES.items():
        weights = tmp_path / family
        if not weights.exists():
            write_weights(weights, family, vocabulary=301)  # which no ranks can share
        more = {
            "data": {"validation_fraction": 0.2} | sections.get("data", {}),
            "checkpoint": {"export": True},
            "track": {"eval_every_steps": 5, "eval_samples": 11},
            "batch": {"micro_samples": 2, "eval_micro_samples": 3},
            "model": sections.get("model", {}),
            "precision": sections.get("precision", {}),
        }
        for ranks, parallel in (("one", {}), ("four", layout)):
            recipe = write_recipe(tmp_path, f"{name}-{ranks}", corpus, weights, family, parallel, **more)
            recipes[ranks].append(recipe)
    for ranks, count in (("one", 1), ("four", 4)):
        run_ranks(count, ["tests/parity/train_many.py", *map(str, recipes[ranks])], timeout_s=600).check()
    for name, (_, _, sections) in CASES.items():
        tolerance = 2e-2 if "precision" in sections else 1e-5
        expected, found = records(tmp_path, f"{name}-one"), records(tmp_path, f"{name}-four")
        assert [list(record) for record in found] == [list(record) for record in expected]
        for here, there in zip(found, expected, strict=True):
            for key, value in there.items():
                if key in ("kind", "step", "labels", "real_tokens", "tokens"):
                    assert here[key] == value
                else:
                    np.testing.assert_allclose(
                        here[key], value, rtol=tolerance, err_msg=f"{name} {key} {there['step']}"
                    )
        # Not weights: a key's bias has no gradient but rounding, which Adam blows up.
        logits, expected_logits = exported_logits(tmp_path, f"{name}-four"), exported_logits(tmp_path, f"{name}-one")
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=10 * tolerance)
