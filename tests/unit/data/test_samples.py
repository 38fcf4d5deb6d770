"""Samples and batches against plain Python loops."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_train.data.batches import Batches, Collator, prefetch
from ds_train.data.order import Order
from ds_train.data.prepare import TokenFile
from ds_train.data.samples import LabelledSamples, MaskedSamples, PackedSamples, PieceSamples, patch_sample


def token_file(lengths: list[int], labels: list[int] | None = None, seed: int = 0) -> TokenFile:
    tokens = np.random.default_rng(seed).integers(0, 250, sum(lengths)).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenFile(tokens, offsets, None if labels is None else np.array(labels), Path("nowhere"))


def documents_of(file: TokenFile) -> list[list[int]]:
    return [file.tokens[a:b].tolist() for a, b in itertools.pairwise(file.offsets)]


LENGTHS = [[40], [1] * 30, [7, 1, 1, 20, 3, 16, 16, 2, 9], [16, 16, 16], [15, 17, 0, 5, 33], [100, 1, 100]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [8, 16])
def test_packed_windows_equal_a_loop_over_tokens(lengths: list[int], window: int) -> None:
    file = token_file(lengths)
    stream = [
        (token, number, place, place + 1 == len(document))
        for number, document in enumerate(documents_of(file))
        for place, token in enumerate(document)
    ]
    samples = PackedSamples(file, window)
    assert len(samples) == len(stream) // window
    for index in range(len(samples)):
        sample = samples[index]
        position = 0
        for t in range(window):
            token, number, _, last = stream[index * window + t]
            previous = stream[index * window + t - 1][1] if t else None
            position = position + 1 if previous == number else 0
            following = -100 if last else stream[index * window + t + 1][0]
            assert (sample["input_ids"][t], sample["labels"][t], sample["position_ids"][t]) == (
                token,
                following,
                position,
            )


@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_of_a_window_hold_its_tokens(lengths: list[int]) -> None:
    file = token_file(lengths)
    documents, samples = documents_of(file), PackedSamples(file, 16)
    for index in range(len(samples)):
        rebuilt = [token for number, low, high in samples.documents_of(index) for token in documents[number][low:high]]
        assert rebuilt == samples[index]["input_ids"].tolist()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pieces_cut_each_document_and_lose_no_label(lengths: list[int]) -> None:
    file = token_file(lengths)
    samples = PieceSamples(file, 16)
    expected = []
    for document in documents_of(file):
        for start in range(0, len(document), 16):
            piece = document[start : start + 16]
            labels = [*document[start + 1 : start + 17], -100][: len(piece)]
            expected.append((piece, labels))
    assert [
        (s["input_ids"].tolist(), s["labels"].tolist()) for s in (samples[i] for i in range(len(samples)))
    ] == expected


@pytest.mark.parametrize("number", [1, 2, 3, 7, 64, 1000, 65537])
def test_every_epoch_is_another_permutation(number: int) -> None:
    order = Order(number, seed=5)
    first, second = order.index(np.arange(number)), order.index(np.arange(number, 2 * number))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(number))
    if number >= 64:
        assert (first != second).mean() > 0.9
        assert (first != Order(number, seed=6).index(np.arange(number))).mean() > 0.9
        assert abs(np.corrcoef(first, np.arange(number))[0, 1]) < 5 / np.sqrt(number)


def test_the_order_never_changes_between_versions() -> None:
    assert Order(10, seed=1).index(np.arange(12)).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [3, 4, 9, 7, 1, 6, 2, 0, 8, 5, 7, 3]


def batches(file: TokenFile, rank: int, ranks: int, micro: int, samples: object = None) -> Batches:
    samples = samples or PackedSamples(file, 8)
    collate = Collator(pad_token=257, length=8, block_mask=False)
    return Batches(samples, collate, Order(len(samples), 3), 8, micro, rank, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_global_batch_is_the_same_at_every_number_of_ranks(ranks: int, micro: int) -> None:
    file = token_file([300, 5, 77])
    for step in (0, 3, 11):
        whole = batches(file, 0, 1, 8).step(step)[0]["input_ids"]
        parts = [batches(file, rank, ranks, micro).step(step) for rank in range(ranks)]
        dealt = torch.cat([parts[rank][a]["input_ids"] for a in range(len(parts[0])) for rank in range(ranks)])
        assert torch.equal(dealt, whole)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 3), (2, 3), (4, 5)])
def test_evaluation_sees_every_sample_once_on_all_ranks(ranks: int, micro: int) -> None:
    file = token_file([100, 3, 8])
    seen, rounds = [], set()
    for rank in range(ranks):
        mine = list(batches(file, rank, ranks, micro).eval(11))
        rounds.add(len(mine))
        for batch in mine:
            seen += [
                row.tolist()
                for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
                if (labels != -100).any()
            ]
    expected = [PackedSamples(file, 8)[i]["input_ids"].tolist() for i in range(11)]
    assert sorted(seen) == sorted(expected)
    assert len(rounds) == 1, "ranks must do equally many forward passes"


def test_padded_batches_are_as_long_as_their_longest_sample() -> None:
    file = token_file([3, 9, 30, 2], labels=[1, 0, 1, 1])
    collate = Collator(pad_token=257, length=20, block_mask=False)
    samples = LabelledSamples(file, 20)
    batch = collate([samples[0], samples[1]])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 257).all()
    assert collate([samples[2]])["input_ids"].shape == (1, 20), "no longer than a sample may be"


def test_encoders_get_a_mask_between_the_documents_of_a_window() -> None:
    file = token_file([3, 5, 8, 8])
    samples = PackedSamples(file, 8)
    collate = Collator(pad_token=257, length=8, block_mask=True)
    mask = collate([samples[0], samples[1]])["attention_mask"]
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).bool()
    assert torch.equal(mask[0, 0], expected)
    assert mask[1].all()
    assert "attention_mask" not in collate([samples[1], samples[2]]), "one document per window needs no mask"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_patches_predict_the_next_patch_of_their_document(lengths: list[int], size: int) -> None:
    samples = PackedSamples(token_file(lengths), 16)
    for index in range(len(samples)):
        window = samples[index]
        tokens, positions = window["input_ids"], window["position_ids"]
        document = [int((positions[: t + 1] == 0).sum()) for t in range(16)]
        found, position = patch_sample(window, size), 0
        for patch in range(16 // size):
            first = patch * size
            position = position + 1 if patch and document[first] == document[first - size] else 0
            following = [first + size + j for j in range(size)]
            expected = [tokens[t] if t < 16 and document[t] == document[first] else -100 for t in following]
            assert found["input_ids"][patch].tolist() == tokens[first : first + size].tolist()
            assert found["position_ids"][patch] == position
            assert found["labels"][patch].tolist() == expected


def test_masking_follows_place_and_seed_and_has_its_shares() -> None:
    file = token_file([4000])
    plain = PackedSamples(file, 1000)
    masked = MaskedSamples(plain, 0.15, range(250), 258, frozenset({7}), seed=3)
    one, again, other = masked.at(0, 0), masked.at(0, 0), masked.at(0, 4)
    assert np.array_equal(one["input_ids"], again["input_ids"])
    assert not np.array_equal(one["labels"], other["labels"])
    chosen = hidden = random = kept = 0
    for place in range(200):
        sample, original = masked.at(place % 4, place), plain[place % 4]["input_ids"]
        labels = sample["labels"] != -100
        assert np.array_equal(sample["labels"][labels], original[labels])
        assert np.array_equal(sample["input_ids"][~labels], original[~labels])
        assert not (labels & (original == 7)).any(), "special tokens are never predicted"
        chosen += labels.sum()
        hidden += (sample["input_ids"][labels] == 258).sum()
        kept += (sample["input_ids"][labels] == original[labels]).sum()
    random = chosen - hidden - kept
    assert chosen / 200_000 == pytest.approx(0.15, rel=0.02)
    assert [hidden / chosen, random / chosen, kept / chosen] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_a_short_sample_still_has_something_to_predict() -> None:
    masked = MaskedSamples(PieceSamples(token_file([2] * 50), 8), 0.01, range(250), 258, frozenset(), seed=1)
    assert all((masked.at(i, i)["labels"] != -100).sum() >= 1 for i in range(50))


def test_masking_puts_in_tokens_that_there_are() -> None:
    tokens = [*range(0, 250, 2), 255, 4_000]  # ids with gaps
    masked = MaskedSamples(PackedSamples(token_file([2_000]), 1_000), 1.0, tokens, 255, frozenset({0, 255}), seed=2)
    sample = masked.at(0, 0)
    chosen = sample["labels"] != -100
    put_in = set(sample["input_ids"][chosen & (sample["input_ids"] != sample["labels"])].tolist()) - {255}
    assert len(put_in) > 30
    assert put_in <= set(tokens) - {0}


def test_prefetch_keeps_order_and_hands_on_errors() -> None:
    assert list(prefetch(lambda: iter(range(50)), 3)) == list(range(50))

    def failing() -> itertools.chain[int]:
        def fail() -> object:
            raise ValueError("broken sample")
            yield

        return itertools.chain([1, 2], fail())  # type: ignore[arg-type]

    stream = prefetch(failing, 2)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="broken sample"):
        next(stream)
    endless = prefetch(itertools.count, 2)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]
