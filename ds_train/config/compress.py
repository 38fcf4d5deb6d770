"""`compress`: making the model smaller while it trains."""

from __future__ import annotations

from ds_train.config.base import Section


class CompressSection(Section):
    """No technique is available in this version, so any key here is refused."""
