"""A model's layers one after the other on samples, each changed for what the changed ones before it give.

Shapes: B samples, T tokens, D hidden, I inputs of a linear layer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_train.compress.teacher import first_tensor
from ds_train.errors import user_error
from ds_train.models.token_drop import repeated_layers

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with."""


@dataclass(frozen=True)
class LayerRun:
    """A layer with its linear layers that are to change, by name, and what it is called with for each micro-batch."""

    layer: nn.Module
    linear: Mapping[str, Any]
    calls: Sequence[Call]
    masks: Sequence[Tensor | None]

    def outputs(self) -> list[Tensor]:
        """The layer's hidden states (B, T, D) for each micro-batch."""
        return [first_tensor(self.layer(*args, **kwargs)) for args, kwargs in self.calls]

    def watch(self, modules: Sequence[nn.Module], see: Callable[[int, nn.Module, Call, Any], None]) -> None:
        """Run the layer once; `see` gets (number of the micro-batch, module, what it was called with, its output)."""
        current = 0

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            see(current, module, (args, kwargs), output)

        with hooked([module.register_forward_hook(hook, with_kwargs=True) for module in modules]):
            for current, (args, kwargs) in enumerate(self.calls):  # noqa: B007 - the hook reads it
                self.layer(*args, **kwargs)

    def real(self, number: int, tensor: Tensor) -> Tensor:
        """What a tensor (B, T, ...) of micro-batch `number` has where there is no padding, flattened to (N, ...)."""
        mask = self.masks[number]
        if mask is not None and mask.shape == tensor.shape[:2]:
            return tensor[mask.bool()]
        return tensor.reshape(-1, tensor.shape[-1])

    def products(self) -> dict[str, Tensor]:
        """Sum over all tokens of x x^T, (I, I) fp32, for the inputs x of each linear layer."""
        names = {module: name for name, module in self.linear.items()}
        sums: dict[str, Tensor] = {}

        def see(number: int, module: nn.Module, call: Call, _: Any) -> None:
            inputs_NI = self.real(number, call[0][0]).float()
            own, name = inputs_NI.t() @ inputs_NI, names[module]
            sums[name] = sums[name].add_(own) if name in sums else own

        self.watch([*self.linear.values()], see)
        return sums


@torch.no_grad()
def layer_by_layer(
    model: Any, chosen: Collection[str], batches: Sequence[Mapping[str, Tensor]], change: Callable[[LayerRun], None]
) -> None:
    """Let `change` work on each layer of the model and its `chosen` linear layers, in order.

    Raises:
        UserError: a layer runs several times on a sample.
    """
    layers = repeated_layers(model)
    calls = _calls(model, layers, batches)
    if any(len(own) != len(batches) for own in calls):
        reason = f"{model.config.model_type} runs the same layer several times, which is rounded for one"
        raise user_error("--method", reason, "use rtn to round, or magnitude to thin out: they look at no samples")
    states = [args[0] for args, _ in calls[0]]
    masks = [batch.get("attention_mask") for batch in batches]
    for layer, given in zip(layers, calls, strict=True):
        linear = {name: module for name, module in model.named_modules() if name in chosen and _within(layer, module)}
        with_states = [
            ((hidden, *args[1:]), kwargs) for hidden, (args, kwargs) in zip(states, given, strict=True)
        ]  # fmt: skip
        run = LayerRun(layer, linear, with_states, masks)
        change(run)
        states = run.outputs()


def _within(layer: nn.Module, module: nn.Module) -> bool:
    return any(module is one for one in layer.modules())


def _calls(model: Any, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> list[list[Call]]:
    """What each layer is called with for each micro-batch; the hidden states, which come first, are those of the first
    layer alone."""
    calls: list[list[Call]] = [[] for _ in layers]

    def note(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = list(inspect.signature(type(layer).forward).parameters)[1]
        hidden = args[0] if args else kwargs[first]
        others = {name: value for name, value in kwargs.items() if name != first}
        calls[number].append(((hidden if number == 0 else None, *args[1:]), others))

    with hooked(
        [
            layer.register_forward_pre_hook(partial(note, number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
    ):
        for batch in batches:
            model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    return calls


@contextlib.contextmanager
def hooked(handles: Sequence[Any]) -> Iterator[None]:
    """These hooks stay for as long as the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
