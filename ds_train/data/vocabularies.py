"""Which vocabulary size pays: BPE tokenizers of several sizes trained on the data, and what a byte then costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_train.config import RunConfig
from ds_train.data.prepare import held_out
from ds_train.data.sources import documents
from ds_train.data.tokenizer import Encoder, train_bpe, vocabulary_size
from ds_train.errors import user_error
from ds_train.plan.model_size import model_size

_COUNTED = 0.1  # of the documents; the rest trains the tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer of the table.

    `tokens_per_byte` is counted on documents that it wasn't trained on. `parameters` and `flops_per_byte` (training,
    forward and backward) are the recipe's model with this vocabulary; None where the model's sizes aren't known.
    """

    size: int
    tokens_per_byte: float
    parameters: int | None
    flops_per_byte: float | None


def compare_vocabularies(run: RunConfig, sizes: Sequence[int], max_bytes: int) -> list[Vocabulary]:
    """A row per size, smallest first, from the first `max_bytes` of the recipe's text.

    Raises:
        UserError: the model has weights, and with them a vocabulary; a size below the 259 of bytes; too little text.
    """
    if run.model.path is not None:
        reason = "pretrained weights know the tokens of their own tokenizer"
        raise user_error("model.path", reason, "compare vocabularies for a model from scratch", run.model.path)
    too_small = [size for size in sizes if size < 260]
    if too_small:
        raise user_error(
            "--sizes", "a byte-level BPE has 259 tokens before its first merge", "260 or more", too_small[0]
        )
    texts = list(_texts(run, max_bytes))
    trained_on = [text for number, text in enumerate(texts) if not held_out(number, _COUNTED)]
    counted = [text for number, text in enumerate(texts) if held_out(number, _COUNTED)]
    if not trained_on or not counted:
        raise user_error("data.source", "too few documents to train on some and count on others", "give at least 10")
    rows = [_row(run, trained_on, counted, size) for size in sorted(set(sizes))]
    # Little text has fewer merges than the largest sizes ask for.
    return list({row.size: row for row in rows}.values())


def flops_per_token(run: RunConfig, vocabulary: int) -> tuple[int | None, float | None]:
    """(parameters, training FLOPs per token) of the recipe's model with a vocabulary of that size.

    6 per matrix parameter and 12 x hidden x length a layer (arXiv 2204.02311, appendix B); an embedding is a lookup.
    """
    size = model_size(run.model, run.task.kind, vocabulary)
    if size is None or size.parameters is None or size.hidden_size is None or size.num_hidden_layers is None:
        return None, None
    rows = 1 if size.tied else 2
    width = size.embedding_size or size.hidden_size
    matrices = size.parameters - (rows - 1) * vocabulary * width
    attention = 12.0 * size.num_hidden_layers * size.hidden_size * run.data.sequence_length
    return size.parameters, 6.0 * matrices + attention


def _row(run: RunConfig, trained_on: list[str], counted: list[str], size: int) -> Vocabulary:
    tokenizer = train_bpe(trained_on, size)
    actual = vocabulary_size(tokenizer)
    rows = Encoder(tokenizer, own=True, classify=False, length=0)(counted)
    tokens_per_byte = sum(map(len, rows)) / sum(len(text.encode()) for text in counted)
    parameters, flops = flops_per_token(run, actual)
    return Vocabulary(actual, tokens_per_byte, parameters, None if flops is None else flops * tokens_per_byte)


def _texts(run: RunConfig, max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for document in documents(run.data, run.task):
        if document.text:
            yield document.text
            left -= len(document.text.encode())
        if left <= 0:
            return
