"""The gradient noise scale against per-micro-batch gradients of a plain loop, the same in every layout that has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import GLOBAL, write_corpus, write_recipe, write_weights
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from ds_train.config import load
from ds_train.data.build import load_data
from ds_train.data.prepare import prepare, prepared_tokenizer

pytestmark = pytest.mark.parity

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0}, "zero1": {"zero_stage": 1}, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3},
    "tensor": {"tensor": 2, "zero_stage": 1},
}  # fmt: skip
MICRO = 2


def expected(recipe: Path) -> tuple[float, float]:
    """(noise, signal) of the first step, from gradients in fp64."""
    run = load(str(recipe))
    folder = prepare(run)
    data = load_data(
        run, folder=folder, tokenizer=prepared_tokenizer(folder), data_rank=0, data_ranks=1, micro_samples=MICRO,
        eval_micro_samples=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float64, attn_implementation="eager")
    model.config.use_cache = False
    squares, sizes, total = [], [], 0.0
    for batch in data.train.step(0):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
        sizes.append(int((labels != -100).sum()))
        squares.append(float((gradient / sizes[-1]).square().sum()))
        total = total + gradient
    small, big = np.mean(sizes), sum(sizes)
    small_square, big_square = np.mean(squares), float((total / big).square().sum())
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return noise, (big * big_square - small * small_square) / (big - small)


def test_the_scale_is_a_plain_loops_in_every_layout(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    sections = {"schedule": {"steps": 2}, "batch": {"micro_samples": MICRO}, "track": {"noise_scale_every_steps": 1}}
    recipes = [
        write_recipe(tmp_path, name, corpus, weights, "llama", layout, **sections) for name, layout in LAYOUTS.items()
    ]
    ended = run_ranks(2, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=300).check()
    assert ended.outputs[0].count("gradient noise scale: ") == len(LAYOUTS)
    wanted = expected(recipes[0])
    assert GLOBAL > MICRO
    for name in LAYOUTS:
        record = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
        found = (record["gradient_noise"], record["gradient_signal"])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=name)
