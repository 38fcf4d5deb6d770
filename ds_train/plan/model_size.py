"""The sizes of a model that planning needs, and its parameter count, from recipe keys or the config.json beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds_train.config.model import ModelSection
from ds_train.plan.transformers_keys import Task, attribute_map, config_fields, modeling_source

# Names under which families that have no attribute_map entry keep the common sizes.
ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "head_dim": ("head_dim",),
    "type_vocab_size": ("type_vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_size": ("moe_intermediate_size",),
    "embedding_size": ("embedding_size",),
    "num_layer_groups": ("num_hidden_groups",),
}
# Keys that say of layers what they are by their places: some layers, how many of the first, and up to which one.
_PLACES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("moe_layer_end_index",)
# Keys of families that aren't (only) made of attention and feed-forward: their count isn't estimated.
_OTHER_MIXERS = ("state_size", "ssm_state_size", "mamba_d_state", "lru_width", "linear_num_value_heads", "conv_L_cache")

# How a family's modeling file shows a gated feed-forward (three matrices instead of two), a table of learned
# positions, and position ids that start after the padding id.
_GATED = re.compile(r"\bself\.(gate_proj|gate_up_proj|ff_proj_gate|w3)\b")
_LEARNED_POSITIONS = re.compile(
    r"self\.(wpe|embed_positions|position_embeddings|position_embed) = (nn\.Embedding|\w*LearnedPositionalEmbedding)"
)
_SHIFTED_POSITIONS = "create_position_ids_from_input_ids"


def first_position(arch: str, padding_id: int | None) -> int:
    """The position of a sample's first token: RoBERTa and its like count from the one after the padding's."""
    shifted = padding_id is not None and _SHIFTED_POSITIONS in modeling_source(arch)
    return padding_id + 1 if shifted and padding_id is not None else 0


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a Transformer. A field is None where neither recipe nor config says it (as a positive integer)."""

    arch: str
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    head_dim: int | None = None
    type_vocab_size: int | None = None
    num_experts: int | None = None
    expert_size: int | None = None
    embedding_size: int | None = None
    num_layer_groups: int | None = None
    countable: bool = True
    tied: bool = True
    padding_id: int | None = None
    task: Task = "causal-lm"

    @property
    def positions(self) -> int | None:
        """Longest sample that the model takes; None where there is no bound that we know."""
        if self.max_position_embeddings is None:
            return None
        return self.max_position_embeddings - first_position(self.arch, self.padding_id)

    @property
    def parameters(self) -> int | None:
        """Estimated number of parameters, exact to about 3 % for the usual families; None where a size is unknown."""
        hidden, layers, vocabulary = self.hidden_size, self.num_hidden_layers, self.vocab_size
        attention = self._attention_parameters()
        if not self.countable or hidden is None or layers is None or vocabulary is None or attention is None:
            return None
        gated = is_gated(self.arch)
        # Families without a gate are the older ones, whose linear layers and norms have biases.
        small = 2 * hidden if gated else 9 * hidden + (self.intermediate_size or 4 * hidden)
        layer = attention + self._feed_forward_parameters(gated) + small
        # ALBERT's layers share their weights in groups (arXiv 1909.11942).
        return (self.num_layer_groups or layers) * layer + self._embedding_parameters(hidden, vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """Sizes and count, for JSON."""
        return asdict(self) | {"parameters": self.parameters}

    def _attention_parameters(self) -> int | None:
        if self.hidden_size is None or self.num_attention_heads is None:
            return None
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        key_value_heads = self.num_key_value_heads or self.num_attention_heads
        return 2 * self.hidden_size * head * (self.num_attention_heads + key_value_heads)

    def _feed_forward_parameters(self, gated: bool) -> int:
        hidden = self.hidden_size or 0
        matrices = 3 if gated else 2
        if self.num_experts is not None:
            expert = self.expert_size or self.intermediate_size or 4 * hidden
            return self.num_experts * (matrices * expert + 1) * hidden
        return matrices * hidden * (self.intermediate_size or 4 * hidden)

    def _embedding_parameters(self, hidden: int, vocabulary: int) -> int:
        rows = vocabulary * (1 if self.tied or self.task == "sequence-classification" else 2)
        if has_learned_positions(self.arch):
            rows += self.max_position_embeddings or 0
        rows += self.type_vocab_size or 0
        width = self.embedding_size or hidden
        # ELECTRA and ALBERT embed in fewer dimensions; an encoder's head has a dense layer before the vocabulary.
        bridge = hidden * width if width != hidden else 0
        return rows * width + bridge + (hidden * width if self.task == "masked-lm" else 0)


@cache
def is_gated(arch: str) -> bool:
    """Whether the feed-forward has gate, up and down matrices (arXiv 2002.05202) instead of two."""
    source = modeling_source(arch)
    return not source or _GATED.search(source) is not None


@cache
def has_learned_positions(arch: str) -> bool:
    """Whether the family keeps a table of learned absolute positions."""
    return _LEARNED_POSITIONS.search(modeling_source(arch)) is not None


def model_size(model: ModelSection, task: Task, vocabulary: int | None = None) -> ModelSize | None:
    """Sizes of the recipe's model; None for a hub id whose config isn't on this machine.

    Args:
        vocabulary: the tokenizer's size, which a model from scratch takes where the recipe gives no `vocab_size`.
    """
    if model.arch is not None:
        # The class's own default vocabulary never counts: the tokenizer's takes its place.
        arch, given = model.arch, {"vocab_size": vocabulary} | dict(model.config)
        defaults = {key: value for key, value in config_fields(arch).items() if key != "vocab_size"}
    else:
        found = read_config(str(model.path), model.revision)
        if found is None:
            return None
        found = of_kept_layers(found, model.keep_layers)
        arch, given = str(found.get("model_type", "")), found | model.config
        defaults = config_fields(arch)
    renamed = attribute_map(arch)
    sizes: dict[str, Any] = {}
    for name, aliases in ALIASES.items():
        value = _first((renamed.get(name, name), *aliases), given, defaults)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes[name] = value
    if _first(("multi_query",), given, defaults) is True and not _first(("new_decoder_architecture",), given, defaults):
        sizes["num_key_value_heads"] = 1
    others = (*_OTHER_MIXERS, "is_encoder_decoder")
    countable = not any(_first((key,), given, defaults) for key in others)
    tied = bool(_first(("tie_word_embeddings",), given, defaults))
    padding = _first(("pad_token_id",), given, defaults)
    return ModelSize(
        arch,
        **sizes,
        countable=countable,
        tied=tied,
        padding_id=padding if isinstance(padding, int) else None,
        task=task,
    )


def read_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """config.json of a local model folder, or of a hub model in the local cache; None where there is none to read."""
    for folder in (Path(path), *_cached_snapshots(path, revision)):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return config
    return None


def other_order(ours: Mapping[Any, str], theirs: Mapping[Any, str]) -> str | None:
    """A label that two classifiers' `id2label` give different numbers, in a phrase; None where none is known to."""
    place = {name.casefold(): int(label) for label, name in ours.items()}
    for label, name in theirs.items():
        own = place.get(name.casefold(), int(label))
        if own != int(label):
            return f"its label {label} is {name!r}, which is the model's label {own}"
    return None


def of_kept_layers(config: dict[str, Any], kept: list[int] | None) -> dict[str, Any]:
    """A config.json whose model has only the layers `kept`, which are below its number; all without it."""
    names = [name for name in ALIASES["num_hidden_layers"] if isinstance(config.get(name), int)]
    if kept is None or not names:
        return config
    return config | said_of_layers(config, config[names[0]], kept) | dict.fromkeys(names, len(kept))


def said_of_layers(config: Mapping[str, Any], count: int, kept: Sequence[int]) -> dict[str, Any]:
    """What a config says of each of its `count` layers, for the layers `kept` alone: its keys that change."""
    said: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (list, tuple)) and name in _PLACES:
            said[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, (list, tuple)) and len(value) == count > max(kept) and "token" not in name:
            said[name] = [value[layer] for layer in kept]
        elif isinstance(value, int) and name in _FIRST:
            said[name] = sum(layer < value for layer in kept)
        elif isinstance(value, int) and name in _LAST and value >= 0:
            said[name] = sum(layer <= value for layer in kept) - 1
    return said


def _cached_snapshots(hub_id: str, revision: str | None) -> list[Path]:
    """Folder of the revision in the hub's local cache (huggingface_hub's constants.py names the variables)."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache_folder = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    repository = cache_folder / ("models--" + hub_id.replace("/", "--"))
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text(encoding="utf-8").strip()
    except OSError:
        commit = wanted
    return [repository / "snapshots" / commit]


def _first(names: tuple[str, ...], *places: dict[str, Any]) -> Any:
    """The first value that is given under one of the names; earlier places win."""
    return next((place[name] for place in places for name in names if place.get(name) is not None), None)
