"""Random layerwise token dropping (random-LTD, arXiv 2211.11586) on the layers of any transformers model.

A hook before a layer gathers the tokens that it takes, from the hidden states and from every argument that has one
entry per token; a hook behind it puts its output in their places, and the other tokens pass by. Which tokens those are
is a pure function of (seed, sample, layer), so it is the same on every rank that works on the sample, in every layout,
and when the layer is recomputed.
Shapes: B samples, T tokens, K kept tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.models.tasks import SAMPLE_IDS, Batch
from ds_train.schedule.seeds import fold_seed

_GAMMA, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64's, as int64


class TokenDropping:
    """Drops tokens in the middle layers of one model, between `on` and the end of its block."""

    def __init__(self, model: PreTrainedModel, seed: int, whole_layers: int, skip: tuple[type, ...] = ()) -> None:
        """`skip`: classes of stand-ins for layers that another rank has."""
        self.kept: int | None = None
        """Tokens that a layer takes from now on; None takes all."""
        self._seed = seed
        self._sample_ids: Tensor | None = None
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        layers = repeated_layers(model)
        for number in range(whole_layers, len(layers) - whole_layers):
            if not isinstance(layers[number], skip):
                _Dropped(self, layers[number], number)

    @contextlib.contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """The block's forward passes are of this micro-batch."""
        with self.of(batch.get(SAMPLE_IDS)):
            yield

    @contextlib.contextmanager
    def of(self, sample_ids: Tensor | None) -> Iterator[None]:
        """As `on`, by the sample ids; None drops nothing."""
        before, self._sample_ids = self._sample_ids, sample_ids
        try:
            yield
        finally:
            self._sample_ids = before

    @property
    def sample_ids(self) -> Tensor | None:
        """Of the micro-batch that is worked on; None where nothing is dropped."""
        return self._sample_ids

    def tokens(self, layer: int, length: int) -> Tensor | None:
        """Places of the tokens that the layer takes, in rising order: (B, K) int64; None where it takes all."""
        if self._sample_ids is None or self.kept is None or self.kept >= length:
            return None
        return random_tokens(self._sample_ids, self._seed, layer, length, self.kept)


def random_tokens(sample_ids_B: Tensor, seed: int, layer: int, length: int, kept: int) -> Tensor:
    """`kept` of `length` places, without order and each as likely, then sorted: (B, kept) int64."""
    place_T = torch.arange(length, device=sample_ids_B.device)
    key_B1 = _mix(_mix(sample_ids_B) ^ fold_seed(seed, "token drop", layer))[:, None]
    return _mix(key_B1 + place_T * _GAMMA).topk(kept, dim=1).indices.sort(dim=1).values


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model: the longest list of modules in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


class _Dropped:
    """The hooks of one layer."""

    def __init__(self, dropping: TokenDropping, layer: nn.Module, number: int) -> None:
        self._dropping, self._number = dropping, number
        self._signature = inspect.signature(type(layer).forward)
        self._first = list(self._signature.parameters)[1]
        self._whole: list[tuple[Tensor, Tensor]] = []
        layer.register_forward_pre_hook(self._before, with_kwargs=True)
        layer.register_forward_hook(self._after)
        recompute: Any = getattr(layer, "_gradient_checkpointing_func", None)
        if recompute is not None:
            setattr(layer, "_gradient_checkpointing_func", self._remembering(recompute))  # noqa: B010

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._whole.clear()  # a recomputation may stop inside of the layer
        given = self._signature.bind(layer, *args, **kwargs).arguments
        hidden_BTD = given[self._first]
        kept_BK = self._dropping.tokens(self._number, hidden_BTD.shape[1]) if layer.training else None
        if kept_BK is None:
            return None
        self._whole.append((hidden_BTD, kept_BK))
        names = dict(zip(list(self._signature.parameters)[1:], args, strict=False))
        taken = {name: take_tokens(name, value, kept_BK, hidden_BTD.shape[1]) for name, value in names.items()}
        more = {name: take_tokens(name, value, kept_BK, hidden_BTD.shape[1]) for name, value in kwargs.items()}
        return tuple(taken.values()), more

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._whole:
            return None
        hidden_BTD, kept_BK = self._whole.pop()
        first = output[0] if isinstance(output, tuple) else output
        index_BKD = kept_BK[:, :, None].expand(-1, -1, hidden_BTD.shape[2])
        whole_BTD = hidden_BTD.scatter(1, index_BKD, first.to(hidden_BTD.dtype))
        return (whole_BTD, *output[1:]) if isinstance(output, tuple) else whole_BTD

    def _remembering(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """Recomputation, which may come after other micro-batches, drops as the first computation did."""

        def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            sample_ids = self._dropping.sample_ids

            def again(*inner: Any, **more: Any) -> Any:
                with self._dropping.of(sample_ids):
                    return function(*inner, **more)

            return recompute(again, *args, **options)

        return call


def take_tokens(name: str, value: Any, kept_BK: Tensor, length: int) -> Any:
    """A layer's argument for the kept tokens alone.

    Raises:
        ValueError: an argument with an entry per token that isn't known.
    """
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        return tuple(take_tokens(name, item, kept_BK, length) for item in value)
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    if "mask" in name and value.dim() == 4:
        return _take_scores(value, kept_BK, length)
    known = name in ("hidden_states", "position_ids", "x") or name.startswith("position_embeddings") or "mask" in name
    if not known and value.dim() != 3:
        raise ValueError(f"its layers take {name}, and nobody knows which of its entries belong to which token")
    if value.dim() < 2 or value.shape[1] != length or value.shape[0] not in (1, kept_BK.shape[0]):
        raise ValueError(f"its layers take {name} of shape {tuple(value.shape)}, not one entry per sample and token")
    whole = value.expand(kept_BK.shape[0], *value.shape[1:])
    index = kept_BK.view(*kept_BK.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
    return whole.gather(1, index)


def dropping_difference(model: Any, dropping: TokenDropping, batch: dict[str, Tensor]) -> str | None:
    """What differs between dropping tokens and hiding them, in a phrase; None if the logits are equal.

    A layer that mixes tokens by attention alone gives a kept token the same output if the dropped ones are hidden from
    it by the mask, and if they aren't there. `batch` has what the model takes, of several documents, so that there is
    a mask; the model is in training mode without dropout.
    """
    sample_ids = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    with torch.no_grad():
        with dropping.of(sample_ids):
            found = model(**batch).logits
        hidden, handles = _hide(model, dropping, sample_ids)
        try:
            expected = model(**batch).logits
        finally:
            for handle in handles:
                handle.remove()
    if not all(hidden.values()):
        return "its layers take no attention mask of all tokens"
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        return "its layers mix tokens otherwise than by attention"
    return None


def _hide(model: Any, dropping: TokenDropping, sample_ids: Tensor) -> tuple[dict[int, bool], list[Any]]:
    """Hooks that let middle layers see the kept tokens alone without taking the others out."""
    hidden: dict[int, bool] = {}
    handles = []
    places: dict[int, tuple[Tensor, Any]] = {}
    for number, layer in enumerate(repeated_layers(model)):
        if not any(isinstance(getattr(hook, "__self__", None), _Dropped) for hook in layer._forward_hooks.values()):
            continue
        hidden[number] = False
        parameters = list(inspect.signature(type(layer).forward).parameters)[1:]

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number,
            parameters: list[str] = parameters,
        ) -> Any:  # fmt: skip
            given = dict(zip(parameters, args, strict=False)) | kwargs
            with dropping.of(sample_ids):
                kept_BK = dropping.tokens(number, given[parameters[0]].shape[1])
            for name, mask in given.items():
                if kept_BK is not None and "mask" in name and isinstance(mask, Tensor) and mask.dim() == 4:
                    seen_BT = torch.zeros(kept_BK.shape[0], mask.shape[-1], dtype=torch.bool).scatter(1, kept_BK, True)
                    seen = seen_BT[:, None, None, :]
                    least = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
                    given[name] = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, least)
                    hidden[number] = True
            places[number] = given[parameters[0]], kept_BK
            return (), given

        def after(_: nn.Module, args: tuple[Any, ...], output: Any, number: int = number) -> Any:
            whole_BTD, kept_BK = places.pop(number)
            first = output[0] if isinstance(output, tuple) else output
            kept_BT1 = torch.zeros(whole_BTD.shape[:2], dtype=torch.bool).scatter(1, kept_BK, True)[:, :, None]
            merged = torch.where(kept_BT1, first, whole_BTD)
            return (merged, *output[1:]) if isinstance(output, tuple) else merged

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    return hidden, handles


def _take_scores(mask: Tensor, kept_BK: Tensor, length: int) -> Tensor:
    """Rows and columns of the kept tokens in a mask (B or 1, heads or 1, T or 1, T)."""
    mask = mask.expand(kept_BK.shape[0], *mask.shape[1:])
    if mask.shape[2] == length:
        mask = mask.gather(2, kept_BK[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, kept_BK[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))


def _mix(value: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64: every input bit changes every output bit."""
    value = value + _GAMMA
    value = (value ^ _shifted(value, 30)) * _MIX1
    value = (value ^ _shifted(value, 27)) * _MIX2
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right, which torch doesn't have for int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
