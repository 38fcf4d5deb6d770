"""Recipe and plan -> model, data, optimizer and the DeepSpeed engine around them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from ds_kernels import Choice, torchs
from ds_kernels.memory import hand_back_memory
from transformers import PreTrainedConfig, PreTrainedModel

from ds_train.compress.compared import check_relations
from ds_train.compress.distill import Distilling, TeacherBeside
from ds_train.compress.packed import Packing, check_loads
from ds_train.compress.qat import Rounding, linear_layers
from ds_train.compress.sparsity import keep_zeros, zeros_among
from ds_train.compress.teacher import check_teacher, teacher_path
from ds_train.config import RunConfig
from ds_train.config.optimizer import OptimizerSection
from ds_train.data.build import DataBundle, load_data
from ds_train.engine.disk import own_disk
from ds_train.engine.distilling import check_teacher_shared, distil
from ds_train.engine.prunable import Prunable, find_prunable
from ds_train.engine.ranks import RankInfo, all_sum, on_main_first
from ds_train.errors import user_error
from ds_train.models.cpu_attention import tiles_are_faster, use_tiled_attention
from ds_train.models.cpu_products import fp32_products_are_faster, use_fp32_products
from ds_train.models.kept_layers import start_from_kept_layers
from ds_train.models.lean import use_lean_layers
from ds_train.models.liger import use_liger
from ds_train.models.load import (
    keep_generation_config,
    load_model_config,
    outline,
    position_of_first,
    without_weights,
)
from ds_train.models.patch import embed_patches
from ds_train.models.token_drop import repeated_layers
from ds_train.optim.build import build_optimizer, choose_kernel
from ds_train.optim.fuse import fuse_passes
from ds_train.optim.guard import guard_steps
from ds_train.parallel.build import Part, build_part
from ds_train.parallel.check import check_documents_apart, check_layer_dropping, check_layout, check_token_dropping
from ds_train.parallel.mesh import Mesh, leave_groups
from ds_train.parallel.sequence import leave_sequence
from ds_train.parallel.tensor import gradient_norm
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.prune import Count
from ds_train.plan.topology import Layout
from ds_train.track.phases import StepClock, step_clock, time_pipeline


@dataclass(frozen=True)
class Assembly:
    """All that the step loop works with. `engine` is DeepSpeed's, around this rank's part of the model.

    `kernel` is what updates the parameters, `clock` what tells where the time of a step goes. `distilling` is there
    where the recipe has a teacher, on ranks that take the loss; `rounding` and `packing` where weights are rounded: in
    training, and in the export. `prunable` is there where the recipe prunes, until the cut.
    """

    engine: Any
    part: Part
    data: DataBundle
    kernel: Choice
    clock: StepClock
    distilling: Distilling | None = None
    rounding: Rounding | None = None
    packing: Packing | None = None
    prunable: Prunable | None = None

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The teacher that runs on this rank, if any does."""
        beside = self.part.pipeline.stage.beside if self.part.pipeline is not None else None
        runner = beside if isinstance(beside, TeacherBeside) else self.distilling
        return None if runner is None or runner.teacher is None else runner.teacher.model

    @property
    def model(self) -> PreTrainedModel:
        """This rank's transformers model."""
        return self.part.model


_FEWEST_ZEROS = 1e-3
"""Share of zeros below which nothing has made a model sparse: shards of ZeRO-3 are filled up with a few, too."""

_engines: WeakSet[Any] = WeakSet()
"""Those that were built in this process and are still there."""


def _leave_last_engine() -> None:
    """Free what is left of this process's last engine, where there was one. Collective."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    leave_sequence()
    while _engines:
        _engines.pop().destroy()  # its hooks on parameters are a cycle that the garbage collector doesn't see
    # ZeRO-3 puts each engine's module there and never takes it out (runtime/zero/parameter_offload.py), and never
    # forgets what to release after which module (partitioned_param_coordinator.py, `__params_to_release`).
    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    remembered = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(remembered, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    gc.collect()  # engines are in cycles of references
    leave_groups()


def _check_zeros(run: RunConfig, linear: list[Any]) -> None:
    """Refuse to keep the zeros of a model that has none. Collective."""
    from deepspeed.accelerator import get_accelerator

    zeros, every = all_sum(zeros_among(linear).to(get_accelerator().current_device_name())).tolist()
    if zeros < _FEWEST_ZEROS * every:
        reason = f"of the {every:,.0f} weights of {run.model.path} that may be zero {zeros:,.0f} are"
        fix = "give the folder that `ds-train sparsify` has written in model.path, or leave it out"
        raise user_error("compress.keep_zeros", reason, fix, True)


def _everyones(section: OptimizerSection, device: str) -> Choice:
    """What updates parameters whose fp32 values lie on `device`: torch's optimizers where any rank has no kernels, or
    replicas would drift apart. Collective."""
    from deepspeed.accelerator import get_accelerator

    own = choose_kernel(section, device)
    without = int(all_sum(torch.tensor(int(not own.fused), device=get_accelerator().current_device_name())))
    return torchs(device, f"{without} ranks have no kernels") if own.fused and without else own


def assemble(
    run: RunConfig, plan: RunPlan, info: RankInfo, tokenizer: Any, prepared: Path, after: Layout | None = None,
    cut: Callable[[PreTrainedConfig], PreTrainedConfig] | None = None, clock: StepClock | None = None,
    left: Mapping[str, Count] | None = None,
) -> Assembly:  # fmt: skip
    """Build everything on this rank. Collective: every rank calls it with the same recipe and plan.

    What was built before it in this process can't be used any more.

    Args:
        after: layout from the cut of a run that prunes on, for what can be cut; the plan's own without it.
        cut: gives the config of a model that has been cut from the recipe's; its weights come from a checkpoint.
        clock: goes on with this one.
        left: units that stay of a model that will be cut, where the run has chosen before.

    Raises:
        UserError: whatever the model, its config or the data refuse.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if info.device == "cuda":
        # Look-alikes are compared in fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
    _leave_last_engine()
    plan = replace(plan, deepspeed_json=own_disk(run, plan.deepspeed_json))
    layout = plan.layout
    if run.model.keep_layers is not None:
        whole = run
        run = on_main_first(info, lambda: start_from_kept_layers(whole, tokenizer))
    config = load_model_config(run, tokenizer)
    data = load_data(
        run,
        folder=prepared,
        tokenizer=tokenizer,
        data_rank=layout.coordinates(info.rank).data,
        data_ranks=layout.data,
        micro_samples=plan.batch.micro_samples,
        eval_micro_samples=plan.batch.eval_micro_samples,
        first_position=position_of_first(config),
    )
    if plan.size is None and cut is None:
        # A hub model's sizes are known only now that its config is on this machine.
        make_plan(run, plan.cluster)
    prunable, taught = None, run  # as the recipe says, with the weights that it starts from
    if cut is not None:
        config = cut(config)
        run = without_weights(run, config)
    elif run.compress.prune.kinds:
        device = get_accelerator().current_device_name()
        prunable = on_main_first(info, lambda: find_prunable(run, config, after or layout, device, left))
    offloaded = run.parallel.offload_optimizer != "none"
    kernel = _everyones(run.optimizer, "cpu" if offloaded else info.device)
    mesh = Mesh(layout, info.rank)
    if layout.ranks > layout.data:
        check_layout(run, config, layout, mesh, get_accelerator().current_device_name())
    later = layout if prunable is None or after is None else after
    if later != layout and later.ranks > later.data:
        # Not first when the cut is due.
        check_layout(run, config, later, Mesh(later, info.rank), get_accelerator().current_device_name())
    if run.token_drop.kind != "none":
        check_token_dropping(run, config)
    if run.layer_drop.kind != "none":
        check_layer_dropping(run, config)
    if run.compress.quantize.bits:
        on_main_first(info, lambda: check_loads(run.compress.quantize, outline(run, config)))
    teacher = check_teacher(taught, config, tokenizer) if run.compress.distill.active else None
    if teacher is not None and not Path(teacher_path(taught)).is_dir():
        # As for the model: the sizes of a hub teacher are known only now.
        make_plan(taught, plan.cluster)
    if teacher is not None and run.compress.distill.relations > 0:
        check_relations(run, config, "model")
        check_relations(run, teacher, "compress.distill.teacher")
    for sequence in {layout.sequence, later.sequence} - {1}:
        if teacher is not None:
            check_teacher_shared(taught, teacher, sequence, info)
    part = build_part(run, config, plan, mesh)
    if cut is not None:
        keep_generation_config(taught, part.model)
    if fp32_products_are_faster(info.device, part.model.dtype):
        use_fp32_products(part.model)
    elif run.model.attention == "auto" and not run.model.compile and tiles_are_faster(info.device, part.model.dtype):
        use_tiled_attention(part.model)
    quantize = run.compress.quantize
    packing = Packing.of(quantize, part.outline) if quantize.bits else None
    rounding = Rounding(run, part.model, mesh.tensor) if quantize.bits else None
    if run.compress.keep_zeros:
        linear = linear_layers(part.model)
        _check_zeros(run, linear)
        keep_zeros(linear)
    lean = run.model.lean_activations and not run.model.activation_checkpointing and not run.model.compile
    if run.model.liger:
        use_liger(part.model, keep_products=not lean)
    if lean:
        use_lean_layers(part.model)
    distilling = None if teacher is None else distil(taught, plan, part, data, teacher)
    if info.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = run.precision.tf32
    engine, *_ = deepspeed.initialize(
        model=part.module,
        optimizer=build_optimizer(part.model, run.optimizer, kernel, part.outline),
        config=plan.deepspeed_json,
        mpu=part.mpu,
    )
    _engines.add(engine)
    fuse_passes(engine)
    guard_steps(engine, partial(gradient_norm, group=mesh.tensor))
    if run.patch.size > 1:
        embed_patches(part.model)
    if run.task.kind != "sequence-classification" and run.data.rows_have_documents:
        engine.eval()
        check_documents_apart(run, config, engine)
        engine.train()
    if run.model.compile:
        # Compiled code outlives this process, as the machine's other caches do.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path("~/.cache/ds_train/compiled").expanduser()))
        for layer in repeated_layers(part.model):
            layer.compile()
    # What building a model takes isn't what steps need.
    hand_back_memory()
    clock = clock or step_clock(info.device)
    if part.pipeline is not None:
        time_pipeline(engine, clock)
    return Assembly(engine, part, data, kernel, clock, distilling, rounding, packing, prunable)
