"""`health`: what a run does about steps that aren't numbers and losses that leap."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Section


class HealthSection(Section):
    """A step with a non-finite loss or gradient never reaches the weights. What is decided here is the same on all
    ranks and a line of kind `health` in RUN/metrics.jsonl."""

    max_nonfinite_steps: int = Field(default=10, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run ends and names the first module in which
    one appeared. Overflows of fp16 that a smaller loss scale may cure aren't counted."""

    on_spike: Literal["ignore", "note", "roll-back"] = "note"
    """What to do when the loss leaps. `roll-back` goes back to the newest checkpoint before it, leaves out the samples
    from there to here (later epochs have them again), and goes on."""

    spike_threshold: float = Field(default=8.0, gt=0.0)
    """A loss is an outlier so many deviations above the median of the last ones; the deviation is 1.4826 x their median
    absolute deviation from their trend, and at least 1 % of the median."""

    spike_window: int = Field(default=50, ge=5)
    """Losses that a new one is compared with; with fewer, and for so many steps after samples change their length,
    nothing is an outlier."""

    spike_steps: int = Field(default=1, ge=1)
    """Outliers in a row that make a spike."""

    max_roll_backs: int = Field(default=3, ge=0)
    """Roll-backs of one run; later spikes are only noted."""
