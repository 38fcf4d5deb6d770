"""GPTQ against its plain form, and folders that are rounded after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from ds_train.compress.gptq import gptq
from ds_train.compress.post_training import Method, quantize_folder
from ds_train.compress.rounding import Grid
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import UserError


def plain_gptq(weight: Tensor, products: Tensor, grid: Grid) -> Tensor:
    """A column at a time in float64, the inverse shrunk by elimination (the paper's equations 2 and 3)."""
    exact, products = weight.double().clone(), products.double().clone()
    products += 0.01 * products.diagonal().mean() * torch.eye(len(products))
    inverse = torch.linalg.inv(products)
    rounded = torch.empty_like(exact)
    group = grid.group or len(products)
    half = (2**grid.bits - 1) / 2
    for column in range(len(products)):
        if column % group == 0:
            scale = exact[:, column : column + group].abs().amax(-1) * (1 + 2.0**-16) / half
        rounded[:, column] = (exact[:, column] / scale).round().clamp(grid.least, grid.most) * scale
        error = (exact[:, column] - rounded[:, column]) / inverse[column, column]
        exact[:, column:] -= error[:, None] * inverse[column, column:]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 16), Grid(8, 48), Grid(4, 144)])
def test_gptq_is_its_plain_form_and_better_than_to_nearest(grid: Grid) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(600, 144) @ torch.randn(144, 144)
    weight = torch.randn(20, 144)
    products = inputs.t() @ inputs
    values, scales = gptq(weight, products, grid)
    expected = plain_gptq(weight, products, grid)
    # Rounding is a matter of the last bit for one weight in many.
    same = (values.double() - expected).abs() < 1e-4
    assert same.float().mean() > 0.99
    assert torch.equal(grid.rounded(values, scales), values)
    near = grid.rounded(weight, grid.scales(weight))
    ours, nearest = (((weight - one) @ inputs.t()).square().sum() for one in (values, near))
    assert ours < 0.9 * nearest


def test_an_input_that_is_never_there_is_left_out() -> None:
    inputs = torch.randn(50, 16)
    inputs[:, 3] = 0
    values, _ = gptq(torch.randn(5, 16), inputs.t() @ inputs, Grid(8))
    assert bool(values.isfinite().all())
    assert not values[:, 3].any()


def saved(family: str, folder: Path) -> Any:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bert":
        config: Any = BertConfig(vocab_size=90, max_position_embeddings=24, **sizes)
        model: Any = AutoModelForSequenceClassification.from_config(config)
    else:
        config = LlamaConfig(vocab_size=90, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_rounded_folder_is_near_the_whole_one(family: str, method: Method, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "whole")
    batch = {"input_ids": torch.randint(5, 90, (4, 24)), "attention_mask": torch.ones(4, 24, dtype=torch.int64)}
    batch["attention_mask"][1, -9:] = 0
    section = QuantizeSection(weights="int4", group=16)
    before, after, _ = quantize_folder(tmp_path / "whole", tmp_path / "small", section, method, [batch, batch])
    assert after < 0.6 * before
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    loaded = type(model).from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, whole = loaded(**batch).logits, model(**batch).logits
    with pytest.raises(UserError, match="packed integers already"):
        quantize_folder(tmp_path / "small", tmp_path / "smaller", section, "rtn")
    difference = (ours - whole).norm() / whole.norm()
    assert 1e-4 < difference < 0.25


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model can be loaded"):
        quantize_folder(tmp_path, tmp_path / "out", QuantizeSection(weights="int8"), "rtn")
