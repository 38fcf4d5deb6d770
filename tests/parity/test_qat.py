"""Quantization-aware training: the losses of a plain PyTorch loop in float64, in every layout, and the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import (
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
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from ds_train.config import load

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = {
    "int4": {"weights": "int4", "group": 8},
    "int8": {"weights": "int8", "start": 0.3},
    "int8-activations": {"weights": "int8", "activations": "int8"},
}
HAIR = 1 + 2.0**-16


def round_last(tensor: Tensor, bits: int, group: int = 0) -> Tensor:
    """`tensor` on a grid over groups of its last dimension, with the gradient of the identity."""
    parts = tensor.detach().unflatten(-1, (-1, group or tensor.shape[-1]))
    scale = parts.abs().amax(-1, keepdim=True) * HAIR / ((2**bits - 1) / 2)
    rounded = (parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return tensor + (rounded.flatten(-2) - tensor).detach()


def plain_loop(recipe: Path, seed: int | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; with `seed`, of activations that are off by the last bit of fp32."""
    random = torch.Generator().manual_seed(seed or 0)

    def near(tensor: Tensor) -> Tensor:
        off = torch.randn(tensor.shape, generator=random, dtype=tensor.dtype) * torch.finfo(torch.float32).eps
        return tensor if seed is None else tensor + (tensor * off).detach()

    run = load(str(recipe))
    section, model = run.compress.quantize, load_plain(str(run.model.path))
    linear = [layer for block in model.model.layers for layer in block.modules() if type(layer) is torch.nn.Linear]
    chosen = {f"{name}.weight" for name, module in model.named_modules() if module in linear}
    if section.activations != "none":
        for layer in linear:
            layer.register_forward_pre_hook(lambda _, args: (round_last(near(args[0]), 8),))

    def loss_of(step: int, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        state = dict(model.named_parameters())
        if step >= section.start * STEPS:
            state |= {name: round_last(state[name], section.bits, section.group) for name in chosen}
        return mean_cross_entropy(functional_call(model, state, kwargs=batch).logits, labels)

    return plain_steps(recipe, [*model.parameters()], loss_of)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("qat")
    return write_corpus(root / "corpus"), write_weights(root / "llama", "llama")


def write_case(folder: Path, folders: tuple[Path, Path], case: str, layout: str) -> Path:
    return write_recipe(
        folder, f"{case}-{layout}", *folders, "llama", TWO_RANKS[layout], compress={"quantize": CASES[case]},
        schedule={"kind": "constant"}, checkpoint={"export": True}, data={"validation_fraction": 0.2},
        track={"sample_prompt": "gamma", "sample_tokens": 2},  # rank 0 alone loads what is packed
    )  # fmt: skip


def check(folder: Path, folders: tuple[Path, Path], chosen: dict[str, list[str]]) -> None:
    recipes = {
        (case, layout): write_case(folder, folders, case, layout) for case, names in chosen.items() for layout in names
    }
    train_on_two_ranks(recipes.values())
    for (case, layout), recipe in recipes.items():
        expected = plain_loop(recipe)
        assert expected[0][0] > 1.05 * expected[-1][0], "the reference doesn't learn, so it shows nothing"
        found, near = history_of(folder, recipe.stem), 1e-5
        if CASES[case].get("activations"):
            # Of so many values some lie within a last bit of a tie, and are an integer apart in another layout: at the
            # first step as far as last bits put the float64 loop apart.
            others = np.array([plain_loop(recipe, seed)[0] for seed in range(4)])
            apart = float(np.abs(others / expected[0] - 1).max())
            assert apart < 2e-4
            np.testing.assert_allclose(found[0], expected[0], rtol=2 * apart, err_msg=f"{case} {layout}")
            near = 1e-3
        np.testing.assert_allclose(found, expected, rtol=near, err_msg=f"{case} {layout}")
        exported = AutoModelForCausalLM.from_pretrained(folder / "runs" / recipe.stem / "export", dtype=torch.float32)
        assert bool(exported(torch.arange(40)[None]).logits.isfinite().all())


def test_a_sample_of_layouts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    check(tmp_path, folders, {"int4": ["tensor2"], "int8": ["zero3"], "int8-activations": ["pipeline2"]})


@pytest.mark.exhaustive
def test_every_layout(folders: tuple[Path, Path], tmp_path: Path) -> None:
    check(tmp_path, folders, {case: list(TWO_RANKS) for case in CASES})
