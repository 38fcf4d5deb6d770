"""`RunConfig`: the whole recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.batch import BatchSection
from ds_train.config.checkpoint import CheckpointSection
from ds_train.config.compress import CompressSection
from ds_train.config.curriculum import CurriculumSection
from ds_train.config.data import DataSection
from ds_train.config.faults import FaultsSection
from ds_train.config.health import HealthSection
from ds_train.config.layer_drop import LayerDropSection
from ds_train.config.model import ModelSection
from ds_train.config.optimizer import OptimizerSection
from ds_train.config.parallel import ParallelSection
from ds_train.config.patch import PatchSection
from ds_train.config.precision import PrecisionSection
from ds_train.config.schedule import ScheduleSection
from ds_train.config.task import TaskSection
from ds_train.config.token_drop import TokenDropSection
from ds_train.config.track import TrackSection


class RunConfig(Section):
    """A recipe. Two runs of one recipe give the same losses, whatever the number of ranks."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: of its folder and of its wandb run."""

    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of the weights, of the order of samples, of masking and of dropout."""

    run_root: str = "runs"
    """Folder in which the run's folder lies; RUN is `run_root/name`."""

    model: ModelSection
    """Which model is trained."""

    task: TaskSection = TaskSection()
    """What it learns to predict."""

    data: DataSection = DataSection()
    """Text, tokens, samples."""

    batch: BatchSection = BatchSection()
    """Samples per step and per forward pass."""

    parallel: ParallelSection = ParallelSection()
    """How states and work are spread over ranks."""

    precision: PrecisionSection = PrecisionSection()
    """Number formats."""

    optimizer: OptimizerSection = OptimizerSection()
    """Update rule."""

    schedule: ScheduleSection
    """Length of the run and learning rate along it."""

    curriculum: CurriculumSection = CurriculumSection()
    """Samples that grow along the run."""

    token_drop: TokenDropSection = TokenDropSection()
    """Tokens that middle layers leave out."""

    layer_drop: LayerDropSection = LayerDropSection()
    """Layers that steps leave out."""

    patch: PatchSection = PatchSection()
    """Several tokens a position at first."""

    checkpoint: CheckpointSection = CheckpointSection()
    """Saving, resuming, exporting."""

    faults: FaultsSection = FaultsSection()
    """Stopping in order, and what a run that hangs does."""

    health: HealthSection = HealthSection()
    """Steps that aren't numbers, losses that leap."""

    track: TrackSection = TrackSection()
    """What is measured and shown."""

    compress: CompressSection = CompressSection()
    """Making the model smaller."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys for what the recipe doesn't cover. Keys that the plan writes are refused, with the recipe's
    own, and so are those that DeepSpeed would ignore."""
