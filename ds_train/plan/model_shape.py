"""The sizes of a model that planning needs, from its recipe keys or the config.json beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config.model import ModelSection
from ds_train.plan.transformers_keys import attribute_map, config_fields

# Names under which families that have no attribute_map entry keep the common sizes.
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "head_dim": ("head_dim",),
    "tie_word_embeddings": ("tie_word_embeddings",),
}

# Families with two feed-forward matrices instead of gate, up and down, and with learned positions.
_UNGATED = frozenset(
    "gpt2 gpt_neo gpt_neox gptj opt bloom bert roberta electra distilbert deberta deberta-v2 phi starcoder2 falcon "
    "codegen mpt biogpt xglm camembert xlm-roberta albert gpt_bigcode".split()
)
_LEARNED_POSITIONS = frozenset("gpt2 gpt_neo opt bert roberta electra distilbert camembert xlm-roberta biogpt".split())


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Transformer; a field is None where neither recipe nor config says it."""

    arch: str
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    @property
    def parameters(self) -> int | None:
        """Estimated number of parameters; None where a size is unknown."""
        hidden, layers, heads, vocabulary = (
            self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.vocab_size,
        )  # fmt: skip
        if hidden is None or layers is None or heads is None or vocabulary is None:
            return None
        head = self.head_dim or hidden // heads
        attention = 2 * hidden * head * (heads + (self.num_key_value_heads or heads))
        feed_forward = (2 if self.arch in _UNGATED else 3) * hidden * (self.intermediate_size or 4 * hidden)
        embedding = vocabulary * hidden
        positions = (self.max_position_embeddings or 0) * hidden if self.arch in _LEARNED_POSITIONS else 0
        return layers * (attention + feed_forward) + embedding * (1 if self.tie_word_embeddings else 2) + positions


def model_shape(model: ModelSection) -> ModelShape | None:
    """Sizes of the recipe's model; None for a hub id whose config isn't on this machine."""
    if model.arch is not None:
        arch, given = model.arch, dict(model.config)
    else:
        found = read_local_config(str(model.path))
        if found is None:
            return None
        arch, given = str(found.get("model_type", "")), found | model.config
    defaults = config_fields(arch)
    renamed = attribute_map(arch)
    sizes: dict[str, Any] = {}
    for name, aliases in _ALIASES.items():
        names = (renamed.get(name, name), *aliases)
        value = next((given[alias] for alias in names if given.get(alias) is not None), None)
        if value is None and not (name == "vocab_size" and model.arch is not None):
            value = next((defaults[alias] for alias in names if defaults.get(alias) is not None), None)
        # A family's default number of key-value heads belongs to its default number of heads.
        if name == "num_key_value_heads" and not any(alias in given for alias in names):
            value = None
        if value is not None and (isinstance(value, int) or name == "tie_word_embeddings"):
            sizes[name] = value
    return ModelShape(arch=arch, **sizes)


def read_local_config(path: str) -> dict[str, Any] | None:
    """The config.json of a local model folder; None where there is none that can be read."""
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
