"""Which units go where layers compete for them. Shapes: U units of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor

from ds_train.compress.gates import lowest


def compete(worth: Mapping[int, Tensor], gone: int, step: int) -> dict[int, list[int]]:
    """Units of each layer that go, the lowest first: `gone` in all or up to `step` - 1 more, those of least worth.

    They go in blocks of `step` that are neighbours by their worth, of which each layer keeps one at least, so that what
    stays is a multiple of `step`; a first, smaller block makes up for a number of units that isn't.

    Args:
        worth: (U,) fp64 of each layer, comparable between layers.
    """
    blocks: list[tuple[float, int, list[int]]] = []
    for layer, values in worth.items():
        order = lowest(values, len(values))
        edges = [0, *range(len(order) % step or step, len(order) - step + 1, step)]
        for first, stop in itertools.pairwise(edges):
            block = order[first:stop]
            blocks.append((float(values[block].mean()), layer, block))
    removed: dict[int, list[int]] = {layer: [] for layer in worth}
    taken = 0
    # Sorting keeps blocks of one layer in their order: each is worth no less than the one before.
    for _, layer, block in sorted(blocks, key=lambda entry: entry[:2]):
        if taken >= gone:
            break
        removed[layer] += block
        taken += len(block)
    return removed


def relative(worth: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Each layer's worth over its L2 norm, by which layers are compared (arXiv 1611.06440)."""
    return {layer: values / values.norm().clamp_min(1e-300) for layer, values in worth.items()}
