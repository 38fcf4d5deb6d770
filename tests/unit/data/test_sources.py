"""Documents of every kind of source, and what each refuses."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from ds_train.config.data import DataSection
from ds_train.config.task import TaskSection
from ds_train.data.sources import Document, documents
from ds_train.errors import UserError

SST2 = Path(__file__).resolve().parents[4] / "shared" / "data" / "sst2" / "dev.tsv"
CLASSIFY = TaskSection(kind="sequence-classification")


def read(source: str, path: Path | str | None, task: TaskSection | None = None, **keys: Any) -> list[Document]:
    data = DataSection(source=source, path=None if path is None else str(path), **keys)  # type: ignore[arg-type]
    return list(documents(data, task or TaskSection()))


def refused(source: str, path: Path | str | None, task: TaskSection | None = None, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source, path, task, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "Fix: " in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_the_standard_library_is_some_megabytes_of_python() -> None:
    found = read("stdlib", None, max_documents=2000)
    root = sysconfig.get_paths()["stdlib"]
    assert found == sorted(found, key=lambda document: Path(document.source))
    assert all(document.source.startswith(root) and document.source.endswith(".py") for document in found)
    assert not any("site-packages" in document.source or "/test/" in document.source for document in found)
    assert 6e6 < sum(len(document.text) for document in found) < 25e6


def test_text_takes_one_document_per_file_unchanged(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "two\r\nlines\n")
    write(tmp_path / "a" / "deep.md", "été \x85 \u2028")
    write(tmp_path / ".git" / "config", "hidden")
    found = read("text", tmp_path)
    assert [(Path(d.source).name, d.text) for d in found] == [
        ("deep.md", "été \x85 \u2028"),
        ("b.txt", "two\r\nlines\n"),
    ]
    assert read("text", tmp_path / "b.txt") == read("text", tmp_path / "*.txt") == [found[1]]
    assert read("text", tmp_path, max_documents=1) == [found[0]]


def test_held_out_documents_come_from_their_own_path(tmp_path: Path) -> None:
    train, held = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    data = DataSection(source="text", path=str(train), validation_path=str(held))
    assert [d.text for d in documents(data, TaskSection(), held_out=True)] == ["b"]


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b", "valid"):
        lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    held_out = {"validation_path": str(tmp_path / "valid.jsonl")}
    assert [document.text for document in read("jsonl", tmp_path, **held_out)] == ["a", "b"]
    # All of it, as a test of a recipe may want.
    assert len(read("jsonl", tmp_path / "valid.jsonl", **held_out)) == 1


def test_a_glob_reads_no_file_twice(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "deeper" / "a.txt", "one")
    assert len(read("text", f"{tmp_path}/**/**/*.txt")) == 1


def test_tsv_without_a_header_counts_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", 'a "quote\t0\n\nun\u2028broken \x85 line\t1\r\nlast\t0')
    found = read("tsv", path, CLASSIFY, text_column="0", label_column="1")
    assert [(d.text, d.label) for d in found] == [('a "quote', 0), ("un\u2028broken \x85 line", 1), ("last", 0)]
    assert [d.source for d in found] == [f"{path}:{line}" for line in (1, 3, 4)]


def test_tsv_with_a_header_names_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "\ufefflabel\tsentence\r\n1\thello\r\n0\t" + "long " * 50_000 + "\n")
    found = read("tsv", path, CLASSIFY, text_column="sentence")
    assert [(d.text[:6], len(d.text), d.label) for d in found] == [("hello", 5, 1), ("long l", 250_000, 0)]


@pytest.mark.skipif(not SST2.is_file(), reason=f"{SST2} is not on this machine")
def test_sst2_reads_as_its_lines() -> None:
    expected = [line.rsplit("\t", 1) for line in SST2.read_text().rstrip("\n").split("\n")]
    found = read("tsv", SST2, CLASSIFY, text_column="0", label_column="1")
    assert [[d.text, str(d.label)] for d in found] == expected


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} é", "label": i % 2, "other": [i]} for i in range(3000)]
    plain = lines(tmp_path / "x.jsonl", rows)
    zipped = write(tmp_path / "z" / "x.jsonl.gz", gzip.compress(plain.read_bytes()))
    table = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    expected = [(row["text"], row["label"]) for row in rows]
    for kind, path in (("jsonl", plain), ("jsonl", zipped), ("jsonl", tmp_path / "z"), ("parquet", table)):
        assert [(d.text, d.label) for d in read(kind, path, CLASSIFY)] == expected
    assert read("parquet", table)[2999] == Document(f"{table}:3000", "text 2999 é")


def test_a_folder_of_tables_is_read_without_its_other_files(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "README.md", "not a table")
    assert [d.text for d in read("jsonl", tmp_path)] == ["a"]


def test_texts_that_json_can_spell_and_utf8_cannot(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}\n{"text": null}\n')
    assert [d.text for d in read("jsonl", path)] == ["a\ufffdb 😀", ""]


def test_the_hub_path_reads_a_folder_as_a_stream(tmp_path: Path) -> None:
    lines(tmp_path / "data" / "train.jsonl", [{"body": "one"}, {"body": "two"}])
    found = read("hub", tmp_path / "data", streaming=True, text_column="body")
    assert [d.text for d in found] == ["one", "two"]
    assert found[1].source == f"{tmp_path / 'data'}[train]:2"


def test_the_hub_gets_id_subset_split_and_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*given: Any, **named: Any) -> list[dict[str, Any]]:
        seen.append((given, named))
        return [{"text": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataSection(source="hub", path="who/what", subset="small", split="train[:5]", validation_split="test")
    assert [d.text for d in documents(data, TaskSection())] == ["x"]
    list(documents(data, TaskSection(), held_out=True))
    assert seen == [(("who/what", "small"), {"split": name, "streaming": False}) for name in ("train[:5]", "test")]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'who/what' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused("hub", "who/what")
    assert message.startswith("data.path=who/what: the hub data set's split train can't be read: Couldn't reach")
    assert "local folder" in message


def test_the_real_hub_code_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "data.path=nobody/no-such-data" in refused("hub", "nobody/no-such-data")


def test_missing_paths_name_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "a")
    assert f"did you mean {tmp_path / 'train.tsv'}?" in refused("tsv", tmp_path / "trian.tsv")
    assert refused("text", "nowhere/at/all").startswith("data.path=nowhere/at/all: there is no such file")
    assert "holds no .parquet file" in refused("parquet", tmp_path)
    assert refused("jsonl", None).startswith("data.path: source jsonl reads from a path")
    message = refused_held_out(tmp_path)
    assert message.startswith("data.validation_path=")


def refused_held_out(tmp_path: Path) -> str:
    data = DataSection(source="tsv", path=str(tmp_path / "train.tsv"), validation_path=str(tmp_path / "gone.tsv"))
    with pytest.raises(UserError) as caught:
        list(documents(data, TaskSection(), held_out=True))
    return str(caught.value)


def test_missing_columns_name_the_nearest_and_all(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": "a", "labels": 1}, {"txt": "b", "labels": 1}])
    message = refused("jsonl", path)
    assert message.startswith(f"data.text_column=text: {path}:2 has no such column")
    assert "did you mean 'txt'? its columns are 'txt', 'labels'" in message
    assert "data.label_column=label" in refused("jsonl", path, CLASSIFY)
    table = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"content": ["a"]}), table)
    assert "its columns are 'content'" in refused("parquet", table)
    header = write(tmp_path / "x.tsv", "sentence\tlabel\n")
    assert f"data.text_column=sentense: {header}:1 has no such column. Fix: did you mean 'sentence'?" in refused(
        "tsv", header, CLASSIFY, text_column="sentense"
    )
    short = write(tmp_path / "y.tsv", "a\t0\nb\n")
    message = refused("tsv", short, CLASSIFY, text_column="0", label_column="1")
    assert message.startswith(f"data.label_column='1': {short}:2 has no such column")


@pytest.mark.parametrize("value", ["positive", "", None, 0.5, float("nan"), [1]])
def test_labels_that_are_no_integers(tmp_path: Path, value: Any) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": value}])
    message = refused("jsonl", path, CLASSIFY)
    assert message.startswith(f"data.label_column=label: {path}:2 has the label {value!r}, which is no integer")


@pytest.mark.parametrize("value", [-1, 2, 1.0e9])
def test_labels_that_are_no_class(tmp_path: Path, value: Any) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": "a", "label": value}])
    message = refused("jsonl", path, CLASSIFY)
    assert message.startswith(f"task.num_labels=2: {path}:1 has the label {int(value)}, but labels go from 0 to 1")


def test_paths_and_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    assert "too long" in refused("text", "x" * 300)
    damaged = bytearray(gzip.compress(json.dumps({"text": "word " * 2000}).encode()))
    damaged[12:30] = b"\xff" * 18
    refused("jsonl", write(tmp_path / "damaged.jsonl.gz", bytes(damaged)))
    assert "is not JSON" in refused("jsonl", write(tmp_path / "deep.jsonl", "[" * 200_000))


def test_damaged_files_name_the_line(tmp_path: Path) -> None:
    latin = "é\n".encode("latin-1")
    assert "byte 0 is not UTF-8" in refused("text", write(tmp_path / "a.txt", latin))
    assert "b.tsv:2 is not UTF-8" in refused("tsv", write(tmp_path / "b.tsv", b"x\n" + latin), text_column="0")
    assert "c.jsonl:2 is not JSON" in refused("jsonl", write(tmp_path / "c.jsonl", '{"text": "a"}\n{"text": '))
    assert "d.jsonl:1 is not a JSON object" in refused("jsonl", write(tmp_path / "d.jsonl", '["a"]\n'))
    assert "e.tsv:2 has 3 cells instead of the header's 2" in refused(
        "tsv", write(tmp_path / "e.tsv", "text\tlabel\na\tb\t1\n"), CLASSIFY
    )
    assert "f.parquet can't be read" in refused("parquet", write(tmp_path / "f.parquet", "no parquet"))
    assert "g.jsonl.gz can't be read" in refused("jsonl", write(tmp_path / "g.jsonl.gz", "no gzip"))
    assert "h.jsonl:1 holds list, not text" in refused("jsonl", lines(tmp_path / "h.jsonl", [{"text": ["a"]}]))
