"""A sparse model stays sparse, and is trained as by a plain loop that masks gradients, in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_loop import (
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
from transformers import AutoModelForCausalLM

from ds_train.compress.post_training import thin_folder
from ds_train.compress.sparsity import Pattern
from ds_train.config import load

pytestmark = pytest.mark.parity


def plain_loop(recipe: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in float64."""
    model = load_plain(str(load(str(recipe)).model.path))
    masks = {name: weight != 0 for name, weight in model.named_parameters() if weight.dim() > 1 and ".layers." in name}

    def mask_gradients() -> None:
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)

    def loss_of(_: int, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        return mean_cross_entropy(model(**batch).logits, labels)

    return plain_steps(recipe, [*model.parameters()], loss_of, mask_gradients)


@pytest.mark.exhaustive
def test_a_model_without_zeros_has_none_to_keep(tmp_path: Path) -> None:
    corpus, whole = write_corpus(tmp_path / "corpus"), write_weights(tmp_path / "llama", "llama")
    recipe = write_recipe(
        tmp_path, "zero3", corpus, whole, "llama", TWO_RANKS["zero3"], compress={"keep_zeros": True}
    )  # fmt: skip
    ended = run_ranks(2, ["launch/train.py", str(recipe)])
    assert ended.codes == [2, 2]
    assert "compress.keep_zeros=true: of the" in ended.outputs[0]
    assert "that may be zero 0 are. Fix: give the folder that `ds-train sparsify` has written" in ended.outputs[0]


@pytest.mark.exhaustive
def test_zeros_stay_zero_in_every_layout(tmp_path: Path) -> None:
    check(tmp_path, list(TWO_RANKS))


def check(folder: Path, layouts: list[str]) -> None:
    corpus, whole = write_corpus(folder / "corpus"), write_weights(folder / "llama", "llama")
    thin_folder(whole, folder / "thin", Pattern(0.5, 4), "magnitude")
    recipes = [
        write_recipe(
            folder, name, corpus, folder / "thin", "llama", TWO_RANKS[name], compress={"keep_zeros": True},
            schedule={"kind": "constant"}, checkpoint={"export": True},
        )
        for name in layouts
    ]  # fmt: skip
    train_on_two_ranks(recipes)
    expected = plain_loop(recipes[0])
    before = AutoModelForCausalLM.from_pretrained(folder / "thin").state_dict()
    for name in layouts:
        np.testing.assert_allclose(history_of(folder, name), expected, rtol=1e-5, err_msg=name)
        after = AutoModelForCausalLM.from_pretrained(folder / "runs" / name / "export").state_dict()
        for key, weight in before.items():
            if ".layers." in key and weight.dim() > 1:
                assert torch.equal(after[key] == 0, weight == 0), f"{name} {key}"
