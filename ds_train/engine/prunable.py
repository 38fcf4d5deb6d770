"""What of a model a recipe prunes: its units, proved to go, and how many of them stay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ds_train.compress.coupling import HEADS, HIDDEN, LAYERS, Structure
from ds_train.compress.cut import Cut, heads_tie_hidden, resized, size_of
from ds_train.compress.structure import find_structure
from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.load import outline
from ds_train.plan.prune import problems, units_left
from ds_train.plan.topology import Layout

_HALVINGS = 40


@dataclass(frozen=True)
class Prunable:
    """What of a model goes: its structure, proved, and how many units of each coupling of a kind stay."""

    config: PreTrainedConfig
    structure: Structure
    left: dict[str, int]


def find_prunable(run: RunConfig, config: PreTrainedConfig, after: Layout) -> Prunable:
    """What the recipe asks to go of a model of this config. `after` is the layout from the cut on.

    Raises:
        UserError: the family can't be cut so, a layer would be left empty, or the ranks can't share what is left.
    """
    section = run.compress.prune
    try:
        sizes = {kind: size_of(config, kind) for kind in section.kinds}
        left = _left(section, config, sizes)
        _check(section, sizes, left, after)
        structure = find_structure(run, config, section.kinds)
        if section.parameters is not None:
            left = _left_for(run, config, structure, sizes)
            _check(section, sizes, left, after)
        resized(config, _widths(left))
    except ValueError as error:
        raise _refusal(section, config, first_line(error)) from error
    return Prunable(config, structure, left)


def _widths(left: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in left.items() if kind != LAYERS}


def _check(section: PruneSection, sizes: Mapping[str, int], left: Mapping[str, int], after: Layout) -> None:
    found = list(problems(section, sizes, left, after))
    if found:
        raise UserError(found)


def _left(
    section: PruneSection, config: PreTrainedConfig, sizes: Mapping[str, int], scale: float | None = None
) -> dict[str, int]:
    """`units_left`, with the next larger numbers of heads and hidden size that the family's config takes.

    All of a kind stay only if shares are scaled; otherwise the config is left to say why it takes no fewer.
    """
    more_than_all = 0 if scale is None else 1
    scale = 1.0 if scale is None else scale
    left = units_left(section, sizes, heads_tie_hidden(config), scale)
    choices: dict[str, list[int | None]] = {kind: [left.get(kind)] for kind in (HEADS, HIDDEN)}
    if not (heads_tie_hidden(config) and HEADS in left and HIDDEN in left):
        # Its hidden size may have to be a multiple of the number of heads.
        choices |= {kind: [*range(left[kind], sizes[kind] + more_than_all)] for kind in choices if kind in left}
    for more, wider in itertools.product(choices[HEADS], choices[HIDDEN]):
        tried = left | {kind: count for kind, count in ((HEADS, more), (HIDDEN, wider)) if count is not None}
        try:
            resized(config, _widths(tried))
        except ValueError:
            continue
        return tried
    return left


def _left_for(
    run: RunConfig, config: PreTrainedConfig, structure: Structure, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Units that stay so that the model has at most as many parameters as the recipe says: the shares are scaled."""
    section = run.compress.prune
    assert section.parameters is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in outline(run, config).named_parameters()}

    def parameters(scale: float) -> int:
        left = _left(section, config, sizes, scale)
        removed: dict[str, dict[int, range]] = {}
        for coupling in structure.couplings:
            removed.setdefault(coupling.kind, {})[coupling.number] = range(left[coupling.kind], coupling.units)
        return Cut(structure, removed).parameters(shapes)

    largest = max(getattr(section, kind) for kind in section.kinds if kind != LAYERS)
    low, high = 0.0, (1.0 - 1e-6) / largest
    if parameters(high) > section.parameters:
        raise ValueError(f"with all but the last of these gone it would have {parameters(high):,} parameters")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(middle) <= section.parameters else (middle, high)
    return _left(section, config, sizes, high)


def _refusal(section: PruneSection, config: PreTrainedConfig, reason: str) -> UserError:
    """The refusal of what the recipe asks for by a model."""
    kinds = section.kinds
    others = [kind for kind in ("ffn", "layers") if kind not in kinds]
    fix = f"prune {' or '.join(others)}" if others else "prune one kind of unit"
    named = next((kind for kind in kinds if f"its {kind}" in reason), kinds[0])
    value = getattr(section, named)
    return user_error(f"compress.prune.{named}", f"{config.model_type} can't lose these: {reason}", fix, value)
