"""How many units of each kind a recipe leaves, and whether the ranks can share those: arithmetic of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ds_train.config.compress import PruneSection
from ds_train.errors import Problem
from ds_train.plan.model_size import ModelSize
from ds_train.plan.topology import Layout

ROUNDED = ("ffn", "hidden")

Count = int | tuple[int, ...]
"""Units that stay: in each layer, or in the model; or of each layer its own number."""


def shared_by(after: Layout) -> dict[str, int]:
    """Ranks that share the units of a layer or of the model, by kind."""
    return {"heads": after.tensor * after.sequence, "ffn": after.tensor, "hidden": after.tensor}


def sizes_of(size: ModelSize, section: PruneSection) -> dict[str, int]:
    """Units of each kind that the recipe prunes and whose number is known: key/value heads for `heads`."""
    known = {
        "heads": size.num_key_value_heads or size.num_attention_heads, "ffn": size.intermediate_size,
        "experts": size.num_experts, "hidden": size.hidden_size, "layers": size.num_hidden_layers,
    }  # fmt: skip
    return {kind: count for kind, count in known.items() if count and kind in section.kinds}


def units_left(
    section: PruneSection, sizes: Mapping[str, int], tied: bool, scale: float = 1.0,
    ranks: Mapping[str, int] | None = None, layers: int = 0,
) -> dict[str, Count]:  # fmt: skip
    """Units that stay of each kind that the recipe prunes and whose size is known.

    Args:
        sizes: units of each kind, key/value heads for `heads`; of a layer, or of the model (`hidden`, `layers`).
        tied: the size of a head is the hidden size over the number of heads, and stays.
        scale: what shares are multiplied by.
        ranks: as many can share what stays, by kind.
        layers: layers of the model, each of which may have a share of its own.
    """

    def of(kind: str, share: float) -> int:
        exact = (1.0 - scale * share) * sizes[kind] - 1e-9
        step = math.lcm(section.multiple if kind in ROUNDED else 1, (ranks or {}).get(kind, 1))
        return min(sizes[kind], math.ceil(exact / step) * step)

    left: dict[str, Count] = {}
    for kind in section.kinds:
        if kind not in sizes:
            continue
        if kind == "layers":
            left[kind] = sizes[kind] - section.layers
        elif kind == "ffn" and section.budget == "per-layer":
            left[kind] = tuple(of(kind, section.share_in(layer)) for layer in range(layers))
        else:
            left[kind] = of(kind, section.share(kind))
    if tied and "heads" in left and "hidden" in left:
        left["hidden"] = of_layer(left["heads"], 0) * sizes["hidden"] // sizes["heads"]
    return left


def of_layer(count: Count, layer: int) -> int:
    """Units that stay in one layer."""
    return count if isinstance(count, int) else count[layer]


def problems(
    section: PruneSection, sizes: Mapping[str, int], left: Mapping[str, Count], after: Layout
) -> Iterator[Problem]:
    """What is wrong with the sizes that stay, on the layout from the cut on: of each kind the first layer's problem.

    Where a size or a time is asked for, a kind may stay whole.
    """
    for kind, counts in left.items():
        each = [counts] if isinstance(counts, int) else list(dict.fromkeys(counts))
        found = (_problem(section, kind, sizes[kind], count, after) for count in each)
        problem = next((problem for problem in found if problem is not None), None)
        if problem is not None:
            yield problem
        elif min(each) == sizes[kind] and not section.targets:
            step = f" multiples of {section.multiple}" if kind in ROUNDED and section.multiple > 1 else ""
            reason = f"all of the {sizes[kind]} {kind} would stay, counted in{step or ' whole ones'}"
            yield Problem(f"compress.prune.{kind}", reason, "raise it", getattr(section, kind))


def _problem(section: PruneSection, kind: str, units: int, count: int, after: Layout) -> Problem | None:
    key, value, ranks = f"compress.prune.{kind}", getattr(section, kind), shared_by(after).get(kind, 1)
    if count < 1:
        return Problem(key, f"none of the {units} {kind} would be left", f"leave at least one of {units}", value)
    if count % ranks:
        nearest = min(range(ranks, units, ranks), key=lambda other: abs(other - count), default=None)
        fix = "lower compress.prune.parallel.tensor" if nearest is None else f"{1 - nearest / units:g} leaves {nearest}"
        return Problem(key, f"the {count} {kind} of {units} that stay can't be shared by {ranks} ranks", fix, value)
    if kind == "layers" and count < after.pipe:
        reason = f"the {count} layers that stay are fewer than the {after.pipe} pipeline stages"
        return Problem(key, reason, f"prune at most {max(0, units - after.pipe)}", value)
    return None
