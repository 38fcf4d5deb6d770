"""`batch`: how many samples make one optimizer step, and how many go through a device at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Section

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]


def settled(value: int | str) -> int:
    """A number that may have been `auto`, after the planner has chosen it.

    Raises:
        ValueError: it still is `auto`.
    """
    if isinstance(value, str):
        raise ValueError("a field that says `auto` was read before the planner had chosen it")
    return value


class BatchSection(Section):
    """The global batch is what the optimizer sees: it is the same at every number of ranks."""

    global_samples: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all ranks. Must be a multiple of micro_samples x data ranks."""

    micro_samples: Positive | Auto = "auto"
    """Samples per forward pass of one rank. `auto` takes the largest divisor of the rank's share up to 8, in a
    pipeline one that leaves at least four micro-batches a stage; where a field of `parallel` or
    model.activation_checkpointing says `auto`, the planner chooses it with them."""

    eval_micro_samples: Positive | Auto = "auto"
    """Samples per forward pass in evaluation. `auto` takes micro_samples."""
