"""`patch`: training on several tokens a position at first."""

from __future__ import annotations

from pydantic import Field

from ds_train.config.base import Section
from ds_train.config.schedule import Share


class PatchSection(Section):
    """Patch-level training (arXiv 2407.12665): a position holds the mean embedding of `size` neighbouring tokens and
    predicts all tokens of the next patch; the rest of the run is token by token. Evaluation always is."""

    size: int = Field(default=1, ge=1)
    """Tokens of a patch; 1 trains on single tokens throughout. Divides `data.sequence_length`."""

    fraction: Share = 0.66
    """Share of the run's tokens that is trained on in patches."""
