"""AWQ: what may be scaled in each family, and by how much, against a plain form in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ds_train.compress.awq import SHRINKS, STEPS, find_folds, narrowed, round_layer
from ds_train.compress.calibration import LayerRun, layer_by_layer
from ds_train.compress.post_training import Method, quantize_folder
from ds_train.compress.qat import linear_names
from ds_train.compress.rounding import Grid
from ds_train.config.quantize import QuantizeSection

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90, "max_position_embeddings": 40, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {
    ("mlp.down_proj",): "mlp.up_proj", ("self_attn.o_proj",): "self_attn.v_proj", QKV: "input_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
}  # fmt: skip
FOLDS: dict[str, dict[tuple[str, ...], str]] = {
    "llama": GATED,
    "qwen3": GATED,
    "gemma2": GATED | {("mlp.gate_proj", "mlp.up_proj"): "pre_feedforward_layernorm"},
    "phi": {(*QKV, "mlp.fc1"): "input_layernorm", ("self_attn.dense",): "self_attn.v_proj", ("mlp.fc2",): ""},
    # The smaller side of a ReLU is a smaller output of it; of a GELU it isn't.
    "opt": {
        QKV: "self_attn_layer_norm", ("self_attn.out_proj",): "self_attn.v_proj", ("fc1",): "final_layer_norm",
        ("fc2",): "fc1",
    },
    "gpt_neox": {
        ("attention.query_key_value",): "input_layernorm", ("mlp.dense_h_to_4h",): "post_attention_layernorm",
        ("attention.dense",): "", ("mlp.dense_4h_to_h",): "",
    },
    # Its norms are read by the residual too.
    "bert": {
        ("attention.self.query", "attention.self.key", "attention.self.value"): "",
        ("attention.output.dense",): "attention.self.value", ("intermediate.dense",): "", ("output.dense",): "",
    },
}  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    known = AutoConfig.for_model(family).to_dict()
    config = AutoConfig.for_model(family, **{key: value for key, value in SIZES.items() if key in known})
    model: Any = AutoModel if family == "bert" else AutoModelForCausalLM
    model = model.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batches(count: int = 1) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        mask = torch.ones(9, 30, dtype=torch.int64)
        mask[1, 13:] = 0
        found.append({"input_ids": torch.randint(1, 90, (9, 30), generator=draw), "attention_mask": mask})
    return found


@pytest.mark.parametrize("family", FOLDS)
def test_scaled_inputs_change_nothing_where_they_are_taken_back(family: str) -> None:
    model = model_of(family).double()
    (batch,) = batches()
    expected = model(**batch)[0].detach().clone()
    names = linear_names(model, 0)

    def scale(run: LayerRun) -> None:
        inner = {id(module): name for name, module in run.layer.named_modules()}
        folds = find_folds(run.layer, [inner[id(module)] for module in run.linear.values()], run.calls[0])
        found = {tuple(sorted(fold.readers)): fold.source for fold in folds}
        assert found == {tuple(sorted(readers)): source for readers, source in FOLDS[family].items()}
        for fold in folds:
            if fold.rows_I is not None:
                rows = int(fold.rows_I.max()) + 1
                known = fold.rows_I[fold.rows_I >= 0].bincount(minlength=rows) > 0
                scale = torch.where(known, torch.rand(rows, dtype=torch.float64) + 0.3, 1.0)
                outputs = len(run.layer.get_submodule(fold.source).weight)  # type: ignore[arg-type]
                fold.apply(run.layer, torch.nn.functional.pad(scale, (0, outputs - rows), value=1.0))

    before = copy.deepcopy(model.state_dict())
    layer_by_layer(model, names, [batch], scale)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 2
    found = model(**batch)[0]
    real = batch["attention_mask"].bool()
    # fp32 norms and softmax inside of the model set the last digits.
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def plain_rounded(weight: Tensor, bits: int, group: int, shrink: Tensor | float = 1.0) -> Tensor:
    parts = weight.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True) * (1 + 2.0**-16) * 2 / (2**bits - 1) * shrink
    return ((parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).flatten(-2)


def plain_narrowed(weight: Tensor, inputs: Tensor, bits: int, group: int) -> Tensor:
    """Rounded to the best of the narrower ranges of each row's group, one after the other."""
    rounded = torch.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part, seen = weight[row, start : start + group], inputs[:, start : start + group]
            tried = [plain_rounded(part, bits, group, shrink) for shrink in SHRINKS]
            errors = [float((seen @ (one - part)).square().sum()) for one in tried]
            rounded[row, start : start + group] = tried[errors.index(min(errors))]
    return rounded


@pytest.mark.parametrize("group", [8, 48])
def test_ranges_are_the_best_of_those_tried(group: int) -> None:
    torch.manual_seed(2)
    inputs, weight = torch.randn(200, 48) @ torch.randn(48, 48), torch.randn(10, 48)
    grid = Grid(4, group if group < 48 else 0)
    ours = grid.rounded(weight, narrowed(weight, inputs.t() @ inputs, grid))
    expected = plain_narrowed(weight.double(), inputs.double(), 4, group)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def plain_awq(layer: Any, run: LayerRun, bits: int, group: int) -> dict[str, Tensor]:
    """What a layer of Llama's form gives each linear layer's weight, in float64: its inputs' scales divided out again.

    One group after the other, by names, with the whole calibration in one batch.
    """
    layer = copy.deepcopy(layer).double()
    ((args, kwargs),) = run.calls
    args, kwargs = (args[0].double(), *args[1:]), dict(kwargs)
    kwargs["position_embeddings"] = tuple(part.double() for part in kwargs["position_embeddings"])
    if kwargs.get("attention_mask") is not None and kwargs["attention_mask"].is_floating_point():
        kwargs["attention_mask"] = kwargs["attention_mask"].double()
    (mask,) = run.masks
    assert mask is not None
    real = mask.bool()
    around = {QKV: "self_attn", ("mlp.gate_proj", "mlp.up_proj"): "mlp"}
    seen: dict[str, Any] = {}
    for name, module in layer.named_modules():
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.update({name: (args, kwargs, output)}), with_kwargs=True
        )
    layer(*args, **kwargs)
    calls = dict(seen)
    effective = {}
    for readers, source in GATED.items():
        inputs = calls[readers[0]][0][0][real]
        sizes = inputs.abs().mean(0)
        if source.endswith("v_proj"):  # two query heads share a key/value head
            sizes = sizes.view(2, 2, 8).mean(1, keepdim=True).expand(2, 2, 8).reshape(-1)
        weights = {name: layer.get_submodule(name).weight.detach().clone() for name in readers}
        module = layer.get_submodule(around.get(readers, readers[0]))
        own_args, own_kwargs, expected = calls[around.get(readers, readers[0])]

        def error(
            changed: dict[str, Tensor], module: Any = module, expected: Any = expected, weights: Any = weights,
            own_args: Any = own_args, own_kwargs: Any = own_kwargs,
        ) -> float:  # fmt: skip
            first = expected[0] if isinstance(expected, tuple) else expected
            for name in weights:
                layer.get_submodule(name).weight.data = changed[name]
            found = module(*own_args, **own_kwargs)
            found = found[0] if isinstance(found, tuple) else found
            for name, weight in weights.items():
                layer.get_submodule(name).weight.data = weight
            return float((found - first)[real].square().sum())

        best = None
        for step in range(STEPS):
            scale = sizes ** (step / STEPS)
            scale = scale / (scale.max() * scale.min()).sqrt()
            tried = {name: plain_rounded(weight * scale, bits, group) / scale for name, weight in weights.items()}
            if best is None or error(tried) < best[0]:
                best = error(tried), scale, tried
        assert best is not None
        _, scale, tried = best
        narrow = {
            name: plain_narrowed(weight * scale, inputs / scale, bits, group) / scale
            for name, weight in weights.items()
        }
        effective |= narrow if error(narrow) < error(tried) else tried
    return effective


@torch.no_grad()
def test_a_layer_is_rounded_as_by_the_plain_form() -> None:
    model = model_of("llama")
    (batch,) = batches()
    chosen = linear_names(model, 0)
    checked = 0

    def compare(run: LayerRun) -> None:
        nonlocal checked
        expected = plain_awq(run.layer, run, 4, 8)
        whole = copy.deepcopy(run.layer)
        expected_out = run.outputs()[0]
        scales, scaled = round_layer(run, Grid(4, 8))
        assert scaled == 7
        layer: Any = run.layer
        for name, module in run.linear.items():
            assert torch.equal(Grid(4, 8).rounded(module.weight, scales[name]), module.weight), name
        # Its rounded matrices, with everything else as it was, give what the rounded layer gives.
        for name, weight in expected.items():
            whole.get_submodule(name).weight.data = weight.float()
        (args, kwargs), real = run.calls[0], batch["attention_mask"].bool()
        plain, ours = whole(*args, **kwargs)[real], layer(*args, **kwargs)[real]
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
        assert (ours - expected_out[real]).norm() > 20 * (ours - plain).norm()
        checked += 1

    layer_by_layer(model, chosen, [batch], compare)
    assert checked == 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_large_inputs_are_spared(family: str, tmp_path: Path) -> None:
    """A few channels of every norm are large, as in trained models, and matrices read them with small weights."""
    model = model_of(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and "layers" in name:
                parameter[::9] = 25.0
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter[:, ::9] *= 0.05
    model.save_pretrained(tmp_path / "whole")
    shown = batches(3)
    section = QuantizeSection(weights="int4", group=16)
    real = shown[0]["attention_mask"].bool()
    errors: dict[str, float] = {}
    methods: tuple[Method, ...] = ("rtn", "awq")
    for method in methods:
        done = quantize_folder(tmp_path / "whole", tmp_path / method, section, method, shown)
        assert done.scaled == (14 if method == "awq" else 0)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype=torch.float32).eval()
        with torch.no_grad():
            change = (loaded(**shown[0]).logits - model(**shown[0]).logits)[real]
        errors[method] = float(change.norm())
    assert errors["awq"] < 0.7 * errors["rtn"]
