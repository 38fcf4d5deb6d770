"""The teacher: a whole transformers model on this rank, or its likeliest logits on disk.

Shapes: B samples, T tokens, N = B x T, D the teacher's hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ds_train.compress.distill_loss import Targets, TeacherHead, TeacherLogits
from ds_train.compress.teacher_shares import Shares, whole
from ds_train.config import RunConfig
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.cpu_attention import tiles_are_faster, use_tiled_attention
from ds_train.models.cpu_products import fp32_products_are_faster, use_fp32_products
from ds_train.models.load import AUTO_CLASSES, DTYPES, position_of_first
from ds_train.models.tasks import TOKEN_IDS, Batch, model_inputs, plain_head
from ds_train.models.token_drop import repeated_layers
from ds_train.parallel.check import check_documents_apart
from ds_train.plan.facts import has_tokenizer
from ds_train.plan.model_size import other_order

KEY = "compress.distill.teacher"


def teacher_path(run: RunConfig) -> str:
    """Folder or hub id of the recipe's teacher."""
    return str(run.compress.distill.teacher or run.model.path)


def teacher_revision(run: RunConfig) -> str:
    """Which of a hub id's revisions it is: of the run's own start the recipe's."""
    return (run.model.revision if run.compress.distill.teacher is None else None) or "main"


def check_teacher(run: RunConfig, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of the teacher, if it speaks of the same tokens and labels as the model of `config`.

    Raises:
        UserError: it can't be loaded, or doesn't.
    """
    path = teacher_path(run)
    try:
        theirs = transformers.AutoConfig.from_pretrained(
            path, revision=teacher_revision(run), trust_remote_code=run.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from error
    packing = getattr(theirs, "quantization_config", None) or {}
    if packing.get("quant_method") == "compressed-tensors":
        reason = "its weights are packed integers, which don't run beside a model"
        raise user_error(KEY, reason, "give the folder of the full weights", path)
    ours, text = config.get_text_config(), theirs.get_text_config()
    if run.task.kind == "sequence-classification":
        if theirs.num_labels != config.num_labels:
            _refuse(run, f"it has {theirs.num_labels} labels, and the model {config.num_labels}", path)
        swapped = other_order(config.id2label or {}, theirs.id2label or {})
        if swapped is not None:
            _refuse(run, swapped, path)
        # GPT-like classifiers look for the last token that isn't padding: another one in every micro-batch.
        own_pad, pad = (getattr(one, "pad_token_id", None) for one in (config, theirs))
        if pad != own_pad:
            _refuse(run, f"its pad_token_id is {pad}, and the model's {own_pad}", path)
    elif text.vocab_size != ours.vocab_size:
        _refuse(run, f"its vocabulary is {text.vocab_size:,} tokens, and the model's {ours.vocab_size:,}", path)
    positions = getattr(text, "max_position_embeddings", None)
    own_first, first = map(position_of_first, (config, theirs))
    if isinstance(positions, int) and 0 < positions < run.data.sequence_length + first:  # some say -1 for no end
        _refuse(run, f"it takes {positions - first} tokens, and data.sequence_length={run.data.sequence_length}", path)
    given = run.task.kind != "sequence-classification" and run.data.rows_have_documents
    if given and first != own_first:
        _refuse(run, f"it is given positions, and counts them from {first}, the model from {own_first}", path)
    _check_tokens(run, path, tokenizer)
    return theirs


class Teacher:
    """A model that no optimizer knows of: whole on this rank, or in shares on the ranks that run it together."""

    def __init__(self, run: RunConfig, device: Any, group: Any = None, layers: int | None = None) -> None:
        """Collective over the ranks of `group`, None for all, where the recipe's teacher is in shares.

        Args:
            layers: those that are needed, from the first; None keeps all, and gives targets.

        Raises:
            UserError: it can't be loaded, or lacks the head of the recipe's task.
        """
        section, path = run.compress.distill, teacher_path(run)
        dtype = DTYPES[run.precision.dtype if section.dtype == "auto" else section.dtype]
        shares = None
        if section.placement != "memory":
            shares = Shares(dtype, section.placement == "offloaded", group)
        try:
            with contextlib.nullcontext() if shares is None else shares.loading():
                loaded, info = AUTO_CLASSES[run.task.kind].from_pretrained(
                    path, revision=teacher_revision(run), dtype=dtype, output_loading_info=True,
                    trust_remote_code=run.model.trust_remote_code,
                )  # fmt: skip
        except (OSError, ValueError) as error:
            raise _cannot_load(path, error) from error
        if info["missing_keys"]:
            _refuse(run, f"it isn't trained for {run.task.kind}: it has no {max(info['missing_keys'])}", path)
        self.model: PreTrainedModel = loaded.eval().requires_grad_(False)
        self.model.config.use_cache = False
        if layers is not None:
            _leave_layers(self.model, layers)
        self._running = contextlib.nullcontext if shares is None else shares.running
        if shares is None:
            self.model.to(device)
        else:
            shares.divide(self.model)
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(device)
        if fp32_products_are_faster(device, dtype):
            use_fp32_products(self.model)
        elif tiles_are_faster(device, dtype):
            use_tiled_attention(self.model)
        if run.task.kind != "sequence-classification" and run.data.rows_have_documents:
            with self._running():
                _check_documents(run, self.model, path)
        self.layers: list[nn.Module] = repeated_layers(self.model)
        """Its repeated blocks."""
        self._head = plain_head(self.model)
        if self._head is not None:
            self._head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """Let the hooks on its layers see the micro-batch."""
        with self._running():
            self.model(**_inputs(batch))

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """What it says about the micro-batch's tokens, in the order of the flattened labels."""
        with self._running():
            output = self.model(**_inputs(batch)).logits
        flat = output.reshape(-1, output.shape[-1])
        if self._head is None:
            return TeacherLogits(flat)
        weight_VD = whole(self._head.weight)
        assert weight_VD is not None
        return TeacherHead(flat, weight_VD, whole(self._head.bias))


def _leave_layers(model: nn.Module, count: int) -> None:
    """Keep the first `count` of the repeated blocks."""
    layers = repeated_layers(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and [*module] == layers:
            del module[count:]


def _inputs(batch: Batch) -> dict[str, Tensor]:
    inputs = model_inputs(batch)
    if TOKEN_IDS in batch:  # in a pipeline `input_ids` are what the stage before has made of them
        inputs["input_ids"] = batch[TOKEN_IDS]
    return inputs


def paired_layers(
    pairs: Sequence[tuple[int, int]] | None, ours: int, theirs: int, key: str = "hidden_layers"
) -> list[tuple[int, int]]:
    """(layer of the model, layer of the teacher), as given or each at the same share of the depth.

    Raises:
        UserError: there is no such layer.
    """
    if pairs is None:
        return [(layer, (layer + 1) * theirs // ours - 1 if theirs >= ours else layer * theirs // ours)
                for layer in range(ours)]  # fmt: skip
    for own, other in pairs:
        if own >= ours or other >= theirs:
            reason = f"the model has {ours} layers and the teacher {theirs}, counted from 0"
            raise user_error(f"compress.distill.{key}", reason, "give layers that are there", [own, other])
    return list(pairs)


def first_tensor(output: Any) -> Tensor:
    """The hidden states among what a layer gives."""
    return output[0] if isinstance(output, tuple) else output


def _check_documents(run: RunConfig, teacher: PreTrainedModel, path: str) -> None:
    """Refuse one that would see the other documents of a row, which the model doesn't."""
    plain = run.model.model_copy(update={"attention": "auto"})
    try:
        check_documents_apart(run.model_copy(update={"model": plain}), teacher.config, teacher)
    except UserError as error:
        _refuse(run, error.problems[0].reason, path)


def _check_tokens(run: RunConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare tokens one by one, where the teacher has a tokenizer beside it."""
    if run.compress.distill.teacher is None or not has_tokenizer(path):
        return
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=run.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from error
    words = theirs.get_vocab()
    other = next((word for word, token in tokenizer.get_vocab().items() if words.get(word) != token), None)
    if other is not None:
        _refuse(run, f"its tokenizer is another one: {other!r} is token {words.get(other)} to it", path)


def _refuse(run: RunConfig, reason: str, path: str) -> None:
    raise user_error(KEY, reason, "give a teacher of the same task and tokens", path)


def _cannot_load(path: str, error: Exception) -> UserError:
    fix = "give a folder with config.json and weights, or a hub id on a machine that reaches the hub"
    return user_error(KEY, f"no model can be loaded from there ({first_line(error)})", fix, path)
