"""`layer_drop`: steps that leave out layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.schedule import Share


class LayerDropSection(Section):
    """Progressive layer dropping (arXiv 2010.13369): a step leaves out layers at random, later steps and deeper layers
    more often. What a layer that runs adds is divided by its probability, so evaluation, which has all layers, sees
    what was trained on average."""

    kind: Literal["none", "progressive"] = "none"
    """`progressive`: layer l of L runs with probability 1 - l / L x (1 - theta), for all samples of a step; `theta`
    falls along the run's tokens as (1 - keep) x exp(-rate x share of the run) + keep."""

    keep: Share = 0.5
    """Probability of the last layer that the run comes near to."""

    rate: float = Field(default=100.0, gt=0.0)
    """How fast; at 100, the paper's, after a tenth of the run."""
