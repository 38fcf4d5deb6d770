"""`make_plan`: recipe + cluster -> everything that is decided before a process starts, or every reason why not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ds_train.config import RunConfig
from ds_train.errors import UserError, outermost
from ds_train.plan.batch import BatchPlan, plan_batch
from ds_train.plan.deepspeed_json import deepspeed_json
from ds_train.plan.deepspeed_keys import check_raw
from ds_train.plan.facts import Facts
from ds_train.plan.model_size import ModelSize
from ds_train.plan.predict import Prediction, Predictor, chosen, unknown
from ds_train.plan.rules import check
from ds_train.plan.search import Search, auto_fields, search
from ds_train.plan.stage import effective_stage
from ds_train.plan.topology import Cluster, Layout

_MUCH_IDLE = 0.25


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    `run` is the recipe with every `auto` of the planner settled. `zero_stage` is the stage that really runs, with a
    note where it isn't the recipe's; `size` is None where the model's sizes aren't known on this machine, `predicted`
    also where its family's code isn't understood. `search` is what `auto` was chosen from.
    """

    run: RunConfig
    cluster: Cluster
    layout: Layout
    batch: BatchPlan
    zero_stage: int
    size: ModelSize | None
    deepspeed_json: dict[str, Any]
    notes: tuple[str, ...]
    predicted: Prediction | None = None
    search: Search | None = None

    @property
    def parameters(self) -> int | None:
        """Estimated parameters of the model; None where its sizes aren't known."""
        return self.size.parameters if self.size else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the recipe is stored beside it."""
        return {
            "cluster": asdict(self.cluster),
            "layout": asdict(self.layout),
            "batch": asdict(self.batch),
            "zero_stage": self.zero_stage,
            "size": self.size.to_dict() if self.size else None,
            "deepspeed_json": self.deepspeed_json,
            "notes": list(self.notes),
            "predicted": self.predicted.to_dict() if self.predicted else None,
        }


def make_plan(run: RunConfig, cluster: Cluster) -> RunPlan:
    """Decide layout, batch and DeepSpeed's configuration. Looks at the recipe, installed sources and local folders.

    Raises:
        UserError: with everything that is wrong: the rules, the batch and the raw DeepSpeed keys; or nothing that
            `auto` could become fits.
    """
    found = search(run, cluster) if auto_fields(run) else None
    if found is not None:
        run = found.best.run
    facts = Facts(run, cluster)
    problems = outermost(check(facts) + check_raw(run.deepspeed))
    data_ranks = max(1, cluster.ranks // facts.fixed_ranks)
    try:
        batch = plan_batch(run.batch, data_ranks, facts.pipeline)
    except UserError as error:
        raise UserError(problems + error.problems) from None
    if problems:
        raise UserError(problems)
    layout = Layout(facts.pipeline, data_ranks, facts.sequence, facts.tensor)
    json = deepspeed_json(run, layout, batch, cluster, facts.size)
    predictor = Predictor.of(facts)
    predicted = predictor.predict(chosen(run, layout, batch, facts.stage)) if predictor else None
    notes = _notes(facts, batch, predicted)
    return RunPlan(run, cluster, layout, batch, facts.stage, facts.size, json, notes, predicted, found)


def like_steps(run: RunConfig) -> int | None:
    """Optimizer steps of a run whose steps are all alike; None where they aren't, or their number depends on data."""
    dropped = run.token_drop.kind != "none" or run.layer_drop.kind != "none"
    if dropped or run.curriculum.kind != "none" or run.patch.size > 1:
        return None
    if run.schedule.steps is None and run.schedule.tokens is None:
        return None
    tokens = run.batch.global_samples * run.data.sequence_length
    return run.schedule.steps or -(-(run.schedule.tokens or 0) // tokens)


def _notes(facts: Facts, batch: BatchPlan, predicted: Prediction | None) -> tuple[str, ...]:
    """What the user should know although nothing is wrong."""
    notes = []
    if predicted is not None and predicted.shortage:
        notes.append(
            f"a rank {predicted.shortage} at its predicted peak: it may run out of memory; "
            "`ds-train plan RECIPE --auto` shows what fits"
        )
    _, promoted = effective_stage(facts.run)
    if promoted:
        notes.append(promoted)
    partition, on_host = facts.run.parallel.secondary_partition, facts.cluster.ranks_per_host
    if partition > 1 and on_host % partition:
        notes.append(f"parallel.secondary_partition={partition} spans hosts of {on_host} ranks: its gathers cross them")
    stages, micro_batches = facts.pipeline, batch.accumulation
    idle = (stages - 1) / (micro_batches + stages - 1)
    if idle > _MUCH_IDLE:
        notes.append(
            f"parallel.pipeline={stages}: with {micro_batches} micro-batches a step its ranks idle {idle:.0%} of the "
            "time; raise batch.global_samples or lower batch.micro_samples"
        )
    data = facts.run.data
    if facts.run.task.kind == "sequence-classification" and data.packing and "packing" in data.model_fields_set:
        notes.append("data.packing=True: samples of sequence-classification are padded, not packed")
    if predicted is None:
        notes.append("memory and time aren't predicted: {}; {}".format(*unknown(facts)))
    elif predicted.step is None:
        notes.append(
            f"time isn't predicted: no figures of this {facts.cluster.device} device; name one with --cluster, or "
            "measure it with `ds-train calibrate`"
        )
    return tuple(notes)
