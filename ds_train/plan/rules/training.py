"""Optimizer, schedule, tracking, evaluation and export."""

from __future__ import annotations

from typing import Any

from ds_train.plan.facts import Facts
from ds_train.plan.rules.base import (
    PIPELINE,
    SEQUENCE,
    TENSOR,
    KeyRule,
    Rule,
    all_of,
    any_of,
    at,
    given,
    is_not,
    nvme,
    on_device,
)


def _uneven_adagrad(facts: Facts) -> bool:
    optimizer = facts.run.optimizer
    return _torchs_adagrad(facts) and optimizer.weight_decay > 0 and not optimizer.decay_all


def _torchs_adagrad(facts: Facts) -> bool:
    return facts.run.optimizer.kind == "adagrad" and facts.run.optimizer.kernel != "fused"


_SCHEDULE_KEYS = {
    "decay_fraction": ("wsd",),
    "final_ratio": ("cosine", "linear", "cosine-restarts", "wsd", "polynomial", "one-cycle"),
    "power": ("polynomial",),
    "cycles": ("cosine-restarts",),
    "cycle_growth": ("cosine-restarts",),
    "cycle_peak": ("cosine-restarts",),
    "milestones": ("step",),
    "step_factor": ("step",),
}
"""Keys of `schedule` that only some kinds read."""


def _unread_schedule_keys(facts: Facts) -> dict[str, Any]:
    """Those that have another value than their default; a resolved recipe writes every default out."""
    schedule = facts.run.schedule
    fields = type(schedule).model_fields
    return {
        f"schedule.{key}": getattr(schedule, key)
        for key, kinds in _SCHEDULE_KEYS.items()
        if schedule.kind not in kinds and getattr(schedule, key) != fields[key].default
    }


def _between_ends(facts: Facts) -> float:
    """Share of the run between warm-up and cool-down."""
    return round(1 - facts.run.schedule.warmup_fraction - facts.run.schedule.cooldown_fraction, 9)


def _nothing_held_out(facts: Facts) -> bool:
    data = facts.run.data
    return data.validation_fraction == 0 and data.validation_path is None and data.validation_split is None


_PROMPTS = is_not(at("track.eval_prompts", ()))
_ROLL_BACK = at("health.on_spike", "roll-back")

RULES: tuple[Rule | KeyRule, ...] = (
    # -- optimizer and schedule -------------------------------------------------------------------------------------
    Rule(
        "adagrad-groups", "optimizer.weight_decay", _uneven_adagrad,
        "ZeRO rebuilds Adagrad with one group (stage_1_and_2.py:946), so norms and biases can't be left out of decay",
        "set optimizer.weight_decay=0, optimizer.decay_all=true, or optimizer.kernel=fused",
    ),
    Rule(
        "kernel-kind", "optimizer.kernel", all_of(at("optimizer.kernel", "fused"), at("optimizer.kind", "sgd")),
        "there is no fused kernel for sgd", "set optimizer.kernel=auto",
    ),
    Rule(
        "kernel-device", "optimizer.kernel",
        all_of(
            at("optimizer.kernel", "fused"), is_not(on_device("cpu", "cuda")), at("parallel.offload_optimizer", "none"),
        ),
        lambda f: f"the fused kernels are for CPUs and CUDA, and the optimizer's states are on {f.cluster.device}",
        "set parallel.offload_optimizer=cpu, or optimizer.kernel=auto",
    ),
    Rule(
        "lr-factors", "optimizer.lr_factors",
        lambda f: f.run.optimizer.lr_factors and _torchs_adagrad(f),
        "ZeRO rebuilds torch's Adagrad with one group (stage_1_and_2.py:946)",
        "leave it out, or set optimizer.kernel=fused",
    ),
    Rule(
        "schedule-overlap", "schedule.cooldown_fraction",
        lambda f: _between_ends(f) < 0,
        lambda f: f"with warmup_fraction={f.run.schedule.warmup_fraction:g} it is longer than the run",
        lambda f: f"at most {1 - f.run.schedule.warmup_fraction:g}",
    ),
    Rule(
        "wsd-overlap", "schedule.decay_fraction",
        lambda f: f.run.schedule.kind == "wsd" and f.run.schedule.decay_fraction > _between_ends(f),
        lambda f: f"warm-up and cool-down leave {_between_ends(f):g} of the run to it",
        lambda f: f"at most {_between_ends(f):g}",
    ),
    Rule(
        "inverse-sqrt-warmup", "schedule.warmup_fraction",
        all_of(at("schedule.kind", "inverse-sqrt"), at("schedule.warmup_fraction", 0.0)),
        "inverse-sqrt falls from the end of warm-up, and there is none", "set it above 0",
    ),
    KeyRule(
        "schedule-unread", _unread_schedule_keys, lambda f, _: f"schedule.kind={f.run.schedule.kind} doesn't read it",
        lambda _, key: f"leave it out, or set schedule.kind={_SCHEDULE_KEYS[key.removeprefix('schedule.')][0]}",
    ),
    Rule(
        "cooldown-unread", "schedule.cooldown_ratio",
        lambda f: f.run.schedule.cooldown_ratio > 0 and f.run.schedule.cooldown_fraction == 0,
        "there is no cool-down", "set schedule.cooldown_fraction above 0, or leave it out",
    ),
    # -- tracking, evaluation, export -------------------------------------------------------------------------------
    Rule(
        "sample-task", "track.sample_prompt",
        all_of(given("track.sample_prompt"), is_not(at("task.kind", "causal-lm"))),
        "only causal language models continue a text", "leave it out",
    ),
    Rule(
        "sample-export", "track.sample_prompt", all_of(given("track.sample_prompt"), at("checkpoint.export", False)),
        "the sample is generated by the exported model", "set checkpoint.export=true, or leave it out",
    ),
    Rule(
        "push-export", "checkpoint.push_to", all_of(given("checkpoint.push_to"), at("checkpoint.export", False)),
        "it is the export that is uploaded", "set checkpoint.export=true, or leave it out",
    ),
    Rule(
        "best-data", "checkpoint.best", all_of(given("checkpoint.best"), _nothing_held_out),
        "nothing is held out to evaluate on", "set data.validation_fraction above 0, or leave it out",
    ),
    Rule(
        "best-evaluations", "checkpoint.best",
        all_of(given("checkpoint.best"), is_not(given("track.eval_every_steps"))),
        "with one evaluation at the end there is nothing to choose from", "set track.eval_every_steps",
    ),
    Rule(
        "best-nvme", "checkpoint.best", all_of(given("checkpoint.best"), nvme),
        "states on nvme are read from a checkpoint when a run starts, not to export another step at its end",
        "leave it out, or offload to cpu",
    ),
    Rule(
        "patience-best", "checkpoint.patience", all_of(given("checkpoint.patience"), is_not(given("checkpoint.best"))),
        "no score says which evaluation is better", "set checkpoint.best=loss",
    ),
    Rule(
        "eval-prompts-task", "track.eval_prompts", all_of(_PROMPTS, is_not(at("task.kind", "causal-lm"))),
        "only causal language models continue a text", "leave it out",
    ),
    Rule(
        "eval-prompts-data", "track.eval_prompts", all_of(_PROMPTS, _nothing_held_out),
        "nothing is held out, so there are no evaluations", "set data.validation_fraction above 0, or leave it out",
    ),
    Rule(
        "eval-prompts-layout", "track.eval_prompts", all_of(_PROMPTS, any_of(PIPELINE, TENSOR, SEQUENCE)),
        "one rank can't generate while its parts of the model are on others",
        "leave it out, or use data ranks with any parallel.zero_stage; track.sample_prompt samples the export",
    ),
    Rule(
        "roll-back-saves", "health.on_spike", all_of(_ROLL_BACK, is_not(given("checkpoint.every_steps"))),
        "there is no checkpoint to go back to before the end", "set checkpoint.every_steps, or health.on_spike=note",
    ),
    Rule(
        "roll-back-kept", "health.spike_steps",
        lambda f: _ROLL_BACK(f) and f.run.checkpoint.every_steps
        and f.run.health.spike_steps - 1 > (f.run.checkpoint.keep_last - 1) * f.run.checkpoint.every_steps,
        "when a spike is known, the checkpoint before it is gone",
        lambda f: "raise checkpoint.keep_last to "
        f"{-(-(f.run.health.spike_steps - 1) // (f.run.checkpoint.every_steps or 1)) + 1}, or set it to 1",
    ),
    Rule(
        "roll-back-nvme", "health.on_spike", all_of(_ROLL_BACK, nvme),
        "states on nvme are read from a checkpoint when a run starts, not in the middle of one",
        "set health.on_spike=note, or offload to cpu",
    ),
    Rule(
        "save-nvme", "checkpoint.asynchronous", all_of(at("checkpoint.asynchronous", True), nvme),
        "the copy on the host would hold what nvme offload keeps out of its memory", "set checkpoint.asynchronous=auto",
    ),
    Rule(
        "noise-scale-layout", "track.noise_scale_every_steps",
        all_of(given("track.noise_scale_every_steps"), any_of(PIPELINE, SEQUENCE)),
        "no rank sees the whole gradient of a micro-batch there", "leave it out, or use data and tensor ranks",
    ),
    Rule(
        "noise-scale-fp16", "track.noise_scale_every_steps",
        all_of(given("track.noise_scale_every_steps"), at("precision.dtype", "fp16")),
        "gradients of scaled losses overflow now and then", "set precision.dtype=bf16, or leave it out",
    ),
    Rule(
        "eval-data", "track.eval_every_steps", all_of(given("track.eval_every_steps"), _nothing_held_out),
        "nothing is held out to evaluate on", "set data.validation_fraction above 0, or leave it out",
    ),
)  # fmt: skip
