"""Prepared data: what is in the files, when they are made anew, and what a crash leaves behind."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_train.config import RunConfig
from ds_train.data import prepare as module
from ds_train.data.prepare import TokenFile, held_out, open_split, prepare, prepared_tokenizer, read_manifest
from ds_train.data.tokenizer import byte_tokenizer, fingerprint
from ds_train.errors import UserError

Recipe = Callable[..., RunConfig]
EOS = 256


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """70 files in the recipe's folder, of which two are empty."""
    random = np.random.default_rng(1)
    words = ["alpha", "bé", "\n", "漢字", "e" * 30, "<eos>"]
    found = [" ".join(random.choice(words, size=int(random.integers(1, 40)))) for _ in range(70)]
    found[3] = found[50] = ""
    (tmp_path / "text").mkdir()
    for number, text in enumerate(found):
        (tmp_path / "text" / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    return found


def one_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "only.txt").write_text(text)


def rows(folder: Path, split: str) -> list[list[int]]:
    file = opened(folder, split)
    assert file.offsets[-1] == len(file.tokens)
    return [file.tokens[a:b].tolist() for a, b in itertools.pairwise(file.offsets)]


def opened(folder: Path, split: str) -> TokenFile:
    file = open_split(folder, split)
    assert file is not None
    return file


def test_documents_become_bytes_and_an_end(recipe: Recipe, texts: list[str]) -> None:
    folder = prepare(recipe(data={"validation_fraction": 0.1}), progress=True)
    kept = [(number, text) for number, text in enumerate(texts) if text]
    for split, held in (("train", False), ("validation", True)):
        mine = [(number, text) for place, (number, text) in enumerate(kept) if held_out(place, 0.1) == held]
        assert rows(folder, split) == [[*text.encode(), EOS] for _, text in mine]
        file = opened(folder, split)
        assert [Path(file.source(i)).name for i in range(file.num_documents)] == [f"{n:03d}.txt" for n, _ in mine]
        counts = read_manifest(folder)["splits"][split]
        sizes = [len(text.encode()) for _, text in mine]
        assert counts == {"documents": len(mine), "tokens": sum(sizes) + len(mine), "text_bytes": sum(sizes)}
    assert opened(folder, "train").tokens.dtype == np.uint16


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.1, 0.3, 1 / 3, 0.5, 0.9])
def test_the_held_out_share_is_kept_at_every_number(fraction: float) -> None:
    chosen = np.array([held_out(number, fraction) for number in range(5000)])
    assert (np.abs(np.cumsum(chosen) - np.arange(1, 5001) * fraction) <= 1 + 1e-6).all()
    if fraction == 0.1:
        assert len(set(np.flatnonzero(chosen) % 10)) == 10, "not every tenth"
    assert not any(held_out(number, 0.0) for number in range(100))


def test_the_end_of_few_documents_is_held_out(recipe: Recipe, tmp_path: Path) -> None:
    one_file(tmp_path, "abcdefghij" * 10)
    folder = prepare(recipe(data={"validation_fraction": 0.25}))
    whole = [*b"abcdefghij" * 10, EOS]
    assert rows(folder, "train") == [whole[:76]]
    assert rows(folder, "validation") == [whole[76:]]
    counts = read_manifest(folder)["splits"]
    assert [counts[split]["text_bytes"] for split in ("train", "validation")] == [75, 25]
    whole_folder = prepare(recipe(data={"validation_fraction": 0.0}))
    assert rows(whole_folder, "train") == [whole]
    assert open_split(whole_folder, "validation") is None


def test_one_of_few_short_documents_is_held_out(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"document {number:02d}")
    folder = prepare(recipe(data={"validation_fraction": 0.02}))
    assert len(rows(folder, "train")) == 19
    assert rows(folder, "validation") == [[*b"document 19", 256]]


def test_held_out_data_of_its_own(recipe: Recipe, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held")
    folder = prepare(recipe(data={"validation_path": str(tmp_path / "held.txt")}))
    assert rows(folder, "validation") == [[*b"held", EOS]]
    assert len(rows(folder, "train")) == 68


def test_classifiers_keep_labels_and_cut_texts(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("".join(f"{'word ' * i}\t{i % 3}\n" for i in range(60)))
    data = {"source": "tsv", "path": str(tmp_path / "x.tsv"), "text_column": "0", "label_column": "1", "packing": False}
    task = {"kind": "sequence-classification", "num_labels": 3}
    folder = prepare(recipe(data={**data, "validation_path": str(tmp_path / "x.tsv")}, task=task))
    file = opened(folder, "train")
    assert file.labels is not None
    assert file.labels.tolist() == [i % 3 for i in range(1, 60)], "the first text is empty"
    assert rows(folder, "train") == [list(b"word " * i)[:16] for i in range(1, 60)]
    backend = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    assert backend["truncation"] is None, "the length to cut at is the recipe's, not the tokenizer's"


def test_large_vocabularies_take_four_bytes(recipe: Recipe, tmp_path: Path) -> None:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(tmp_path / "words")
    one_file(tmp_path, "w69999 w65536 w5")
    folder = prepare(recipe(data={"tokenizer": str(tmp_path / "words"), "validation_fraction": 0}))
    assert rows(folder, "train") == [[69_999, 65_536, 5, 1]]
    assert opened(folder, "train").tokens.dtype == np.uint32


def test_a_tokenizer_with_code_of_its_own_lies_there_with_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = tmp_path / "own"
    byte_tokenizer().save_pretrained(own)
    (own / "reversed.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class ReversedTokenizer(PreTrainedTokenizerFast):\n"
        "    def __call__(self, texts, **options):\n"
        "        return super().__call__([text[::-1] for text in texts], **options)\n"
    )
    file = own / "tokenizer_config.json"
    places = {"AutoTokenizer": ["reversed.ReversedTokenizer", None]}
    named = {"tokenizer_class": "ReversedTokenizer", "auto_map": places}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    one_file(tmp_path, "abc" * 90)
    data = {"tokenizer": str(own), "validation_fraction": 0}
    folder = prepare(recipe(data=data, model={"arch": "llama", "trust_remote_code": True}))
    assert rows(folder, "train") == [[*reversed(b"abc" * 90), EOS]]
    tokenizer = prepared_tokenizer(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "ReversedTokenizer"
    assert fingerprint(tokenizer) == read_manifest(folder)["tokenizer"] != fingerprint(byte_tokenizer())
    with pytest.raises(ValueError, match="trust_remote_code"):
        prepared_tokenizer(folder)


def test_a_trained_tokenizer_lies_with_its_tokens(recipe: Recipe, texts: list[str]) -> None:
    folder = prepare(recipe(data={"train_vocabulary": 280, "validation_fraction": 0}))
    tokenizer = prepared_tokenizer(folder)
    assert len(tokenizer) == 280
    assert read_manifest(folder)["tokenizer"] == fingerprint(tokenizer)
    assert [tokenizer.decode(row[:-1]) for row in rows(folder, "train")] == [text for text in texts if text]
    assert all(row[-1] == tokenizer.eos_token_id not in row[:-1] for row in rows(folder, "train"))


def test_the_standard_library_is_prepared(recipe: Recipe) -> None:
    folder = prepare(recipe(data={"source": "stdlib", "path": None, "max_documents": 60}))
    assert sum(split["documents"] for split in read_manifest(folder)["splits"].values()) <= 60
    file = opened(folder, "train")
    source = Path(file.source(7)).read_bytes()
    assert file.tokens[file.offsets[7] : file.offsets[8]].tolist() == [*source, EOS]


def test_the_manifest_holds_hashes_and_one_for_the_content(recipe: Recipe, texts: list[str], tmp_path: Path) -> None:
    folder = prepare(recipe())
    manifest = read_manifest(folder)
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {"python", "tokenizers", "transformers", "datasets"} <= set(manifest["versions"])
    (tmp_path / "text").rename(tmp_path / "moved")
    moved = prepare(recipe(data={"path": str(tmp_path / "moved")}))
    assert moved != folder
    assert read_manifest(moved)["content"] == manifest["content"], "the same tokens, wherever they came from"


def test_prepared_data_is_used_again(recipe: Recipe, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(recipe())
    monkeypatch.setattr(module, "documents", None)  # reading would fail
    same = ({"sequence_length": 64}, {"packing": False}, {"workers": 3})
    assert {prepare(recipe(data=keys)) for keys in same} == {folder}
    assert prepare(recipe(task={"kind": "masked-lm"}, seed=9)) == folder


def test_other_content_is_prepared_anew(recipe: Recipe, texts: list[str], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"max_documents": 60}, {"validation_fraction": 0.5}, {"train_vocabulary": 270}]
    folders = [prepare(recipe(data=keys)) for keys in changes]
    (tmp_path / "text" / "000.txt").write_text("changed")
    folders.append(prepare(recipe()))
    assert len(set(folders)) == 5


def test_processes_that_race_end_with_one_whole_folder(
    recipe: Recipe, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_written, publish = threading.Barrier(2, timeout=20), module._publish

    def publish_together(partial: Path, folder: Path) -> None:
        both_written.wait()
        publish(partial, folder)

    monkeypatch.setattr(module, "_publish", publish_together)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(recipe()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1
    assert list((tmp_path / "cache").iterdir()) == [found[0]]
    assert len(rows(found[0], "train")) > 60


def test_a_killed_process_leaves_nothing_taken_for_whole(
    recipe: Recipe, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe()
    child = os.fork()
    if child == 0:  # dies as from SIGKILL, with every file but the last written
        monkeypatch.setattr(module, "_write_manifest", lambda *_: os._exit(9))
        try:
            prepare(run)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = (tmp_path / "cache").iterdir()
    whole = prepare(run)
    assert len(rows(whole, "train")) > 60
    assert left.is_dir()  # it might be another process's that is still at work
    for path in (*left.iterdir(), left):
        os.utime(path, (0, 0))
    other = prepare(recipe(data={"max_documents": 60}))
    assert {*(tmp_path / "cache").iterdir()} == {whole, other}


def test_a_failure_cleans_up(recipe: Recipe, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text" / "060.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(recipe())
    assert list((tmp_path / "cache").iterdir()) == []


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_damaged_folders_are_refused(recipe: Recipe, texts: list[str]) -> None:
    folder = prepare(recipe())
    tokens = folder / "train.tokens"
    size = tokens.stat().st_size
    os.truncate(tokens, size - 2)
    message = refused(lambda: open_split(folder, "train"))
    assert f"{tokens} has {size - 2} bytes instead of {size}. Fix: remove {folder}" in message
    tokens.unlink()
    assert f"{tokens} is missing" in refused(lambda: open_split(folder, "train"))
    (folder / "manifest.json").write_text("{")
    assert "manifest.json is missing or damaged" in refused(lambda: open_split(folder, "train"))
    (folder / "manifest.json").unlink()
    assert f"{folder} is not whole. Fix: remove {folder}" in refused(lambda: prepare(recipe()))


def test_a_cache_that_cannot_be_written(recipe: Recipe, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = recipe(data={"cache_dir": str(tmp_path / "file" / "cache")})
    message = refused(lambda: prepare(run))
    assert message.startswith(f"data.cache_dir={tmp_path / 'file' / 'cache'}: can't be written: ")


def test_a_full_disk(recipe: Recipe, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._SplitWriter, "add", full)
    assert "can't be written: No space left on device" in refused(lambda: prepare(recipe()))


def test_the_cache_is_in_the_home_folder(
    recipe: Recipe, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare(recipe(data={"cache_dir": "~/here"})).parent == tmp_path / "here"


def test_nothing_to_train_on(recipe: Recipe, tmp_path: Path) -> None:
    one_file(tmp_path, "")
    assert "there is no text to train on" in refused(lambda: prepare(recipe()))
    (tmp_path / "text" / "only.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    run = recipe(data={"validation_path": str(tmp_path / "empty.txt")})
    assert refused(lambda: prepare(run)).startswith("data.validation_path=")
