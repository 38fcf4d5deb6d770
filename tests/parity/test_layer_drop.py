"""Layers that steps leave out: the losses of a plain loop in float64 that calls them or not, in every layout."""

from __future__ import annotations

import math
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
    mean_cross_entropy,
    plain_steps,
    train_on_two_ranks,
    write_corpus,
    write_recipe,
    write_weights,
)
from ranks import run_ranks
from torch import Tensor

from ds_train.config import load
from ds_train.schedule.layer_drop import draw_layers

pytestmark = pytest.mark.parity

SECTION = {"kind": "progressive", "keep": 0.3, "rate": 8.0}
LAYOUTS = TWO_RANKS | {
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3-offload": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"},
}


def plain_loop(recipe: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; a layer that isn't called has a gradient of zero."""
    run = load(str(recipe))
    model = load_plain(str(run.model.path))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    now: dict[str, Any] = {}

    def around(layer: Any, number: int) -> None:
        compute = layer.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if number in now["dropped"]:
                return hidden
            return hidden + (compute(hidden, *args, **kwargs) - hidden) / now["kept"][number]

        layer.forward = forward

    for number, layer in enumerate(model.model.layers):
        around(layer, number)
    left_out = 0

    def loss_of(step: int, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        nonlocal left_out
        theta = 0.7 * math.exp(-8.0 * step / STEPS) + 0.3
        now["kept"] = [1 - (number + 1) / 4 * (1 - theta) for number in range(4)]
        tokens = labels.numel()
        now["dropped"] = draw_layers(run.layer_drop, 4, SEED, step * tokens, STEPS * tokens).dropped
        left_out += len(now["dropped"])
        return mean_cross_entropy(model(**batch).logits, labels)

    history = plain_steps(recipe, [*model.parameters()], loss_of)
    assert 5 < left_out < 30
    return history


def write_case(folder: Path, layout: str, **sections: Any) -> Path:
    corpus, weights = folder / "corpus", folder / "llama"
    if not corpus.exists():
        write_corpus(corpus)
        write_weights(weights, "llama")
    return write_recipe(
        folder, layout, corpus, weights, "llama", LAYOUTS[layout], layer_drop=SECTION,
        schedule={"kind": "constant"}, **sections,
    )  # fmt: skip


def check(folder: Path, layouts: list[str]) -> None:
    recipes = [write_case(folder, layout) for layout in layouts]
    train_on_two_ranks(recipes)
    expected = plain_loop(recipes[0])
    for layout in layouts:
        np.testing.assert_allclose(history_of(folder, layout), expected, rtol=1e-5, err_msg=layout)


def test_a_sample_of_layouts(tmp_path: Path) -> None:
    check(tmp_path, ["zero3", "pipeline2"])


@pytest.mark.exhaustive
def test_every_layout(tmp_path: Path) -> None:
    check(tmp_path, list(LAYOUTS))


@pytest.mark.exhaustive
def test_a_run_goes_on_with_the_draws_of_its_clock(tmp_path: Path) -> None:
    recipe = write_case(tmp_path, "zero3", checkpoint={"every_steps": 5}, model={"activation_checkpointing": True})
    other = write_case(tmp_path, "tensor2", model={"activation_checkpointing": True})
    train_on_two_ranks([recipe])
    checkpoint = tmp_path / "runs" / "zero3" / "checkpoints" / "step-00000005"
    run_ranks(2, ["tests/parity/go_on.py", str(checkpoint), str(other)], timeout_s=600).check()
    np.testing.assert_allclose(history_of(tmp_path, "tensor2"), history_of(tmp_path, "zero3")[5:], rtol=1e-5)
