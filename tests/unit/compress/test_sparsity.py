"""Which weights become zero, against the papers' formulas, and that they stay so in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_post_training import saved
from torch import Tensor
from transformers import AutoModelForCausalLM

from ds_train.compress.post_training import thin_folder
from ds_train.compress.qat import linear_layers, linear_names
from ds_train.compress.sparsity import Pattern, Score, keep_zeros, thin, zeros_among

PATTERNS = {"2:4": Pattern(0.5, 4), "1:4": Pattern(0.25, 4), "half": Pattern(0.5), "most": Pattern(0.8)}


def calibration() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    inputs = torch.randn(600, 160) @ torch.randn(160, 160) * torch.rand(160).add(0.1)
    return inputs, torch.randn(24, 160), inputs.t() @ inputs


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_each_group_or_row_has_its_zeros(name: str, score: Score) -> None:
    _, weight, products = calibration()
    pattern = PATTERNS[name]
    zero = thin(weight, products, pattern, score) == 0
    if pattern.group:
        assert bool((zero.unflatten(1, (-1, 4)).sum(-1) == 4 * pattern.share).all())
    elif score == "sparsegpt":  # a share of every block of a row
        assert zero.float().mean() == pytest.approx(pattern.share, abs=0.01)
    else:
        assert bool((zero.sum(-1) == 160 * pattern.share).all())


@pytest.mark.parametrize("name", ["2:4", "half"])
def test_wanda_keeps_what_the_paper_keeps(name: str) -> None:
    inputs, weight, products = calibration()
    ours = thin(weight, products, PATTERNS[name], "wanda")
    scores = weight.abs() * inputs.norm(dim=0)
    for row in range(len(weight)):
        for start in range(0, 160, PATTERNS[name].group or 160):
            part = slice(start, start + (PATTERNS[name].group or 160))
            kept = ours[row, part] != 0
            assert scores[row, part][kept].min() >= scores[row, part][~kept].max()
            assert torch.equal(ours[row, part][kept], weight[row, part][kept])


def test_what_is_left_makes_up_for_what_goes() -> None:
    inputs, weight, products = calibration()

    def error(score: Score) -> float:
        return float(((weight - thin(weight, products, PATTERNS["2:4"], score)) @ inputs.t()).square().sum())

    assert error("sparsegpt") < 0.8 * error("wanda") < 0.8 * error("magnitude")


def test_sparsegpt_is_exact_least_squares_for_the_last_inputs() -> None:
    """With the first half of a row gone, the optimum of the other half is known in closed form."""
    inputs, weight, products = calibration()
    products = products + 0.01 * products.diagonal().mean() * torch.eye(160)
    pattern = Pattern(0.5, 4)
    ours = thin(weight, inputs.t() @ inputs, pattern, "sparsegpt")
    kept = ours != 0
    row = 3
    own = kept[row]
    best = torch.linalg.solve(products[own][:, own].double(), (products[own].double() @ weight[row].double()))
    mine, optimum = ours[row, own].double(), best

    def cost(values: Tensor) -> float:
        difference = torch.zeros(160, dtype=torch.float64)
        difference[own] = values
        difference -= weight[row].double()
        return float(difference @ products.double() @ difference)

    untouched = cost(weight[row, own].double())
    assert cost(optimum) <= cost(mine) < untouched


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_a_thin_folder_stays_thin_in_training(score: Score, tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole")
    batch = {"input_ids": torch.randint(5, 90, (4, 24)), "attention_mask": torch.ones(4, 24, dtype=torch.int64)}
    assert thin_folder(tmp_path / "whole", tmp_path / "thin", Pattern(0.5, 4), score, [batch]) == pytest.approx(0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "thin", dtype=torch.float32)
    names = linear_names(model, 4)
    zeros, every = zeros_among(linear_layers(model)).tolist()
    assert zeros == every / 2 == sum(model.get_submodule(name).weight.numel() for name in names) / 2
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    keep_zeros(linear_layers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in before.items():
        after = model.get_submodule(name).weight
        assert torch.equal(after == 0, weight == 0)
        assert not torch.allclose(after, weight, atol=1e-4)
