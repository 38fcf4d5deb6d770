"""A start of fewer layers is the whole model without the others, as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ds_train.config import RunConfig
from ds_train.config.load import validate
from ds_train.data.tokenizer import byte_tokenizer
from ds_train.errors import UserError
from ds_train.models.kept_layers import start_from_kept_layers
from ds_train.models.load import load_model_config
from ds_train.models.token_drop import repeated_layers

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "n_embd": 32,
    "n_layer": 4, "n_head": 4, "sliding_window": 8, "query_pre_attn_scalar": 8, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
OLDER = {"gemma2": ("layer_types",), "cohere2": ("layer_types",)}
"""What files from before transformers 4.53 leave to be computed from a layer's place."""


def saved(family: str, folder: Path, **keys: Any) -> Any:
    known = AutoConfig.for_model(family).to_dict()
    own = {key: value for key, value in SIZES.items() if key in known} | keys
    config = AutoConfig.for_model(family, **own | ({"layer_types": None} if "layer_types" in known else {}))
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    auto: Any = AutoModelForMaskedLM if "bert" in family else AutoModelForCausalLM
    torch.manual_seed(4)
    whole = auto.from_config(config).eval()
    whole.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in stored.items() if key not in OLDER.get(family, ())})
    )
    return whole


def recipe_of(family: str, folder: Path, kept: list[int]) -> RunConfig:
    return validate(
        {
            "model": {"path": str(folder / "whole"), "keep_layers": kept}, "run_root": str(folder / "runs"),
            "task": {"kind": "masked-lm" if "bert" in family else "causal-lm"}, "schedule": {"steps": 1},
            "compress": {"distill": {"logits": "js"}},
        }
    )  # fmt: skip


@pytest.mark.parametrize("kept", [[0, 3], [1, 2]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere2", "bert", "glm4_moe"])
def test_the_others_are_left_out(family: str, kept: list[int], tmp_path: Path) -> None:
    whole = saved(family, tmp_path / "whole")
    run = recipe_of(family, tmp_path, kept)
    assert load_model_config(run, byte_tokenizer()).num_hidden_layers == 2
    started = start_from_kept_layers(run, byte_tokenizer())
    assert started.compress.distill.teacher == str(tmp_path / "whole")
    small, info = type(whole).from_pretrained(str(started.model.path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(repeated_layers(small)) == 2
    # The oracle: the whole model, whose other layers hand on what they get.
    for number, layer in enumerate(repeated_layers(whole)):
        if number not in kept:
            layer.register_forward_hook(
                lambda _, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
            )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits if family != "bert" else whole(tokens).logits
        torch.testing.assert_close(small.eval()(tokens).logits, expected)


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "layer 1 would be another one at place 0, .* attn.scaling"),
        ("modernbert", {"cls_token_id": 1, "sep_token_id": 2}, "Identity instead of LayerNorm as its attn_norm"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "MLP instead of .*MoeBlock as its mlp"),
    ],
)
def test_layers_that_are_what_they_are_by_their_place_are_refused(
    family: str, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    saved(family, tmp_path / "whole", **keys)
    with pytest.raises(UserError, match=says):
        start_from_kept_layers(recipe_of(family, tmp_path, [1, 3]), byte_tokenizer())
    assert not [*(tmp_path / "runs").glob("*/start")]


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole")
    with pytest.raises(UserError, match=r"model.keep_layers=.*: there is no layer 4: they count from 0 to 3"):
        load_model_config(recipe_of("llama", tmp_path, [1, 4]), byte_tokenizer())


def test_a_start_is_made_anew_when_its_source_or_its_layers_change(tmp_path: Path) -> None:
    saved("llama", tmp_path / "whole")
    run = recipe_of("llama", tmp_path, [0, 3])
    (tmp_path / "whole" / "generation_config.json").write_text(json.dumps({"top_k": 7}))

    def first_rows() -> Any:
        folder = Path(str(start_from_kept_layers(run, byte_tokenizer()).model.path))
        small = AutoModelForCausalLM.from_pretrained(folder)
        assert small.generation_config.top_k == 7
        return small.model.layers[0].self_attn.q_proj.weight[0].tolist(), (folder / "config.json").stat().st_mtime_ns

    weights, made = first_rows()
    assert first_rows() == (weights, made)
    run = recipe_of("llama", tmp_path, [1, 3])
    others, made_later = first_rows()
    assert others != weights
    assert made_later > made
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] += 1.0
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    assert first_rows()[0] == pytest.approx([value + 1.0 for value in others])
