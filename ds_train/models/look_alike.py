"""Small look-alikes of model families, which are asked before training what the large ones would do."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from ds_train.config import RunConfig
from ds_train.models.load import outline, without_weights

# Sizes of a look-alike: those that ranks share, which can be cut by 2, and the others.
_SHARED = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "word_embed_proj_dim": 32, "ffn_dim": 48,
    "n_inner": 48, "embedding_size": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "num_global_key_value_heads": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "index_n_heads": 4,
    "d_model": 32, "n_embd": 32,
}  # fmt: skip
_SMALL = {
    "head_dim": 8, "max_position_embeddings": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "sliding_window": 6,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1, "query_pre_attn_scalar": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
    "index_head_dim": 8, "index_topk": 32, "rotary_dim": 4, "local_attention": 6,
}  # fmt: skip
_VOCABULARY = 320  # holds a vocabulary of bytes
_LARGEST = 50_000_000  # parameters of a look-alike; some have towers for pictures or sound beside their layers


def look_alike(config: PreTrainedConfig, layers: int, ranks: int = 1) -> PreTrainedConfig:
    """A config of the same family and with the same switches as `config`, but of `layers` layers and tiny widths.

    Whether keys and values share heads, weights are tied, and which kinds of layers alternate is kept. Heads and widths
    can be shared by `ranks` ranks, and the vocabulary if that of `config` can.

    Raises:
        ValueError: the family's config class refuses such sizes.
    """
    given = config.to_dict()
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type"):
        given.pop(name, None)
    chosen = _chosen_layers(given, config.num_hidden_layers, layers)
    for key, value in per_layer(given, config.num_hidden_layers).items():
        given[key] = [value[index] for index in chosen]
    factor = ranks // math.gcd(ranks, 2)
    sizes = {name: size * factor for name, size in _SHARED.items()} | _SMALL | {"num_hidden_layers": layers}
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if groups is not None and groups != heads:
        sizes["num_key_value_heads"] //= 2
    even = config.get_text_config().vocab_size % ranks == 0
    vocabulary = next(size for size in range(_VOCABULARY, 2 * _VOCABULARY) if (size % ranks == 0) == even)
    sizes |= {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    renamed = config.attribute_map
    for name, size in sizes.items():
        own = renamed.get(name, name)
        if isinstance(given.get(own), int) and not isinstance(given[own], bool):
            given[own] = size
        elif isinstance(given.get(own), list):
            given[own] = [size] * len(given[own])
    # These change nothing but the comparison: noise has no oracle, and weights near zero would hide differences.
    for name, value in given.items():
        if isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            given[name] = 0.0
        if isinstance(value, float) and name in ("initializer_range", "init_std"):
            given[name] = 0.1
    given["rope_parameters"] = _small_rope(given.get("rope_parameters"), sizes)
    if given["rope_parameters"] is None:
        del given["rope_parameters"]
    try:
        return type(config)(**copy.deepcopy(given))
    except Exception as error:  # every config class validates in its own way
        raise ValueError(f"{config.model_type}: no small look-alike can be made ({error})") from error


def small_run(
    run: RunConfig, config: PreTrainedConfig, layers: int, ranks: int = 1
) -> tuple[RunConfig, PreTrainedConfig]:
    """Recipe and config of a look-alike from scratch in fp32, without what only the run itself asks for.

    Raises:
        ValueError: the family can't be made small.
    """
    run = without_weights(run, config)
    model = run.model.model_copy(update={"activation_checkpointing": False})
    precision = run.precision.model_copy(update={"dtype": "fp32"})
    parallel = run.parallel.model_copy(update={"stage_layers": None})
    run = run.model_copy(update={"model": model, "precision": precision, "parallel": parallel})
    small = look_alike(config, layers, ranks)
    small.use_cache = False
    if run.task.kind == "sequence-classification":
        small.num_labels = int(config.num_labels or 2)
    parameters = sum(parameter.numel() for parameter in outline(run, small).parameters())
    if parameters > _LARGEST:
        raise ValueError(f"no small look-alike can be made, {parameters / 1e6:,.0f} million parameters stay")
    return run, small


def per_layer(given: Mapping[str, Any], count: int) -> dict[str, Sequence[Any]]:
    """The settings that have a value for each of `count` layers."""
    return {
        key: value
        for key, value in given.items()
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count
    }


def _chosen_layers(given: Mapping[str, Any], count: int, wanted: int) -> list[int]:
    """Indices of the layers that a look-alike keeps: one of every kind first, then from the start."""
    lists = per_layer(given, count).values()
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(str([value[index] for value in lists]), index)
    order = [*kinds.values(), *(index for index in range(count) if index not in kinds.values())]
    return sorted((order * wanted)[:wanted]) if order else []


def _small_rope(rope: Any, sizes: Mapping[str, int]) -> Any:
    """Rotary settings whose per-frequency lists are cut to the small head."""
    if not isinstance(rope, Mapping):
        return rope
    small = {key: _small_rope(value, sizes) for key, value in rope.items()}
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), Sequence):
            small[key] = list(small[key])[: sizes["head_dim"] // 2]
    return small
