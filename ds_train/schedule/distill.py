"""The teacher's share of the loss, as a pure function of the clock."""

from __future__ import annotations

from ds_train.config.distill import DistillSection


def teacher_share(section: DistillSection, tokens: int, total_tokens: int) -> float:
    """Share of the teacher's logits in the loss of a step that starts at `tokens` consumed of `total_tokens`."""
    if section.logits == "none":
        return 0.0
    if section.alpha_end is None:
        return section.alpha
    return section.alpha + (section.alpha_end - section.alpha) * min(1.0, tokens / total_tokens)
