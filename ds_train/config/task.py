"""`task`: what the model learns to predict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Section


class TaskSection(Section):
    """The task decides the model's head, the shape of a sample and the metrics of evaluation."""

    kind: Literal["causal-lm", "masked-lm", "sequence-classification"] = "causal-lm"
    """`causal-lm`: next token. `masked-lm`: hidden tokens. `sequence-classification`: one label per text."""

    num_labels: int = Field(default=2, ge=2)
    """Classes of `sequence-classification`; labels are the integers 0 to num_labels - 1."""

    mask_fraction: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of tokens that `masked-lm` predicts: 80 % of them masked, 10 % replaced, 10 % kept (arXiv 1810.04805)."""
