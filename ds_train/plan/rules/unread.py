"""Keys that only some recipes read, and which: what would be ignored without a word is refused.

A key counts where it has another value than its default, since a resolved recipe writes every default out. What holds
anyway isn't ignored: parallel.pin_memory=false where nothing is offloaded, say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.compress import PRUNE_TARGETS, PRUNED_KINDS
from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import (
    CLASSIFYING,
    DROPPING,
    LAYER_DROP,
    PATCHES,
    KeyRule,
    KeyText,
    Predicate,
    above,
    all_of,
    any_of,
    at,
    given,
    held_out,
    is_not,
    nvme,
    prunes,
    taught,
)

_OF_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer.kind": {
        "optimizer.betas": ("adamw", "adam"),
        "optimizer.eps": ("adamw", "adam", "adagrad"),
        "optimizer.momentum": ("sgd",),
    },
    "schedule.kind": {
        "schedule.decay_fraction": ("wsd",),
        "schedule.final_ratio": ("cosine", "linear", "cosine-restarts", "wsd", "polynomial", "one-cycle"),
        "schedule.power": ("polynomial",),
        "schedule.cycles": ("cosine-restarts",),
        "schedule.cycle_growth": ("cosine-restarts",),
        "schedule.cycle_peak": ("cosine-restarts",),
        "schedule.milestones": ("step",),
        "schedule.step_factor": ("step",),
    },
    "curriculum.kind": {
        "curriculum.start_length": ("linear", "root"),
        "curriculum.fraction": ("linear", "root"),
        "curriculum.root": ("root",),
        "curriculum.lengths": ("discrete",),
        "curriculum.until": ("discrete",),
        "curriculum.multiple": ("linear", "root", "discrete"),
        "curriculum.how": ("linear", "root", "discrete"),
        "curriculum.keep_tokens": ("linear", "root", "discrete"),
    },
    "task.kind": {
        "task.num_labels": (CLASSIFYING,),
        "task.mask_fraction": ("masked-lm",),
        "data.label_column": (CLASSIFYING,),
    },
    "data.source": {"data.text_column": ("jsonl", "parquet", "tsv", "hub")},
}
"""Kinds of something that read a key, by the key that chooses among them."""


@cache
def _default(key: str) -> Any:
    section, found = RunConfig, None
    for part in key.split("."):
        found = section.model_fields[part]
        section = found.annotation  # type: ignore[assignment]
    assert found is not None
    return found.get_default(call_default_factory=True)


def _changed(facts: Facts, keys: Sequence[str]) -> dict[str, Any]:
    """Those of `keys` that have another value than their default."""
    return {key: facts.value(key) for key in keys if facts.value(key) != _default(key)}


def _read_where(name: str, keys: Sequence[str], where: Predicate, reason: KeyText, fix: KeyText) -> KeyRule:
    """Nothing reads `keys` but where `where` holds."""
    return KeyRule(name, lambda facts: {} if where(facts) else _changed(facts, keys), reason, fix)


def _of_kinds(switch: str, readers: Mapping[str, Sequence[str]]) -> KeyRule:
    """Each of the keys `readers` is read by some kinds, which `switch` chooses."""

    def unread(facts: Facts) -> dict[str, Any]:
        if facts.value(switch) == "none" and _said(switch)(facts):
            return {}
        return _changed(facts, [key for key, kinds in readers.items() if facts.value(switch) not in kinds])

    return KeyRule(
        f"{switch.replace('.', '-')}-unread",
        unread,
        lambda facts, _: f"{switch}={facts.value(switch)} doesn't read it",
        lambda _, key: f"leave it out, or set {switch}={readers[key][0]}",
    )


def _keys_of(section: str, *switches: str) -> list[str]:
    """All keys of a section but those that switch it on."""
    fields: Any = RunConfig
    for part in section.split("."):
        fields = fields.model_fields[part].annotation
    return [f"{section}.{key}" for key in fields.model_fields if key not in switches]


def _said(*keys: str) -> Predicate:
    """The recipe itself says one of `keys`: what is off in so many words may keep how it is when it is on."""

    def said(facts: Facts) -> bool:
        places = (key.rpartition(".") for key in keys)
        return any(name in facts.value(section).model_fields_set for section, _, name in places)

    return said


def _local_folder(facts: Facts) -> bool:
    path = facts.run.model.path
    return path is not None and facts.cluster.here and Path(path).is_dir()


def _sharded(facts: Facts) -> bool:
    return facts.stage > 0


def _pruned(*kinds: str) -> Predicate:
    """Units of one of `kinds` go."""
    return lambda facts: not set(kinds).isdisjoint(facts.run.compress.prune.kinds)


def _cuts_heads_anew(facts: Facts) -> bool:
    distill = facts.run.compress.distill
    return distill.relations > 0 and {*distill.relation_kinds} != {"attention"}


def _truncates(facts: Facts) -> bool:
    """Whether lengths of a curriculum are multiples, not divisors of the window."""
    curriculum = facts.run.curriculum
    return curriculum.kind == "none" or (curriculum.how == "truncate" and not curriculum.keep_tokens)


def _score_sums(facts: Facts) -> bool:
    """Whether a score looks at more than weights; that of layers always does."""
    return facts.run.compress.prune.score != "magnitude" or _pruned("layers")(facts)


def _close_one_by_one(facts: Facts) -> bool:
    return facts.run.compress.prune.end > facts.run.compress.prune.start


_TEACHES = ("logits", "hidden", "relations")
_LOADS_TOKENIZER = all_of(is_not(at("data.tokenizer", "bytes")), is_not(given("data.train_vocabulary")))

RULES: tuple[KeyRule, ...] = (
    *(_of_kinds(switch, readers) for switch, readers in _OF_KINDS.items()),
    # -- model, data, batch -----------------------------------------------------------------------------------------
    _read_where(
        "revision-unread", ["model.revision"], all_of(given("model.path"), is_not(_local_folder)),
        "only models of the hub have revisions", "leave it out, or give a hub id in model.path",
    ),
    _read_where(
        "remote-code-unread", ["model.trust_remote_code"], any_of(given("model.path"), _LOADS_TOKENIZER, taught),
        "no code comes with a model from scratch", "leave it out",
    ),
    _read_where(
        "held-out-unread", ["data.validation_fraction"],
        any_of(
            all_of(is_not(given("data.validation_path")), is_not(given("data.validation_split"))),
            at("data.validation_fraction", 0.0),
        ),
        lambda f, _: f"data.validation_{'split' if f.run.data.source == 'hub' else 'path'} says what is held out",
        "leave one of them out",
    ),
    _read_where(
        "evaluation-unread", ["batch.eval_micro_samples", "track.eval_samples"], held_out,
        "nothing is held out to evaluate on", "leave it out, or set data.validation_fraction above 0",
    ),
    # -- layout, precision, optimizer, schedule ---------------------------------------------------------------------
    _read_where(
        "nvme-unread", ["parallel.nvme_path"], nvme, "nothing is offloaded to a disk",
        "leave it out, or set parallel.offload_optimizer=nvme",
    ),
    _read_where(
        "buckets-unread", ["parallel.bucket_elements"], _sharded, "stage 0 has DeepSpeed's own buckets",
        "leave it out, or set parallel.zero_stage=1",
    ),
    _read_where(
        "overlap-unread", ["parallel.overlap_communication"],
        any_of(_sharded, at("parallel.overlap_communication", False)),
        "stage 0 reduces gradients after the last backward pass", "leave it out, or set parallel.zero_stage=1",
    ),
    _read_where(
        "loss-scale-unread", ["precision.loss_scale", "precision.initial_loss_scale_power"],
        at("precision.dtype", "fp16"), "only fp16 scales its loss", "leave it out, or set precision.dtype=fp16",
    ),
    _read_where(
        "loss-scale-fixed", ["precision.initial_loss_scale_power"],
        any_of(at("precision.loss_scale", "dynamic"), is_not(at("precision.dtype", "fp16"))),
        lambda f, _: f"precision.loss_scale={f.run.precision.loss_scale:g} is a fixed scale",
        "leave it out, or set precision.loss_scale=dynamic",
    ),
    _read_where(
        "decay-unread", ["optimizer.decay_all"], above("optimizer.weight_decay"),
        "optimizer.weight_decay=0 decays nothing", "leave it out, or set optimizer.weight_decay above 0",
    ),
    _read_where(
        "warmup-unread", ["schedule.initial_ratio"], above("schedule.warmup_fraction"), "there is no warm-up",
        "leave it out, or set schedule.warmup_fraction above 0",
    ),
    _read_where(
        "cycles-unread", ["schedule.cycle_growth", "schedule.cycle_peak"],
        any_of(above("schedule.cycles", 1), is_not(at("schedule.kind", "cosine-restarts"))), "there is one cycle",
        "leave it out, or set schedule.cycles above 1",
    ),
    _read_where(
        "cooldown-unread", ["schedule.cooldown_ratio"], above("schedule.cooldown_fraction"), "there is no cool-down",
        "leave it out, or set schedule.cooldown_fraction above 0",
    ),
    # -- fewer tokens, fewer layers ---------------------------------------------------------------------------------
    _read_where(
        "multiple-unread", ["curriculum.multiple"], _truncates,
        lambda f, _: "lengths are divisors of data.sequence_length with "
        + ("curriculum.how=repack" if f.run.curriculum.how == "repack" else "curriculum.keep_tokens=true"),
        "leave it out, or set curriculum.how=truncate and keep_tokens=false",
    ),
    _read_where(
        "patch-unread", _keys_of("patch", "size"), any_of(PATCHES, _said("patch.size")),
        "positions hold one token, so nothing reads it",
        "set patch.size=4, or leave it out",
    ),
    _read_where(
        "token-drop-unread", _keys_of("token_drop", "kind"), any_of(DROPPING, _said("token_drop.kind")),
        "no token is dropped, so nothing reads it",
        "set token_drop.kind=random-ltd, or leave it out",
    ),
    _read_where(
        "layer-drop-unread", _keys_of("layer_drop", "kind"), any_of(LAYER_DROP, _said("layer_drop.kind")),
        "no layer is left out, so nothing reads it",
        "set layer_drop.kind=progressive, or leave it out",
    ),
    # -- checkpoints, health, tracking ------------------------------------------------------------------------------
    _read_where(
        "keep-every-unread", ["checkpoint.keep_every"],
        any_of(given("checkpoint.every_steps"), given("checkpoint.best")), "there is one checkpoint, at the end",
        "leave it out, or set checkpoint.every_steps",
    ),
    _read_where(
        "spikes-unread", ["health.spike_steps"], is_not(at("health.on_spike", "ignore")), "spikes are ignored",
        "leave it out, or set health.on_spike=note",
    ),
    _read_where(
        "roll-backs-unread", ["health.max_roll_backs"], at("health.on_spike", "roll-back"), "nothing is rolled back",
        "leave it out, or set health.on_spike=roll-back",
    ),
    _read_where(
        "wandb-unread", ["track.wandb_project", "track.wandb_entity", "track.wandb_artifacts"],
        any_of(is_not(at("track.wandb", "off")), _said("track.wandb")), "wandb is off",
        "set track.wandb=online or offline, or leave it out",
    ),
    _read_where(
        "artifacts-unread", ["track.wandb_artifacts"],
        any_of(at("checkpoint.export", True), at("track.wandb_artifacts", "all"), at("track.wandb", "off")),
        "nothing is exported", "set checkpoint.export=true, or leave it out",
    ),
    _read_where(
        "profile-unread", ["track.profile_ranks"], given("track.profile_steps"), "no step is recorded",
        "set track.profile_steps, or leave it out",
    ),
    _read_where(
        "sample-unread", ["track.sample_tokens"], _said("track.sample_prompt", "track.eval_prompts"),
        "no text is continued",
        "set track.sample_prompt or track.eval_prompts, or leave it out",
    ),
    # -- teachers and few bits --------------------------------------------------------------------------------------
    _read_where(
        "distill-unread", _keys_of("compress.distill", *_TEACHES),
        any_of(taught, _said(*(f"compress.distill.{key}" for key in _TEACHES))),
        "there is no teacher, so nothing reads it", "set compress.distill.logits, hidden or relations",
    ),
    _read_where(
        "distill-logits-unread", [f"compress.distill.{key}" for key in ("temperature", "alpha", "alpha_end")],
        any_of(is_not(taught), is_not(at("compress.distill.logits", "none"))), "the teacher's logits aren't learned",
        "set compress.distill.logits=forward-kl, or leave it out",
    ),
    _read_where(
        "distill-hidden-unread", ["compress.distill.hidden_layers"],
        any_of(is_not(taught), above("compress.distill.hidden")), "hidden states aren't compared",
        "set compress.distill.hidden above 0, or leave it out",
    ),
    _read_where(
        "distill-relations-unread",
        [f"compress.distill.relation_{key}" for key in ("kinds", "heads", "layers")],
        any_of(is_not(taught), above("compress.distill.relations")), "attention isn't compared",
        "set compress.distill.relations above 0, or leave it out",
    ),
    _read_where(
        "distill-heads-unread", ["compress.distill.relation_heads"],
        any_of(is_not(above("compress.distill.relations")), _cuts_heads_anew),
        "attention is compared by the models' own heads", "leave it out, or add query, key or value to relation_kinds",
    ),
    _read_where(
        "quantize-unread", _keys_of("compress.quantize", "weights"),
        any_of(is_not(at("compress.quantize.weights", "none")), _said("compress.quantize.weights")),
        "nothing is rounded, so nothing reads it", "set compress.quantize.weights",
    ),
    # -- pruning ----------------------------------------------------------------------------------------------------
    _read_where(
        "prune-unread",
        _keys_of("compress.prune", *PRUNED_KINDS, *PRUNE_TARGETS, "latency_samples", "latency_length", "budget"),
        any_of(prunes, _said(*(f"compress.prune.{kind}" for kind in PRUNED_KINDS))),
        "nothing is asked to go, so nothing reads it", "set a share, such as ffn: 0.5",
    ),
    _read_where(
        "prune-latency-unread", ["compress.prune.latency_samples", "compress.prune.latency_length"],
        any_of(given("compress.prune.latency"), given("compress.prune.latency_ms")),
        "nothing reads it: no time is asked for", "set compress.prune.latency, such as 0.5, or leave it out",
    ),
    _read_where(
        "prune-budget-unread", ["compress.prune.budget"], _pruned("ffn"),
        "it is about feed-forward channels, and none go", "set compress.prune.ffn, or leave it out",
    ),
    _read_where(
        "prune-multiple-unread", ["compress.prune.multiple"], any_of(is_not(prunes), _pruned("ffn", "hidden")),
        "neither feed-forward channels nor the hidden size go", "set compress.prune.ffn or hidden, or leave it out",
    ),
    _read_where(
        "prune-score-unread", ["compress.prune.score"],
        any_of(is_not(prunes), _pruned("heads", "ffn", "experts", "hidden")),
        "layers are chosen by what they add to their input", "leave it out",
    ),
    _read_where(
        "prune-steps-unread", ["compress.prune.score_steps"], any_of(is_not(prunes), _score_sums),
        "compress.prune.score=magnitude looks at the weights alone", "leave it out",
    ),
    _read_where(
        "prune-shape-unread", ["compress.prune.shape"], any_of(is_not(prunes), _close_one_by_one),
        "all units close at once, compress.prune.start=end", "leave it out, or set compress.prune.end later",
    ),
)  # fmt: skip
