"""`make_plan`: recipe + cluster -> everything that is decided before a process starts, or every reason why not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.data import BYTES_VOCABULARY
from ds_train.errors import Problem, UserError
from ds_train.plan.batch import BatchPlan, plan_batch
from ds_train.plan.deepspeed_json import deepspeed_json
from ds_train.plan.deepspeed_keys import check_raw
from ds_train.plan.model_shape import ModelShape, model_shape
from ds_train.plan.rules import Facts, check
from ds_train.plan.topology import Cluster, Layout


@dataclass(frozen=True)
class RunPlan:
    """What a run will do. `parameters` is an estimate, None where the model's sizes aren't known on this machine."""

    cluster: Cluster
    layout: Layout
    batch: BatchPlan
    zero_stage: int
    parameters: int | None
    deepspeed_json: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def make_plan(run: RunConfig, cluster: Cluster) -> RunPlan:
    """Decide layout, batch and DeepSpeed's configuration. Pure: looks at the recipe and installed sources only.

    Raises:
        UserError: with every rule that the recipe breaks.
    """
    shape = _shape(run)
    parallel = run.parallel
    problems = check(Facts(run, cluster, shape)) + check_raw(run.deepspeed)
    fixed = parallel.pipeline * parallel.tensor * parallel.sequence
    batch: BatchPlan | None = None
    if cluster.ranks % fixed:
        reason = f"pipeline x tensor x sequence = {fixed} does not divide the {cluster.ranks} ranks started"
        problems.append(Problem("parallel", reason, f"start a multiple of {fixed} ranks"))
    else:
        try:
            batch = plan_batch(run.batch, cluster.ranks // fixed)
        except UserError as error:
            problems += error.problems
    if problems or batch is None:
        raise UserError(problems)
    layout = Layout(parallel.pipeline, cluster.ranks // fixed, parallel.sequence, parallel.tensor)
    stage, notes = _effective_stage(run)
    parameters = shape.parameters if shape else None
    json = deepspeed_json(run, layout, batch, cluster, stage, parameters)
    return RunPlan(cluster, layout, batch, stage, parameters, json, notes)


def _shape(run: RunConfig) -> ModelShape | None:
    shape = model_shape(run.model)
    if shape is None or shape.vocab_size is not None:
        return shape
    # A model from scratch takes the tokenizer's vocabulary; a loaded tokenizer's size isn't known yet.
    vocabulary = run.data.train_vocabulary or (BYTES_VOCABULARY if run.data.tokenizer == "bytes" else None)
    return replace(shape, vocab_size=vocabulary)


def _effective_stage(run: RunConfig) -> tuple[int, tuple[str, ...]]:
    if run.parallel.zero_stage == 0 and run.precision.dtype != "fp32":
        # DeepSpeed's 16-bit optimizers of stage 0 take an Adam step with zero gradients at start-up, and never scale
        # an fp16 loss (unfused_optimizer.py:425).
        note = f"parallel.zero_stage: 1 is used instead of 0, which is wrong with {run.precision.dtype} in DeepSpeed"
        return 1, (note,)
    return run.parallel.zero_stage, ()
