"""`schedule`: how long the run is, and the learning rate along it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ds_train.config.base import Section

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class ScheduleSection(Section):
    """The run's length in steps, tokens or epochs, and the learning-rate curve over its tokens.

    Three parts follow one another: warm-up, the curve of `kind`, and a cool-down if `cooldown_fraction` asks for one.
    """

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Exactly one of steps, tokens and epochs is given."""

    tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on; rounded up to whole steps."""

    epochs: float | None = Field(default=None, gt=0.0)
    """Passes over the training samples; rounded up to whole steps."""

    kind: Literal[
        "constant", "linear", "cosine", "cosine-restarts", "wsd", "inverse-sqrt", "polynomial", "one-cycle", "step"
    ] = "cosine"
    """`wsd` is warm-up, stable, decay (arXiv 2404.06395); `cosine-restarts` is SGDR (arXiv 1608.03983); `inverse-sqrt`
    falls as 1 / sqrt(tokens) from the end of warm-up (arXiv 1706.03762); `one-cycle` rises and falls by cosines (arXiv
    1708.07120; give it a long warm-up, 0.3 say); `step` falls at `milestones`."""

    warmup_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of the run in which the learning rate rises to its peak: linearly, `one-cycle` by a cosine."""

    initial_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate at the start of warm-up, as a share of the peak."""

    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """`wsd`: share of the run, before any cool-down, in which the learning rate falls."""

    final_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the curve's end, as a share of the peak. `constant`, `inverse-sqrt` and `step` have none."""

    power: float = Field(default=2.0, gt=0.0)
    """`polynomial`: what is left of the fall is (1 - progress) to this power."""

    cycles: int = Field(default=1, ge=1)
    """`cosine-restarts`: number of cycles."""

    cycle_growth: float = Field(default=1.0, gt=0.0)
    """`cosine-restarts`: length of a cycle over that of the one before."""

    cycle_peak: float = Field(default=1.0, gt=0.0, le=1.0)
    """`cosine-restarts`: peak of a cycle over that of the one before."""

    milestones: tuple[Share, ...] = (0.5, 0.75)
    """`step`: shares of the run at which the learning rate falls, in rising order."""

    step_factor: float = Field(default=0.1, gt=0.0, le=1.0)
    """`step`: what the learning rate is multiplied by at each milestone."""

    cooldown_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the run, at its end, in which the learning rate falls linearly from where the curve has ended."""

    cooldown_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate at the end of the cool-down, as a share of the peak."""

    @field_validator("milestones")
    @classmethod
    def _rising(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("milestones are shares of the run in rising order")
        return milestones

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleSection:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and epochs says how long the run is; given: {', '.join(given) or 'none'}"
            )
        return self
