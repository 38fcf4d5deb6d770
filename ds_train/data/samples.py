"""Tokens -> samples: packed windows, or one document (or piece of one) each.

Shapes: T tokens of a window. A sample is a dict of int64 arrays. Labels of causal models are shifted here: the label at
a position is the token that follows it in the same document.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ds_train.data.prepare import TokenFile

IGNORE_INDEX = -100

Sample = dict[str, NDArray[np.int64]]


class Samples(Protocol):
    """A data set of samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class PackedSamples:
    """Windows of `length` tokens over all documents, end to end; the last incomplete window is left out.

    input_ids (T,), labels (T,) shifted within each document, position_ids (T,) restarting at each document.
    No token is lost between windows: the last label of a window is the first token of the next one.
    """

    def __init__(self, file: TokenFile, length: int) -> None:
        self._file, self._length = file, length

    def __len__(self) -> int:
        return len(self._file.tokens) // self._length

    def __getitem__(self, index: int) -> Sample:
        start = index * self._length
        stop = start + self._length
        tokens = np.asarray(self._file.tokens[start : stop + 1], dtype=np.int64)
        starts = self._document_starts(start, stop)
        places = np.arange(start, stop)
        first_of = starts[np.searchsorted(starts, places, side="right") - 1]
        labels = np.full(self._length, IGNORE_INDEX, dtype=np.int64)
        labels[: len(tokens) - 1] = tokens[1:]
        ends = self._file.offsets[1:]
        low, high = np.searchsorted(ends, [start + 1, stop + 1])
        labels[ends[low:high] - 1 - start] = IGNORE_INDEX  # nothing follows the last token of a document
        return {"input_ids": tokens[: self._length], "labels": labels, "position_ids": places - first_of}

    def documents_of(self, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, one past its last) of every document in window `index`, within the document."""
        start, stop = index * self._length, (index + 1) * self._length
        offsets = self._file.offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        found = []
        for document in range(first, self._file.num_documents):
            low, high = int(offsets[document]), int(offsets[document + 1])
            if low >= stop:
                break
            if high > low:
                found.append((document, max(start, low) - low, min(stop, high) - low))
        return found

    def _document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Places where documents begin in the window; the window's own start counts as one."""
        low, high = np.searchsorted(self._file.offsets, [start + 1, stop])
        return np.concatenate([[start], np.unique(self._file.offsets[low:high])])


class PieceSamples:
    """Each document cut into pieces of at most `length` tokens: input_ids (<= T,), labels shifted."""

    def __init__(self, file: TokenFile, length: int) -> None:
        self._file, self._length = file, length
        pieces = -(-np.diff(file.offsets) // length)
        self._document = np.repeat(np.arange(file.num_documents), pieces)
        self._first_piece = np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, index: int) -> Sample:
        document = int(self._document[index])
        start = int(self._file.offsets[document]) + (index - int(self._first_piece[document])) * self._length
        stop = min(start + self._length, int(self._file.offsets[document + 1]))
        tokens = np.asarray(self._file.tokens[start:stop], dtype=np.int64)
        labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int64)
        following = np.asarray(self._file.tokens[start + 1 : stop + 1], dtype=np.int64)
        labels[: len(following)] = following
        if stop == self._file.offsets[document + 1]:
            labels[-1] = IGNORE_INDEX
        return {"input_ids": tokens, "labels": labels}


class LabelledSamples:
    """One document each: input_ids (<= T,), labels () the class."""

    def __init__(self, file: TokenFile, length: int) -> None:
        self._file, self._length = file, length

    def __len__(self) -> int:
        return self._file.num_documents

    def __getitem__(self, index: int) -> Sample:
        if self._file.labels is None:
            raise ValueError("the prepared data has no labels")
        start, stop = (int(place) for place in self._file.offsets[index : index + 2])
        tokens = np.asarray(self._file.tokens[start : min(stop, start + self._length)], dtype=np.int64)
        return {"input_ids": tokens, "labels": np.asarray(self._file.labels[index])}


class MaskedSamples:
    """Masked-language-model samples over packed windows or pieces (arXiv 1810.04805, section 3.1).

    Which tokens are hidden is a pure function of (seed, place), where place is the sample's place in the run, so a
    sample is masked differently in every epoch and the same in every layout.
    """

    def __init__(
        self, samples: Samples, fraction: float, vocabulary: int, mask_token: int, special: frozenset[int], seed: int
    ) -> None:
        self._samples, self._fraction, self._vocabulary = samples, fraction, vocabulary
        self._mask_token, self._seed = mask_token, seed
        self._special = np.array(sorted(special), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def at(self, index: int, place: int) -> Sample:
        """Sample `index`, masked as the run's `place`-th sample: 80 % mask token, 10 % any token, 10 % kept."""
        sample = self._samples[index]
        tokens = sample["input_ids"].copy()
        random = np.random.Generator(np.random.Philox(key=[self._seed, place]))
        draws, fate, other = random.random(len(tokens)), random.random(len(tokens)), random.integers(0, self._vocabulary, len(tokens))
        draws[np.isin(tokens, self._special)] = np.inf
        chosen = draws < self._fraction
        if not chosen.any() and np.isfinite(draws).any():
            chosen[np.argmin(draws)] = True
        labels = np.where(chosen, tokens, IGNORE_INDEX)
        tokens = np.where(chosen & (fate < 0.8), self._mask_token, tokens)
        tokens = np.where(chosen & (fate >= 0.8) & (fate < 0.9), other, tokens)
        return {**sample, "input_ids": tokens, "labels": labels}
