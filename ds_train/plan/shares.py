"""Which parameters each rank has: a model's outline cut into pipeline stages and tensor shards.

The same rules as in parallel/pipeline.py and parallel/tensor.py, which cut the model itself; that they agree is
tested on running engines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_train.plan.families import EXPERT_STYLES, FAMILIES
from ds_train.plan.outline import Outline, Parameter
from ds_train.plan.stages import balance, stage_bounds

_ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")
_COLWISE = ("colwise", "colwise_rep", "colwise_gather_output", "fused_colwise")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """A parameter as one rank holds it: elements after tensor ranks have shared it, and whether it is a matrix."""

    elements: int
    matrix: bool


@dataclass(frozen=True)
class Share:
    """What the ranks of one pipeline stage hold: `pieces` with how often each occurs, and their layers.

    `multiply_adds` per token of a forward pass, of the matrices on one tensor rank; `head_multiply_adds` is the part
    of the output embedding in it.
    """

    pieces: tuple[tuple[Piece, int], ...]
    first: int
    stop: int
    has_embedding: bool
    has_head: bool
    multiply_adds: float
    head_multiply_adds: float

    @cached_property
    def elements(self) -> int:
        """Parameters of the stage on one tensor rank."""
        return sum(piece.elements * count for piece, count in self.pieces)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max((piece.elements for piece, _ in self.pieces), default=0)

    def groups(self, all_decayed: bool) -> list[int]:
        """Elements of each parameter group of the optimizer: matrices and vectors, or all together."""
        matrices = sum(piece.elements * count for piece, count in self.pieces if piece.matrix)
        vectors = self.elements - matrices
        return [size for size in ([matrices + vectors] if all_decayed else [matrices, vectors]) if size]


class Shares:
    """A model's outline, cut for layouts as they are asked for."""

    def __init__(self, outline: Outline, arch: str, sequence_length: int) -> None:
        self._outline, self._arch, self._length = outline, arch, sequence_length
        family = FAMILIES.get(arch)
        self._layers = self._layer_list(family.layers if family else None)
        self._tensor = self._tensor_styles()
        self._cut = self._places()
        self._made: dict[tuple[int, int, tuple[int, ...] | None], tuple[Share, ...]] = {}

    @property
    def places(self) -> list[int]:
        """Of each parameter of the outline: its layer's number; below 0 it stands before or after the layers."""
        return self._cut

    @property
    def can_cut_stages(self) -> bool:
        """Whether there is a plan that says where stages begin."""
        family = FAMILIES.get(self._arch)
        return bool(self._outline.pipeline_plan or (family and family.before)) and self._layers is not None

    @property
    def can_cut_tensors(self) -> bool:
        """Whether there is a plan that says how matrices are shared."""
        return bool(self._tensor)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return 1 + max((place for place in self._cut if place >= 0), default=-1)

    @cached_property
    def exchanges(self) -> tuple[int, int]:
        """All-reduces of hidden states over tensor ranks per layer: in a forward pass, in a backward pass.

        One after each row-wise product, one before each column-wise one (module_inject/layers.py of DeepSpeed).
        """
        inside = [style for name, style in self._tensor.items() if "*" in name]
        return sum(style in _ROWWISE for style in inside), sum(style in _COLWISE for style in inside)

    def cuts_vocabulary(self, ranks: int) -> bool:
        """Whether embedding and head are cut over `ranks` tensor ranks, by vocabulary."""
        outline = self._outline
        if ranks == 1 or outline.head is None or not outline.plain_head or outline.embedding is None:
            return False
        planned = outline.head_plan.get(outline.head) in ("colwise_gather_output", "colwise_rep")
        vocabulary = next(p.shape[0] for p in outline.parameters if p.name.startswith(f"{outline.embedding}."))
        return planned and vocabulary % ranks == 0

    def stages(self, pipe: int, tensor: int, sizes: Sequence[int] | None = None) -> tuple[Share, ...]:
        """What each of `pipe` stages holds on one of `tensor` tensor ranks; `sizes`: layers of each stage."""
        key = (pipe, tensor, tuple(sizes) if sizes else None)
        if key not in self._made:
            self._made[key] = tuple(self._stages(pipe, tensor, sizes))
        return self._made[key]

    def _stages(self, pipe: int, tensor: int, sizes: Sequence[int] | None) -> list[Share]:
        count = self.layers
        chosen = list(sizes) if sizes else balance(*self._costs, pipe) if pipe > 1 else [count]
        shares = []
        vocabulary = self.cuts_vocabulary(tensor)
        for number, (first, stop) in enumerate(stage_bounds(chosen)):
            last = number == pipe - 1
            pieces: Counter[Piece] = Counter()
            work = head_work = 0.0
            for parameter, place in zip(self._outline.parameters, self._cut, strict=True):
                here = first <= place < stop or (place == _BEFORE and number == 0) or (place == _AFTER and last)
                copied = last and number > 0 and self._is_tied_table(parameter)
                if not (here or copied):
                    continue
                elements = self._elements(parameter, tensor, vocabulary)
                pieces[Piece(elements, len(parameter.shape) > 1)] += 1
                work += self._work(parameter, elements) if here else 0.0
            if last and self._outline.head is not None:
                head_work = self._head_elements / (tensor if vocabulary else 1)
                work += head_work
            shares.append(Share(tuple(pieces.items()), first, stop, number == 0, last, work, head_work))
        return shares

    @cached_property
    def _head_elements(self) -> float:
        """Multiply-adds of the output embedding per token: its matrix, whether or not it is the input's too."""
        head = f"{self._outline.head}.weight"
        own = next((p.elements for p in self._outline.parameters if p.name == head), None)
        if own is None and self._outline.tied:
            return float(self._table_elements)
        return float(own or 0)

    @property
    def _table_elements(self) -> int:
        table = f"{self._outline.embedding}.weight"
        return next((p.elements for p in self._outline.parameters if p.name == table), 0)

    def _is_tied_table(self, parameter: Parameter) -> bool:
        return self._outline.tied and parameter.name == f"{self._outline.embedding}.weight"

    def _work(self, parameter: Parameter, elements: int) -> float:
        """Multiply-adds per token: matrices by their elements, experts by the share that a token visits."""
        is_head = self._outline.head is not None and parameter.name == f"{self._outline.head}.weight"
        if len(parameter.shape) < 2 or parameter.kind == "Embedding" or is_head:
            return 0.0
        return elements * (self._expert_share if ".experts." in parameter.name else 1.0)

    @cached_property
    def _expert_share(self) -> float:
        config = self._outline.config
        experts = next((config[name] for name in _EXPERT_COUNTS if config.get(name)), 1)
        return float((config.get("num_experts_per_tok") or 1) / experts)

    @cached_property
    def _costs(self) -> tuple[list[float], float]:
        """What parallel/pipeline.py's `layer_costs` gives for the model itself."""
        attention = float(self._length * int(self._outline.config.get("hidden_size") or 0))
        costs = [attention] * self.layers
        last = 0.0
        for parameter, place in zip(self._outline.parameters, self._cut, strict=True):
            if len(parameter.shape) > 1:
                cost = parameter.elements * (self._expert_share if ".experts." in parameter.name else 1.0)
                if place >= 0:
                    costs[place] += cost
                elif place == _AFTER:
                    last += cost
        return costs, last + (self._table_elements if self._outline.tied else 0)

    def _elements(self, parameter: Parameter, tensor: int, vocabulary: bool) -> int:
        if tensor == 1:
            return parameter.elements
        module, _, leaf = parameter.name.rpartition(".")
        if module in (self._outline.embedding, self._outline.head):
            return parameter.elements // tensor if vocabulary else parameter.elements
        style = self._tensor.get(_general(module)) or self._tensor.get(_general(parameter.name))
        if style in _COLWISE or (style in _ROWWISE and leaf == "weight"):
            return parameter.elements // tensor
        return parameter.elements

    def _tensor_styles(self) -> Mapping[str, str]:
        """Style by full name with `*` for a layer's number, experts left out (parallel/tensor.py)."""
        outline, family = self._outline, FAMILIES.get(self._arch)
        own = outline.tensor_plan or (family.tensor if family else {})
        plan = {outline.prefix + name: style for name, style in own.items()} | dict(outline.head_plan)
        roots = {_before_experts(name) for name, style in plan.items() if style in EXPERT_STYLES} - {None}
        return {name: style for name, style in plan.items() if _before_experts(name) not in roots}

    def _layer_list(self, named: str | None) -> str | None:
        """Full name of the list of layers: the planned one, or the longest numbered list."""
        names = [parameter.name for parameter in self._outline.parameters]
        for candidate in (*self._outline.pipeline_plan, *([named] if named else [])):
            full = f"{self._outline.prefix}{candidate}."
            if any(name.startswith(full) and name[len(full) :].split(".")[0].isdigit() for name in names):
                return full
        lists: Counter[str] = Counter()
        for name in names:
            match = _LAYER.search(name)
            if match:
                lists[name[: match.start() + 1]] += 1
        return lists.most_common(1)[0][0] if lists else None

    def _places(self) -> list[int]:
        """Of each parameter: its layer's number, or before or after the layers."""
        family = FAMILIES.get(self._arch)
        order = self._outline.pipeline_plan or ((*family.before, family.layers, *family.after) if family else ())
        layers = (self._layers or "").removeprefix(self._outline.prefix).rstrip(".")
        before = order[: order.index(layers)] if layers in order else ()
        places = []
        for parameter in self._outline.parameters:
            name = parameter.name
            if self._layers and name.startswith(self._layers):
                places.append(int(name[len(self._layers) :].split(".")[0]))
            elif any(name.startswith(f"{self._outline.prefix}{module}.") for module in before):
                places.append(_BEFORE)
            elif order:
                places.append(_AFTER)
            else:
                places.append(_BEFORE if parameter.kind == "Embedding" else _AFTER)
        return places


_BEFORE, _AFTER = -1, -2
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _general(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _before_experts(name: str) -> str | None:
    parts = name.split(".")
    return ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else None
