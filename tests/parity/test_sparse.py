"""A sparse model stays sparse, and is trained as by a plain loop that masks gradients, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import (
    LR,
    TWO_RANKS,
    history_of,
    plain_optimizer,
    whole_batches,
    write_corpus,
    write_recipe,
    write_weights,
)  # fmt: skip
from ranks import run_ranks
from transformers import AutoModelForCausalLM

from ds_train.compress.post_training import thin_folder
from ds_train.compress.sparsity import Pattern
from ds_train.config import load

pytestmark = pytest.mark.parity


def plain_loop(recipe: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, in float64."""
    run = load(str(recipe))
    model: Any = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float64, attn_implementation="eager")
    masks = {name: weight != 0 for name, weight in model.named_parameters() if weight.dim() > 1 and ".layers." in name}
    optimizer = plain_optimizer([*model.parameters()])
    history = []
    for batch in whole_batches(recipe):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.exhaustive
def test_zeros_stay_zero_in_every_layout(tmp_path: Path) -> None:
    check(tmp_path, 2, list(TWO_RANKS))


def check(folder: Path, ranks: int, layouts: list[str]) -> None:
    corpus, whole = write_corpus(folder / "corpus"), write_weights(folder / "llama", "llama")
    thin_folder(whole, folder / "thin", Pattern(0.5, 4), "magnitude")
    recipes = [
        write_recipe(
            folder, name, corpus, folder / "thin", "llama", TWO_RANKS[name], compress={"keep_zeros": True},
            schedule={"kind": "constant"}, checkpoint={"export": True},
        )
        for name in layouts
    ]  # fmt: skip
    run_ranks(ranks, ["tests/parity/train_many.py", *map(str, recipes)], timeout_s=900).check()
    expected = plain_loop(recipes[0])
    before = AutoModelForCausalLM.from_pretrained(folder / "thin").state_dict()
    for name in layouts:
        np.testing.assert_allclose(history_of(folder, name), expected, rtol=1e-5, err_msg=name)
        after = AutoModelForCausalLM.from_pretrained(folder / "runs" / name / "export").state_dict()
        for key, weight in before.items():
            if ".layers." in key and weight.dim() > 1:
                assert torch.equal(after[key] == 0, weight == 0), f"{name} {key}"
