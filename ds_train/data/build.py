"""The recipe's training and held-out batches over prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.data.batches import Batches, Collator
from ds_train.data.eval_sources import EvalSource, find_sources
from ds_train.data.order import Order
from ds_train.data.prepare import TokenFile, open_split, prepared_tokenizer, read_manifest
from ds_train.data.samples import FittedSamples, LabelledSamples, MaskedSamples, PackedSamples, PieceSamples, Samples
from ds_train.errors import UserError, user_error


@dataclass(frozen=True)
class DataBundle:
    """Batches of this rank; `validation` is None where nothing is held out. `folder` is the prepared data.

    `packing_efficiency` is the share of the training windows that isn't padding; None where samples aren't packed.
    `eval_sources` are those of `track.eval_sources`.
    """

    train: Batches
    validation: Batches | None
    samples_per_epoch: int
    tokenizer: Any
    folder: Path
    manifest: dict[str, Any]
    packing_efficiency: float | None = None
    eval_sources: Sequence[EvalSource] = ()


def load_data(
    run: RunConfig, *, folder: Path, tokenizer: Any, data_rank: int, data_ranks: int, micro_samples: int,
    eval_micro_samples: int, first_position: int = 0,
) -> DataBundle:  # fmt: skip
    """Open prepared data for one data rank. `first_position`: of position ids, for models that count from another one.

    Raises:
        UserError: fewer training tokens than one sample, nothing held out of a source that is to be evaluated, or
            prepared files that are damaged.
    """
    collate = Collator(
        pad_token=padding_token(tokenizer),
        length=run.data.sequence_length,
        block_mask=run.task.kind == "masked-lm",
        padding_free=run.data.padding_free,
        first_position=first_position,
    )

    def batches(split: str, micro: int) -> tuple[Batches | None, Samples | MaskedSamples | None]:
        samples = open_samples(run, folder, split, tokenizer)
        if samples is None:
            return None, None
        if len(samples) == 0:
            raise _too_short(run.data.sequence_length, len(samples.file.tokens), split)
        dealt = Batches(
            samples, collate, Order(len(samples), run.seed), global_samples=run.batch.global_samples,
            micro_samples=micro, data_rank=data_rank, data_ranks=data_ranks,
            name_samples=split == "train" and (run.token_drop.kind != "none" or run.compress.distill.cache_top > 0),
        )  # fmt: skip
        return dealt, samples

    train, samples = batches("train", micro_samples)
    if train is None or samples is None:
        raise _too_short(run.data.sequence_length, 0, "train")
    validation, held_out = batches("validation", eval_micro_samples)
    patterns = run.track.eval_sources
    sources = find_sources(patterns, held_out, run.track.eval_samples) if patterns and held_out is not None else ()
    return DataBundle(
        train, validation, len(samples), tokenizer, folder, read_manifest(folder), packing_efficiency(samples), sources
    )


def open_samples(run: RunConfig, folder: Path, split: str, tokenizer: Any = None) -> Samples | MaskedSamples | None:
    """The samples of a split of prepared data; None where the split has no tokens. `tokenizer`: the prepared one."""
    file = open_split(folder, split)
    if file is None:
        return None
    known = tokenizer or prepared_tokenizer(folder, run.model.trust_remote_code)
    return _samples(run, file, known, allow_short=split == "validation")


def packing_efficiency(samples: Samples | MaskedSamples) -> float | None:
    """Share of the windows' tokens that isn't padding; None for samples that aren't fitted into windows."""
    plain = samples.plain if isinstance(samples, MaskedSamples) else samples
    return plain.efficiency if isinstance(plain, FittedSamples) else None


def padding_token(tokenizer: Any) -> int:
    """The token that fills what is left of a row; any will do, since no label and no attention goes there."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _samples(run: RunConfig, file: TokenFile, tokenizer: Any, allow_short: bool) -> Samples | MaskedSamples:
    length = run.data.sequence_length
    if run.task.kind == "sequence-classification":
        return LabelledSamples(file, length)
    plain: Samples
    if not run.data.packing:
        plain = PieceSamples(file, length)
    elif run.data.packing_by == "stream":
        plain = PackedSamples(file, length, allow_short)
    else:
        best = run.data.packing_by == "best-fit"
        plain = FittedSamples(file, length, best, padding_token(tokenizer))
    if run.task.kind == "causal-lm":
        return plain
    special, tokens = frozenset(tokenizer.all_special_ids), tokenizer.get_vocab().values()
    return MaskedSamples(plain, run.task.mask_fraction, tokens, tokenizer.mask_token_id, special, run.seed)


def _too_short(length: int, tokens: int, split: str) -> UserError:
    if split == "validation":
        reason = f"the held-out data has {tokens} tokens, less than one sample"
        return user_error("data.sequence_length", reason, "hold out more, or choose data.packing_by=stream", length)
    fix = "give more text" + (f", or set data.sequence_length={tokens} or less" if tokens >= 8 else "")
    return user_error(
        "data.sequence_length", f"the training data has {tokens} tokens, less than one sample", fix, length
    )
