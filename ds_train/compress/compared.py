"""What layers of a model and of its teacher have in common: hidden states and attention relations, as losses.

Hooks take them while the two run, the teacher first; a loss is what the layers of this rank's part of the model differ
in, a sample's mean over tokens times its labels.
Shapes: B samples, T tokens, D hidden, H heads, K of a head, A relation heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface

from ds_train.compress.teacher import Teacher, first_tensor
from ds_train.config import RunConfig
from ds_train.config.distill import Relation
from ds_train.errors import first_line, user_error
from ds_train.models.load import build_model
from ds_train.models.look_alike import small_run
from ds_train.models.loss import IGNORE_INDEX
from ds_train.models.tasks import TOKEN_IDS, Batch
from ds_train.models.token_drop import repeated_layers
from ds_train.parallel.sequence import SequenceParallel

Pairs = Mapping[int, tuple[int, int]]
"""(layer of the model, layer of the teacher) by number, those of this rank's part of the model."""


class Comparison(Protocol):
    """A loss of layers."""

    def begin(self, batch: Batch) -> None:
        """The next forward passes, the teacher's first, are of this micro-batch."""

    def end(self) -> Tensor | None:
        """The loss of the model's forward pass: a differentiable scalar, fp32."""


class HiddenStates:
    """Mean squared differences of layers' outputs, through a learned matrix to the teacher's width."""

    def __init__(
        self, model: Any, teacher: Teacher, pairs: Pairs, weight: float, projections: Mapping[str, nn.Module],
        sequence: SequenceParallel | None = None,
    ) -> None:  # fmt: skip
        """`weight` is that of one pair, `projections` are by its number."""
        self._weight, self._sequence = weight, sequence
        self._theirs: dict[int, Tensor] = {}
        self._weights_BT: Tensor | None = None
        self._sum: Tensor | None = None
        layers = repeated_layers(model)
        for number, (own, other) in pairs.items():
            teacher.layers[other].register_forward_hook(partial(self._keep, number))
            layers[own].register_forward_hook(partial(self._compare, number, projections[str(number)]))

    def begin(self, batch: Batch) -> None:
        """See `Comparison`."""
        self._weights_BT, self._sum = token_weights(batch, self._sequence), None

    def end(self) -> Tensor | None:
        """See `Comparison`."""
        total, self._sum, self._weights_BT = self._sum, None, None
        self._theirs.clear()
        return total

    def _keep(self, number: int, _: nn.Module, __: Any, output: Any) -> None:
        self._theirs[number] = first_tensor(output)

    def _compare(self, number: int, projection: nn.Module, _: nn.Module, __: Any, output: Any) -> None:
        if self._weights_BT is None or not torch.is_grad_enabled():
            return
        difference_BTD = projection(first_tensor(output)).float() - self._theirs[number].float()
        loss: Tensor = self._weight * (difference_BTD.square().mean(-1) * self._weights_BT).sum()
        self._sum = loss if self._sum is None else self._sum + loss


class Relations:
    """Divergence of how tokens relate in attention (MiniLM, arXiv 2002.10957 and 2012.15828).

    A relation is the softmax of the products of two of a layer's queries, keys and values, by head, over the tokens
    that a token may see. `attention` is query and key, by the model's own heads. The others are each with itself: all
    heads are put side by side and cut anew into as many as both models can have, so that nothing has to be learned
    where their numbers of heads differ. A matrix (T, T) of one head is held at a time.
    """

    def __init__(
        self, model: Any, teacher: Teacher, pairs: Pairs, weight: float, kinds: Sequence[Relation], heads: int,
        causal: bool, group: Any = None,
    ) -> None:  # fmt: skip
        """
        Args:
            weight: of one pair.
            heads: that queries, keys and values are cut anew into.
            causal: a token doesn't see later ones.
            group: tensor ranks, which have a share of the heads each; None where a rank has all.
        """
        self._weight, self._kinds, self._heads, self._causal, self._group = weight, kinds, heads, causal, group
        self._theirs: dict[int, _States] = {}
        self._ours: dict[int, _States] = {}
        self._batch: Batch | None = None
        _install()
        layers = repeated_layers(model)
        for number, (own, other) in pairs.items():
            _listen(teacher.layers[other], partial(self._keep, self._theirs, number))
            _listen(layers[own], partial(self._keep, self._ours, number))

    def begin(self, batch: Batch) -> None:
        """See `Comparison`."""
        self._batch = batch
        _LISTENERS.clear()  # of a pass that was broken off
        self._ours.clear()
        self._theirs.clear()

    def end(self) -> Tensor | None:
        """See `Comparison`. Collective over the tensor ranks."""
        assert self._batch is not None
        if not self._ours:
            return None
        visible_BTT = visible_tokens(self._batch, self._causal)
        weights_BT = token_weights(self._batch, None) * (self._weight / len(self._kinds))
        rank, ranks = (0, 1) if self._group is None else (dist.get_rank(self._group), dist.get_world_size(self._group))
        losses = []
        for number, ours in self._ours.items():
            for kind in self._kinds:
                one, other = ours.pair(kind, self._heads // ranks), self._theirs[number].pair(kind, self._heads)
                share = other[0].shape[1] // ranks
                mine = slice(rank * share, (rank + 1) * share)
                theirs = tuple(states[:, mine] for states in other)
                mean = weights_BT / other[0].shape[1]
                losses.append(relation_loss(one, theirs, visible_BTT, mean))  # type: ignore[arg-type]
        self._batch = None
        total = torch.stack(losses).sum()
        if self._group is not None:
            whole = total.detach().clone()
            dist.all_reduce(whole, group=self._group)
            total = total + (whole - total.detach())
        return total

    def _keep(self, place: dict[int, _States], number: int, states: _States) -> None:
        if self._batch is not None:
            place[number] = states


class _States:
    """Queries, keys and values of a layer, (B, H, T, K) each, and what their products are multiplied by."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
        self.query, self.key, self.value = query, key, value
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def pair(self, kind: Relation, heads: int) -> tuple[Tensor, Tensor]:
        """Whose products a relation is of, scaled, (B, A, T, K) each."""
        if kind == "attention":
            shared = self.query.shape[1] // self.key.shape[1]
            return self.query * self.scaling, self.key.repeat_interleave(shared, 1)
        states_BHTK: Tensor = getattr(self, kind)
        joined_BTD = states_BHTK.transpose(1, 2).flatten(2)
        anew_BATK = joined_BTD.unflatten(2, (heads, -1)).transpose(1, 2)
        return anew_BATK * anew_BATK.shape[-1] ** -0.5, anew_BATK


def relation_loss(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], visible_BTT: Tensor, weights_BT: Tensor
) -> Tensor:
    """Weighted sum over tokens and heads of the divergence of our relations from theirs: differentiable scalar, fp32.

    Args:
        ours: whose products the relations are of, (B, A, T, K) each; `theirs` have as many heads.
        visible_BTT: whether a token (the second dimension) relates to another.
    """
    return _RelationLoss.apply(*ours, *theirs, visible_BTT, weights_BT)


class _RelationLoss(torch.autograd.Function):
    """The gradient is computed beside the loss, a head at a time, as the loss of logits has it."""

    @staticmethod
    def forward(
        ctx: Any, one: Tensor, other: Tensor, their_one: Tensor, their_other: Tensor, visible: Tensor, weights: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=one.device)
        grads = torch.empty_like(one), torch.empty_like(other)
        for head in range(one.shape[1]):
            ours_BTT, theirs_BTT = (
                (left[:, head].float() @ right[:, head].float().transpose(1, 2)).masked_fill_(~visible, -torch.inf)
                for left, right in ((one, other), (their_one, their_other))
            )
            ours_BTT, theirs_BTT = torch.log_softmax(ours_BTT, -1), torch.log_softmax(theirs_BTT, -1)
            p_BTT, difference_BTT = theirs_BTT.exp(), (theirs_BTT - ours_BTT).masked_fill_(~visible, 0.0)
            total += ((p_BTT * difference_BTT).sum(-1) * weights).sum()
            slopes_BTT = ours_BTT.exp_().sub_(p_BTT).mul_(weights[..., None])
            grads[0][:, head] = slopes_BTT @ other[:, head].float()
            grads[1][:, head] = slopes_BTT.transpose(1, 2) @ one[:, head].float()
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        one, other = (grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return one, other, None, None, None, None


def check_relations(run: RunConfig, config: PreTrainedConfig, key: str) -> None:
    """Let a look-alike of the model of `config`, which `key` names, say whether its layers' attention can be heard.

    Raises:
        UserError: it can't.
    """
    heard: list[_States] = []
    try:
        small_recipe, small = small_run(run, config, 2)
        model: Any = build_model(small_recipe, small, {}, 0).eval()
        _install()
        for layer in repeated_layers(model):
            _listen(layer, heard.append)
        tokens_BT = torch.arange(6)[None] % small.get_text_config().vocab_size
        with torch.no_grad():
            model(input_ids=tokens_BT)
        text, shapes = small.get_text_config(), [states.query.shape for states in heard]
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        expected = [torch.Size((1, text.num_attention_heads, 6, head))] * 2
        reason = None if shapes == expected else f"its layers give queries of shapes {[tuple(one) for one in shapes]}"
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
    if reason is not None:
        why = f"{config.model_type}: the attention of its layers can't be compared: {reason}"
        raise user_error(key, why, "set compress.distill.relations=0")


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_weights(batch: Batch, sequence: SequenceParallel | None) -> Tensor:
    """What each of this rank's tokens counts, (B, T): its sample's labels over its tokens; 0 for padding.

    With `sequence` they are shared: collective over its ranks.
    """
    labels = batch["labels"]
    counts_B = (labels != IGNORE_INDEX).view(len(labels), -1).sum(-1)
    mask, tokens = batch.get("attention_mask"), _tokens(batch)
    if mask is None or mask.dim() != 2:
        mask = torch.ones_like(tokens)
        lengths_B = mask.sum(-1) * (1 if sequence is None else sequence.ranks)
    else:
        lengths_B = mask.sum(-1)
        mask = mask if sequence is None else sequence.own(mask)
    if sequence is not None:
        dist.all_reduce(counts_B, group=sequence.group)
    return counts_B[:, None] * mask / lengths_B[:, None].clamp(min=1)


def visible_tokens(batch: Batch, causal: bool) -> Tensor:
    """Which tokens a token may see, (B, T, T): of its document, not padding, and no later ones if `causal`; itself."""
    mask, positions, tokens_BT = batch.get("attention_mask"), batch.get("position_ids"), _tokens(batch)
    length = tokens_BT.shape[1]
    visible_BTT = torch.ones(len(tokens_BT), length, length, dtype=torch.bool, device=tokens_BT.device)
    if mask is not None:
        visible_BTT &= mask[:, None].bool() if mask.dim() == 2 else mask[:, 0].bool()
    if positions is not None:
        document_BT = (positions == positions[:, :1]).cumsum(-1)
        visible_BTT &= document_BT[:, :, None] == document_BT[:, None]
    if causal:
        visible_BTT.tril_()
    return visible_BTT | torch.eye(length, dtype=torch.bool, device=tokens_BT.device)


def _tokens(batch: Batch) -> Tensor:
    return batch.get(TOKEN_IDS, batch["input_ids"])


# -- listening to attention --------------------------------------------------------------------------------------------


_Listener = Callable[[_States], None]


_LISTENERS: list[_Listener] = []
"""Those of the layer that runs."""

_plain_interface = AttentionInterface.get_interface


def _install() -> None:
    """Put an ear to whatever function a model's attention calls; without listeners it changes nothing."""
    AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign, assignment]


def _get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    function = _plain_interface(self, name, default)
    return partial(_attend, function) if _LISTENERS else function


def _attend(
    function: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any,
    **options: Any,
) -> Any:  # fmt: skip
    for listener in _LISTENERS:
        listener(_States(query, key, value, options.get("scaling")))
    return function(module, query, key, value, *arguments, **options)


def _listen(layer: nn.Module, listener: _Listener) -> None:
    """Let `listener` have the queries, keys and values of the layer."""

    def before(*_: Any) -> None:
        _LISTENERS.append(listener)

    def after(*_: Any) -> None:
        _LISTENERS.clear()

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
