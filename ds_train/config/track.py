"""`track`: what is measured, how often, and where it is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_train.config.base import Section
from ds_train.config.batch import Auto

# YAML 1.1 takes a bare `off` for false.
_OFF = BeforeValidator(lambda value: "off" if value is False else value)


class TrackSection(Section):
    """RUN/metrics.jsonl is always written; the rest is a choice."""

    log_every_steps: int = Field(default=1, ge=1)
    """Write a metrics line every this many steps."""

    eval_every_steps: int | None = Field(default=None, ge=1)
    """Evaluate on held-out samples every this many steps, and at the end. `null` evaluates at the end only."""

    eval_samples: int = Field(default=256, ge=1)
    """Held-out samples per evaluation; fewer where there are fewer."""

    eval_sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """Parts of the held-out text whose loss is measured by itself too, by name: patterns of their files, such as
    `{code: "*.py", wiki: "wiki/*"}`; a document counts for the first one that fits. Each takes the first
    `eval_samples` samples that have text of it, so it costs as much as an evaluation of the whole."""

    eval_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """`causal-lm`: texts that the model continues by its `sample_tokens` likeliest tokens at every evaluation, in lines
    of kind `sample` of metrics.jsonl."""

    noise_scale_every_steps: int | None = Field(default=None, ge=1)
    """Measure the gradient noise scale (arXiv 1812.06162) every this many steps, for a norm of every micro-batch's
    gradient; the end of the run names the batch size that it speaks for. `null` never does."""

    progress: bool | Auto = "auto"
    """Progress bar on rank 0. `auto`: on a terminal; otherwise a line every so often."""

    wandb: Annotated[Literal["off", "offline", "online"], _OFF] = "off"
    """Weights & Biases: `offline` writes a run that `wandb sync` uploads later. A recipe that says `off` keeps the
    project and the others for runs that don't."""

    wandb_project: str = "ds_train"
    """Project of the wandb run."""

    wandb_entity: str | None = None
    """Team or user of the wandb run. `null` takes the account's default."""

    tags: tuple[str, ...] = ()
    """Tags of the wandb run; reports show them too."""

    wandb_artifacts: Annotated[Literal["off", "export", "all"], _OFF] = "off"
    """What goes to wandb as artifacts: the exported model at the end, or every checkpoint too. Rank 0 reads the files
    once more for it, and wandb uploads them in the background."""

    also: tuple[Literal["tensorboard", "csv"], ...] = ()
    """More places for the same records: RUN/tensorboard (needs the package of that name), RUN/csv with a table for each
    kind of record."""

    profile_steps: tuple[int, int] | None = None
    """Record steps i to j, both included and counted from 1, with torch's profiler, into RUN/profile. `ds-train
    profile` sets it and ends the run after them."""

    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that are recorded."""

    peak_tflops: Annotated[float, Field(gt=0.0)] | Auto = "auto"
    """Peak TFLOP/s of one rank, the denominator of MFU. `auto` measures a matrix product in the run's dtype."""

    sample_prompt: str | None = None
    """`causal-lm`: text that the exported model continues at the end of the run. `null` generates nothing."""

    sample_tokens: int = Field(default=64, ge=1)
    """Tokens of that sample, and of those of `eval_prompts`."""
