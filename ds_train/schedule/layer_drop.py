"""Layers that a step leaves out, as a pure function of seed and clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_train.config.layer_drop import LayerDropSection
from ds_train.schedule.seeds import fold_seed


@dataclass(frozen=True)
class LayerDraw:
    """Layers of one step: those that are `dropped`, and the probability that each of them all had to stay."""

    dropped: frozenset[int]
    kept: tuple[float, ...]


def kept_share(section: LayerDropSection, tokens: int, total_tokens: int) -> float:
    """Probability that the last layer stays in a step that starts at `tokens` consumed (theta, equation 6)."""
    if section.kind == "none":
        return 1.0
    return (1.0 - section.keep) * math.exp(-section.rate * min(1.0, tokens / total_tokens)) + section.keep


def draw_layers(section: LayerDropSection, layers: int, seed: int, tokens: int, total_tokens: int) -> LayerDraw:
    """The draw of a step that starts at `tokens` consumed of `total_tokens`; the same on every rank, and once more."""
    theta = kept_share(section, tokens, total_tokens)
    kept = tuple(1.0 - (layer + 1) / layers * (1.0 - theta) for layer in range(layers))
    return LayerDraw(frozenset(layer for layer in range(layers) if _uniform(seed, tokens, layer) >= kept[layer]), kept)


def _uniform(seed: int, tokens: int, layer: int) -> float:
    """A number from 0 to below 1 that any of the three changes altogether."""
    return (fold_seed(seed, "layer drop", tokens, layer) >> 10) / 2**53
