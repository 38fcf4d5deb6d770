"""A recipe's teacher, put beside the labels of this rank's part of the model."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig

from ds_train.compress.distill import Distilling, add_projections
from ds_train.compress.teacher import Teacher, paired_layers
from ds_train.compress.teacher_cache import cached_teacher
from ds_train.config import RunConfig
from ds_train.data.build import DataBundle
from ds_train.engine.ranks import RankInfo
from ds_train.parallel.build import Part
from ds_train.parallel.check import check_layout
from ds_train.parallel.mesh import Mesh
from ds_train.plan.make import RunPlan
from ds_train.plan.topology import Layout


def check_teacher_shared(run: RunConfig, theirs: PreTrainedConfig, sequence: int, info: RankInfo) -> None:
    """Ask a look-alike of the teacher whether its tokens can be shared by so many ranks, as the model's. Collective.

    Raises:
        UserError: they can't.
    """
    plain = run.model_copy(update={"model": run.model.model_copy(update={"attention": "auto"})})
    shared = Layout(1, info.ranks // sequence, sequence, 1)
    check_layout(plain, theirs, shared, Mesh(shared, info.rank), get_accelerator().current_device_name())


def distil(run: RunConfig, plan: RunPlan, part: Part, data: DataBundle, theirs: PreTrainedConfig) -> Distilling | None:
    """Put the teacher, of config `theirs`, beside the labels. Collective where its logits are kept on disk."""
    section, task = run.compress.distill, part.own_loss
    device = get_accelerator().current_device_name()
    if section.cache_top > 0:
        classifies = run.task.kind == "sequence-classification"
        classes = int(theirs.num_labels or 2) if classifies else theirs.get_text_config().vocab_size
        cache = cached_teacher(run, data.train, data.manifest, device, plan.batch.eval_micro_samples, classes)
        distilling = None if task is None else Distilling(section, cache)
    else:
        if part.pipeline is not None:
            part.pipeline.carries_tokens = True
        distilling = None if task is None else Distilling(section, Teacher(run, device))
    if task is None or distilling is None:
        return None
    if section.hidden > 0:
        ours, text = part.model.config.get_text_config(), theirs.get_text_config()
        pairs = paired_layers(section.hidden_layers, ours.num_hidden_layers, text.num_hidden_layers)
        widths = ours.hidden_size, text.hidden_size
        add_projections(part.model, part.outline, len(pairs), widths, run.seed)
        distilling.compare_layers(part.model, pairs)
    task.objective = distilling
    return distilling
