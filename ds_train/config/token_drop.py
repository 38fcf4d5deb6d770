"""`token_drop`: middle layers that work on a random part of the tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.schedule import Share


class TokenDropSection(Section):
    """Random layerwise token dropping (random-LTD, arXiv 2211.11586). Evaluation always uses all tokens."""

    kind: Literal["none", "random-ltd"] = "none"
    """`random-ltd`: each middle layer takes its own random tokens of a sample; the others pass it by."""

    start_keep: Share = 0.5
    """Share of a sample's tokens that a middle layer takes at the start of the run; it grows in a line to all."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Share of the run after which no token is dropped."""

    multiple: int = Field(default=16, ge=1)
    """Tokens that a layer takes are rounded up to a multiple of this."""

    whole_layers: int = Field(default=1, ge=0)
    """First and last layers that take all tokens, at each end."""
