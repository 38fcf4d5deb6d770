"""How many units of each kind a recipe leaves, and whether the ranks can share those: arithmetic of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ds_train.config.compress import PruneSection
from ds_train.errors import Problem
from ds_train.plan.topology import Layout

ROUNDED = ("ffn", "hidden")


def shared_by(after: Layout) -> dict[str, int]:
    """Ranks that share the units of a layer or of the model, by kind."""
    return {"heads": after.tensor * after.sequence, "ffn": after.tensor, "hidden": after.tensor}


def units_left(
    section: PruneSection, sizes: Mapping[str, int], tied: bool, scale: float = 1.0,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Units that stay of each kind that the recipe prunes and whose size is known.

    Args:
        sizes: units of each kind, key/value heads for `heads`; of a layer, or of the model (`hidden`, `layers`).
        tied: the size of a head is the hidden size over the number of heads, and stays.
        scale: what shares are multiplied by.
        ranks: as many can share what stays, by kind.
    """
    left: dict[str, int] = {}
    for kind in section.kinds:
        if kind not in sizes:
            continue
        if kind == "layers":
            left[kind] = sizes[kind] - section.layers
            continue
        exact = (1.0 - scale * getattr(section, kind)) * sizes[kind] - 1e-9
        step = math.lcm(section.multiple if kind in ROUNDED else 1, (ranks or {}).get(kind, 1))
        left[kind] = min(sizes[kind], math.ceil(exact / step) * step)
    if tied and "heads" in left and "hidden" in left:
        left["hidden"] = left["heads"] * sizes["hidden"] // sizes["heads"]
    return left


def problems(
    section: PruneSection, sizes: Mapping[str, int], left: Mapping[str, int], after: Layout
) -> Iterator[Problem]:
    """What is wrong with the sizes that stay, on the layout from the cut on.

    Where a size or a time is asked for, a kind may stay whole.
    """
    shared = shared_by(after)
    for kind, count in left.items():
        key, value, units = f"compress.prune.{kind}", getattr(section, kind), sizes[kind]
        ranks = shared.get(kind, 1)
        if count < 1:
            yield Problem(key, f"none of the {units} {kind} would be left", f"leave at least one of {units}", value)
        elif count == units and not section.targets:
            step = f" multiples of {section.multiple}" if kind in ROUNDED and section.multiple > 1 else ""
            yield Problem(
                key, f"all of the {units} {kind} would stay, counted in{step or ' whole ones'}", "raise it", value
            )
        elif count % ranks:
            nearest = min(range(ranks, units, ranks), key=lambda other: abs(other - count), default=None)
            fix = (
                "lower compress.prune.parallel.tensor"
                if nearest is None
                else f"{1 - nearest / units:g} leaves {nearest}"
            )
            yield Problem(key, f"the {count} {kind} of {units} that stay can't be shared by {ranks} ranks", fix, value)
        elif kind == "layers" and count < after.pipe:
            reason = f"the {count} layers that stay are fewer than the {after.pipe} pipeline stages"
            yield Problem(key, reason, f"prune at most {max(0, units - after.pipe)}", value)
