"""Rounding against compressed-tensors' own arithmetic, training through it, and what from_pretrained makes of it."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ds_train.checkpoint.hf import export_fragments
from ds_train.compress.packed import Packing
from ds_train.compress.qat import Rounding, quantized_names
from ds_train.compress.rounding import Grid, round_tokens
from ds_train.config import RunConfig
from ds_train.config.load import validate
from ds_train.config.quantize import QuantizeSection
from ds_train.data.tokenizer import byte_tokenizer
from ds_train.errors import UserError

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SECTIONS = {
    "int8": QuantizeSection(weights="int8"),
    "int4-group": QuantizeSection(weights="int4", group=16),
    "int8-activations": QuantizeSection(weights="int8", activations="int8"),
}


def small(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(3)
    known = AutoConfig.for_model(family).to_dict()
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{key: value for key, value in SMALL.items() if key in known})
    )


def run_with(section: QuantizeSection, **model: Any) -> RunConfig:
    quantize = section.model_dump()
    return validate({"model": {"arch": "llama"} | model, "schedule": {"steps": 1}, "compress": {"quantize": quantize}})


def oracle(tensor: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """Rounded with these scales by compressed-tensors; that those are its own, to a hair, is asserted."""
    args = QuantizationArgs(type="int", symmetric=True, **options)
    grouped = tensor.unflatten(-1, (-1, options.get("group_size") or tensor.shape[-1]))
    own, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    torch.testing.assert_close(scale, own, rtol=2e-5 if tensor.dtype == torch.float32 else 5e-3, atol=0)
    return fake_quantize(tensor, scale, zero, args)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 8), (8, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_as_the_library_that_reads_it(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = torch.randn(19, 48, dtype=dtype)
    weight[3] = 0
    grid = Grid(bits, group)
    scales = grid.scales(weight)
    strategy: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    ours = grid.rounded(weight, scales)
    assert ours.dtype == dtype
    assert grid.integers(weight, scales).unique().numel() > 2**bits // 3
    if dtype == torch.float32:
        torch.testing.assert_close(ours, oracle(weight, scales, num_bits=bits, **strategy), rtol=1e-6, atol=0)
    # Half a step; in 16 bits the scale, and the value that an integer stands for, are rounded too.
    step = scales.float().repeat_interleave(group or 48, 1)
    slack = 0.5001 * step if dtype == torch.float32 else 0.54 * step + 2.0**-8 * weight.float().abs()
    assert bool(((ours.float() - weight.float()).abs() <= slack).all())


def test_tokens_round_as_the_library_does() -> None:
    hidden = torch.randn(2, 7, 24, requires_grad=True)
    ours = round_tokens(hidden)
    flat = hidden.detach().flatten(0, 1)
    scale = flat.abs().amax(-1, keepdim=True) / 127.5 * (1 + 2.0**-16)
    torch.testing.assert_close(
        ours.flatten(0, 1), oracle(flat, scale, num_bits=8, strategy="channel"), rtol=1e-6, atol=0
    )
    weight = torch.randn_like(hidden)
    (gradient,) = torch.autograd.grad((ours * weight).sum(), hidden)
    torch.testing.assert_close(gradient, weight)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_last_bit_of_the_largest_decides_nothing(sign: float) -> None:
    near = sign * torch.rand(4000, 1).add_(0.5) * torch.ones(1, 2) * torch.tensor([1.0, 0.3])
    assert Grid(4).integers(near, Grid(4).scales(near))[:, 0].unique().tolist() == [7 * int(sign)]


def rounded_weights(model: PreTrainedModel, section: QuantizeSection) -> dict[str, Tensor]:
    grid = Grid(section.bits, section.group)
    names = {f"{name}.weight" for name in quantized_names(model, section)}
    state = dict(model.named_parameters())
    return {name: grid.rounded(value, grid.scales(value)) for name, value in state.items() if name in names}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_go_straight_through(checkpointing: bool) -> None:
    section = SECTIONS["int4-group"]
    model, plain = small(), small()
    tokens = torch.randint(1, 97, (2, 9))
    # The oracle: the rounded value, and the identity's gradient.
    state = dict(plain.named_parameters())
    rounded = {
        name: state[name] + (value - state[name]).detach() for name, value in rounded_weights(plain, section).items()
    }
    expected = functional_call(plain, rounded, (tokens,)).logits
    expected.square().mean().backward()
    rounding = Rounding(run_with(section, activation_checkpointing=checkpointing), model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    logits = model(tokens).logits
    logits.square().mean().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)
    rounding.on = False
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)


def test_rounded_weights_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, plain = small(), [], Grid.rounded

    def rounded(grid: Grid, weight: Tensor, scales: Tensor) -> Tensor:
        value = plain(grid, weight, scales)
        made.append(weakref.ref(value.untyped_storage()))
        return value

    monkeypatch.setattr(Grid, "rounded", rounded)
    Rounding(run_with(SECTIONS["int8"]), model)
    loss = model(torch.randint(1, 97, (2, 9))).logits.sum()
    gc.collect()
    assert len(made) == 14
    assert not any(storage() for storage in made)
    loss.backward()
    assert len(made) == 28


@pytest.mark.parametrize("name", SECTIONS)
def test_from_pretrained_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    section, model = SECTIONS[name], small()
    packing = Packing.of(section, model)
    assert len(packing.names) == 14
    state = packing.state(model.state_dict())
    save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": packing.config(model)}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    Rounding(run_with(section), model)
    tokens = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        # A token's largest value may lie one integer further there, see compress/rounding.py.
        near = 5e-3 if section.activations != "none" else 1e-5
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=near)
    bits = {"int8": 8, "int4-group": 4, "int8-activations": 8}[name]
    weights = sum(value.numel() for key, value in model.state_dict().items() if key.rpartition(".")[0] in packing.names)
    stored = sum(
        value.numel() * value.element_size()
        for key, value in state.items()
        if key.rpartition(".")[0] in packing.names and key.endswith(("weight", "weight_packed"))
    )
    assert stored == weights * bits // 8


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4-group"])
def test_a_checkpoint_is_exported_with_the_integers_that_were_trained(
    name: str, written: torch.dtype, trained: torch.dtype, tmp_path: Path
) -> None:
    section, model = SECTIONS[name], small()
    weights = {key: value + 1e-3 * torch.randn_like(value) for key, value in model.named_parameters()}

    class Files:
        shapes = weights

        def whole(self, name: str, kind: str = "weight") -> Tensor:
            return weights[name].detach()

    model.to(trained)  # type: ignore[call-arg]
    packing = Packing.of(section, model)
    export_fragments(Files(), model, byte_tokenizer(), tmp_path / "out", "", written, packing=packing)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for layer in packing.names:
        # The oracle: the nearest integers in float64, of the weights and the scales that the forward pass has.
        weight = weights[f"{layer}.weight"].to(trained)
        parts = weight.double().unflatten(-1, (-1, section.group or weight.shape[-1]))
        scale = packing.grid.scales(weight)
        expected = (parts / scale.double()[..., None]).round().clamp(packing.grid.least, packing.grid.most).flatten(-2)
        shape = torch.Size(found[f"{layer}.weight_shape"].tolist())
        ours = unpack_from_int32(found[f"{layer}.weight_packed"], section.bits, shape)
        # A tie, which fp32 sees otherwise, is one in very many.
        assert (ours != expected).sum() <= 1, layer
        assert torch.equal(found[f"{layer}.weight_scale"], scale.to(written))
    head = weights["lm_head.weight"].to(written)
    assert torch.equal(found["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("family", "section", "says"),
    [
        ("gpt2", SECTIONS["int8"], "is a Conv1D"),
        ("mixtral", SECTIONS["int8"], "only linear layers are taken"),
        ("llama", QuantizeSection(weights="int4", group=20), "has 32 inputs"),
    ],
)
def test_what_cannot_be_rounded_is_refused(family: str, section: QuantizeSection, says: str) -> None:
    with pytest.raises(UserError, match=says):
        quantized_names(small(family), section)
