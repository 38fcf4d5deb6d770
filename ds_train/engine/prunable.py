"""What of a model a recipe prunes: its units, proved to go, and how many of them stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from ds_train.compress.coupling import FFN, HEADS, HIDDEN, LAYERS, Structure
from ds_train.compress.cut import Cut, heads_tie_hidden, resized, size_of
from ds_train.compress.structure import check_shapes, find_structure
from ds_train.config import RunConfig
from ds_train.config.compress import PruneSection
from ds_train.engine.latency import forward_seconds, left_for_latency
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.load import outline
from ds_train.plan.prune import Count, of_layer, problems, shared_by, units_left
from ds_train.plan.topology import Layout

_HALVINGS = 40


@dataclass(frozen=True)
class Prunable:
    """What of a model goes: its structure, proved, and how many units of each coupling of a kind stay.

    Where layers compete, each keeps a multiple of `step` feed-forward channels. `note` says what has been measured.
    """

    config: PreTrainedConfig
    structure: Structure
    left: Mapping[str, Count]
    step: int
    note: str | None = None


def find_prunable(
    run: RunConfig,
    config: PreTrainedConfig,
    after: Layout,
    device: Any = "cpu",
    left: Mapping[str, Count] | None = None,
) -> Prunable:
    """What the recipe asks to go of a model of this config.

    Args:
        after: the layout from the cut on.
        device: where a time that is asked for is measured.
        left: units that stay, where the run has chosen before.

    Raises:
        UserError: the family can't be cut so, a layer would be left empty, the ranks can't share what is left, or a
            size or a time that is asked for can't be reached.
    """
    section, note = run.compress.prune, None
    try:
        sizes = {kind: size_of(config, kind) for kind in section.kinds}
        if left is None and not section.targets:
            left = _left(section, config, sizes)
            _check(section, sizes, left, after)
        if section.budget != "uniform":
            _check_says_each(section, config)
        structure = find_structure(run, config, section.kinds)
        if left is None:
            scaled = partial(_scaled, section, config, sizes, shared_by(after))
            if section.parameters is not None:
                left = _left_for(run, config, structure, scaled)
            else:
                left, note = _left_in_time(run, config, scaled, device)
        _check(section, sizes, left, after)
        for cut in _cuts(structure, left):
            check_shapes(run, config, cut)
    except ValueError as error:
        raise _refusal(section, config, first_line(error)) from error
    return Prunable(config, structure, left, math.lcm(section.multiple, shared_by(after)[FFN]), note)


def _cuts(structure: Structure, left: Mapping[str, Count]) -> tuple[Cut, Cut]:
    """A cut of the last units of everything, and one of the first; which ones really go isn't known yet."""
    last: dict[str, dict[int, range]] = {}
    first: dict[str, dict[int, range]] = {}
    for coupling in structure.couplings:
        count = of_layer(left[coupling.kind], coupling.number)
        last.setdefault(coupling.kind, {})[coupling.number] = range(count, coupling.units)
        first.setdefault(coupling.kind, {})[coupling.number] = range(coupling.units - count)
    return Cut(structure, last), Cut(structure, first)


def _widths(left: Mapping[str, Count]) -> dict[str, Count]:
    return {kind: count for kind, count in left.items() if kind != LAYERS}


def _check(section: PruneSection, sizes: Mapping[str, int], left: Mapping[str, Count], after: Layout) -> None:
    found = list(problems(section, sizes, left, after))
    if found:
        raise UserError(found)


def _check_says_each(section: PruneSection, config: PreTrainedConfig) -> None:
    try:
        resized(config, {FFN: range(1, config.num_hidden_layers + 1)})
    except ValueError as error:
        raise user_error("compress.prune.budget", first_line(error), "set it to uniform", section.budget) from error


def _left(
    section: PruneSection, config: PreTrainedConfig, sizes: Mapping[str, int], scale: float | None = None,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Count]:  # fmt: skip
    """`units_left`, with the next larger numbers of heads and hidden size that the family's config takes.

    All of a kind stay only if shares are scaled; otherwise the config is left to say why it takes no fewer.
    """
    more_than_all = 0 if scale is None else 1
    scale, ranks = 1.0 if scale is None else scale, ranks or {}
    left = units_left(section, sizes, heads_tie_hidden(config), scale, ranks, config.num_hidden_layers)
    known = {kind: of_layer(left[kind], 0) for kind in (HEADS, HIDDEN) if kind in left}
    choices: dict[str, list[int | None]] = {kind: [known.get(kind)] for kind in (HEADS, HIDDEN)}
    if not (heads_tie_hidden(config) and HEADS in left and HIDDEN in left):
        # Its hidden size may have to be a multiple of the number of heads.
        choices |= {
            kind: [*range(least, sizes[kind] + more_than_all, ranks.get(kind, 1))] for kind, least in known.items()
        }
    for more, wider in itertools.product(choices[HEADS], choices[HIDDEN]):
        tried = left | {kind: count for kind, count in ((HEADS, more), (HIDDEN, wider)) if count is not None}
        try:
            resized(config, _widths(tried))
        except ValueError:
            continue
        return tried
    return left


def _scaled(
    section: PruneSection, config: PreTrainedConfig, sizes: Mapping[str, int], ranks: Mapping[str, int], part: float
) -> dict[str, Count]:
    """Units that stay at a part, from 0 to 1, of the way to where none would."""
    largest = max(section.share(kind) for kind in section.kinds if kind != LAYERS)
    return _left(section, config, sizes, part * (1.0 - 1e-6) / largest, ranks)


def _left_for(
    run: RunConfig, config: PreTrainedConfig, structure: Structure, left_at: Callable[[float], dict[str, Count]]
) -> dict[str, Count]:
    """Units that stay so that the model has at most as many parameters as the recipe says."""
    target = run.compress.prune.parameters
    assert target is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in outline(run, config).named_parameters()}

    def parameters(part: float) -> int:
        return _cuts(structure, left_at(part))[0].parameters(shapes)

    key, whole = "compress.prune.parameters", sum(map(math.prod, shapes.values()))
    if whole <= target:
        raise user_error(key, f"the model as it is has {whole:,}", "ask for fewer, or prune nothing", target)
    low, high = 0.0, 1.0
    if parameters(high) > target:
        reason = f"with all but the last of these gone it would have {parameters(high):,} of {whole:,}"
        raise user_error(key, reason, "ask for more, or let more kinds of units go", target)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(middle) <= target else (middle, high)
    return left_at(high)


def _left_in_time(
    run: RunConfig, config: PreTrainedConfig, left_at: Callable[[float], dict[str, Count]], device: Any
) -> tuple[Mapping[str, Count], str]:
    """Units that stay so that a forward pass takes as long as the recipe says; and what has been measured."""

    def seconds(left: Mapping[str, Count]) -> float:
        layers = range(of_layer(left[LAYERS], 0)) if LAYERS in left else None
        return forward_seconds(run, resized(config, _widths(left), layers), device)

    return left_for_latency(run.compress.prune, forward_seconds(run, config, device), left_at, seconds)


def _refusal(section: PruneSection, config: PreTrainedConfig, reason: str) -> UserError:
    """The refusal of what the recipe asks for by a model."""
    kinds = section.kinds
    others = [kind for kind in ("ffn", "layers") if kind not in kinds]
    fix = f"prune {' or '.join(others)}" if others else "prune one kind of unit"
    named = next((kind for kind in kinds if f"its {kind}" in reason), kinds[0])
    value = getattr(section, named)
    return user_error(f"compress.prune.{named}", f"{config.model_type} can't lose these: {reason}", fix, value)
