"""Tokens that a middle layer takes of each sample, as a pure function of the clock."""

from __future__ import annotations

import math

from ds_train.config.token_drop import TokenDropSection


def kept_tokens(section: TokenDropSection, length: int, tokens: int, total_tokens: int) -> int:
    """Tokens, of `length`, that a middle layer takes in a step that starts at `tokens` consumed of `total_tokens`."""
    if section.kind == "none":
        return length
    progress = min(1.0, tokens / (section.fraction * total_tokens))
    share = section.start_keep + (1.0 - section.start_keep) * progress
    return min(length, math.ceil(share * length / section.multiple - 1e-9) * section.multiple)
