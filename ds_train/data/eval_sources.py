"""Held-out samples of one source: which documents are of it, which samples have text of those, and which labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from ds_train.data.prepare import TokenFile
from ds_train.data.samples import IGNORE_INDEX, MaskedSamples, Sample, Samples
from ds_train.errors import user_error


@dataclass(frozen=True)
class EvalSource:
    """`documents` (of the split,) says which are of the source `name`; `samples` are the first with text of those."""

    name: str
    documents: NDArray[np.bool_]
    samples: list[int]

    def alone(self, sample: Sample, index: int, samples: Samples | MaskedSamples) -> Sample:
        """`sample`, number `index` of `samples`, with no label of other sources."""
        labels = sample["labels"]
        if labels.ndim == 0:  # a class, of the one document of a sample that is of the source
            return sample
        others, passed = np.ones(len(labels), dtype=bool), 0
        for document, start, stop in samples.documents_of(index):
            others[passed : passed + stop - start] = not self.documents[document]
            passed += stop - start
        return {**sample, "labels": np.where(others, IGNORE_INDEX, labels)}


def find_sources(patterns: Mapping[str, str], samples: Samples | MaskedSamples, most: int) -> list[EvalSource]:
    """The sources that `patterns` name (`track.eval_sources`), each with its first `most` samples.

    Raises:
        UserError: no sample has text of one of them.
    """
    of_document = _source_of_documents(patterns, samples.file)
    found: list[list[int]] = [[] for _ in patterns]
    for index in range(len(samples)):
        for source in {int(of_document[document]) for document, *_ in samples.documents_of(index)} - {-1}:
            if len(found[source]) < most:
                found[source].append(index)
        if all(len(some) == most for some in found):
            break
    for (name, pattern), some in zip(patterns.items(), found, strict=True):
        if not some:
            example = samples.file.source(0)
            reason = f"no held-out text comes from there; some comes from {example}"
            raise user_error(f"track.eval_sources.{name}", reason, "correct the pattern, or hold out more", pattern)
    return [EvalSource(name, of_document == place, found[place]) for place, name in enumerate(patterns)]


def _source_of_documents(patterns: Mapping[str, str], file: TokenFile) -> NDArray[np.int64]:
    """Place of the first pattern that fits each document; -1 where none does."""
    places = (
        next((place for place, pattern in enumerate(patterns.values()) if _fits(file.source(document), pattern)), -1)
        for document in range(file.num_documents)
    )
    return np.fromiter(places, dtype=np.int64, count=file.num_documents)


def _fits(source: str, pattern: str) -> bool:
    """A pattern may leave out the beginning of a path, and the line or row behind it."""
    return any(fnmatchcase(f"/{form}", f"*/{pattern}") for form in (source, re.sub(r":\d+$", "", source)))
