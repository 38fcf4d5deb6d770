"""`schedule`: how long the run is, and the learning rate along it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ds_train.config.base import Section


class ScheduleSection(Section):
    """The run's length in steps, tokens or epochs, and the learning-rate curve over it."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of steps, tokens and epochs is given."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on; rounded up to whole steps."""

    epochs: float | None = Field(default=None, gt=0.0)
    """Passes over the training samples; rounded up to whole steps."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """`wsd` is warm-up, stable, decay (arXiv 2404.06395); the others fall from the peak right after warm-up."""

    warmup_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of the run in which the learning rate rises from 0 to its peak."""

    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """`wsd`: share of the run, at its end, in which the learning rate falls."""

    final_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleSection:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and epochs says how long the run is; given: {', '.join(given) or 'none'}"
            )
        return self
