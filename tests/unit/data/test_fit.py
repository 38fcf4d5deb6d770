"""First-fit and best-fit against plain loops over windows, and fitted windows against the pieces they hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_samples import token_file
from transformers import AutoConfig, AutoModelForCausalLM

from ds_train.data.batches import Collator
from ds_train.data.fit import fit_windows
from ds_train.data.samples import FittedSamples, PieceSamples


def plain_fit(lengths: list[int], window: int, best: bool) -> list[list[int]]:
    windows: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        rooms = [window - sum(lengths[member] for member in members) for members in windows]
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[piece]]
        if not fitting:
            windows.append([piece])
        elif best:
            windows[min(fitting, key=lambda number: rooms[number])].append(piece)
        else:
            windows[fitting[0]].append(piece)
    return windows


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("window", [1, 7, 16, 33])
def test_windows_are_those_of_a_plain_loop(window: int, best: bool) -> None:
    random = np.random.default_rng(window)
    for count in (1, 2, 40, 150):
        lengths = random.integers(1, window + 1, count)
        pieces, starts = fit_windows(lengths, window, best)
        found = [sorted(pieces[start:stop].tolist()) for start, stop in itertools.pairwise(starts)]
        assert found == [sorted(members) for members in plain_fit(lengths.tolist(), window, best)]


def test_many_pieces_are_fitted_tightly() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 20_000)
    for best in (False, True):
        _, starts = fit_windows(lengths, 1024, best)
        assert lengths.sum() / (1024 * (len(starts) - 1)) > 0.99


@pytest.mark.parametrize("best", [False, True])
def test_a_window_holds_its_pieces_and_padding_that_nobody_sees(best: bool) -> None:
    file = token_file([5, 40, 3, 1, 17, 16, 9, 2, 33])
    samples, pieces = FittedSamples(file, 16, best, 257), PieceSamples(file, 16)
    held = []
    for index in range(len(samples)):
        sample = samples[index]
        assert {key: value.shape for key, value in sample.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), (16,)
        )
        place = 0
        for document, low, high in samples.documents_of(index):
            piece = next(
                pieces[number]
                for number in range(len(pieces))
                if pieces.documents_of(number) == [(document, low, high)]
            )
            part = slice(place, place + high - low)
            assert sample["input_ids"][part].tolist() == piece["input_ids"].tolist()
            assert sample["labels"][part].tolist() == piece["labels"].tolist()
            assert sample["position_ids"][part].tolist() == list(range(high - low))
            held.append((document, low, high))
            place += high - low
        assert set(sample["labels"][place:]) <= {-100}
        assert set(sample["input_ids"][place:]) <= {257}
        assert set(sample["position_ids"][place:]) <= {0}
    everything = [pieces.documents_of(number)[0] for number in range(len(pieces))]
    assert sorted(held) == [span for span in everything if span[2] - span[1] > 1]
    text = sum(high - low for _, low, high in held)
    assert samples.efficiency == pytest.approx(text / (16 * len(samples)))


def test_a_padding_free_row_is_the_samples_end_to_end() -> None:
    pieces = PieceSamples(token_file([5, 9, 3]), 16)
    row = Collator(pad_token=257, length=16, block_mask=False, padding_free=True)([pieces[0], pieces[1], pieces[2]])
    assert {key: tuple(value.shape) for key, value in row.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, 24)
    )
    assert row["position_ids"][0].tolist() == [*range(5), *range(9), *range(3), *[0] * 7]
    assert row["labels"][0].tolist() == [label for i in range(3) for label in pieces[i]["labels"]] + [-100] * 7
    mask = Collator(257, 16, block_mask=True, padding_free=True)([pieces[0], pieces[1]])["attention_mask"]
    assert mask.shape == (1, 1, 16, 16)
    assert int(mask[0, 0, :5].sum()) == 25


@pytest.mark.parametrize("best", [False, True])
def test_packed_and_padding_free_documents_have_the_losses_of_padded_ones(best: bool) -> None:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.config.use_cache = False  # as in training: a cache is for one document a row

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    file = token_file([5, 40, 3, 17, 16, 9, 2, 33])
    samples, pieces = FittedSamples(file, 16, best, 257), PieceSamples(file, 16)
    flat = Collator(pad_token=257, length=16, block_mask=False, padding_free=True)
    padded = Collator(pad_token=257, length=16, block_mask=False)
    expected = {tuple(pieces.documents_of(i)[0]): losses(padded([pieces[i]])).sum() for i in range(len(pieces))}
    assert len(samples) < len(pieces)
    for index in range(len(samples)):
        packed = losses(padded([samples[index]]))[0]
        members = [i for i in range(len(pieces)) if pieces.documents_of(i)[0] in samples.documents_of(index)]
        row = losses(flat([pieces[i] for i in members]))[0]
        place = 0
        for document in samples.documents_of(index):
            size = document[2] - document[1]
            torch.testing.assert_close(packed[place : place + size].sum(), expected[document], rtol=1e-5, atol=1e-5)
            place += size
        torch.testing.assert_close(
            row.sum(), sum(expected[span] for span in samples.documents_of(index)), rtol=1e-5, atol=1e-5
        )
