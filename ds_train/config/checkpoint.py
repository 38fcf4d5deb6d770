"""`checkpoint`: saving, resuming and exporting."""

from __future__ import annotations

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.batch import Auto


class CheckpointSection(Section):
    """Checkpoints lie in RUN/checkpoints, the export in RUN/export; RUN is `run_root/name`."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save after every this many steps. `null` saves at the end, and when the run is told to stop."""

    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; older ones are removed after a newer one is whole."""

    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that this divides are kept for good."""

    best: str | None = None
    """Score of the evaluations by which one is best: `loss`, `perplexity`, `accuracy`, or `loss_` and a name of
    `track.eval_sources` (the least loss or perplexity, the greatest accuracy). A checkpoint is saved after each that is
    better than all before, and the best one is kept for good and exported at the end."""

    patience: int | None = Field(default=None, ge=1)
    """End the run after so many evaluations in a row that aren't better by `best`. `null` never does."""

    asynchronous: bool | Auto = "auto"
    """Write while training goes on, from a copy in the host's memory. `auto`: on devices yes, but with nvme offload;
    on CPU ranks the copy would take as much memory again as the states have."""

    resume: str = "auto"
    """`auto` continues the newest whole checkpoint of the run folder, or starts anew where there is none; `never`
    starts anew and refuses a folder that has checkpoints; a path continues that checkpoint, where the run's folder has
    no later ones. The layout, the number of ranks too, may be another one than it was saved on. From another run's
    checkpoint a run goes on with what it trains, and begins a best evaluation and a wandb run of its own."""

    save_final: bool = True
    """Save after the last step."""

    export: bool = True
    """Write the trained model as a transformers folder at the end."""

    push_to: str | None = None
    """Repository of the Hugging Face hub, `owner/name`, that the export is uploaded to; made private if it isn't there.
    Needs a token (HF_TOKEN, or `hf auth login`)."""
