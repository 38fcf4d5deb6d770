"""Bytes that a layer keeps for its backward pass, and those of embedding, head and loss, per rank.

What torch's autograd saves of each operation, added up by the layer's own matrices (the method of arXiv 2205.05198,
section 4, for the layers that transformers has): the input of every product, what norms and activation functions keep,
queries, keys, values and output of attention, dropout masks. Letters: D hidden, F feed-forward, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ds_train.plan.model_size import is_gated
from ds_train.plan.outline import Outline, Parameter
from ds_train.plan.shares import Share, Shares
from ds_train.plan.transformers_keys import modeling_source

_CHUNK_LOGITS, _CHUNK_IN_PLACE, _CHUNK_ON_DEVICES, _CHUNK_TOKENS = 2 * 2**20, 16 * 2**20, 128 * 2**20, 256


def chunk_tokens(vocabulary: int, device: str, in_place: bool = False, compared: bool = False) -> int:
    """Tokens whose logits the fused head and loss hold at once on `device`, by its kind (models/loss.py).

    On a CPU 8 MB of logits in fp32, with as much for their gradient; 32 MB in 16 bits where that takes their place.
    Never so few tokens that products are thin, and that adding up the gradients of a large head takes longer than
    making them: a device multiplies so much faster than it adds that it takes 512 MB in fp32, about a gigabyte in all;
    a quarter where logits are `compared` with a teacher's, which takes several times as many tensors.
    """
    if device != "cpu":
        return max(_CHUNK_TOKENS, _CHUNK_ON_DEVICES // (4 if compared else 1) // vocabulary)
    return max(_CHUNK_TOKENS, (_CHUNK_IN_PLACE if in_place else _CHUNK_LOGITS) // vocabulary)


# What an activation function keeps, in multiples of F, beside the input of the next product where that isn't its
# output itself. The tanh forms that are written out in Python keep five tensors.
_KEPT_BY_FUNCTION = {"relu": 1, "relu2": 2, "gelu_new": 5, "gelu_fast": 5, "quick_gelu": 4}
_KEPT_BY_KERNELS = 2
_DROPOUTS = ("resid_pdrop", "hidden_dropout_prob", "hidden_dropout", "dropout", "residual_dropout")
_ATTENTION_DROPOUTS = ("attn_pdrop", "attention_probs_dropout_prob", "attention_dropout")
_FLASH = ("flash_attention_2", "flash_attention_3", "flex_attention")
# What lean layers are taken by (models/lean.py), as a family's modeling file has it.
_LEAN_NORM = "return self.weight * hidden_states.to(input_dtype)"
_LEAN_GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


_Kind = tuple[tuple[str, tuple[int, ...], str], ...]
"""Name, shape and owner of each parameter of a layer."""


@dataclass(frozen=True)
class Work:
    """What a rank has in one micro-batch: samples, tokens of a sample, ranks that share them, formats and kernels, and
    whether logits are compared with a teacher's."""

    samples: int
    length: int
    tensor: int
    sequence: int
    dtype_bytes: int
    checkpointing: bool
    device: str
    attention: str
    packed: bool
    lean: bool = False
    compared: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on one sequence rank."""
        return self.samples * self.length // self.sequence


class Activations:
    """What the layers of one model keep."""

    def __init__(self, outline: Outline, arch: str, shares: Shares) -> None:
        self._outline, self._arch, self._shares = outline, arch, shares
        config = outline.config
        self._hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim") or 1
        self._heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or 1
        self._groups = _number(config, "num_key_value_heads", "num_kv_heads") or self._heads
        functions = [config.get(name) for name in ("hidden_act", "hidden_activation", "activation_function")]
        self._function = str(next((function for function in functions if function), ""))
        self._dropouts = sum(bool(config.get(name)) for name in _DROPOUTS)
        self._attention_dropout = any(config.get(name) for name in _ATTENTION_DROPOUTS)
        self._cache: dict[tuple[int, ...], tuple[float, float]] = {}

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self._hidden

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._heads

    @property
    def attention_width(self) -> float:
        """Elements of all heads' queries and of their output together, halved: what scores cost is linear in it."""
        query, _, _, output = self._attention_widths
        return (query + output) / 2

    def layers(self, share: Share, work: Work) -> tuple[float, float]:
        """(all, largest): bytes that the layers of a stage keep of a micro-batch without checkpointing."""
        key = (share.first, share.stop, work.samples, work.tensor, work.sequence)
        if key not in self._cache:
            each = {kind: sum(self._layer(kind, work)) * work.tokens for kind in set(self._of(share))}
            kept = [each[kind] for kind in self._of(share)]
            self._cache[key] = sum(kept), max(kept, default=0.0)
        return self._cache[key]

    def in_blocks_below(self, size: int, share: Share, work: Work) -> float:
        """Bytes of tensors smaller than `size` that a stage's layers keep, or make on the way, of a micro-batch."""
        groups = [0.0] * 2
        if work.attention not in _FLASH and self._groups < self._heads:
            groups = [part * work.dtype_bytes / work.tensor for part in self._attention_widths[1:3]]
        each = {
            kind: [each * work.tokens for each in self._layer(kind, work) + groups] for kind in set(self._of(share))
        }
        return sum(block for kind in self._of(share) for block in each[kind] if block < size)

    def stage(self, share: Share, work: Work) -> tuple[float, float]:
        """(bytes kept for one micro-batch in flight, bytes that the backward pass of one layer adds to them)."""
        kept, largest = self.layers(share, work)
        if not work.checkpointing:
            return kept, 0.0
        return float(work.tokens * self._hidden * work.dtype_bytes * (share.stop - share.first)), largest

    def drawn(self, share: Share, work: Work) -> float:
        """Random numbers that dropout draws in a forward pass over a stage's layers of one micro-batch."""
        scores = self._heads * work.length if self._attention_dropout and self._by_hand(work) else 0
        each = scores / work.tensor + 2 * self._hidden * min(1, self._dropouts)
        return (share.stop - share.first) * work.tokens * each

    def loss(self, share: Share, work: Work) -> float:
        """Bytes of the final norm, head and loss on the stage that has the head."""
        if not share.has_head:
            return 0.0
        vocabulary = int(self._outline.config.get("vocab_size") or 0)
        rows = vocabulary // (work.tensor if self._shares.cuts_vocabulary(work.tensor) else 1)
        norm = 3 * work.tokens * self._hidden * work.dtype_bytes
        if self._outline.head is None or rows == 0:
            return float(norm)
        if self._outline.head == "score":  # of classifiers
            return float(norm)
        if self._outline.plain_head:
            in_place = work.device == "cpu" and work.dtype_bytes == 2  # ds_kernels/entropy.py
            tokens = min(chunk_tokens(rows, work.device, in_place, work.compared), work.tokens)
            chunk = tokens * rows * (work.dtype_bytes if in_place else 3 * 4)
            weight = rows * self._hidden
            # The gradients of hidden states and weight are made in the forward pass. Chunks of them are added up in
            # fp32, and rounded when the chunks are gone.
            sums = weight * 4 if tokens < work.tokens else 0
            return float(norm + work.tokens * self._hidden * 4 + sums + max(chunk, weight * work.dtype_bytes))
        return float(norm + work.tokens * rows * (2 * work.dtype_bytes + 3 * 4))

    def masks(self, work: Work) -> float:
        """Bytes of the attention mask of a micro-batch of packed or padded samples."""
        return 0.0 if work.attention in _FLASH else work.samples * float(work.length) ** 2

    # -- one layer ---------------------------------------------------------------------------------------------------

    @cached_property
    def _kinds(self) -> list[_Kind]:
        """Of each layer its parameters, as a key: layers of the same parameters keep the same."""
        found: list[list[tuple[str, tuple[int, ...], str]]] = [[] for _ in range(self._shares.layers)]
        for parameter, place in zip(self._outline.parameters, self._shares.places, strict=True):
            if place >= 0:
                found[place].append((_inner(parameter), parameter.shape, parameter.kind))
        return [tuple(layer) for layer in found]

    def _of(self, share: Share) -> list[_Kind]:
        return self._kinds[share.first : share.stop]

    @cached_property
    def _attention_widths(self) -> tuple[float, float, float, float]:
        """Elements per token of queries, keys, values and output of all heads."""
        config = self._outline.config
        nope, rope, value = (_number(config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if nope and value:  # latent attention (arXiv 2405.04434): keys and values are made for every head
            width = self._heads * (nope + (rope or 0))
            return width, width, self._heads * value, self._heads * value
        head = _number(config, "head_dim") or self._hidden / self._heads
        return self._heads * head, self._groups * head, self._groups * head, self._heads * head

    def _layer(self, kind: _Kind, work: Work) -> list[float]:
        """Bytes per token of each tensor that a layer keeps."""
        width, hidden = work.dtype_bytes, self._hidden
        blocks: list[float] = []
        for name, shape, owner in kind:
            if len(shape) == 1 and name.endswith("weight") and shape[0] == hidden and "orm" in owner + name:
                blocks += 2 * [hidden * width]
                if ("RMS" in owner or "Rms" in owner) and not self._is_lean(_LEAN_NORM, work):
                    blocks.append(hidden * (4 if width == 2 else width))  # what is normed, in fp32
            elif len(shape) == 1 and shape[0] == hidden and name.startswith(("ln_", "ln.")) and name.endswith("weight"):
                blocks += 2 * [hidden * width]
        if any("att" in name for name, _, _ in kind):
            blocks += self._attention(kind, work)
        blocks += [size / work.tensor for size in self._feed_forward(kind, work)]
        blocks += self._experts(kind, width)
        mask = width if work.device == "cpu" else 1
        return blocks + 2 * [hidden * mask] * min(1, self._dropouts)

    def _attention(self, kind: _Kind, work: Work) -> list[float]:
        width = work.dtype_bytes
        query, key, value, output = self._attention_widths
        if work.attention not in _FLASH:
            # Beside a mask, transformers repeats the keys and values of a group for each of its heads.
            key, value = (part * self._heads / self._groups for part in (key, value))
        kept = [query * width, key * width, value * width, output * width]
        if any("q_norm" in name or "k_norm" in name for name, _, _ in kind):
            kept += 2 * [query * width, key * width]
        scores = self._heads * work.length
        if self._by_hand(work):
            # torch's CPU kernel has no dropout: scores, mask and product exist in fp32, queries and keys are scaled.
            kept += 3 * [scores * 4] + [query * width, key * width]
        elif work.attention == "eager":
            # The softmax is fp32, what it gives in 16 bits is kept too, by the product or by dropout's output.
            kept += [scores * 4, *([scores * width] if width < 4 else [])]
            if self._attention_dropout:
                kept += [scores * (width if work.device == "cpu" else 1), *([scores * width] if width == 4 else [])]
        # Each layer makes a mask of the scores' format out of the one of booleans, for all of its heads.
        mask = [work.length * work.sequence * width] if work.attention == "sdpa" and not self._by_hand(work) else []
        return [size / work.tensor for size in kept] + mask

    def _by_hand(self, work: Work) -> bool:
        """Whether scaled-dot-product attention falls back to plain products: on CPUs, with dropout."""
        return work.device == "cpu" and self._attention_dropout and work.attention != "eager"

    def _feed_forward(self, kind: _Kind, work: Work) -> list[float]:
        """Bytes per token of what the dense feed-forward keeps, before tensor ranks share it."""
        wide: list[float] = []
        for name, shape, owner in kind:
            if len(shape) == 2 and "att" not in name and ".experts." not in f".{name}" and "router" not in name:
                inputs, outputs = shape if owner == "Conv1D" else shape[::-1]
                router = name.endswith(("mlp.gate.weight", "moe.gate.weight"))
                if inputs == self._hidden and not router and (outputs > 1 or name.endswith("gate.weight")):
                    wide.append(outputs * work.dtype_bytes)
        # Lean ones keep gate and up alone.
        return wide * (1 if self._is_lean(_LEAN_GATED, work) else self._kept_by_function)

    def _is_lean(self, code: str, work: Work) -> bool:
        return work.lean and code in modeling_source(self._arch)

    def _experts(self, kind: _Kind, width: int) -> list[float]:
        """Bytes per token of a mixture's experts, which every tensor rank has whole."""
        visited = _number(self._outline.config, "num_experts_per_tok", "moe_topk", "num_experts_per_token") or 0
        wide = [max(shape[1:]) if len(shape) == 3 else 0 for name, shape, _ in kind if ".experts." in f".{name}"]
        if not visited or not wide:
            return []
        up = max((shape[1] for name, shape, _ in kind if "up_proj" in name and len(shape) == 3), default=max(wide))
        return [visited * (self._kept_by_function * up + 2 * self._hidden) * width]

    @property
    def _kept_by_function(self) -> int:
        """Tensors that a feed-forward keeps for each element that its first products give."""
        if is_gated(self._arch):
            return 2  # gate, activated gate, up, and the product of the two: four for two
        return _KEPT_BY_FUNCTION.get(self._function, _KEPT_BY_KERNELS)


def _inner(parameter: Parameter) -> str:
    """Name within the layer."""
    parts = parameter.name.split(".")
    index = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[index + 1 :])


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of the config's values under `names` that is a positive whole number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
