"""The recipe's training and held-out batches over prepared data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.data.batches import Batches, Collator
from ds_train.data.order import Order
from ds_train.data.prepare import TokenFile, open_split
from ds_train.data.samples import LabelledSamples, MaskedSamples, PackedSamples, PieceSamples, Samples
from ds_train.errors import user_error


@dataclass(frozen=True)
class DataBundle:
    """Batches of this rank; `validation` is None where nothing is held out."""

    train: Batches
    validation: Batches | None
    samples_per_epoch: int


def load_data(
    run: RunConfig, *, folder: Path, tokenizer: Any, data_rank: int, data_ranks: int, micro_samples: int,
    eval_micro_samples: int,
) -> DataBundle:  # fmt: skip
    """Open prepared data for one data rank.

    Raises:
        UserError: fewer training tokens than one sample, or a tokenizer without a mask for `masked-lm`.
    """
    collate = Collator(
        pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        length=run.data.sequence_length,
        block_mask=run.task.kind == "masked-lm",
    )

    def batches(samples: Samples | MaskedSamples, micro: int) -> Batches:
        order = Order(len(samples), run.seed)
        return Batches(samples, collate, order, run.batch.global_samples, micro, data_rank, data_ranks)

    file = open_split(folder, "train")
    samples = _samples(run, file, tokenizer) if file is not None else []
    if file is None or len(samples) == 0:
        tokens = 0 if file is None else len(file.tokens)
        raise user_error(
            "data.sequence_length", f"the training data has {tokens} tokens, less than one sample",
            "give more text, or a smaller sequence_length", run.data.sequence_length,
        )  # fmt: skip
    held_out = open_split(folder, "validation")
    validation = _samples(run, held_out, tokenizer) if held_out is not None else []
    return DataBundle(
        train=batches(samples, micro_samples),
        validation=batches(validation, eval_micro_samples) if len(validation) else None,
        samples_per_epoch=len(samples),
    )


def _samples(run: RunConfig, file: TokenFile, tokenizer: Any) -> Any:
    length = run.data.sequence_length
    if run.task.kind == "sequence-classification":
        return LabelledSamples(file, length)
    plain: Samples = PackedSamples(file, length) if run.data.packing else PieceSamples(file, length)
    if run.task.kind == "causal-lm":
        return plain
    if tokenizer.mask_token_id is None:
        raise user_error(
            "data.tokenizer", "this tokenizer has no mask token, which masked-lm needs", "choose one that has",
            run.data.tokenizer,
        )  # fmt: skip
    special = frozenset(tokenizer.all_special_ids)
    return MaskedSamples(plain, run.task.mask_fraction, len(tokenizer), tokenizer.mask_token_id, special, run.seed)
