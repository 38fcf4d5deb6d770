"""Gates on a model: units' outputs are multiplied by numbers from 0 (as if cut out) to 1, and measured.

Each wraps the forward of one module. Shapes: N tokens, C channels of a module here (its tensor rank's), U units.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ds_train.compress.coupling import LAYERS, Coupling, Gate, Removed, Structure

OF_ACTIVATIONS = ("taylor", "fisher", "activation", "wanda")
"""Scores that are summed over tokens."""

_LEAST = 1e-6  # a gate that may open again leaves no token without experts, and no norm without channels

Key = tuple[str, int, str]
"""Kind and number of a coupling, module of a gate."""

Local = Callable[[Gate, nn.Module, Tensor], Tensor]


class Gates:
    """The gates of one model, or of the part of it that is here."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        score: str | None = None,
        local: Local = lambda gate, module, whole: whole,
    ) -> None:
        """
        Args:
            score: what is measured (`compress.prune.score`) while `collecting`; None measures nothing.
            local: gives of all channels of a gate those that its module has here.
        """
        self.collecting = False
        self.gradient_scale = 1.0
        """What the loss's gradient has been multiplied by."""
        self.sums: dict[Key, Tensor] = {}
        """What was measured: fp64, of the channels that are here; `fisher` and routers, of units; a layer, two."""
        self.score, self._local = score, local
        self._gates: dict[tuple[str, int], list[_Gated]] = {}
        modules = dict(model.named_modules())
        for coupling in structure.couplings:
            for gate in coupling.gates:
                module = modules.get(gate.module)
                # A stand-in for what another pipeline stage has has no parameters.
                if module is not None and any(True for _ in module.parameters()):
                    own = self._gates.setdefault((coupling.kind, coupling.number), [])
                    own.append(_FORMS[gate.how](self, coupling, gate, module))

    def set(self, kind: str, number: int, values: Sequence[float]) -> None:
        """Give the units of a coupling their values."""
        for gated in self._gates.get((kind, number), ()):
            gated.set(values)

    def set_removed(self, structure: Structure, removed: Removed, value: float = 0.0) -> None:
        """Give every unit in `removed` the value `value`, and 1 to the others."""
        for coupling in structure.couplings:
            gone = set(removed.get(coupling.kind, {}).get(coupling.number, ()))
            values = [value if unit in gone else 1.0 for unit in range(coupling.units)]
            self.set(coupling.kind, coupling.number, values)

    def learn(self, kind: str, number: int, values_U: Tensor) -> None:
        """Give the units of a coupling values that have gradients; what isn't training has no gates then."""
        for gated in self._gates.get((kind, number), ()):
            gated.learn(values_U)

    def take_gradients(self) -> dict[Key, Tensor]:
        """The loss's gradients by the values that `learn` gave, fp64, of the channels that are here; they are gone."""
        gradients = {}
        for own in self._gates.values():
            for gated in own:
                gradient = gated.take_gradient()
                if gradient is not None:
                    gradients[gated.key] = gradient.double() / self.gradient_scale
        return gradients

    def here(self) -> dict[Key, tuple[Gate, nn.Module]]:
        """The gates that are here, and their modules."""
        return {gated.key: (gated.gate, gated.module) for own in self._gates.values() for gated in own}

    def local(self, gate: Gate, module: nn.Module, whole: Tensor) -> Tensor:
        """Of all channels of a gate those that its module has here."""
        return self._local(gate, module, whole)

    def add(self, key: Key, values: Tensor) -> None:
        """Sum what was measured."""
        values = values.double()
        self.sums[key] = self.sums[key] + values if key in self.sums else values


class _Gated:
    """A module whose `forward` is called through this."""

    def __init__(self, gates: Gates, coupling: Coupling, gate: Gate, module: nn.Module) -> None:
        self.key: Key = (coupling.kind, coupling.number, gate.module)
        self.gate, self.module = gate, module
        self._gates = gates
        self._forward = module.forward
        self._mask: Tensor | None = None
        module.forward = self  # type: ignore[assignment]

    def set(self, values: Sequence[float]) -> None:
        """Give the units their values."""
        whole_C = torch.tensor(values, dtype=torch.float32).repeat_interleave(self.gate.each)
        self._mask = (
            None if all(value == 1.0 for value in values) else self._gates.local(self.gate, self.module, whole_C)
        )

    def learn(self, values_U: Tensor) -> None:
        """Give the units values that have gradients."""
        whole_C = values_U.float().repeat_interleave(self.gate.each)
        self._mask = self._gates.local(self.gate, self.module, whole_C).requires_grad_()

    def take_gradient(self) -> Tensor | None:
        """The gradient by the mask, summed over micro-batches; None where it has none."""
        if self._mask is None or self._mask.grad is None:
            return None
        gradient, self._mask.grad = self._mask.grad, None
        return gradient

    def mask(self, like: Tensor) -> Tensor | None:
        """The mask on the device of `like`; None where all is 1."""
        if self._mask is None or (self._mask.requires_grad and not self.module.training):
            return None
        if self._mask.device != like.device:
            placed = self._mask.detach().to(like.device, non_blocking=True)
            self._mask = placed.requires_grad_(self._mask.requires_grad)
        return self._mask

    def watch(self, passing: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Add `measure(passing, gradient)` when the gradient is there, both (N, C) in fp32; gives what goes on.

        That is a view, so that the gradient is this gate's alone: a norm's input passes it by, too, and whether others'
        gradients come to the same tensor depends on ZeRO's hooks, pipeline stages and recomputation.
        """
        if not (self._gates.collecting and passing.requires_grad):
            return passing
        scale = self._gates.gradient_scale

        def count(passing: Tensor, gradient: Tensor) -> None:
            slope_NC = gradient.flatten(0, -2).float() / scale
            # Where fp16 overflows, the step isn't taken either.
            self._gates.add(self.key, measure(passing.flatten(0, -2).float(), slope_NC).nan_to_num(0.0, 0.0, 0.0))

        seen: Tensor = _Seen.apply(passing, count)
        return seen

    def of_channels(self, passing_NC: Tensor, slope_NC: Tensor) -> Tensor:
        """What a score sums over tokens. One that the loss doesn't depend on (padding) has no gradient."""
        score = self._gates.score
        if score == "taylor":
            return (passing_NC * slope_NC).sum(0)
        if score == "fisher":
            return (passing_NC * slope_NC).unflatten(-1, (-1, self.gate.each)).sum(-1).square().sum(0)
        return (passing_NC.square() * _alive(slope_NC)).sum(0)


class _Seen(torch.autograd.Function):
    """What passes, shown with its gradient when that is there. It is kept as any activation, which may be computed
    again instead."""

    @staticmethod
    def forward(ctx: Any, passing: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(passing)
        ctx.show = show
        return passing.view_as(passing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        ctx.show(*ctx.saved_tensors, upstream[0])
        return upstream[0], None


class _Input(_Gated):
    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if self._gates.score in OF_ACTIVATIONS:
            hidden = self.watch(hidden, self.of_channels)
        mask = self.mask(hidden)
        return self._forward(hidden if mask is None else hidden * mask.to(hidden.dtype), *arguments, **options)


class _Norm(_Gated):
    """A norm over the channels that are open: with `s` the root of (all channels / open ones), the norm of `s` times
    the open channels is `s` times what a norm of those alone gives, its epsilon included."""

    _scale = 1.0

    def set(self, values: Sequence[float]) -> None:
        super().set(values)
        if self._mask is not None:  # while it is on the host: a device would have to be waited for
            self._scale = math.sqrt(self._mask.numel() / float(self._mask.sum()))

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._gates.score in OF_ACTIVATIONS:
            hidden = self.watch(hidden, self.of_channels)
        mask = self.mask(hidden)
        if mask is None:
            return self._forward(hidden)
        scale: Any = self._scale
        if mask.requires_grad:
            scale = (mask.numel() / mask.sum().clamp_min(_LEAST)).sqrt()
        mask = mask.to(hidden.dtype)
        if not isinstance(self.module, nn.LayerNorm):
            return self._forward(hidden * mask * scale) / scale
        mean = (hidden * mask).sum(-1, keepdim=True) * (scale**2 / mask.numel())
        own, centred = self.module, (hidden - mean) * mask * scale
        # Without the bias, and nothing in a closed channel: gradients would be differences of equal sums, or of what
        # rounding leaves of the mean, and Adam's step large, another one in every layout.
        normal = F.layer_norm(centred, own.normalized_shape, own.weight, None, own.eps) * (mask != 0)
        return normal / scale if own.bias is None else normal / scale + own.bias * mask


class _Router(_Gated):
    """The logits of a router, inside of its forward: the logarithm of its value is added to an expert's."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.module, nn.Linear):
            # Its forward may be another one, whose product is of a copy (models/cpu_products.py).
            return self.seen(self._forward(*arguments, **options))
        with _product_seen(self.module.weight, self.seen):  # type: ignore[arg-type]
            return self._forward(*arguments, **options)

    def seen(self, logits: Tensor) -> Tensor:
        """The logits that the router goes on with."""
        if self._gates.score in OF_ACTIVATIONS:
            logits = self.watch(logits, self.of_experts)
        mask = self.mask(logits)
        if mask is None:
            return logits
        logarithm = mask.clamp_min(_LEAST).log() if mask.requires_grad else mask.log()
        return logits + logarithm.to(logits.dtype)

    def of_experts(self, logits_NU: Tensor, slope_NU: Tensor) -> Tensor:
        """As `of_channels`: an expert's probability is what passes, and its derivative by a factor is the logit's."""
        if self._gates.score == "taylor":
            return slope_NU.sum(0)
        if self._gates.score == "fisher":
            return slope_NU.square().sum(0)
        return (logits_NU.softmax(-1).square() * _alive(slope_NU)).sum(0)


class _Layer(_Gated):
    _part = 1.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        output = self._forward(*arguments, **options)
        before: Tensor = arguments[0] if arguments else options["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        after = self.watch(after, lambda after_NC, slope_NC: _change(before.detach(), after_NC, slope_NC))
        part = self._part
        if part < 1.0:
            # Where it is 0, too: a gradient of zeros, since ZeRO would apply an earlier one if there were none.
            after = before + (after - before) * part if part or after.requires_grad else before
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def set(self, values: Sequence[float]) -> None:
        self._part = float(torch.tensor(values[self.gate.unit]))  # as a mask has it, in fp32


_FORMS: dict[str, type[_Input | _Norm | _Router | _Layer]] = {
    "input": _Input, "norm": _Norm, "router": _Router, "layer": _Layer,
}  # fmt: skip


@contextlib.contextmanager
def _product_seen(weight: Tensor, seen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the product with `weight` is shown to `seen`, and what that gives is gone on with.

    `F.linear` itself is replaced: what ZeRO-3 has put in its place (zero/linear.py) passes torch's function modes by.
    """
    linear = F.linear

    def shown(hidden: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        product = linear(hidden, matrix, bias)
        return seen(product) if matrix is weight else product

    F.linear = shown  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = linear


def worth(coupling: Coupling, score: str, sums: dict[Key, Tensor], weights_U: Tensor | None) -> Tensor:
    """What each unit is worth: (U,) fp64.

    Args:
        sums: of all channels of all gates, over all tokens.
        weights_U: of `magnitude`, the norms of all weights of each unit; of `wanda`, see `weight_worth`.
    """
    if coupling.kind == LAYERS:
        found = torch.stack([sums[coupling.kind, 0, gate.module] for gate in coupling.gates])
        # The last layer of a classifier counts one token of a sample, those before it all.
        return found[:, 0] / found[:, 1].clamp_min(1.0)
    if score == "magnitude":
        assert weights_U is not None
        return weights_U
    total = torch.zeros(coupling.units, dtype=torch.float64)
    for gate in coupling.gates:
        found = sums[coupling.kind, coupling.number, gate.module].cpu()
        if gate.how == "router" or score == "fisher":
            of_units = found.sqrt() if score in ("activation", "wanda") else found
        elif score == "taylor":
            of_units = found.view(coupling.units, -1).sum(-1)
        else:
            of_units = found.view(coupling.units, -1).sum(-1).sqrt()
        total += of_units.abs()
    return total * weights_U if score == "wanda" and weights_U is not None else total


def lowest(values: Tensor, count: int) -> list[int]:
    """Places of the `count` lowest values, the lowest first, of equal ones the first first."""
    return sorted(range(len(values)), key=lambda place: (float(values[place]), place))[:count]


def _alive(slope_NC: Tensor) -> Tensor:
    return (slope_NC != 0).any(-1, keepdim=True)


def _change(before: Tensor, after_NC: Tensor, slope_NC: Tensor) -> Tensor:
    """1 - the cosine of a layer's input and output, summed over the tokens that count, and their number: (2,)."""
    change_N = 1.0 - F.cosine_similarity(before.flatten(0, -2).float(), after_NC, dim=-1)
    counts_N = _alive(slope_NC)[:, 0]
    return torch.stack([(change_N * counts_N).sum(), counts_N.sum()])
