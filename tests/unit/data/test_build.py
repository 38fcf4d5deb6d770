"""From a recipe to this rank's micro-batches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_train.config import RunConfig
from ds_train.data.batches import Collator, count_labels, prefetch
from ds_train.data.build import DataBundle, load_data
from ds_train.data.ledger import Portion
from ds_train.data.prepare import open_split, prepare, prepared_tokenizer
from ds_train.data.samples import cut_sample
from ds_train.errors import UserError
from ds_train.schedule.timeline import StepShape, cut_timeline

Recipe = Callable[..., RunConfig]
SHAKESPEARE = Path(__file__).resolve().parents[4] / "shared" / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    random = np.random.default_rng(4)
    (tmp_path / "text").mkdir()
    for number in range(60):
        text = "".join(random.choice(list("abcdefgh \n"), size=int(random.integers(1, 90))))
        (tmp_path / "text" / f"{number:02d}.txt").write_text(text)
    return tmp_path


tokenizer_of = functools.cache(prepared_tokenizer)


def load(run: RunConfig, rank: int = 0, ranks: int = 1, micro: int = 4, eval_micro: int = 3) -> DataBundle:
    folder = prepare(run)
    return load_data(
        run, folder=folder, tokenizer=tokenizer_of(folder), data_rank=rank, data_ranks=ranks,
        micro_samples=micro, eval_micro_samples=eval_micro,
    )  # fmt: skip


def portions(bundle: DataBundle, sample: int) -> list[Portion]:
    return bundle.train.portions([sample], StepShape(0, 4, 2000, 0, 0, 1))


def global_batch(run: RunConfig, steps: tuple[int, ...], ranks: int, micro: int) -> list[Any]:
    """(input ids, labels) of every sample of the steps without padding, by its place in the run."""
    trains = [load(run, rank, ranks, micro).train for rank in range(ranks)]
    parts = [[batch for step in steps for batch in train.step(step)] for train in trains]
    found = []
    for turn in range(len(parts[0])):
        for rank in range(ranks):
            batch = parts[rank][turn]
            assert len(batch["input_ids"]) == micro
            for row in range(micro):
                mask = batch.get("attention_mask", torch.zeros(()))
                real: Any = mask[row].bool() if mask.dim() == 2 else slice(None)
                labels = batch["labels"][row]
                shown = labels[real].tolist() if labels.dim() else labels.item()
                found.append((batch["input_ids"][row][real].tolist(), shown))
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["causal-lm", "masked-lm"])
def test_the_global_batch_is_the_same_in_every_layout(recipe: Recipe, corpus: Path, kind: str, packing: bool) -> None:
    run = recipe(task={"kind": kind}, data={"packing": packing}, batch={"global_samples": 8})
    expected = global_batch(run, (0, 9), 1, 8)
    assert len(expected) == 16
    assert expected[:8] != expected[8:]
    for ranks, micro in ((1, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
        assert global_batch(run, (0, 9), ranks, micro) == expected


def test_an_epoch_predicts_every_token_but_the_first_of_each_document(recipe: Recipe, corpus: Path) -> None:
    run = recipe(data={"packing": False, "validation_fraction": 0.0}, batch={"global_samples": 1})
    bundle = load(run, micro=1)
    labels = sum(count_labels(bundle.train.step(step)) for step in range(bundle.samples_per_epoch))
    file = open_split(bundle.folder, "train")
    assert file is not None
    assert labels == len(file.tokens) - file.num_documents


@pytest.mark.parametrize("length", [8, 13, 64])
def test_packed_windows_equal_a_walk_through_the_files(recipe: Recipe, corpus: Path, length: int) -> None:
    walk: list[tuple[int, int, int]] = []  # token, its label, tokens before it in its document
    for path in sorted((corpus / "text").iterdir()):
        tokens = [*path.read_bytes(), 256]
        walk += [
            (token, following, place)
            for place, (token, following) in enumerate(zip(tokens, [*tokens[1:], -100], strict=True))
        ]
    expected = []
    for first in range(0, len(walk) - length + 1, length):
        window = walk[first : first + length]
        positions = [min(place, t) for t, (_, _, place) in enumerate(window)]
        expected.append((*([entry[part] for entry in window] for part in (0, 1)), positions))
    run = recipe(data={"sequence_length": length, "validation_fraction": 0.0}, batch={"global_samples": 1})
    bundle = load(run, micro=1)
    assert bundle.samples_per_epoch == len(expected)
    keys = ("input_ids", "labels", "position_ids")
    found = [tuple(bundle.train.step(step)[0][key][0].tolist() for key in keys) for step in range(len(expected))]
    assert sorted(found) == sorted(expected)


def test_samples_can_be_traced_to_their_documents(recipe: Recipe, corpus: Path) -> None:
    for packing in (True, False):
        bundle = load(recipe(data={"packing": packing, "validation_fraction": 0.0}), micro=1)
        for step in range(6):
            for row, batch in enumerate(bundle.train.step(step)):
                expected: list[int] = []
                for portion in portions(bundle, step * 4 + row):
                    expected += [*Path(portion.source).read_bytes(), 256][portion.start : portion.stop]
                length = 16 if packing else int(batch["attention_mask"].sum())
                assert batch["input_ids"][0, :length].tolist() == expected


def test_masked_samples_differ_by_epoch_and_hide_no_special_token(recipe: Recipe, corpus: Path) -> None:
    run = recipe(task={"kind": "masked-lm"}, data={"validation_fraction": 0.0}, batch={"global_samples": 1})
    train = load(run, micro=1).train
    bundle = load(run, micro=1)
    number = bundle.samples_per_epoch
    by_sample: dict[Any, list[Any]] = {}
    for step in range(2 * number):
        (batch,) = train.step(step)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert count_labels([batch]) >= 1
        assert labels.max() < 256
        assert not {257} & set(ids.tolist()), "a token put in is never a special one, but for the mask"
        original = torch.where(labels != -100, labels, ids)
        by_sample.setdefault(tuple(original.tolist()), []).append(labels.tolist())
    assert all(258 not in sample for sample in by_sample), "whatever is masked can be restored"
    twice = [found for found in by_sample.values() if len(found) == 2]
    assert len(twice) == number
    assert sum(first != second for first, second in twice) > 0.8 * number


def test_packed_encoders_get_a_mask_where_documents_meet(recipe: Recipe, corpus: Path) -> None:
    for kind, expected in (("masked-lm", True), ("causal-lm", False)):
        batches = load(recipe(task={"kind": kind})).train.step(0)
        for batch in batches:
            position_BT = batch["position_ids"]
            assert ("attention_mask" in batch) == (expected and bool((position_BT[:, 1:] == 0).any()))
            if "attention_mask" not in batch:
                continue
            for row, positions in enumerate(position_BT.tolist()):
                owner = np.cumsum([position == 0 for position in positions])
                same = [[a == b for b in owner] for a in owner]
                assert batch["attention_mask"][row, 0].tolist() == same


def test_classification(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("".join(f"{'x' * (i + 1)}\t{i % 2}\n" for i in range(9)))
    data = {
        "source": "tsv", "path": str(tmp_path / "x.tsv"), "validation_path": str(tmp_path / "x.tsv"),
        "text_column": "0", "label_column": "1", "packing": False,
    }  # fmt: skip
    run = recipe(data=data, task={"kind": "sequence-classification"}, batch={"global_samples": 4})
    (batch,) = load(run).train.step(0)
    lengths = batch["attention_mask"].sum(1)
    assert batch["labels"].tolist() == ((lengths - 1) % 2).tolist()
    assert batch["input_ids"].shape[1] in (8, 16)
    assert global_batch(run, (3,), 2, 1) == global_batch(run, (3,), 1, 4)
    parts = [list(held(run, rank, 2).eval(100)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2], "9 samples in rounds of 6"
    assert [count_labels(part) for part in parts] == [6, 3]
    seen = [label for turn in range(2) for rank in range(2) for label in parts[rank][turn]["labels"].tolist()]
    assert seen == [i % 2 for i in range(9)] + [-100] * 3


def held(run: RunConfig, rank: int, ranks: int) -> Any:
    validation = load(run, rank, ranks, micro=1).validation
    assert validation is not None
    return validation


def test_less_held_out_text_than_a_window_is_a_shorter_window(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a" * 200)
    batches = list(held(recipe(data={"validation_fraction": 0.05}), 0, 1).eval(50))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 10)]
    assert count_labels(batches) == 9


def test_nothing_held_out(recipe: Recipe, corpus: Path) -> None:
    bundle = load(recipe(data={"validation_fraction": 0.0}))
    assert bundle.validation is None
    assert bundle.manifest["splits"]["train"]["documents"] == 60


def test_too_little_text_names_the_length(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a" * 50)
    with pytest.raises(UserError) as caught:
        load(recipe(data={"sequence_length": 64, "validation_fraction": 0.0}))
    assert str(caught.value) == (
        "data.sequence_length=64: the training data has 51 tokens, less than one sample. "
        "Fix: give more text, or set data.sequence_length=51 or less."
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_loaded_ahead_are_the_steps(recipe: Recipe, corpus: Path, workers: int) -> None:
    run = recipe()
    train, timeline = load(run).train, cut_timeline(run, 100 * 4 * 16)
    found = list(train.steps(lambda: timeline.shapes(3, 9), workers))
    assert [shape.step for shape, _ in found] == list(range(3, 9))
    for shape, batches in found:
        for one, other in zip(batches, train.step(shape.step), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("kind", ["causal-lm", "masked-lm"])
@pytest.mark.parametrize("keep_tokens", [True, False])
def test_repacked_samples_are_the_windows_in_pieces(recipe: Recipe, corpus: Path, kind: str, keep_tokens: bool) -> None:
    curriculum = {"kind": "discrete", "lengths": [8], "until": [0.4], "keep_tokens": keep_tokens}
    run = recipe(curriculum=curriculum, schedule={"steps": None, "tokens": 20 * 4 * 16}, task={"kind": kind})
    timeline = cut_timeline(run, 20 * 4 * 16)
    assert [stretch.length for stretch in timeline.stretches] == [8, 16]
    plain = load(recipe(task={"kind": kind})).train
    whole = torch.cat([batch["input_ids"] for step in range(20) for batch in plain.step(step)])
    for ranks, micro in ((1, 4), (2, 1)):
        trains = [load(run, rank, ranks, micro).train for rank in range(ranks)]
        rows = []
        for shape in timeline.shapes(0, timeline.steps):
            dealt = [train.take(shape) for train in trains]
            turns = range(len(dealt[0]))
            step = torch.cat([dealt[rank][turn]["input_ids"] for turn in turns for rank in range(ranks)])
            assert step.shape == (shape.samples, shape.length)
            rows.append(step.flatten())
        seen = torch.cat(rows)
        assert len(seen) == timeline.total_tokens
        if kind == "causal-lm":
            assert torch.equal(seen, whole.flatten()), "every token once, in the order of the plain run"


def test_truncated_samples_are_the_starts_of_the_windows(recipe: Recipe, corpus: Path) -> None:
    curriculum = {"kind": "linear", "start_length": 8, "how": "truncate", "keep_tokens": False, "multiple": 3}
    run = recipe(curriculum=curriculum | {"start_length": 9}, schedule={"steps": None, "tokens": 50 * 4 * 16})
    timeline, train, plain = cut_timeline(run, 50 * 4 * 16), load(run).train, load(recipe()).train
    assert [stretch.length for stretch in timeline.stretches] == [9, 12, 15, 16]
    for shape in timeline.shapes(0, timeline.steps):
        (found,), (whole,) = train.take(shape), plain.step(shape.step)
        for key, values in found.items():
            assert torch.equal(values, whole[key][:, : shape.length])


def test_a_piece_of_a_document_starts_at_position_0() -> None:
    sample = {"input_ids": np.arange(10), "position_ids": np.array([3, 4, 5, 6, 0, 1, 0, 1, 2, 3])}
    assert cut_sample(sample, 2, 9)["position_ids"].tolist() == [0, 1, 0, 1, 0, 1, 2]
    assert cut_sample(sample, 4, 6)["position_ids"].tolist() == [0, 1]
    assert cut_sample(sample, 7, 10)["position_ids"].tolist() == [0, 1, 2]
    assert sample["position_ids"].tolist() == [3, 4, 5, 6, 0, 1, 0, 1, 2, 3]


def test_a_batch_that_cannot_be_dealt_is_an_error(recipe: Recipe, corpus: Path) -> None:
    with pytest.raises(ValueError, match="4 samples can't be dealt to 3 ranks by 1"):
        load(recipe(), ranks=3, micro=1).train.step(0)


def test_prefetching_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    closed = threading.Event()

    def endless() -> Any:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    stream = prefetch(endless, 2)
    assert next(stream) == 1
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert closed.wait(5), "the producer is closed too"


def test_padding_is_never_longer_than_a_sample() -> None:
    sample = {"input_ids": np.arange(13), "labels": np.arange(13)}
    assert Collator(pad_token=9, length=13, block_mask=False)([sample])["input_ids"].shape == (1, 13)
    assert Collator(pad_token=9, length=64, block_mask=False)([sample])["input_ids"].shape == (1, 16)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"{SHAKESPEARE} is not on this machine")
def test_tinyshakespeare_comes_back_from_its_windows(recipe: Recipe) -> None:
    run = recipe(
        data={"path": str(SHAKESPEARE), "sequence_length": 1000, "validation_fraction": 0.1},
        batch={"global_samples": 10},
    )
    bundle, text = load(run, micro=10), SHAKESPEARE.read_bytes()
    tokens = len(text) + 1 - int((len(text) + 1) * 0.1)
    assert bundle.samples_per_epoch == tokens // 1000
    places = {portions(bundle, row)[0].start: row for row in range(bundle.samples_per_epoch)}
    for start in (0, 5000, 1000 * (bundle.samples_per_epoch - 1)):
        step, row = divmod(places[start], 10)
        batch = bundle.train.step(step)[0]
        assert bytes(batch["input_ids"][row].tolist()) == text[start : start + 1000]
        assert bytes(batch["labels"][row, :-1].tolist()) == text[start + 1 : start + 1000]
    assert held(run, 0, 1) is not None


EVAL_SOURCES = {"early": "text/[0-2]*.txt", "late": "*/[3-9]*"}


@pytest.mark.parametrize("form", [{}, {"packing_by": "best-fit"}, {"packing": False}])
@pytest.mark.parametrize("ranks", [1, 2])
def test_held_out_labels_of_each_source_are_its_own(
    recipe: Recipe, corpus: Path, form: dict[str, Any], ranks: int
) -> None:
    data = {"validation_path": str(corpus / "text"), "sequence_length": 16, **form}
    run = recipe(data=data, track={"eval_samples": 1000, "eval_sources": EVAL_SOURCES})
    bundles = [load(run, rank, ranks) for rank in range(ranks)]
    file = open_split(bundles[0].folder, "validation")
    assert file is not None
    found, expected = {}, {}
    for source in bundles[0].eval_sources:
        batches = [[*bundle.validation.eval(1000, source)] for bundle in bundles if bundle.validation]
        assert len({len(some) for some in batches}) == 1, "every rank has as many"
        labels = torch.cat([batch["labels"].flatten() for some in batches for batch in some])
        found[source.name] = torch.bincount(labels[labels >= 0], minlength=300)
        own = [number for number in range(60) if (number < 30) == (source.name == "early")]
        documents = [number for number in range(60) if int(Path(file.source(number)).stem) in own]
        tokens = [file.tokens[file.offsets[number] + 1 : file.offsets[number + 1]] for number in documents]
        expected[source.name] = np.bincount(np.concatenate(tokens), minlength=300)
    whole = torch.zeros(300, dtype=torch.int64)
    for batch in (batch for bundle in bundles if bundle.validation for batch in bundle.validation.eval(1000)):
        whole += torch.bincount(batch["labels"][batch["labels"] >= 0], minlength=300)
    assert torch.equal(sum(found.values()), whole)
    for name, counts in expected.items():
        # The last window of a stream isn't whole; a piece of one token has nothing to predict.
        missing = counts - found[name].numpy()
        assert missing.min() >= 0
        assert missing.sum() < 16
    assert found["early"].sum() > 0


def test_a_source_has_its_first_samples(recipe: Recipe, corpus: Path) -> None:
    data = {"validation_path": str(corpus / "text"), "packing": False}
    run = recipe(data=data, track={"eval_samples": 5, "eval_sources": {"late": "5*.txt:1"}})
    with pytest.raises(UserError, match=r"track.eval_sources.late=5\*.txt:1: no held-out text comes from there"):
        load(run)
    run = recipe(data=data, track={"eval_samples": 5, "eval_sources": {"late": "5*.txt"}})
    bundle = load(run)
    assert bundle.validation is not None
    (source,) = bundle.eval_sources
    assert source.samples == list(range(source.samples[0], source.samples[0] + 5))
    assert count_labels(bundle.validation.eval(5, source)) == count_labels(
        [bundle.validation.of_samples(source.samples)]
    )


def test_masked_tokens_count_for_their_source(recipe: Recipe, corpus: Path) -> None:
    data = {"validation_path": str(corpus / "text")}
    masked = recipe(task={"kind": "masked-lm"}, model={"arch": "bert"}, data=data, track={"eval_sources": EVAL_SOURCES})
    bundle = load(masked)
    assert bundle.validation is not None
    parts = [count_labels(bundle.validation.eval(1000, source)) for source in bundle.eval_sources]
    assert sum(parts) == count_labels(bundle.validation.eval(1000))
    assert min(parts) > 0
