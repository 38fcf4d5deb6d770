"""Where text comes from: one stream of documents, whatever the source."""

from __future__ import annotations

import csv
import glob
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_train.config.data import DataSection
from ds_train.config.load import nearest
from ds_train.config.task import TaskSection
from ds_train.errors import user_error


@dataclass(frozen=True)
class Document:
    """A text, where it came from, and its label (None for language models)."""

    source: str
    text: str
    label: int | None = None


def documents(data: DataSection, task: TaskSection, held_out: bool = False) -> Iterator[Document]:
    """The documents of the source in a fixed order, or of its held-out path or split.

    Raises:
        UserError: missing or unreadable file, missing column, a label that is no class, an unreachable hub.
    """
    count = 0
    for document in _read(data, task, held_out):
        if data.max_documents is not None and count >= data.max_documents:
            return
        count += 1
        yield document


def local_files(data: DataSection, held_out: bool = False) -> list[Path]:
    """Files that a local source reads, sorted; empty for a hub source.

    Raises:
        UserError: the path holds no file.
    """
    if data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        return sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    if data.source == "hub":
        return []
    key = "data.validation_path" if held_out else "data.path"
    given = str(data.validation_path if held_out else data.path)
    path = Path(given).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not found:
        raise user_error(key, "there is no such file, folder or glob", f"looked in {Path.cwd()}", given)
    return sorted(found)


def _read(data: DataSection, task: TaskSection, held_out: bool) -> Iterator[Document]:
    if data.source == "hub":
        yield from _rows(_hub_rows(data, held_out), f"hub {data.path}", data, task)
        return
    for file in local_files(data, held_out):
        if data.source == "stdlib":
            yield Document(str(file), file.read_text(encoding="utf-8", errors="replace"))
        elif data.source == "text":
            yield Document(str(file), _read_text(file))
        elif data.source == "tsv":
            yield from _rows(_tsv_rows(file, data, task), str(file), data, task)
        else:
            yield from _rows(_table_rows(file, data.source), str(file), data, task)


def _rows(rows: Iterator[dict[str, Any]], source: str, data: DataSection, task: TaskSection) -> Iterator[Document]:
    labelled = task.kind == "sequence-classification"
    for number, row in enumerate(rows):
        place = f"{source}:{number}"
        text = row[_column(row, data.text_column, "data.text_column", source)]
        label = None
        if labelled:
            label = _label(row[_column(row, data.label_column, "data.label_column", source)], task.num_labels, place)
        yield Document(place, "" if text is None else str(text), label)


def _column(row: dict[str, Any], name: str, key: str, source: str) -> str:
    if name in row:
        return name
    guess = nearest(name, list(row))
    fix = f"did you mean {guess!r}?" if guess else "its columns: " + ", ".join(map(repr, row))
    raise user_error(key, f"{source} has no such column", fix, name)


def _label(value: Any, num_labels: int, place: str) -> int:
    try:
        label = int(value)
    except (TypeError, ValueError):
        label = -1
    if isinstance(value, float) and value != label:
        label = -1
    if not 0 <= label < num_labels:
        reason = f"{place}: label {value!r} is not an integer from 0 to {num_labels - 1}"
        raise user_error("task.num_labels", reason, "correct the label, or set task.num_labels", num_labels)
    return label


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise user_error("data.path", f"{file} is not UTF-8 text: {error.reason} at byte {error.start}", "convert it") from error
    except OSError as error:
        raise user_error("data.path", f"{file} can't be read: {error.strerror}", "make it readable") from error


def _tsv_rows(file: Path, data: DataSection, task: TaskSection) -> Iterator[dict[str, Any]]:
    """Rows by column name, or by number where the recipe names columns by number (a file without a header)."""
    lines = csv.reader(_read_text(file).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    header: list[str] | None = None
    columns = [data.text_column] + ([data.label_column] if task.kind == "sequence-classification" else [])
    if not all(name.isdigit() for name in columns):
        header = next(lines, [])
    for number, cells in enumerate(lines):
        names = header if header is not None else [str(index) for index in range(len(cells))]
        if not cells:
            continue
        if len(cells) < len(names):
            reason = f"{file}: row {number} has {len(cells)} cells instead of {len(names)}"
            raise user_error("data.path", reason, "correct the row")
        yield dict(zip(names, cells, strict=False))


def _table_rows(file: Path, kind: str) -> Iterator[dict[str, Any]]:
    import datasets

    builder = {"jsonl": "json", "parquet": "parquet"}[kind]
    try:
        # Streaming reads the file as it goes, and leaves no copy of it in the cache of `datasets`.
        yield from datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True)
    except Exception as error:  # the readers raise pyarrow's, json's and datasets' own errors
        raise user_error("data.path", f"{file} can't be read as {kind}: {_first_line(error)}", "correct the file") from error


def _hub_rows(data: DataSection, held_out: bool) -> Iterator[dict[str, Any]]:
    import datasets

    split = data.validation_split if held_out else data.split
    try:
        yield from datasets.load_dataset(data.path, data.subset, split=split, streaming=data.streaming)
    except Exception as error:  # no network, no such id, no such split: each has its own class
        fix = "check id, subset and split, go where the hub can be reached, or give local files"
        raise user_error("data.path", f"hub data set can't be read: {_first_line(error)}", fix, data.path) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
