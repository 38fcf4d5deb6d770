"""Pruning: what stays of a model, and what goes together with it."""

from __future__ import annotations

from typing import Any

from ds_train.errors import Problem
from ds_train.plan.facts import Facts
from ds_train.plan.model_size import ALIASES
from ds_train.plan.prune import problems, sizes_of, units_left
from ds_train.plan.rules.base import (
    DROPPING,
    KeyRule,
    Rule,
    above,
    all_of,
    at,
    compared,
    given,
    nvme,
    prunes,
    size_of,
)
from ds_train.plan.topology import Layout
from ds_train.plan.transformers_keys import takes_list


def _after_cut(facts: Facts) -> Facts:
    """From the cut of a run that prunes on."""
    parallel = facts.run.compress.prune.parallel
    later = facts.run if parallel is None else facts.run.model_copy(update={"parallel": parallel})
    return Facts(later, facts.cluster)


def _pruning_problems(facts: Facts) -> dict[str, Problem]:
    """What is wrong with the sizes that pruning leaves, where the recipe alone says them."""
    section, size, after = facts.run.compress.prune, facts.size, _after_cut(facts)
    if size is None or section.targets or _auto_after_cut(facts) or _other_layers(facts):
        return {}
    sizes = sizes_of(size, section)
    layout = Layout(after.pipeline, 1, after.sequence, after.tensor)
    left = units_left(section, sizes, "head_dim" not in facts.config_keys, layers=size.num_hidden_layers or 0)
    return {problem.key: problem for problem in problems(section, sizes, left, layout)}


def _auto_after_cut(facts: Facts) -> bool:
    """Whether the layout from the cut on has degrees that a planner would have to choose."""
    parallel, keys = facts.run.compress.prune.parallel, ("pipeline", "tensor", "sequence", "zero_stage")
    offload = ("offload_optimizer", "offload_params")
    return parallel is not None and any(getattr(parallel, key) == "auto" for key in (*keys, *offload))


def _unpruned_proportions(facts: Facts) -> dict[str, Any]:
    section = facts.run.compress.prune
    return {} if set(section.kinds) - {"layers"} else _targets(facts)


def _targets(facts: Facts) -> dict[str, Any]:
    """The keys that ask for a size or a time, and their values."""
    return {key: facts.value(key) for key in (f"compress.prune.{name}" for name in facts.run.compress.prune.targets)}


def _by_layer(facts: Facts) -> bool:
    return not isinstance(facts.run.compress.prune.ffn, float)


def _one_size(facts: Facts) -> bool:
    """Whether layers would have sizes that the family's config can't say."""
    if facts.run.compress.prune.budget == "uniform" or facts.arch is None:
        return False
    found = [takes_list(facts.arch, key) for key in ALIASES["intermediate_size"]]
    return True not in found and False in found


def _other_layers(facts: Facts) -> str | None:
    """What is wrong with the layers that have a share of their own."""
    shares, layers = facts.run.compress.prune.ffn, size_of(facts, "num_hidden_layers")
    if layers is None or isinstance(shares, float):
        return None
    if isinstance(shares, list):
        return None if len(shares) == layers else f"{len(shares)} shares for {layers} layers"
    beyond = [layer for layer in shares if layer >= layers]
    return f"there is no layer {beyond[0]}: they count from 0 to {layers - 1}" if beyond else None


def _too_long(facts: Facts) -> bool:
    length, positions = facts.run.compress.prune.latency_length, size_of(facts, "positions")
    return length is not None and positions is not None and length > positions


def _layers_left(facts: Facts) -> int | None:
    layers = size_of(facts, "num_hidden_layers")
    return layers - facts.run.compress.prune.layers if layers else None


def _all_whole(facts: Facts) -> bool:
    """Whether no layer that is left after the cut drops tokens, though some did before."""
    left, whole = _layers_left(facts), 2 * facts.run.token_drop.whole_layers
    return (
        facts.run.compress.prune.layers > 0
        and left is not None
        and 0 < left <= whole < size_of(facts, "num_hidden_layers")
    )


def _parted(facts: Facts) -> bool:
    """Whether heads and hidden size lose other shares, though the config ties the size of a head to both."""
    section, found = facts.run.compress.prune, facts.outline
    return section.heads != section.hidden and found is not None and "head_dim" not in found.config


RULES: tuple[Rule | KeyRule, ...] = (
    KeyRule(
        "prune-sizes", lambda f: {key: f.value(key) for key in _pruning_problems(f)},
        lambda f, key: _pruning_problems(f)[key].reason, lambda f, key: _pruning_problems(f)[key].fix,
    ),
    Rule(
        "prune-tied", "compress.prune.hidden", _parted,
        lambda f: f"a {f.arch} config ties the size of a head to their number and the hidden size, and "
        f"compress.prune.heads={f.run.compress.prune.heads}",
        "give both the same share",
    ),
    Rule(
        "prune-budget", "compress.prune.budget", all_of(_one_size, lambda f: f.run.compress.prune.share("ffn") > 0),
        lambda f: f"a {f.arch} config has one feed-forward size for all layers", "set it to uniform",
    ),
    Rule(
        "prune-shares", "compress.prune.ffn", lambda f: _by_layer(f) and f.run.compress.prune.budget != "per-layer",
        lambda f: f"compress.prune.budget={f.run.compress.prune.budget} takes one share",
        "set compress.prune.budget=per-layer",
    ),
    Rule(
        "prune-share", "compress.prune.ffn", lambda f: not _by_layer(f) and f.run.compress.prune.budget == "per-layer",
        "compress.prune.budget=per-layer takes a share for each layer",
        "give a list, or a mapping of layers; or set compress.prune.budget=uniform",
    ),
    Rule(
        "prune-shares-layers", "compress.prune.ffn", _other_layers,
        lambda f: _other_layers(f) or "", "give one for each, or a mapping of some layers",
    ),
    Rule(
        "prune-shares-fewer", "compress.prune.layers", lambda f: _by_layer(f) and f.run.compress.prune.layers > 0,
        "which layers go is chosen in the run, whatever shares they have", "prune layers in a run of their own",
    ),
    Rule(
        "prune-end", "compress.prune.end",
        lambda f: prunes(f) and f.run.compress.prune.end < f.run.compress.prune.start,
        lambda f: f"it is before compress.prune.start={f.run.compress.prune.start}", "set it later, or start sooner",
    ),
    KeyRule(
        "prune-target", _unpruned_proportions,
        "nothing says what goes", "give shares as proportions, such as compress.prune.ffn=0.5",
    ),
    KeyRule(
        "prune-targets", lambda f: dict(list(_targets(f).items())[1:]),
        lambda f, _: f"shares are scaled to {next(iter(_targets(f)))} already", "leave one of them out",
    ),
    Rule(
        "prune-latency-length", "compress.prune.latency_length", _too_long,
        lambda f: f"the model takes samples of {size_of(f, 'positions')} tokens", "lower it, or leave it out",
    ),
    Rule(
        "prune-compile", "model.compile", all_of(prunes, at("model.compile", True)),
        "layers would be compiled again whenever a unit closes", "set model.compile=false",
    ),
    Rule(
        "prune-stages", "parallel.stage_layers",
        lambda f: f.run.compress.prune.layers and _after_cut(f).run.parallel.stage_layers is not None,
        "they are those of the model before its layers are pruned",
        "leave it out, or say those that stay in compress.prune.parallel.stage_layers",
    ),
    Rule(
        "prune-rates", "optimizer.lr_factors",
        lambda f: f.run.compress.prune.layers
        and any(character.isdigit() for pattern in f.run.optimizer.lr_factors for character in pattern),
        "layers have other numbers once some are pruned", "write * for the number of a layer",
    ),
    Rule(
        "prune-layout-auto", "compress.prune.parallel", _auto_after_cut,
        "the planner doesn't choose for a model that is smaller only later", "write its degrees as numbers",
    ),
    Rule(
        "prune-roll-back", "health.on_spike", all_of(prunes, at("health.on_spike", "roll-back")),
        "a checkpoint from before the cut has another size than the model after it", "set health.on_spike=note",
    ),
    KeyRule(
        "prune-compared-layers", compared(prunes),
        "what layers are compared by doesn't shrink with the model",
        "set it to 0; compress.distill.logits goes with pruning",
    ),
    Rule(
        "prune-quantize", "compress.quantize.weights",
        lambda f: prunes(f) and f.run.compress.quantize.weights != "none",
        "units are scored by weights that aren't rounded", "prune in one run, and round what it exports in the next",
    ),
    Rule(
        "prune-zeros", "compress.keep_zeros", all_of(prunes, at("compress.keep_zeros", True)),
        "which weights are zero is found before the cut", "prune in one run, and train what it exports in the next",
    ),
    Rule(
        "prune-keep-layers", "model.keep_layers", all_of(prunes, given("model.keep_layers")),
        "what can be cut is found on the whole model", "choose the layers in one run, and prune what it exports",
    ),
    Rule(
        "prune-best", "checkpoint.best", all_of(prunes, given("checkpoint.best")),
        "the best step may lie before the cut, and its model isn't the one that is asked for", "leave it out",
    ),
    Rule(
        "prune-nvme", "parallel.offload_optimizer", all_of(prunes, nvme),
        "two engines, before and after the cut, would share the files on the disk", "offload to cpu",
    ),
    Rule(
        "prune-secondary", "parallel.secondary_partition",
        all_of(prunes, above("parallel.secondary_partition", 1)),
        "DeepSpeed makes that group once in a process (utils/groups.py:938), and the cut begins a second engine",
        "set parallel.secondary_partition=1",
    ),
    Rule(
        "prune-token-drop", "token_drop.whole_layers", all_of(DROPPING, _all_whole),
        lambda f: f"of the {_layers_left(f)} layers after the cut none is left to drop tokens",
        "set it lower, or token_drop.kind=none",
    ),
)  # fmt: skip
"""The table of this subject."""
