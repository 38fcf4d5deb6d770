"""Fewer tokens a step: curriculum, patches, token dropping."""

from __future__ import annotations

from typing import Any

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import (
    CLASSIFIER,
    CURRICULUM,
    DROPPING,
    FLASH,
    LAYER_DROP,
    PATCHES,
    SEQUENCE,
    KeyRule,
    Rule,
    all_of,
    any_of,
    at,
    divisors,
    is_not,
    size_of,
)


def _tokens_of_steps(facts: Facts) -> int:
    run = facts.run
    return (run.schedule.steps or 0) * run.batch.global_samples * run.data.sequence_length


def _bad_lengths(facts: Facts) -> dict[str, Any]:
    """Lengths of the curriculum that the window can't be cut into."""
    curriculum = facts.run.curriculum
    if curriculum.kind == "none":
        return {}
    if curriculum.kind == "discrete":
        wanted = {f"curriculum.lengths[{place}]": length for place, length in enumerate(curriculum.lengths)}
    else:
        wanted = {"curriculum.start_length": curriculum.start_length}
    return {key: length for key, length in wanted.items() if length not in _lengths_to_choose(facts)}


def _lengths_to_choose(facts: Facts) -> list[int]:
    """Lengths below the window's that schedule/timeline.py gives to samples."""
    curriculum, full = facts.run.curriculum, facts.run.data.sequence_length
    if curriculum.how == "repack" or curriculum.keep_tokens:
        return [length for length in range(8, full) if full % length == 0]
    return list(range(-(-8 // curriculum.multiple) * curriculum.multiple, full, curriculum.multiple))


RULES: tuple[Rule | KeyRule, ...] = (
    # -- curriculum -------------------------------------------------------------------------------------------------
    Rule(
        "curriculum-task", "curriculum.kind", all_of(CURRICULUM, CLASSIFIER),
        "a text that is cut short has another label, perhaps", "set curriculum.kind=none",
    ),
    Rule(
        "curriculum-repack", "curriculum.how",
        all_of(CURRICULUM, at("curriculum.how", "repack"), at("data.packing", False)),
        "only packed windows are cut into shorter ones", "set curriculum.how=truncate, or data.packing=true",
    ),
    KeyRule(
        "curriculum-length", _bad_lengths,
        lambda f, _: f"samples can't have that length beside data.sequence_length={f.run.data.sequence_length}",
        lambda f, _: f"one of {', '.join(map(str, _lengths_to_choose(f)))}"
        if _lengths_to_choose(f) else "set curriculum.kind=none: there is no shorter length",
    ),
    Rule(
        "curriculum-steps", "schedule.steps",
        lambda f: CURRICULUM(f) and not f.run.curriculum.keep_tokens and f.run.schedule.steps is not None,
        "steps differ in their tokens, so steps don't say how long the run is",
        lambda f: f"set schedule.tokens={_tokens_of_steps(f)}, or curriculum.keep_tokens=true",
    ),
    Rule(
        "curriculum-flash", "curriculum.keep_tokens",
        lambda f: CURRICULUM(f) and FLASH(f) and f.run.curriculum.keep_tokens and f.run.data.packing,
        "micro-batches have several packed windows then, and flash attention attends across their documents",
        "set curriculum.keep_tokens=false, or model.attention=sdpa",
    ),
    # -- patches ----------------------------------------------------------------------------------------------------
    Rule(
        "patch-task", "patch.size", all_of(PATCHES, is_not(at("task.kind", "causal-lm"))),
        "a patch predicts the tokens of the next one, as causal language models do", "set patch.size=1",
    ),
    Rule(
        "patch-packing", "patch.size",
        all_of(PATCHES, any_of(at("data.packing", False), is_not(at("data.packing_by", "stream")))),
        "patches are cut from windows without padding", "set data.packing=true and data.packing_by=stream",
    ),
    Rule(
        "patch-divides", "patch.size",
        lambda f: f.run.data.sequence_length % (f.run.patch.size * f.sequence) and PATCHES(f),
        lambda f: f"data.sequence_length={f.run.data.sequence_length} isn't a multiple of it"
        + (f" x parallel.sequence={f.run.parallel.sequence}" if SEQUENCE(f) else ""),
        lambda f: divisors(f.run.data.sequence_length // f.sequence),
    ),
    Rule(
        "patch-alone", "patch.size", all_of(PATCHES, any_of(CURRICULUM, DROPPING)),
        "a run reduces its tokens in one way", "set curriculum.kind=none and token_drop.kind=none, or patch.size=1",
    ),
    # -- token dropping ---------------------------------------------------------------------------------------------
    Rule(
        "token-drop-packing", "token_drop.kind",
        all_of(DROPPING, any_of(at("data.packing", False), CLASSIFIER)),
        "rows as long as their micro-batch's longest text would drop other tokens in another layout",
        "set data.packing=true (language models), or token_drop.kind=none",
    ),
    Rule(
        "token-drop-sequence", "token_drop.kind", all_of(DROPPING, SEQUENCE),
        "sequence ranks would be left with unequal numbers of tokens",
        "set parallel.sequence=1; parallel.tensor, parallel.pipeline and ZeRO go with it",
    ),
    Rule(
        "token-drop-compile", "model.compile", all_of(DROPPING, at("model.compile", True)),
        "layers would be compiled again for every number of tokens", "set model.compile=false",
    ),
    Rule(
        "token-drop-attention", "model.attention",
        all_of(DROPPING, any_of(FLASH, at("model.attention", "flex_attention"))),
        "its kernels know documents by positions that follow one another", "set model.attention=sdpa",
    ),
    Rule(
        "token-drop-layers", "token_drop.whole_layers",
        lambda f: DROPPING(f) and size_of(f, "num_hidden_layers")
        and 2 * f.run.token_drop.whole_layers >= size_of(f, "num_hidden_layers"),
        lambda f: f"of the model's {size_of(f, 'num_hidden_layers')} layers none is left to drop tokens",
        lambda f: f"at most {(size_of(f, 'num_hidden_layers') - 1) // 2}, or token_drop.kind=none",
    ),
    # -- layer dropping ---------------------------------------------------------------------------------------------
    Rule(
        "layer-drop-tokens", "layer_drop.kind", all_of(LAYER_DROP, DROPPING),
        "layers leave out tokens already", "set token_drop.kind=none, or layer_drop.kind=none",
    ),
    Rule(
        "layer-drop-compile", "model.compile", all_of(LAYER_DROP, at("model.compile", True)),
        "what runs is another graph in every step", "set model.compile=false",
    ),
    Rule(
        "layer-drop-compared", "layer_drop.kind", lambda f: LAYER_DROP(f) and f.run.compress.distill.compares,
        "a layer that is left out has nothing to compare with the teacher's",
        "set compress.distill.hidden=0 and relations=0; compress.distill.logits goes with it",
    ),
    Rule(
        "layer-drop-prune", "layer_drop.kind", lambda f: LAYER_DROP(f) and f.run.compress.prune.kinds,
        "units of layers that steps leave out would score too little", "prune in one run, and drop layers in another",
    ),
)  # fmt: skip
