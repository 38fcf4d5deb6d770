"""Tokens -> samples: packed or fitted windows, or one document (or piece of one) each.

Shapes: T tokens of a window. A sample is a dict of int64 arrays. Labels of causal models are shifted here: the label at
a position is the token that follows it in the same document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ds_train.data.fit import fit_windows
from ds_train.data.prepare import TokenFile

IGNORE_INDEX = -100

Sample = dict[str, NDArray[np.int64]]

Span = tuple[int, int, int]
"""(document, first token, one past its last): a part of a document, places counted within it."""


class Samples(Protocol):
    """A data set of samples by number."""

    file: TokenFile

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def documents_of(self, index: int) -> list[Span]:
        """What sample `index` is made of, in order."""
        ...


class PackedSamples:
    """Windows of `length` tokens over all documents, end to end; the last incomplete window is left out.

    input_ids (T,), labels (T,) shifted within each document, position_ids (T,) restarting at each document.
    No token is lost between windows: the last label of a window is the first token of the next one.
    With `allow_short`, a file of fewer tokens than one window is one shorter window.
    """

    def __init__(self, file: TokenFile, length: int, allow_short: bool = False) -> None:
        tokens = len(file.tokens)
        self.file, self._length = file, min(length, tokens) if allow_short else length

    def __len__(self) -> int:
        return len(self.file.tokens) // self._length

    def __getitem__(self, index: int) -> Sample:
        start = index * self._length
        stop = start + self._length
        places = np.arange(start, stop)
        starts = self._document_starts(start, stop)
        first_of = starts[np.searchsorted(starts, places, side="right") - 1]
        tokens = _int64(self.file.tokens[start : stop + 1])
        labels = np.full(self._length, IGNORE_INDEX, dtype=np.int64)
        labels[: len(tokens) - 1] = tokens[1:]
        ends = self.file.offsets[1:]
        low, high = np.searchsorted(ends, [start + 1, stop + 1])
        labels[ends[low:high] - 1 - start] = IGNORE_INDEX  # nothing follows the last token of a document
        return {"input_ids": tokens[: self._length], "labels": labels, "position_ids": places - first_of}

    def documents_of(self, index: int) -> list[Span]:
        start, stop = index * self._length, (index + 1) * self._length
        offsets = self.file.offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        spans = [_span(self.file, document, start, stop) for document in range(first, last)]
        return [(document, low, high) for document, low, high in spans if high > low]

    def _document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Places where documents begin in the window; the window's own start counts as one."""
        low, high = np.searchsorted(self.file.offsets, [start + 1, stop])
        return np.concatenate([[start], self.file.offsets[low:high]])


class PieceSamples:
    """Each document cut into pieces of at most `length` tokens: input_ids (<= T,), labels (<= T,) shifted."""

    def __init__(self, file: TokenFile, length: int) -> None:
        self.file, self._length = file, length
        self._first_piece = np.concatenate([[0], np.cumsum(-(-np.diff(file.offsets) // length))])

    def __len__(self) -> int:
        return int(self._first_piece[-1])

    def __getitem__(self, index: int) -> Sample:
        document, start, stop = self._place(index)
        tokens = _int64(self.file.tokens[start : min(stop + 1, int(self.file.offsets[document + 1]))])
        labels = np.full(stop - start, IGNORE_INDEX, dtype=np.int64)
        labels[: len(tokens) - 1] = tokens[1:]
        return {"input_ids": tokens[: stop - start], "labels": labels}

    def documents_of(self, index: int) -> list[Span]:
        document, start, stop = self._place(index)
        return [_span(self.file, document, start, stop)]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every piece: (pieces,)."""
        counts = np.diff(self._first_piece)
        lengths = np.full(len(self), self._length, dtype=np.int64)
        some = counts > 0
        lasts = self._first_piece[1:][some] - 1
        lengths[lasts] = (np.diff(self.file.offsets) - (counts - 1) * self._length)[some]
        return lengths

    def _place(self, index: int) -> tuple[int, int, int]:
        """(document, first token, one past the last) of piece `index`, in the whole file."""
        document = int(np.searchsorted(self._first_piece, index, side="right")) - 1
        start = int(self.file.offsets[document]) + (index - int(self._first_piece[document])) * self._length
        return document, start, min(start + self._length, int(self.file.offsets[document + 1]))


class FittedSamples:
    """Windows of `length` tokens filled with whole pieces of documents, and with padding where none fits.

    input_ids (T,), labels (T,) shifted within each piece, position_ids (T,) restarting at each piece. Each padding
    token has position 0 and no label, so it is a document by itself that nobody sees. Pieces of one token, which have
    nothing to predict, are left out.
    """

    def __init__(self, file: TokenFile, length: int, best: bool, pad_token: int) -> None:
        self.file, self._length, self._pad_token = file, length, pad_token
        self._pieces = PieceSamples(file, length)
        lengths = self._pieces.lengths()
        self._kept = np.flatnonzero(lengths > 1)
        self._fitted, self._starts = fit_windows(lengths[self._kept], length, best)
        self._tokens = int(lengths[self._kept].sum())

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def efficiency(self) -> float:
        """Share of the windows' tokens that aren't padding."""
        return self._tokens / (len(self) * self._length) if len(self) else 1.0

    def __getitem__(self, index: int) -> Sample:
        pieces = [self._pieces[piece] for piece in self._members(index)]
        sizes = [len(piece["input_ids"]) for piece in pieces]
        missing = self._length - sum(sizes)
        filling = {"input_ids": self._pad_token, "labels": IGNORE_INDEX}
        sample = {
            key: np.concatenate([*(piece[key] for piece in pieces), np.full(missing, value, dtype=np.int64)])
            for key, value in filling.items()
        }
        sample["position_ids"] = restarting_positions(sizes, missing)
        return sample

    def documents_of(self, index: int) -> list[Span]:
        return [span for piece in self._members(index) for span in self._pieces.documents_of(piece)]

    def _members(self, index: int) -> list[int]:
        window = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return [int(piece) for piece in self._kept[self._fitted[window]]]


def restarting_positions(sizes: Sequence[int], padding: int) -> NDArray[np.int64]:
    """Position ids of pieces of `sizes` tokens laid end to end, then `padding` tokens of position 0."""
    return np.concatenate([*(np.arange(size) for size in sizes), np.zeros(padding, dtype=np.int64)])


class LabelledSamples:
    """One document each: input_ids (<= T,), labels () the class."""

    def __init__(self, file: TokenFile, length: int) -> None:
        if file.labels is None:
            raise ValueError("the prepared data has no labels")
        self.file, self._length, self._labels = file, length, file.labels

    def __len__(self) -> int:
        return self.file.num_documents

    def __getitem__(self, index: int) -> Sample:
        start, stop = self._place(index)
        return {
            "input_ids": _int64(self.file.tokens[start:stop]),
            "labels": self._labels[index : index + 1].reshape(()),
        }

    def documents_of(self, index: int) -> list[Span]:
        return [_span(self.file, index, *self._place(index))]

    def _place(self, index: int) -> tuple[int, int]:
        start, stop = (int(place) for place in self.file.offsets[index : index + 2])
        return start, min(stop, start + self._length)


class MaskedSamples:
    """Masked-language-model samples over packed windows or pieces (arXiv 1810.04805, section 3.1).

    Which tokens are hidden is a pure function of (seed, place), where place is the sample's place in the run, so a
    sample is masked differently in every epoch and the same in every layout. Special tokens are neither hidden nor
    put in; at least one token of a sample is hidden if it has any other.
    """

    def __init__(
        self, samples: Samples, fraction: float, vocabulary: Iterable[int], mask_token: int, special: frozenset[int],
        seed: int,
    ) -> None:  # fmt: skip
        """`vocabulary`: every token of the tokenizer, whose ids may have gaps."""
        self.file, self.plain, self._fraction = samples.file, samples, fraction
        self._mask_token, self._seed = mask_token, seed
        self._special = np.array(sorted(special), dtype=np.int64)
        self._ordinary = np.setdiff1d(np.fromiter(vocabulary, np.int64), self._special)

    def __len__(self) -> int:
        return len(self.plain)

    def at(self, index: int, place: int, start: int = 0, stop: int | None = None) -> Sample:
        """Tokens `start` to `stop` - 1 of sample `index`, masked as the run's `place`-th sample.

        80 % become the mask token, 10 % any token, 10 % are kept.
        """
        sample = cut_sample(self.plain[index], start, stop)
        tokens = sample["input_ids"]
        random = np.random.Generator(np.random.Philox(key=[self._seed, place + (start << 40)]))
        draws, fate = random.random((2, len(tokens)))
        other = self._ordinary[random.integers(0, len(self._ordinary), len(tokens))]
        draws[np.isin(tokens, self._special)] = np.inf
        chosen = draws < self._fraction
        if not chosen.any() and np.isfinite(draws).any():
            chosen[np.argmin(draws)] = True
        hidden = np.where(fate < 0.8, self._mask_token, np.where(fate < 0.9, other, tokens))
        labels = np.where(chosen, tokens, IGNORE_INDEX)
        return {**sample, "input_ids": np.where(chosen, hidden, tokens), "labels": labels}

    def documents_of(self, index: int) -> list[Span]:
        return self.plain.documents_of(index)


def cut_sample(sample: Sample, start: int = 0, stop: int | None = None) -> Sample:
    """Tokens `start` to `stop` - 1 of a language model's sample; positions start again where it cuts a document."""
    if start == 0 and (stop is None or stop >= len(sample["input_ids"])):
        return sample
    cut = {key: values[start:stop] for key, values in sample.items()}
    positions = cut.get("position_ids")
    if positions is not None and start and positions[0]:
        later = np.flatnonzero(positions == 0)
        first = int(later[0]) if len(later) else len(positions)
        cut["position_ids"] = np.concatenate([positions[:first] - positions[0], positions[first:]])
    return cut


def patch_sample(sample: Sample, size: int) -> Sample:
    """A packed window of T tokens as P = T / size patches: input_ids and labels (P, size), position_ids (P,).

    A patch belongs to the document of its first token. Its labels are the tokens of the next patch, those of the same
    document; what else is in a patch at a document's end is seen by nobody who has labels.
    """
    tokens, positions = sample["input_ids"].reshape(-1, size), sample["position_ids"]
    document = (positions == 0).cumsum().reshape(-1, size)
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:-1] = np.where(document[1:] == document[:-1, :1], tokens[1:], IGNORE_INDEX)
    starts = np.flatnonzero(np.diff(document[:, 0], prepend=-1))
    places = np.arange(len(tokens))
    first_of = starts[np.searchsorted(starts, places, side="right") - 1]
    return {"input_ids": tokens, "labels": labels, "position_ids": places - first_of}


def _int64(tokens: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(tokens, dtype=np.int64)


def _span(file: TokenFile, document: int, start: int, stop: int) -> Span:
    """The part of `document` within tokens `start` to `stop` - 1 of the whole file."""
    low, high = int(file.offsets[document]), int(file.offsets[document + 1])
    return document, max(start, low) - low, min(stop, high) - low
