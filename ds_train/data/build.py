"""The recipe's training and held-out batches over prepared data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.data.batches import Batches, Collator
from ds_train.data.order import Order
from ds_train.data.prepare import TokenFile, open_split, read_manifest
from ds_train.data.samples import LabelledSamples, MaskedSamples, PackedSamples, PieceSamples, Samples
from ds_train.errors import UserError, user_error


@dataclass(frozen=True)
class DataBundle:
    """Batches of this rank; `validation` is None where nothing is held out. `folder` is the prepared data."""

    train: Batches
    validation: Batches | None
    samples_per_epoch: int
    tokenizer: Any
    folder: Path
    manifest: dict[str, Any]


def load_data(
    run: RunConfig, *, folder: Path, tokenizer: Any, data_rank: int, data_ranks: int, micro_samples: int,
    eval_micro_samples: int,
) -> DataBundle:  # fmt: skip
    """Open prepared data for one data rank.

    Raises:
        UserError: fewer training tokens than one sample, or prepared files that are damaged.
    """
    collate = Collator(
        pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        length=run.data.sequence_length,
        block_mask=run.task.kind == "masked-lm",
    )

    def batches(split: str, micro: int) -> tuple[Batches | None, int]:
        file = open_split(folder, split)
        if file is None:
            return None, 0
        samples = _samples(run, file, tokenizer, allow_short=split == "validation")
        if len(samples) == 0:
            raise _too_short(run.data.sequence_length, len(file.tokens))
        dealt = Batches(
            samples, collate, Order(len(samples), run.seed), global_samples=run.batch.global_samples,
            micro_samples=micro, data_rank=data_rank, data_ranks=data_ranks,
        )  # fmt: skip
        return dealt, len(samples)

    train, samples_per_epoch = batches("train", micro_samples)
    if train is None:
        raise _too_short(run.data.sequence_length, 0)
    validation, _ = batches("validation", eval_micro_samples)
    return DataBundle(train, validation, samples_per_epoch, tokenizer, folder, read_manifest(folder))


def _samples(run: RunConfig, file: TokenFile, tokenizer: Any, allow_short: bool) -> Samples | MaskedSamples:
    length = run.data.sequence_length
    if run.task.kind == "sequence-classification":
        return LabelledSamples(file, length)
    plain: Samples = PackedSamples(file, length, allow_short) if run.data.packing else PieceSamples(file, length)
    if run.task.kind == "causal-lm":
        return plain
    special = frozenset(tokenizer.all_special_ids)
    return MaskedSamples(plain, run.task.mask_fraction, len(tokenizer), tokenizer.mask_token_id, special, run.seed)


def _too_short(length: int, tokens: int) -> UserError:
    fix = "give more text" + (f", or set data.sequence_length={tokens} or less" if tokens >= 8 else "")
    return user_error(
        "data.sequence_length", f"the training data has {tokens} tokens, less than one sample", fix, length
    )
