"""`data`: where text comes from, how it becomes tokens, and how tokens become samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_train.config.base import Place, Section

BYTES_VOCABULARY = 259
"""Tokens of the embedded tokenizer: 256 bytes, end of text, padding, mask."""


class DataSection(Section):
    """Source, tokenizer and sample shape. The order of samples is a pure function of (seed, position)."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "tsv", "hub"] = "stdlib"
    """`stdlib` reads the sources of the running Python's standard library (nothing is downloaded);
    `text`, `jsonl`, `parquet` and `tsv` read local files; `hub` reads a `datasets` hub id."""

    path: Place | None = None
    """File, folder (all below it, but hidden names) or glob of the local sources; hub id for `hub`. `text` takes one
    document per file."""

    subset: str | None = None
    """Configuration name of a hub data set (`wikitext-103-raw-v1`)."""

    split: str = "train"
    """Split of a hub data set that is trained on."""

    streaming: bool = False
    """Read a hub data set as a stream, so that it is never stored whole; needs `max_documents` if it is endless."""

    text_column: str = "text"
    """Column that holds the text; a number counts from 0 in a tsv without a header line."""

    label_column: str = "label"
    """Column that holds the integer label of `sequence-classification`; a number as in `text_column`."""

    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents. `null` reads all."""

    validation_path: str | None = None
    """Held-out file, folder or glob of the same kind as `path`. `null` holds out a part of the source."""

    validation_split: str | None = None
    """Split of a hub data set that is held out. `null` holds out a part of `split`."""

    validation_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Share of documents that is held out where no validation path or split is given; 0 trains without evaluation."""

    tokenizer: Place = "bytes"
    """`bytes` (embedded, vocabulary 259), a hub id or folder, or `model` for the one beside `model.path`.
    Left out where `train_vocabulary` trains a new one."""

    train_vocabulary: int | None = Field(default=None, ge=260)
    """Train a byte-level BPE tokenizer of this vocabulary size on the source, instead of loading one."""

    sequence_length: int = Field(default=512, ge=8)
    """Tokens per sample: the window of packed samples, the longest sample otherwise (longer texts are cut)."""

    packing: bool = True
    """Fill windows with several documents, without attention across them; position ids restart at each.
    Only for the language-model tasks; `sequence-classification` always pads."""

    packing_by: Literal["stream", "first-fit", "best-fit"] = "stream"
    """How windows are filled. `stream`: documents end to end, cut at the window's edge; no padding. `first-fit` and
    `best-fit` (arXiv 2404.10830): whole documents, or pieces of `sequence_length`, with padding where none fits."""

    padding_free: bool = False
    """Without packing: lay the samples of a micro-batch end to end in one row instead of padding each to the longest.
    For fine-tuning language models on texts of uneven length."""

    cache_dir: str = "~/.cache/ds_train"
    """Folder of the prepared, memory-mapped tokens. Prepared data are reused when source and tokenizer are the same:
    files by path, size and time of change, a data set on the hub by its id alone. Nothing removes them."""

    workers: int = Field(default=4, ge=0)
    """Steps whose batches a thread loads ahead of the step loop, some at a time; 0 loads them inside the loop."""

    @property
    def holds_out(self) -> bool:
        """Whether there is something to evaluate on."""
        named = self.validation_path is not None or self.validation_split is not None
        return named or self.validation_fraction > 0

    @property
    def rows_have_documents(self) -> bool:
        """Whether a row of a language model's micro-batch may hold several documents."""
        return self.packing or self.padding_free

    @property
    def pads_rows(self) -> bool:
        """Whether a row of several documents may end in padding."""
        return self.padding_free or (self.packing and self.packing_by != "stream")
