"""A recipe's teacher, put beside the labels of this rank's part of the model."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedConfig

from ds_train.compress.compared import Comparison, HiddenStates, Relations
from ds_train.compress.distill import Distilling, TeacherBeside, add_projections
from ds_train.compress.teacher import Teacher, paired_layers
from ds_train.compress.teacher_cache import cached_teacher
from ds_train.config import RunConfig
from ds_train.data.build import DataBundle
from ds_train.engine.ranks import RankInfo
from ds_train.models.token_drop import repeated_layers
from ds_train.parallel.build import Part
from ds_train.parallel.check import check_layout
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.pipeline import is_elsewhere
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
    """Put the teacher, of config `theirs`, beside the labels, and beside what stages before a pipeline's last hand on.

    Collective where its logits are kept on disk.

    Raises:
        UserError: layers can't be compared.
    """
    section, task = run.compress.distill, part.own_loss
    device = get_accelerator().current_device_name()
    if section.cache_top > 0:
        classifies = run.task.kind == "sequence-classification"
        classes = int(theirs.num_labels or 2) if classifies else theirs.get_text_config().vocab_size
        cache = cached_teacher(run, data.train, data.manifest, device, plan.batch.eval_micro_samples, classes)
        distilling = None if task is None else Distilling(section, cache)
        if task is not None:
            task.objective = distilling
        return distilling
    if part.pipeline is not None:
        part.pipeline.carries_tokens = True
    paired = _Paired(run, part, theirs)
    projections = None
    if section.hidden > 0:
        widths = part.model.config.get_text_config().hidden_size, theirs.get_text_config().hidden_size
        own = {*paired.hidden}
        projections = add_projections(part.model, part.outline, paired.hidden_count, widths, run.seed, own)
    group = None
    if part.pipeline is not None and section.placement != "memory":
        group = part.mesh.group("data", "sequence", "tensor")
    if task is None and not paired.any_here:
        return None
    teacher = Teacher(run, device, group, None if task is not None else paired.deepest + 1)
    comparisons = paired.comparisons(teacher, projections)
    if task is None:
        assert part.pipeline is not None
        part.pipeline.stage.beside = TeacherBeside(teacher, comparisons)
        return None
    distilling = Distilling(section, teacher, comparisons)
    task.objective = distilling
    return distilling


class _Paired:
    """Layers of this rank's part of the model with the teacher's that they are compared with."""

    def __init__(self, run: RunConfig, part: Part, theirs: PreTrainedConfig) -> None:
        self._run, self._part, self._theirs = run, part, theirs
        section = run.compress.distill
        ours, text = part.model.config.get_text_config(), theirs.get_text_config()
        counts = ours.num_hidden_layers, text.num_hidden_layers
        hidden = paired_layers(section.hidden_layers, *counts)
        last = [(counts[0] - 1, counts[1] - 1)]
        related = paired_layers(section.relation_layers or last, *counts, "relation_layers")
        self.hidden_count, self._related_count = len(hidden), len(related)
        self.hidden = self._here(hidden) if section.hidden > 0 else {}
        """Those whose outputs are compared, by number; `hidden_count` on all ranks."""
        self._related = self._here(related) if section.relations > 0 else {}

    @property
    def any_here(self) -> bool:
        """Whether this rank has any."""
        return bool(self.hidden or self._related)

    @property
    def deepest(self) -> int:
        """The last of the teacher's layers that is looked at."""
        return max(other for _, other in (*self.hidden.values(), *self._related.values()))

    def comparisons(self, teacher: Teacher, projections: nn.ModuleDict | None) -> list[Comparison]:
        """The losses, which watch both models from now on."""
        section, part = self._run.compress.distill, self._part
        found: list[Comparison] = []
        if self.hidden:
            assert projections is not None
            weight, matrices = section.hidden / self.hidden_count, dict(projections.items())
            found.append(HiddenStates(part.model, teacher, self.hidden, weight, matrices, part.sequence))
        if self._related:
            heads = section.relation_heads or self._theirs.get_text_config().num_attention_heads
            ranks = part.mesh.layout.tensor
            found.append(Relations(
                part.model, teacher, self._related, section.relations / self._related_count, section.relation_kinds,
                heads, causal=self._run.task.kind == "causal-lm", group=part.mesh.tensor if ranks > 1 else None,
            ))  # fmt: skip
        return found

    def _here(self, pairs: list[tuple[int, int]]) -> dict[int, tuple[int, int]]:
        layers = repeated_layers(self._part.model)
        return {number: pair for number, pair in enumerate(pairs) if not is_elsewhere(layers[pair[0]])}
