"""Progressive layer dropping (arXiv 2010.13369) on the layers of any transformers model.

A layer that is left out hands on what it is given, and has a gradient of zero (optim/unused.py). What one that stays
adds is divided by the probability of that, so that the mean over draws is the whole model's: x + (F(x) - x) / p. The
paper divides inside of the layer, each of its two parts; around the whole layer the mean is exact, and no family's code
is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.models.token_drop import repeated_layers
from ds_train.plan.families import FAMILIES
from ds_train.schedule.layer_drop import LayerDraw


class LayerDropping:
    """Leaves out layers of one model while it trains."""

    def __init__(self, model: PreTrainedModel, skip: tuple[type, ...] = ()) -> None:
        """`skip`: classes of stand-ins for layers that another rank has."""
        family = FAMILIES.get(model.config.model_type)
        self._gives_tuples = family is not None and family.tuples
        self._draw: LayerDraw | None = None
        layers = repeated_layers(model)
        self.count = len(layers)
        """Layers of the whole model."""
        self._own = {number: layer for number, layer in enumerate(layers) if not isinstance(layer, skip)}
        for number, layer in self._own.items():
            first = list(inspect.signature(type(layer).forward).parameters)[1]
            layer.forward = partial(self._forward, number, layer, layer.forward, first)  # type: ignore[method-assign]

    def draw(self, draw: LayerDraw) -> None:
        """Train with the layers of `draw` from now on."""
        self._draw = draw

    @property
    def unused(self) -> Iterator[nn.Parameter]:
        """This rank's parameters of the layers that are left out."""
        for number in (self._draw.dropped if self._draw is not None else frozenset()) & self._own.keys():
            yield from self._own[number].parameters()

    def _forward(
        self, number: int, layer: nn.Module, forward: Callable[..., Any], first_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        if not layer.training or self._draw is None:
            return forward(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs[first_name]
        if number in self._draw.dropped:
            return (hidden,) if self._gives_tuples else hidden
        output, kept = forward(*args, **kwargs), self._draw.kept[number]
        if kept == 1.0:
            return output
        first = output[0] if isinstance(output, tuple) else output
        scaled = hidden + (first - hidden) / kept
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled
