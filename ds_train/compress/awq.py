"""AWQ (arXiv 2306.00978): inputs that matter are made larger before weights are rounded, and smaller where they come
from.

An input can be made smaller in the norm or the linear layer before, if nothing else reads it and what lies between is
linear in it. That isn't taken from names: every candidate is tried on the layer itself. What comes out is an ordinary
model (torchao's prototype keeps the factors beside the weights, llm-compressor folds by a table of names).
Shapes: O outputs, I inputs of a matrix, R outputs of what gives the inputs, G groups that share a scale, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_train.compress.calibration import Call, LayerRun, hooked
from ds_train.compress.rounding import Grid
from ds_train.compress.teacher import first_tensor

STEPS = 20
"""Exponents that are tried: 0, 1/20, ... 19/20, as in the paper's own code."""

SHRINKS = tuple(1 - 0.05 * step for step in range(11))
"""Shares of a group's largest weight that are tried for the end of its range."""

_SAME = 1e-5
"""Of the largest output: norms and softmax are computed in fp32 even where all else is fp64."""


@dataclass(frozen=True)
class Fold:
    """A group of linear layers that read the same inputs, and what gives these.

    Names are those in the layer. `rows_I` says which output of `source` an input is proportional to, -1 where no token
    has told; `offset` is what a norm adds to its weight before it multiplies by it. `source` is empty where the inputs
    can't be made smaller anywhere.
    """

    readers: tuple[str, ...]
    source: str = ""
    rows_I: Tensor | None = None
    offset: float = 0.0

    def by_input(self, scale_R: Tensor) -> Tensor:
        """The scale (I) of each input, from those of what gives them."""
        assert self.rows_I is not None
        return torch.where(self.rows_I < 0, 1.0, scale_R[self.rows_I])

    def apply(self, layer: nn.Module, scale_R: Tensor) -> None:
        """Multiply the readers' weights by the scale of their inputs, and divide what gives the inputs by it."""
        for name in self.readers:
            weight: Any = layer.get_submodule(name).weight
            weight.copy_(weight.to(scale_R.dtype) * self.by_input(scale_R))
        source: Any = layer.get_submodule(self.source)
        by_row = scale_R.view(-1, *[1] * (source.weight.dim() - 1))
        source.weight.copy_((source.weight.to(scale_R.dtype) + self.offset) / by_row - self.offset)
        if getattr(source, "bias", None) is not None:
            source.bias.copy_(source.bias.to(scale_R.dtype) / scale_R)


def round_layer(run: LayerRun, grid: Grid) -> tuple[dict[str, Tensor], int]:
    """Round the linear layers of a layer in place: ((O, G) scales by name, number of those whose inputs are scaled).

    Each group of inputs is scaled by mean|x|^a / c, whose exponent a, of `STEPS`, changes least what the smallest
    module around its readers gives; then the ends of the groups' ranges are drawn in where that changes less still.
    Everything is decided on the layer as it was, and done at the end.
    """
    inner = {id(module): name for name, module in run.layer.named_modules()}
    names = {inner[id(module)]: name for name, module in run.linear.items()}
    scales: dict[str, Tensor] = {}
    applied: list[tuple[Fold, Tensor]] = []
    for sight in _observe(run, find_folds(run.layer, [*names], run.calls[0])):
        scale_R, own = _decided(run, sight, grid)
        scales |= own
        if scale_R is not None:
            applied.append((sight.fold, scale_R))
    for fold, scale_R in applied:
        fold.apply(run.layer, scale_R)
        if fold.source in scales:
            scales[fold.source] = scales[fold.source] / scale_R[:, None]
    for name in names:
        weight: Any = run.layer.get_submodule(name).weight
        scales[name] = scales[name].to(weight.dtype)
        weight.copy_(grid.rounded(weight, scales[name]))
    return {names[name]: scale for name, scale in scales.items()}, sum(len(fold.readers) for fold, _ in applied)


# -- what may be scaled ------------------------------------------------------------------------------------------------


def find_folds(layer: nn.Module, linear: Sequence[str], call: Call) -> list[Fold]:
    """Linear layers by the inputs that they share, with what these can be divided in; in the order of their turn.

    Args:
        linear: names in the layer.
        call: what the layer is called with; a few tokens will do.
    """
    trial = _Trial(layer, linear, call)
    return [trial.fold(readers) for readers in trial.groups()]


class _Trial:
    """A copy of a layer in fp64, whose weights are changed to see what else changes."""

    def __init__(self, layer: nn.Module, linear: Sequence[str], call: Call) -> None:
        self._layer = copy.deepcopy(layer).double()
        self._draw = torch.Generator().manual_seed(0)
        self._call = _map(call, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        self._modules = {name: self._layer.get_submodule(name) for name in linear}
        leaves = [(name, module) for name, module in self._layer.named_modules() if not [*module.children()]]
        self._given: dict[str, list[Tensor]] = {name: [] for name in linear}
        self._gives: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _, args, output, name=name: self._note(name, args, output))
            for name, module in leaves
        ]
        with hooked(handles):
            self._expected = self._run()

    def groups(self) -> list[tuple[str, ...]]:
        """Linear layers that run once, by the tensor that they are given."""
        groups: dict[Any, list[str]] = {}
        for name, given in self._given.items():
            groups.setdefault(_place(given[0]) if len(given) == 1 else name, []).append(name)
        return [tuple(names) for names in groups.values()]

    def fold(self, readers: tuple[str, ...]) -> Fold:
        """What the inputs of these can be divided in, if anything."""
        if len(self._given[readers[0]]) == 1:
            for fold in self._candidates(readers):
                if self._changes_nothing(fold):
                    return fold
        return Fold(readers)

    def _candidates(self, readers: tuple[str, ...]) -> Iterator[Fold]:
        given = self._given[readers[0]][0]
        for name, output in self._gives.items():
            weight: Any = getattr(self._layer.get_submodule(name), "weight", None)
            if isinstance(weight, Tensor) and weight.shape == given.shape[-1:] and _place(output) == _place(given):
                for offset in (0.0, 1.0):
                    yield Fold(readers, name, torch.arange(given.shape[-1]), offset)
        for name in self._modules:
            rows_I = None if name in readers else self._rows(name, readers[0])
            if rows_I is not None:
                yield Fold(readers, name, rows_I)

    def _rows(self, source: str, reader: str) -> Tensor | None:
        """Which output of a linear layer each input of another is, up to a factor that doesn't depend on it."""
        outputs = len(self._weight(source))
        # All different, so that each input tells by how much it has grown where it comes from.
        order_R = torch.randperm(outputs, generator=self._draw)
        factors_R = 0.5 + 1.5 * order_R.double() / outputs
        seen: list[Tensor] = []
        handles = [
            self._modules[source].register_forward_hook(lambda _, __, output: output * factors_R),
            self._modules[reader].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        ]
        with hooked(handles):
            self._run()
        before_NI, after_NI = (tensor.flatten(0, -2) for tensor in (self._given[reader][0], seen[0]))
        squares_I = before_NI.square().sum(0)
        grown_I = ((before_NI * after_NI).sum(0) / squares_I).nan_to_num(0.5)
        rows_I = order_R.argsort()[((grown_I - 0.5) / 1.5 * outputs).round().long().clamp(0, outputs - 1)]
        if not _same(after_NI, before_NI * factors_R[rows_I]):
            return None
        # Inputs that are zero for all of the tokens belong to the outputs that are left, if all others have as many.
        rows_I[squares_I == 0] = -1
        inputs_R = rows_I[rows_I >= 0].bincount(minlength=outputs)
        return rows_I if bool(((inputs_R == 0) | (inputs_R * outputs == len(rows_I))).all()) else None

    def _changes_nothing(self, fold: Fold) -> bool:
        assert fold.rows_I is not None
        outputs = len(self._weight(fold.source))
        changed = [self._layer.get_submodule(name) for name in (fold.source, *fold.readers)]
        before = [copy.deepcopy(module.state_dict()) for module in changed]
        scale_R = torch.rand(outputs, dtype=torch.float64, generator=self._draw) * 1.5 + 0.5
        known_R = fold.rows_I[fold.rows_I >= 0].bincount(minlength=outputs) > 0
        fold.apply(self._layer, torch.where(known_R, scale_R, 1.0))
        same = _same(self._run(), self._expected)
        for module, state in zip(changed, before, strict=True):
            module.load_state_dict(state)
        return same

    def _weight(self, name: str) -> Tensor:
        weight: Any = self._layer.get_submodule(name).weight
        return weight

    def _run(self) -> Tensor:
        args, kwargs = self._call
        return first_tensor(self._layer(*args, **kwargs))

    def _note(self, name: str, args: Any, output: Any) -> None:
        if name in self._given:
            self._given[name].append(args[0])
        if isinstance(output, Tensor):
            self._gives[name] = output


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _SAME * expected.abs().max())


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    return type(value)(_map(item, change) for item in value) if type(value) in (tuple, list) else value


# -- by how much -------------------------------------------------------------------------------------------------------


@dataclass
class _Sight:
    """What was seen of a group: of its inputs the sum of products and the mean size, and what the smallest module
    around all its readers was called with and gave."""

    fold: Fold
    around: str
    products_II: Tensor
    sizes_I: Tensor
    calls: list[Call]
    outputs: list[Tensor]


def _observe(run: LayerRun, folds: Sequence[Fold]) -> list[_Sight]:
    sights = []
    counts: dict[str, int] = {}
    for fold in folds:
        inputs = _weight(run, fold.readers[0]).shape[1]
        nothing = torch.zeros(inputs, inputs), torch.zeros(inputs)
        sights.append(_Sight(fold, _around(fold.readers), *nothing, [], []))
    by_name = {sight.fold.readers[0]: sight for sight in sights}
    inner = {module: name for name, module in run.layer.named_modules()}

    def see_inputs(number: int, module: nn.Module, call: Call, output: Any) -> None:
        sight, name = by_name[inner[module]], inner[module]
        inputs_NI = run.real(number, call[0][0]).float()
        sight.products_II += inputs_NI.t() @ inputs_NI
        sight.sizes_I += inputs_NI.abs().sum(0)
        counts[name] = counts.get(name, 0) + len(inputs_NI)

    def see_around(number: int, module: nn.Module, call: Call, output: Any) -> None:
        for sight in sights:
            if len(sight.fold.readers) > 1 and sight.around == inner[module]:
                sight.calls.append(call)
                sight.outputs.append(run.real(number, first_tensor(output)))

    run.watch([run.layer.get_submodule(name) for name in by_name], see_inputs)
    run.watch([run.layer.get_submodule(name) for name in {sight.around for sight in sights}], see_around)
    for name, sight in by_name.items():
        sight.sizes_I /= max(1, counts.get(name, 0))
    return sights


def _around(names: Sequence[str]) -> str:
    """The smallest module that holds all of them; itself for one."""
    if len(names) == 1:
        return names[0]
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len({*parts}) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _decided(run: LayerRun, sight: _Sight, grid: Grid) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(scale (R) of what gives the inputs, None where they stay; (O, G) scales of the readers' scaled weights)."""
    weights = {name: _weight(run, name) for name in sight.fold.readers}
    chosen_R, scale_I = None, torch.ones_like(sight.sizes_I)
    if sight.fold.rows_I is not None:
        outputs = len(_weight(run, sight.fold.source))
        candidates = [_scale(sight, outputs, step / STEPS) for step in range(STEPS)]
        errors = []
        for scale_R in candidates:
            by_input = sight.fold.by_input(scale_R)
            errors.append(_error(run, sight, {
                name: grid.rounded(weight * by_input, grid.scales(weight * by_input)) / by_input
                for name, weight in weights.items()
            }))  # fmt: skip
        chosen_R = candidates[min(range(STEPS), key=errors.__getitem__)]
        scale_I = sight.fold.by_input(chosen_R)
    products_II = sight.products_II / torch.outer(scale_I, scale_I)
    wide = {name: grid.scales(weight * scale_I) for name, weight in weights.items()}
    narrow = {name: narrowed(weight * scale_I, products_II, grid) for name, weight in weights.items()}
    errors = [
        _error(run, sight, {
            name: grid.rounded(weight * scale_I, scales[name]) / scale_I for name, weight in weights.items()
        })
        for scales in (wide, narrow)
    ]  # fmt: skip
    return chosen_R, wide if errors[0] <= errors[1] else narrow


def _scale(sight: _Sight, outputs: int, exponent: float) -> Tensor:
    """(R) from the mean size of the inputs that come from each output, around 1; 1 where none are known to."""
    rows_I = sight.fold.rows_I
    assert rows_I is not None
    known_I = rows_I >= 0
    counts_R = rows_I[known_I].bincount(minlength=outputs)
    sums_R = torch.zeros(outputs).index_add(0, rows_I[known_I], sight.sizes_I[known_I])
    scale_R = (sums_R / counts_R.clamp(min=1)).pow(exponent).clamp(min=1e-4)
    own_R = scale_R[counts_R > 0]
    return torch.where(counts_R > 0, scale_R / (own_R.max() * own_R.min()).sqrt(), 1.0)


def narrowed(weight_OI: Tensor, products_II: Tensor, grid: Grid) -> Tensor:
    """(O, G) scales, each the share of `SHRINKS` of the one of the largest weight that changes least what the group
    alone gives for inputs of these products."""
    wide_OG = grid.scales(weight_OI)
    size = weight_OI.shape[1] // wide_OG.shape[1]
    own_GII = torch.stack([
        products_II[start : start + size, start : start + size] for start in range(0, weight_OI.shape[1], size)
    ])  # fmt: skip
    best_OG, least_OG = wide_OG, torch.full_like(wide_OG, torch.inf)
    for shrink in SHRINKS:
        scales_OG = wide_OG * shrink
        change_OGI = (grid.rounded(weight_OI, scales_OG) - weight_OI).unflatten(1, (-1, size))
        error_OG = torch.einsum("ogi,gij,ogj->og", change_OGI, own_GII, change_OGI)
        better_OG = error_OG < least_OG
        best_OG, least_OG = torch.where(better_OG, scales_OG, best_OG), torch.where(better_OG, error_OG, least_OG)
    return best_OG


def _error(run: LayerRun, sight: _Sight, weights: Mapping[str, Tensor]) -> float:
    """Squared change of what the module around the readers gives, if they had these weights."""
    if len(weights) == 1:
        ((name, weight),) = weights.items()
        change_OI = weight - _weight(run, name)
        return float(((change_OI @ sight.products_II) * change_OI).sum(dtype=torch.float64))
    modules: dict[str, Any] = {name: run.layer.get_submodule(name) for name in weights}
    before = {name: module.weight.data for name, module in modules.items()}
    around, total = run.layer.get_submodule(sight.around), 0.0
    try:
        for name, module in modules.items():
            module.weight.data = weights[name].to(module.weight.dtype)
        for number, ((args, kwargs), output) in enumerate(zip(sight.calls, sight.outputs, strict=True)):
            found = run.real(number, first_tensor(around(*args, **kwargs)))
            total += float((found.float() - output.float()).square().sum(dtype=torch.float64))
    finally:
        for name, module in modules.items():
            module.weight.data = before[name]
    return total


def _weight(run: LayerRun, name: str) -> Tensor:
    weight: Any = run.layer.get_submodule(name).weight
    return weight.float()
