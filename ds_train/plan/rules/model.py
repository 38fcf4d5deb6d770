"""The model, its task and its attention."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ds_train.config.load import nearest
from ds_train.plan.facts import Facts
from ds_train.plan.model_size import ALIASES
from ds_train.plan.rules.base import (
    CLASSIFIER,
    FLASH,
    PIPELINE,
    TENSOR,
    KeyRule,
    Predicate,
    Rule,
    all_of,
    any_of,
    at,
    divisors,
    is_not,
    on_device,
    size_of,
)
from ds_train.plan.transformers_keys import OLD_ROPE_KEYS, TASKS, architectures_with_head, known_architectures


def _does_not_divide(part: str, whole: str) -> Predicate:
    """Both sizes of the model are known and one doesn't divide the other."""

    def broken(facts: Facts) -> bool:
        small, large = getattr(facts.size, part, None), getattr(facts.size, whole, None)
        return bool(small and large and large % small)

    return broken


def _positions(facts: Facts) -> int | None:
    return facts.size.positions if facts.size else None


def _too_long(facts: Facts) -> bool:
    longest = _positions(facts)
    return longest is not None and facts.run.data.sequence_length > longest


def _longer_model(facts: Facts) -> str:
    shorter = f"set data.sequence_length to at most {_positions(facts)}"
    from_scratch = facts.run.model.arch is not None
    return f"{shorter}, or raise model.max_position_embeddings" if from_scratch else shorter


def _without_head(facts: Facts) -> bool:
    return facts.arch in known_architectures() and facts.arch not in architectures_with_head(facts.run.task.kind)


def _tasks_of(facts: Facts) -> str:
    tasks = [task for task in TASKS if facts.arch in architectures_with_head(task)]
    return f"{facts.arch} can learn {' or '.join(tasks)}" if tasks else "choose another family, llama or bert say"


def _similar_arch(facts: Facts) -> str:
    guess = nearest(str(facts.arch), list(known_architectures()))
    return f"did you mean {guess}?" if guess else "give a model_type of the installed transformers, llama or bert say"


def _vocabulary_too_small(facts: Facts) -> bool:
    size = facts.size.vocab_size if facts.size else None
    return size is not None and facts.vocabulary is not None and size < facts.vocabulary


_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_OTHER_PLACES = {
    "dtype": "precision.dtype", "torch_dtype": "precision.dtype", "num_labels": "task.num_labels",
    "id2label": "task.num_labels", "label2id": "task.num_labels", "attn_implementation": "model.attention",
    "_attn_implementation": "model.attention", "gradient_checkpointing": "model.activation_checkpointing",
    "name_or_path": "model.path", "model_type": "model.arch",
}  # fmt: skip
_COUNTS = frozenset({
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "head_dim", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "ffn_dim",
})  # fmt: skip


def _model_keys(facts: Facts, wanted: Callable[[str, Any], bool]) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in facts.run.model.config.items() if wanted(key, value)}


def _unknown_model_keys(facts: Facts) -> dict[str, Any]:
    known = facts.config_keys
    return _model_keys(facts, lambda key, _: key not in known and key not in _OTHER_PLACES) if known else {}


def _misplaced_model_keys(facts: Facts) -> dict[str, Any]:
    return _model_keys(facts, lambda key, _: key in _OTHER_PLACES)


def _unread_rope_keys(facts: Facts) -> dict[str, Any]:
    if facts.run.model.path is None or "rope_parameters" not in facts.config_keys:
        return {}
    return _model_keys(facts, lambda key, _: key in OLD_ROPE_KEYS)


def _special_token_keys(facts: Facts) -> dict[str, Any]:
    return _model_keys(facts, lambda key, _: key in _SPECIAL_TOKENS) if facts.run.model.arch else {}


def _bad_counts(facts: Facts) -> dict[str, Any]:
    def bad(key: str, value: Any) -> bool:
        count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return key in _COUNTS and value is not None and not count

    return _model_keys(facts, bad)


def _similar_model_key(facts: Facts, key: str) -> str:
    word = key.removeprefix("model.")
    same = next((names for names in ALIASES.values() if word in names), ())
    guess = next((name for name in same if name in facts.config_keys), None)
    guess = guess or nearest(word, [*facts.config_keys, *type(facts.run.model).model_fields])
    if guess:
        return f"did you mean `model.{guess}`?"
    return f"`ds-train` takes the keys of transformers' {known_architectures().get(str(facts.arch), 'config')}"


RULES: tuple[Rule | KeyRule, ...] = (
    Rule(
        "arch", "model.arch", lambda f: f.run.model.arch is not None and f.run.model.arch not in known_architectures(),
        "the installed transformers has no such family", _similar_arch,
    ),
    Rule(
        "weights", "model.path", lambda f: f.weights_missing,
        "there is no config.json in that folder", "give the folder that `save_pretrained` wrote, or a hub id",
    ),
    Rule(
        "head", "task.kind", _without_head,
        lambda f: f"transformers has no {f.run.task.kind} model of family {f.arch}", _tasks_of,
    ),
    KeyRule(
        "model-key", _unknown_model_keys,
        lambda f, _: f"the transformers config of {f.arch} has no such key", _similar_model_key,
    ),
    KeyRule(
        "model-key-elsewhere", _misplaced_model_keys, "another recipe key decides this",
        lambda _, key: f"set {_OTHER_PLACES[key.removeprefix('model.')]}",
    ),
    KeyRule(
        "rope-keys", _unread_rope_keys,
        "it is an older spelling, which a stored config no longer takes (configuration_utils.py, `from_dict`)",
        "set model.rope_parameters, with rope_type, rope_theta and all else that its config.json has there",
    ),
    KeyRule(
        "special-tokens", _special_token_keys, "a model from scratch takes the tokenizer's special tokens",
        "leave it out",
    ),
    Rule(
        "router-loss", "model.output_router_logits", lambda f: f.run.model.config.get("output_router_logits") is True,
        "the routers' auxiliary loss isn't part of the loss here", "set false", lambda f: "true",
    ),
    KeyRule("model-count", _bad_counts, "a size is a whole number above 0", "write one, without quotes"),
    Rule(
        "heads", "model.num_attention_heads",
        lambda f: f.size and f.size.head_dim is None and _does_not_divide("num_attention_heads", "hidden_size")(f),
        lambda f: f"it doesn't divide the hidden size {size_of(f, 'hidden_size')}",
        lambda f: divisors(size_of(f, "hidden_size")), lambda f: size_of(f, "num_attention_heads"),
    ),
    Rule(
        "head-groups", "model.num_key_value_heads", _does_not_divide("num_key_value_heads", "num_attention_heads"),
        lambda f: f"it doesn't divide the {size_of(f, 'num_attention_heads')} attention heads",
        lambda f: divisors(size_of(f, "num_attention_heads")), lambda f: size_of(f, "num_key_value_heads"),
    ),
    Rule(
        "positions", "data.sequence_length", _too_long, lambda f: f"the model has {_positions(f)} positions",
        _longer_model,
    ),
    Rule(
        "vocabulary", "model.vocab_size", _vocabulary_too_small,
        lambda f: f"vocabulary mismatch: the tokenizer has {f.vocabulary} tokens",
        lambda f: f"set model.vocab_size={f.vocabulary} or more",
        lambda f: size_of(f, "vocab_size"),
    ),
    Rule(
        "attention-flash-device", "model.attention", all_of(FLASH, on_device("cpu")),
        "flash attention is a kernel of GPUs", "set model.attention=sdpa",
    ),
    Rule(
        "attention-flash-dtype", "model.attention", all_of(FLASH, at("precision.dtype", "fp32")),
        "flash attention computes in 16 bits only", "set precision.dtype=bf16, or model.attention=sdpa",
    ),
    Rule(
        "attention-flash-packing", "model.attention",
        lambda f: FLASH(f) and f.run.data.packing and not CLASSIFIER(f)
        and (f.run.batch.micro_samples != 1 or f.run.batch.eval_micro_samples not in (1, "auto")),
        "with more than one packed window at once it attends across documents "
        "(transformers' modeling_flash_attention_utils.py:574)",
        "set batch.micro_samples=1 and batch.eval_micro_samples=1, or model.attention=sdpa",
    ),
    Rule(
        "cut-flash", "model.attention", all_of(FLASH, any_of(PIPELINE, TENSOR)),
        "a cut model can't be checked with it before training", "set model.attention=sdpa",
    ),
    Rule(
        "liger-device", "model.liger", all_of(at("model.liger", True), is_not(on_device("cuda"))),
        "liger's kernels are Triton's, for CUDA devices", "set model.liger=false",
    ),
    Rule(
        "liger-package", "model.liger",
        lambda f: f.run.model.liger and f.cluster.here and f.cluster.device == "cuda" and not find_spec("liger_kernel"),
        "the package liger-kernel isn't installed", "pip install liger-kernel, or set model.liger=false",
    ),
    Rule(
        "liger-compile", "model.compile", all_of(at("model.liger", True), at("model.compile", True)),
        "liger's kernels aren't compiled again", "set model.compile=false, or model.liger=false",
    ),
    Rule(
        "attention-flex-device", "model.attention", all_of(at("model.attention", "flex_attention"), on_device("cpu")),
        "torch's flex attention has no backward pass on the CPU", "set model.attention=sdpa",
    ),
    Rule(
        "attention-family", "model.attention",
        any_of(
            all_of(FLASH, lambda f: not f.supports("_supports_flash_attn")),
            all_of(at("model.attention", "sdpa"), lambda f: not f.supports("_supports_sdpa")),
            all_of(at("model.attention", "flex_attention"), lambda f: not f.supports("_supports_flex_attn")),
        ),
        lambda f: f"the models of family {f.arch} don't have it", "set model.attention=auto",
    ),
    Rule(
        "checkpointing-family", "model.activation_checkpointing",
        lambda f: f.run.model.activation_checkpointing and not f.supports("supports_gradient_checkpointing"),
        lambda f: f"the models of family {f.arch} don't support it", "set model.activation_checkpointing=false",
    ),
)  # fmt: skip
