"""Outlines made without torch are the models' own parameters: every name and shape, and the plans they are cut by."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from ds_train.plan.outline import outline
from ds_train.plan.shares import Shares
from ds_train.plan.transformers_keys import Task

FAMILIES: dict[str, tuple[Task, dict[str, Any]]] = {
    "llama": ("causal-lm", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "mlp_bias": True}),
    "qwen3": ("causal-lm", {"hidden_size": 64, "head_dim": 24, "tie_word_embeddings": True}),
    "gpt2": ("causal-lm", {"n_embd": 48, "n_layer": 3, "n_inner": 100}),
    "gpt_neox": ("causal-lm", {"hidden_size": 64, "num_attention_heads": 4}),
    "gemma2": ("causal-lm", {"hidden_size": 64, "head_dim": 16}),
    "opt": ("causal-lm", {"hidden_size": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "mixtral": ("causal-lm", {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 5}),
    "qwen3_moe": ("causal-lm", {"hidden_size": 64, "num_experts": 6, "moe_intermediate_size": 40}),
    "deepseek_v3": ("causal-lm", {"hidden_size": 64, "n_routed_experts": 4, "num_hidden_layers": 4}),
    "falcon": ("causal-lm", {"hidden_size": 64, "num_attention_heads": 4}),
    "bert": ("masked-lm", {"hidden_size": 48, "num_attention_heads": 4}),
    "roberta": ("sequence-classification", {"hidden_size": 48, "num_attention_heads": 4, "num_labels": 3}),
    "phi3": ("sequence-classification", {"hidden_size": 64, "num_attention_heads": 4, "num_labels": 5}),
}
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_parameters_are_the_models_own(arch: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    task, keys = FAMILIES[arch]
    keys = {"num_hidden_layers": 2} | keys if arch != "gpt2" else keys
    config = transformers.AutoConfig.for_model(arch, **keys)
    with torch.device("meta"):
        model = getattr(transformers, AUTO[task]).from_config(config)
    model.tie_weights()
    found = outline(arch, task, keys)
    assert found is not None
    real = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    if arch == "roberta":  # registers its tied pair in the other order
        assert Counter(shape for _, shape in real) == Counter(parameter.shape for parameter in found.parameters)
    else:
        assert [(parameter.name, parameter.shape) for parameter in found.parameters] == real
    assert dict(found.tensor_plan) == {
        key: style for key, style in (config.base_model_tp_plan or {}).items() if isinstance(style, str)
    }
    assert list(found.pipeline_plan) == list(config.base_model_pp_plan or {})


def test_a_tied_head_is_seen() -> None:
    for tied in (False, True):
        found = outline("llama", "causal-lm", {"num_hidden_layers": 1, "tie_word_embeddings": tied})
        assert found is not None
        assert (found.tied, found.plain_head) == (tied, True)
        assert (found.head, found.embedding) == ("lm_head", "model.embed_tokens")
    capped = outline("gemma2", "causal-lm", {"num_hidden_layers": 1})
    assert capped is not None
    assert not capped.plain_head


def test_what_isnt_understood_has_no_outline() -> None:
    assert outline("no-such-arch", "causal-lm", {}) is None
    assert outline("qwen3_next", "causal-lm", {}) is None
    assert outline("llama", "masked-lm", {}) is None


def test_shares_are_those_of_the_cut_model() -> None:
    """Against counting by hand: tests/parity/test_held.py counts the same in the running engine."""
    V, D, F, LAYERS, HEADS, GROUPS = 320, 64, 160, 8, 4, 2
    keys = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "tie_word_embeddings": False,
    }  # fmt: skip
    found = outline("llama", "causal-lm", keys)
    assert found is not None
    shares = Shares(found, "llama", 48)
    matrices = 2 * D * D + 2 * D * D * GROUPS // HEADS + 3 * D * F
    first, last = shares.stages(2, 2, [5, 3])
    assert first.elements == 5 * (matrices // 2 + 2 * D) + V * D // 2
    assert last.elements == 3 * (matrices // 2 + 2 * D) + V * D // 2 + D
    (whole,) = shares.stages(1, 1)
    assert whole.elements == LAYERS * (matrices + 2 * D) + 2 * V * D + D
    assert whole.multiply_adds == LAYERS * matrices + V * D
    assert whole.groups(all_decayed=False) == [LAYERS * matrices + 2 * V * D, (2 * LAYERS + 1) * D]


def test_tied_embeddings_stand_on_both_end_stages() -> None:
    keys = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    plain, tied = (
        Shares(found, "llama", 16).stages(2, 1)
        for found in (outline("llama", "causal-lm", keys | {"tie_word_embeddings": tie}) for tie in (False, True))
        if found is not None
    )
    assert [stage.elements for stage in plain] == [stage.elements for stage in tied]


def test_experts_stay_whole_on_tensor_ranks() -> None:
    keys = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 4, "num_local_experts": 4, "vocab_size": 128}  # fmt: skip
    found = outline("mixtral", "causal-lm", keys)
    assert found is not None
    whole, cut = (Shares(found, "mixtral", 16).stages(1, tensor)[0].elements for tensor in (1, 2))
    experts = 4 * 3 * 64 * 96
    assert cut > experts
    assert whole - cut == (4 * 64 * 64 + 2 * 64 * 128) // 2
