"""A start of fewer layers is the whole model without the others, as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from ds_train.config.load import validate
from ds_train.data.tokenizer import byte_tokenizer
from ds_train.models.kept_layers import start_from_kept_layers
from ds_train.models.load import load_model_config

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2, "n_embd": 32,
    "n_layer": 4, "n_head": 4, "sliding_window": 8, "query_pre_attn_scalar": 8,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
def test_the_others_are_left_out(family: str, tmp_path: Path) -> None:
    known = AutoConfig.for_model(family).to_dict()
    config = AutoConfig.for_model(family, **{key: value for key, value in SIZES.items() if key in known})
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    auto: Any = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    torch.manual_seed(4)
    whole = auto.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    run = validate(
        {
            "model": {"path": str(tmp_path / "whole"), "keep_layers": [0, 3]}, "run_root": str(tmp_path / "runs"),
            "task": {"kind": "masked-lm" if family == "bert" else "causal-lm"}, "schedule": {"steps": 1},
            "compress": {"distill": {"logits": "js"}},
        }
    )  # fmt: skip
    assert load_model_config(run, byte_tokenizer()).num_hidden_layers == 2
    started = start_from_kept_layers(run, byte_tokenizer())
    assert started.compress.distill.teacher == str(tmp_path / "whole")
    small, info = auto.from_pretrained(str(started.model.path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    lists = [module for module in whole.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4]
    (layers,) = lists
    kinds = getattr(whole.config, "layer_types", None)
    del layers[1:3]
    if kinds is not None:
        assert small.config.layer_types == [kinds[0], kinds[3]]
        whole.config.layer_types = small.config.layer_types
    for part in whole.modules():
        if getattr(part, "config", None) is not None:
            part.config.num_hidden_layers = 2
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits if family != "bert" else whole(tokens).logits
        torch.testing.assert_close(small.eval()(tokens).logits, expected)
