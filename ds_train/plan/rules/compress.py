"""Teachers, few bits, fewer layers: the `compress` section, and the models that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_train.plan.facts import Facts
from ds_train.plan.model_size import model_size, other_order, read_config
from ds_train.plan.relations import even_heads, other_heads, relation_heads, uneven_heads
from ds_train.plan.rules.base import (
    CLASSIFYING,
    CURRICULUM,
    DROPPING,
    HEAD_COUNTS,
    PATCHES,
    PIPELINE,
    SEQUENCE,
    KeyRule,
    Rule,
    above,
    all_of,
    any_of,
    at,
    compared,
    divisors,
    given,
    is_not,
    size_of,
    taught,
)

_TEACHER = "compress.distill.teacher"


_CACHED = all_of(taught, above("compress.distill.cache_top"))
_HIDDEN = above("compress.distill.hidden")
_RELATIONS = above("compress.distill.relations")
_ROUNDS = is_not(at("compress.quantize.weights", "none"))
_ROUNDS_LATER = all_of(_ROUNDS, above("compress.quantize.start"))


def _on_own_disks(facts: Facts) -> bool:
    """Whether there are several hosts, and the cache lies where no host sees another's files, whatever is mounted."""
    folder = Path(facts.run.data.cache_dir).expanduser()
    several = facts.cluster.ranks > facts.cluster.ranks_per_host
    return several and any(folder.is_relative_to(place) for place in ("/tmp", "/var/tmp", "/dev/shm"))


def _teacher_config(facts: Facts) -> dict[str, Any] | None:
    """config.json of the recipe's teacher; None where there is no teacher, or it isn't on this machine."""
    teacher = facts.run.compress.distill.teacher
    return read_config(teacher) if teacher is not None and facts.run.compress.distill.active else None


def _teacher_differs(facts: Facts) -> str | None:
    """What the teacher and the recipe don't agree about, in a phrase."""
    config, run = _teacher_config(facts), facts.run
    if config is None:
        return None
    positions, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    heads = [config.get(name) for name in HEAD_COUNTS]
    if not run.compress.distill.cache_top and any(count and count % facts.sequence for count in heads):
        return f"parallel.sequence={facts.sequence} doesn't divide its {next(count for count in heads if count)} heads"
    if positions and 0 < positions < run.data.sequence_length:  # some say -1 for no end
        return f"it takes {positions} tokens, and data.sequence_length={run.data.sequence_length}"
    if run.task.kind == CLASSIFYING:
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        if len(names) != run.task.num_labels:
            return f"it has {len(names)} labels, and task.num_labels={run.task.num_labels}"
        own = read_config(run.model.path, run.model.revision) if run.model.path else None
        return other_order((own or {}).get("id2label") or {}, names)
    ours = facts.size.vocab_size if facts.size else None
    if ours and vocabulary and ours != vocabulary:
        return f"its vocabulary is {vocabulary:,} tokens, and the model's {ours:,}"
    return None


def _teacher_missing(facts: Facts) -> bool:
    teacher = facts.run.compress.distill.teacher
    if teacher is None or not facts.cluster.here or not facts.run.compress.distill.active:
        return False
    return teacher.startswith((".", "/", "~")) and _teacher_config(facts) is None


def _packed_teacher(facts: Facts) -> bool:
    packing = (_teacher_config(facts) or {}).get("quantization_config") or {}
    return packing.get("quant_method") == "compressed-tensors"


def _packed_weights(facts: Facts) -> bool:
    model = facts.run.model
    config = read_config(model.path, model.revision) if model.path else None
    return config is not None and "quantization_config" in config


def _stored_layers(facts: Facts) -> int:
    """Layers of `model.path`; 0 where they aren't known."""
    size = model_size(facts.run.model.model_copy(update={"keep_layers": None}), facts.run.task.kind)
    return (size.num_hidden_layers or 0) if size else 0


def _missing_layer(facts: Facts) -> bool:
    kept, count = facts.run.model.keep_layers, _stored_layers(facts)
    return kept is not None and count > 0 and max(kept) >= count


def _ungrouped(facts: Facts) -> int | None:
    """A number of inputs of the model's matrices, on one tensor rank, that the group of scales doesn't divide."""
    group, size = facts.run.compress.quantize.group, facts.size
    if not (group and size and _ROUNDS(facts)):
        return None
    heads, hidden = size.num_attention_heads, size.hidden_size
    attention = heads * (size.head_dim or hidden // heads) if heads and hidden else None
    cut = [inputs // facts.tensor for inputs in (size.intermediate_size, attention) if inputs]
    return next((inputs for inputs in (hidden, *cut) if inputs and inputs % group), None)


RULES: tuple[Rule | KeyRule, ...] = (
    Rule(
        "model-packed", "model.path", _packed_weights,
        "its weights are packed integers, which aren't trained", "give the folder of the full weights",
    ),
    Rule(
        "keep-layers", "model.keep_layers", _missing_layer,
        lambda f: f"the model has {_stored_layers(f)} layers", lambda f: f"numbers from 0 to {_stored_layers(f) - 1}",
    ),
    Rule(
        "distill-start", _TEACHER, all_of(taught, is_not(given(_TEACHER)), is_not(given("model.path"))),
        "a model from scratch has no start to learn from", "give a teacher's folder or hub id", lambda f: "null",
    ),
    Rule(
        "distill-missing", _TEACHER, _teacher_missing, "there is no config.json",
        "give a transformers folder, or a hub id",
    ),
    Rule(
        "distill-teacher", _TEACHER, _teacher_differs, lambda f: str(_teacher_differs(f)),
        "give a teacher of the same task and tokens",
    ),
    Rule(
        "distill-packed", _TEACHER, _packed_teacher, "its weights are packed integers, which don't run beside a model",
        "give the folder of the full weights",
    ),
    Rule(
        "distill-patch", "patch.size", all_of(taught, PATCHES), "a teacher reads token by token",
        "set patch.size=1",
    ),
    Rule(
        "distill-cache-logits", "compress.distill.cache_top",
        all_of(_CACHED, any_of(_HIDDEN, _RELATIONS, at("compress.distill.logits", "none"))),
        "only logits are kept on disk", "set cache_top=0, or hidden=0, relations=0 and logits to a divergence",
    ),
    Rule(
        "distill-cache-samples", "compress.distill.cache_top",
        all_of(_CACHED, any_of(CURRICULUM, at("task.kind", "masked-lm"))),
        "samples aren't the same every time they are seen", "set compress.distill.cache_top=0",
    ),
    Rule(
        "distill-cache-hosts", "data.cache_dir", all_of(_CACHED, _on_own_disks),
        "the ranks of all hosts fill the teacher's cache together, and this lies on each host's own disk",
        "choose a folder that all hosts share, or set compress.distill.cache_top=0",
    ),
    Rule(
        "distill-cache-sequence", "compress.distill.cache_top", all_of(_CACHED, SEQUENCE),
        "what is on disk goes by whole samples", "set compress.distill.cache_top=0, or parallel.sequence=1",
    ),
    KeyRule(
        "distill-compared-recomputed", compared(at("model.activation_checkpointing", True, "auto")),
        "layers that are computed again would be compared again", "set model.activation_checkpointing=false",
    ),
    KeyRule(
        "distill-compared-compile", compared(at("model.compile", True)), "layers that are compared aren't compiled",
        "set model.compile=false",
    ),
    KeyRule(
        "distill-compared-scale", compared(all_of(PIPELINE, at("precision.dtype", "fp16"))),
        "only a pipeline's last stage knows what fp16 losses are scaled by", "set precision.dtype=bf16",
    ),
    Rule(
        "distill-relations-sequence", "compress.distill.relations", all_of(_RELATIONS, SEQUENCE),
        "sequence ranks hold parts of the relations between tokens, which nobody gathers",
        "set parallel.sequence=1; parallel.tensor, parallel.pipeline and ZeRO go with it",
    ),
    Rule(
        "distill-relations-dropped", "compress.distill.relations", all_of(_RELATIONS, DROPPING),
        "a layer that takes some of the tokens relates fewer than the teacher's", "set token_drop.kind=none",
    ),
    Rule(
        "distill-relations-kinds", "compress.distill.relation_kinds", other_heads, lambda f: str(other_heads(f)),
        "choose among query, key and value, which are cut anew",
    ),
    Rule(
        "distill-relations-heads", "compress.distill.relation_heads", uneven_heads, lambda f: str(uneven_heads(f)),
        even_heads, relation_heads,
    ),
    Rule(
        "distill-revision", _TEACHER,
        all_of(taught, is_not(given(_TEACHER)), given("model.keep_layers"), given("model.revision")),
        "the whole model would be taken as it is now, not of model.revision",
        "give the folder of that revision", lambda f: "null",
    ),
    KeyRule(
        "distill-compared-rows", compared(at("data.padding_free", True)),
        "a sample's mean isn't taken where samples share a row", "set data.padding_free=false",
    ),
    Rule(
        "quantize-activations", "compress.quantize.activations",
        lambda f: f.run.compress.quantize.activations == "int8" and _ROUNDS(f)
        and (f.run.compress.quantize.weights != "int8" or f.run.compress.quantize.group > 0),
        "products of integers have 8 bits on both sides and one scale a row", "set weights=int8 and group=0",
    ),
    Rule(
        "quantize-group", "compress.quantize.group", _ungrouped,
        lambda f: f"a tensor rank's matrices have {_ungrouped(f)} inputs, which it doesn't divide",
        lambda f: f"0, or {divisors(_ungrouped(f))}",
    ),
    Rule(
        "quantize-experts", "compress.quantize.weights", lambda f: _ROUNDS(f) and size_of(f, "num_experts"),
        "experts aren't linear layers", "set none",
    ),
    Rule(
        "quantize-compile", "model.compile", all_of(_ROUNDS, at("model.compile", True)),
        "layers that round aren't compiled", "set model.compile=false",
    ),
    Rule(
        "quantize-best", "compress.quantize.start", all_of(_ROUNDS_LATER, given("checkpoint.best")),
        "the best evaluation may be one before it, of weights that aren't the rounded ones that are exported",
        "set it to 0, or leave out checkpoint.best",
    ),
    Rule(
        "quantize-roll-back", "compress.quantize.start", all_of(_ROUNDS_LATER, at("health.on_spike", "roll-back")),
        "the loss leaps when rounding begins, which no other samples cure", "set it to 0, or health.on_spike=note",
    ),
    Rule(
        "keep-zeros-start", "compress.keep_zeros",
        all_of(at("compress.keep_zeros", True), is_not(given("model.path"))),
        "a model from scratch has no zeros to keep", "give model.path what `ds-train sparsify` has made",
    ),
)  # fmt: skip
