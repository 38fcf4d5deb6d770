"""This rank's part of a model in any layout, ready for `deepspeed.initialize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from ds_kernels.memory import hand_back_memory
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_train.config import RunConfig
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.layer_drop import LayerDropping
from ds_train.models.load import build_model, matrix_parameters, outline, shares_embedding
from ds_train.models.tasks import TaskLoss
from ds_train.models.tensor_plan import tensor_plan
from ds_train.models.token_drop import TokenDropping
from ds_train.parallel.mesh import Group, Mesh
from ds_train.parallel.pipeline import Pipeline, Stage, cut_to_stage, find_cut, layer_costs
from ds_train.parallel.sequence import SequenceParallel
from ds_train.parallel.tensor import cuts_vocabulary, shard_model
from ds_train.plan.make import RunPlan
from ds_train.plan.stages import balance, stage_bounds
from ds_train.plan.topology import Layout

Built = TypeVar("Built")


@dataclass(frozen=True)
class Part:
    """What this rank holds of a model, and how it works with the others.

    `model` is the transformers model (a stage's has stand-ins for what is elsewhere); `module` and `mpu` go to
    `deepspeed.initialize`. `task` is None in a pipeline, where the last stage has it. `outline` is the whole model on
    torch's meta device, or `model` itself where it is whole. `stage_layers` are the layers of each pipeline stage.
    `dropping` is there where the recipe's middle layers drop tokens, `layer_drop` where steps leave out layers.
    """

    model: PreTrainedModel
    module: nn.Module
    mesh: Mesh
    mpu: Any
    outline: PreTrainedModel
    matrix_parameters: int
    task: TaskLoss | None = None
    pipeline: Pipeline | None = None
    sequence: SequenceParallel | None = None
    stage_layers: tuple[int, ...] = ()
    dropping: TokenDropping | None = None
    layer_drop: LayerDropping | None = None

    @property
    def loss(self) -> TaskLoss:
        """What `model` is trained on; a pipeline asks its last stage."""
        if self.task is None:
            raise ValueError("the loss of a pipeline is its last stage's")
        return self.task

    @property
    def own_loss(self) -> TaskLoss | None:
        """The loss where this rank takes it; None on stages before a pipeline's last."""
        return self.task if self.pipeline is None else self.pipeline.stage.task


def build_part(run: RunConfig, config: PreTrainedConfig, plan: RunPlan, mesh: Mesh) -> Part:
    """Build this rank's part. Collective: every rank calls it with the same recipe and plan.

    Raises:
        UserError: whatever the model refuses.
    """
    layout = plan.layout
    try:
        if layout.pipe > 1:
            return _pipeline_part(run, config, plan, mesh)
        if layout.tensor > 1:
            sketch = outline(run, config)
            cut = _Cutter(run, config, sketch, layout, mesh.tensor)
            model = _in_turn(plan, cut.whole)
            task = TaskLoss(model, cut.vocabulary_group)
        else:
            sketch = model = build_model(run, config, plan.deepspeed_json, plan.zero_stage)
            task = TaskLoss(model)
        sequence = SequenceParallel(mesh.sequence, model) if layout.sequence > 1 else None
    except ValueError as error:
        raise cannot_cut(config, layout, first_line(error)) from error
    mpu = mesh if layout.tensor * layout.sequence > 1 else None
    drop = run.token_drop
    dropping = None if drop.kind == "none" else TokenDropping(model, run.seed, drop.whole_layers)
    return Part(
        model, model, mesh, mpu, sketch, matrix_parameters(sketch), task, sequence=sequence, dropping=dropping,
        layer_drop=None if run.layer_drop.kind == "none" else LayerDropping(model),
    )  # fmt: skip


def cannot_cut(config: PreTrainedConfig, layout: Layout, reason: str) -> UserError:
    """The refusal of a layout by a model, or by what its family's code does."""
    degrees = {"pipeline": layout.pipe, "tensor": layout.tensor, "sequence": layout.sequence}
    cuts = [axis for axis, degree in degrees.items() if degree > 1]
    if not cuts:
        return user_error("model", f"{config.model_type}: {reason}")
    whole = " and ".join(f"parallel.{axis}=1" for axis in cuts)
    fix = f"set {whole}; parallel.zero_stage=3 spreads any model over ranks"
    return user_error(f"parallel.{cuts[0]}", f"{config.model_type} can't be cut so: {reason}", fix, degrees[cuts[0]])


def build_stages(run: RunConfig, config: PreTrainedConfig, layout: Layout, group: Group) -> list[Stage]:
    """Every stage of the model in this process, each sharded over the tensor ranks of `group`, balanced by count.

    Raises:
        ValueError: there is no plan to cut the model by.
    """
    sketch = outline(run, config)
    cutter = _Cutter(run, config, sketch, layout, group)
    if layout.pipe == 1:
        return [Stage(cutter.whole(), vocabulary_group=cutter.vocabulary_group)]
    cutter.sizes = balance([1.0] * config.num_hidden_layers, 0.0, layout.pipe)
    return [cutter.stage(number) for number in range(layout.pipe)]


class _Cutter:
    """Makes parts of one model: pipeline stages, tensor shards, or both."""

    def __init__(
        self, run: RunConfig, config: PreTrainedConfig, sketch: PreTrainedModel, layout: Layout, group: Group
    ) -> None:
        self._run, self._config, self._group, self._layout = run, config, group, layout
        self._plan = tensor_plan(sketch) if layout.tensor > 1 else {}
        if layout.tensor > 1 and not self._plan:
            raise ValueError("there is no tensor plan for it")
        vocabulary = layout.tensor > 1 and cuts_vocabulary(sketch, self._plan, layout.tensor)
        self.vocabulary_group = group if vocabulary else None
        self.sizes: list[int] = []
        self._cut = find_cut(sketch) if layout.pipe > 1 else None
        if self._cut is not None:
            chosen = run.parallel.stage_layers
            costs = layer_costs(sketch, self._cut, run.data.sequence_length)
            self.sizes = list(chosen) if chosen is not None else balance(*costs, layout.pipe)

    def whole(self) -> PreTrainedModel:
        """The whole model, sharded over the tensor ranks."""
        return self._shard(None)

    def stage(self, number: int) -> Stage:
        """Pipeline stage `number`, sharded over the tensor ranks."""
        assert self._cut is not None
        first, stop = list(stage_bounds(self.sizes))[number]
        model = self._shard(partial(cut_to_stage, cut=self._cut, first=first, stop=stop))
        return Stage(model, self._cut, first, stop, self.vocabulary_group)

    def _shard(self, cut: Callable[[PreTrainedModel], None] | None) -> PreTrainedModel:
        # Never partitioned by ZeRO-3 while it is built: DeepSpeed does that to the shards, over their data ranks.
        model = build_model(self._run, self._config, {}, 0, cut)
        if self._layout.tensor > 1:
            shard_model(model, self._plan, self._group, self.vocabulary_group is not None)
        return model


def _in_turn(plan: RunPlan, build: Callable[[], Built]) -> Built:
    """Run `build` on one rank of each host after the other. Collective.

    A tensor rank holds all that is cut until it has cut it: few hosts have the memory for all their ranks at once.
    """
    turns = plan.cluster.ranks_per_host if plan.layout.tensor > 1 else 1
    own = dist.get_rank() % turns
    for _ in range(own):
        dist.barrier()
    built = build()
    hand_back_memory()
    for _ in range(own + 1, turns):
        dist.barrier()
    return built


def _pipeline_part(run: RunConfig, config: PreTrainedConfig, plan: RunPlan, mesh: Mesh) -> Part:
    sketch = outline(run, config)
    cutter = _Cutter(run, config, sketch, plan.layout, mesh.tensor)
    stage = _in_turn(plan, lambda: cutter.stage(mesh.place.pipe))
    pipeline = Pipeline(stage, plan.layout, dynamic_shape=not run.data.packing, tied=shares_embedding(sketch))
    drop = run.token_drop
    return Part(
        pipeline.stage.model,
        pipeline,
        mesh,
        None,
        sketch,
        matrix_parameters(sketch),
        pipeline=pipeline,
        stage_layers=tuple(cutter.sizes),
        dropping=None if drop.kind == "none" else pipeline.stage.drop_tokens(run.seed, drop.whole_layers),
        layer_drop=None if run.layer_drop.kind == "none" else pipeline.stage.drop_layers(),
    )
