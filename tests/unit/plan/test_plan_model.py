"""What the plan knows of models without importing transformers, against transformers itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plan_recipes import recipe

from ds_train.config.model import ModelSection
from ds_train.plan.facts import Facts
from ds_train.plan.model_size import model_size, of_kept_layers, said_of_layers
from ds_train.plan.topology import Cluster
from ds_train.plan.transformers_keys import (
    TASKS,
    Task,
    architectures_with_head,
    attribute_map,
    config_fields,
    known_architectures,
    supports,
)

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 3, "num_attention_heads": 6,
              "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 5, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64},
    "mistral": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 8},
    "mixtral": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 8,
                "num_local_experts": 4},
    "gemma2": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 32},
    "gpt2": {"n_embd": 144, "n_layer": 4, "n_head": 6, "n_positions": 128},
    "gpt_neo": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 256,
                "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 6},
    "opt": {"hidden_size": 144, "ffn_dim": 432, "num_hidden_layers": 3, "num_attention_heads": 6,
            "max_position_embeddings": 128, "word_embed_proj_dim": 144},
    "bert": {"hidden_size": 132, "intermediate_size": 528, "num_hidden_layers": 3, "num_attention_heads": 6},
    "roberta": {"hidden_size": 132, "intermediate_size": 528, "num_hidden_layers": 3, "num_attention_heads": 6},
}  # fmt: skip
HEADS: dict[str, Task] = {"bert": "masked-lm", "roberta": "masked-lm"}
FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "supports_gradient_checkpointing")
AUTO = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}


@pytest.mark.parametrize("sizes", ["small", "default"])
@pytest.mark.parametrize("arch", SMALL)
def test_parameter_count_is_within_3_percent_of_the_model(arch: str, sizes: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    task, keys = HEADS.get(arch, "causal-lm"), SMALL[arch] if sizes == "small" else {}
    config = transformers.AutoConfig.for_model(arch, **keys, vocab_size=5003)
    with torch.device("meta"):
        real = getattr(transformers, AUTO[task]).from_config(config)
    count = sum(parameter.numel() for parameter in real.parameters())
    estimate = model_size(ModelSection(arch=arch, config=keys), task, vocabulary=5003)
    assert estimate is not None
    assert estimate.parameters == pytest.approx(count, rel=0.03)
    # The same from the config.json that stands beside weights.
    config.save_pretrained(tmp_path)
    stored = model_size(ModelSection(path=str(tmp_path)), task)
    assert stored is not None
    assert stored.parameters == pytest.approx(count, rel=0.03)


def test_a_classifier_has_no_vocabulary_head() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", **SMALL["llama"], vocab_size=5003)
    with torch.device("meta"):
        real = transformers.AutoModelForSequenceClassification.from_config(config)
    size = model_size(ModelSection(arch="llama", config=SMALL["llama"]), "sequence-classification", 5003)
    assert size is not None
    assert size.parameters == pytest.approx(sum(p.numel() for p in real.parameters()), rel=0.03)


def test_sizes_that_are_not_known() -> None:
    assert model_size(ModelSection(path="nobody/nothing"), "causal-lm") is None
    for arch in ("mamba", "bart", "no-such-arch"):
        size = model_size(ModelSection(arch=arch), "causal-lm", 100)
        assert size is not None
        assert size.parameters is None
    loaded = model_size(ModelSection(arch="llama"), "causal-lm", None)
    assert loaded is not None
    assert loaded.parameters is None  # the tokenizer decides the vocabulary


def test_a_hub_model_in_the_local_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps({"model_type": "opt", "hidden_size": 64}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    size = model_size(ModelSection(path="some/model"), "causal-lm")
    assert size is not None
    assert (size.arch, size.hidden_size) == ("opt", 64)
    assert model_size(ModelSection(path="some/model", revision="v2"), "causal-lm") is None


@pytest.mark.parametrize("mapping", TASKS)
def test_heads_are_transformers_own(mapping: Task) -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    name = f"MODEL_FOR_{mapping.upper().replace('-', '_')}_MAPPING_NAMES"
    assert architectures_with_head(mapping) == set(getattr(auto, name))


def test_families_and_their_keys_are_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    assert known_architectures() == dict(auto.CONFIG_MAPPING_NAMES)
    for arch in (*SMALL, "electra", "albert", "xlm-roberta", "gpt-sw3", "gemma3_text", "deepseek_v3", "falcon", "phi3"):
        config = transformers.AutoConfig.for_model(arch)
        assert attribute_map(arch) == config.attribute_map
        declared = {field.name: field.default for field in dataclasses.fields(config)}
        assert set(declared) <= set(config_fields(arch)), arch
        for key, default in config_fields(arch).items():
            if isinstance(default, int) and key in declared:
                assert declared[key] == default, (arch, key)


def test_what_models_support_is_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    for arch in (*SMALL, "bloom", "ctrl", "falcon"):
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(transformers.AutoConfig.for_model(arch))]
        for flag in FLAGS:
            assert supports(arch, flag) in (None, bool(getattr(model_class, flag))), (arch, flag)
    assert supports("no-such-arch", "_supports_sdpa") is None


def test_facts_read_recipe_keys_wherever_they_stand() -> None:
    facts = Facts(recipe({"deepspeed.aio.block_size": 4096}), Cluster(1, 1, "cpu"))
    assert facts.value("model.hidden_size") == 512
    assert facts.value("model.attention") == "auto"
    assert facts.value("parallel.zero_stage") == 1
    assert facts.raw("aio.block_size") == 4096
    assert facts.raw("aio.nothing.deeper") is None


def test_what_a_config_says_of_each_layer_is_said_of_those_that_stay() -> None:
    said = {
        "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4], "first_k_dense_replace": 2,
        "mlp_only_layers": [0, 3], "moe_layer_start_index": 1, "moe_layer_end_index": 2, "hidden_size": 4,
    }  # fmt: skip
    assert said_of_layers(said, 4, [1, 3]) == {
        "layer_types": ["b", "d"], "first_k_dense_replace": 1, "mlp_only_layers": [1], "moe_layer_start_index": 0,
        "moe_layer_end_index": 0,
    }  # fmt: skip
    assert of_kept_layers(said | {"n_layer": 4}, [0])["n_layer"] == 1
