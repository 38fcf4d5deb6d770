"""GPTQ against its plain form, and folders that are rounded after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
)

from ds_train.compress.gptq import gptq
from ds_train.compress.post_training import Method, quantize_folder, thin_folder
from ds_train.compress.rounding import Grid
from ds_train.compress.sparsity import Pattern, thin
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import UserError
from ds_train.models.load import not_waiting


def plain_gptq(weight: Tensor, products: Tensor, grid: Grid, zeros_stay: bool = True) -> Tensor:
    """A column at a time in float64, the inverse shrunk by elimination (the paper's equations 2 and 3).

    Scales, and what integers stand for, are rounded to the weight's format, as they are stored.
    """
    exact, products = weight.double().clone(), products.double().clone()
    zero = (exact == 0) & zeros_stay
    products += 0.01 * products.diagonal().mean() * torch.eye(len(products))
    inverse = torch.linalg.inv(products)
    rounded = torch.empty_like(exact)
    group = grid.group or len(products)
    half = (2**grid.bits - 1) / 2
    for column in range(len(products)):
        if column % group == 0:
            part = exact[:, column : column + group].masked_fill(zero[:, column : column + group], 0.0)
            scale = (part.abs().amax(-1) * (1 + 2.0**-16) / half).to(weight.dtype).double()
        value = (exact[:, column] / scale).round().clamp(grid.least, grid.most) * scale
        rounded[:, column] = value.to(weight.dtype).double().masked_fill(zero[:, column], 0.0)
        error = (exact[:, column] - rounded[:, column]) / inverse[column, column]
        exact[:, column:] -= error[:, None] * inverse[column, column:]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded


def change(weight: Tensor, values: Tensor, inputs: Tensor) -> float:
    """How far the layer's outputs are from what they were."""
    return float(((weight.double() - values.double()) @ inputs.double().t()).square().sum())


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 16), Grid(8, 48), Grid(4, 144)])
@pytest.mark.parametrize("pattern", [None, Pattern(0.5, 4), Pattern(0.7)])
def test_gptq_is_its_plain_form_and_better_than_to_nearest(grid: Grid, pattern: Pattern | None) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(600, 144) @ torch.randn(144, 144)
    weight = torch.randn(20, 144)
    products = inputs.t() @ inputs
    if pattern is not None:
        weight = thin(weight, products, pattern, "wanda")
    values, scales = gptq(weight, products, grid)
    expected = plain_gptq(weight, products, grid)
    # Rounding is a matter of the last bit for one weight in many.
    same = (values.double() - expected).abs() < 1e-4
    assert same.float().mean() > 0.99
    assert torch.equal(grid.rounded(values, scales), values)
    assert not values[weight == 0].any()
    near = grid.rounded(weight, grid.scales(weight))
    assert change(weight, values, inputs) < 0.95 * change(weight, near, inputs)


@pytest.mark.parametrize("grid", [Grid(4), Grid(8), Grid(4, 16)])
def test_gptq_makes_up_for_the_rounding_of_stored_scales(grid: Grid) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(600, 96) @ torch.randn(96, 96)
    weight = torch.randn(200, 96).bfloat16()
    values, scales = gptq(weight, inputs.t() @ inputs, grid)
    assert values.dtype == scales.dtype == torch.bfloat16
    assert torch.equal(grid.rounded(values, scales), values), "what is packed is what the errors were of"
    expected = plain_gptq(weight, inputs.t() @ inputs, grid)
    assert change(weight, values, inputs) == pytest.approx(change(weight, expected, inputs), rel=0.02)


def test_a_few_zeros_that_stay_cost_nothing() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(600, 96) @ torch.randn(96, 96)
    weight = torch.randn(60, 96).masked_fill(torch.rand(60, 96) < 0.003, 0.0)
    assert 5 < (weight == 0).sum() < 40
    values, _ = gptq(weight, inputs.t() @ inputs, Grid(4))
    refilled = plain_gptq(weight, inputs.t() @ inputs, Grid(4), zeros_stay=False)
    assert change(weight, values, inputs) < 1.02 * change(weight, refilled, inputs)


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


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_sparse_folder_stays_sparse(method: Method, tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole")
    batch = {"input_ids": torch.randint(5, 90, (4, 24))}
    thin_folder(tmp_path / "whole", tmp_path / "thin", Pattern(0.5, 4), "magnitude")
    section = QuantizeSection(weights="int4", group=16)
    quantize_folder(tmp_path / "thin", tmp_path / "small", section, method, [batch])
    thinned, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32) for folder in ("thin", "small")
    )
    loaded(**batch)  # unpacks
    names = [name for name, _ in thinned.named_modules() if name.endswith("_proj")]
    assert len(names) == 14
    for name in names:
        zero = thinned.get_submodule(name).weight == 0  # type: ignore[operator]
        assert zero.float().mean() == 0.5
        assert not loaded.get_submodule(name).weight[zero].any(), name  # type: ignore[index]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model can be loaded"):
        quantize_folder(tmp_path, tmp_path / "out", QuantizeSection(weights="int8"), "rtn")


def test_a_family_that_transformers_cannot_load_packed_is_refused(tmp_path: Path) -> None:
    """ModernBERT's code asks a linear layer for its weight while it is loaded."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = ModernBertConfig(num_hidden_layers=2, pad_token_id=0, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    section = QuantizeSection(weights="int8")
    with pytest.raises(UserError, match=r"weights=int8: transformers can't load a packed modernbert: .*'weight'\. Fix"):
        quantize_folder(tmp_path / "model", tmp_path / "out", section, "rtn")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_layers_are_one_is_refused_where_layers_are_looked_at(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    config = AlbertConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    batches = [{"input_ids": torch.randint(3, 64, (2, 8))}]
    with pytest.raises(UserError, match=r"--method: albert runs the same layer several times.* Fix: use rtn"):
        quantize_folder(tmp_path / "model", tmp_path / "out", QuantizeSection(weights="int8"), "gptq", batches)


def test_one_rank_of_several_loads_what_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors divides the loading among all ranks, of which the others may do something else."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    quantize_folder(tmp_path / "model", tmp_path / "out", QuantizeSection(weights="int8"), "rtn")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="process group has not been initialized"):  # or there is nothing to mend
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with not_waiting():
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(5)[None])
    assert torch.distributed.is_initialized()
