"""Where text comes from: one stream of documents, whatever the source."""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ds_train.config.data import DataSection
from ds_train.config.load import nearest
from ds_train.config.task import TaskSection
from ds_train.errors import Problem, UserError, first_line, user_error

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "parquet": (".parquet",),
    "tsv": (".tsv", ".tsv.gz"),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text, where it came from (`file`, `file:line` or `id:row`, counted from 1), and its label (None without)."""

    source: str
    text: str
    label: int | None = None


def documents(data: DataSection, task: TaskSection, held_out: bool = False) -> Iterator[Document]:
    """The documents of the source in a fixed order, or of its held-out path or split.

    Raises:
        UserError: missing or unreadable file, missing column, a label that is no class, an unreachable hub.
    """
    return itertools.islice(_read(data, task, held_out), data.max_documents)


def has_held_out(data: DataSection) -> bool:
    """Whether the recipe names held-out data; else a part of the source is held out."""
    return (data.validation_split if data.source == "hub" else data.validation_path) is not None


def local_files(data: DataSection, held_out: bool = False) -> list[Path]:
    """Files that a local source reads, sorted; empty for a hub source.

    A folder is read with all below it: every file for `text`, those named `*.jsonl` and the like for the others. The
    standard library is taken without its own tests, which some distributions leave out. Files below `path` that
    `validation_path` names are held out, unless that is all of them.

    Raises:
        UserError: the path holds no file, or can't be looked into.
    """
    if data.source == "stdlib":
        return _library_files(Path(sysconfig.get_paths()["stdlib"]))
    if data.source == "hub":
        return []
    found = _files(_origin(data, held_out), data.source)
    if held_out or data.validation_path is None:
        return found
    aside = {file.resolve() for file in _files(_origin(data, True), data.source)}
    return [file for file in found if file.resolve() not in aside] or found


def check_paths(data: DataSection) -> list[Problem]:
    """What is wrong with the paths of a local source, of which one file each is looked for."""
    if data.source in ("stdlib", "hub"):
        return []
    problems: list[Problem] = []
    for held_out in [place for place, path in ((False, data.path), (True, data.validation_path)) if path is not None]:
        try:
            _files(_origin(data, held_out), data.source, at_most=1)
        except UserError as error:
            problems += error.problems
    return problems


def _files(origin: _Origin, source: str, at_most: int | None = None) -> list[Path]:
    path = Path(origin.given).expanduser()
    try:
        found = set(itertools.islice(_found(path, source), at_most))
        if not found:
            raise origin.error(*_nothing_there(path, source))
    except OSError as error:  # no right to look, or too long a name
        raise _unreadable(path, error, origin) from error
    return sorted(found)


def _found(path: Path, source: str) -> Iterator[Path]:
    if path.is_dir():
        named = (file for file in path.rglob("*") if file.name.endswith(_SUFFIXES.get(source, "")))
        yield from (file for file in named if file.is_file() and not _hidden(file, path))
    elif path.is_file():
        yield path
    else:
        yield from (Path(name) for name in glob.iglob(str(path), recursive=True) if Path(name).is_file())


@dataclass(frozen=True)
class _Origin:
    """The recipe key that named what is being read, for errors."""

    key: str
    given: str

    def error(self, reason: str, fix: str) -> UserError:
        return user_error(self.key, reason, fix, self.given)


def _origin(data: DataSection, held_out: bool) -> _Origin:
    key = "data.validation_path" if held_out and data.source != "hub" else "data.path"
    given = data.validation_path if key == "data.validation_path" else data.path
    if given is None:
        raise user_error(
            key, f"source {data.source} reads from a path", "give a file, folder or glob; a hub id for hub"
        )
    return _Origin(key, given)


def _library_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]  # not even walked: site-packages can be huge
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _nothing_there(path: Path, source: str) -> tuple[str, str]:
    """(reason, fix) for a path without files."""
    if path.is_dir():
        wanted = _SUFFIXES.get(source, ("",))[0]
        return f"the folder holds no {wanted + ' ' if wanted else ''}file", "give a folder that does, a file or a glob"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    fix = f"did you mean {path.parent / guess}?" if guess else f"give one that exists, from {Path.cwd()}"
    return "there is no such file, folder or glob", fix


def _read(data: DataSection, task: TaskSection, held_out: bool) -> Iterator[Document]:
    if data.source == "stdlib":
        for file in local_files(data):
            yield Document(str(file), file.read_bytes().decode(errors="replace"))
        return
    origin = _origin(data, held_out)
    columns = [data.text_column] + ([data.label_column] if task.kind == "sequence-classification" else [])
    if data.source == "hub":
        yield from _rows(_hub_rows(data, held_out, origin), data, task)
        return
    for path in local_files(data, held_out):
        if data.source == "text":
            yield Document(str(path), _read_text(path, origin))
        elif data.source == "tsv":
            yield from _rows(_tsv_rows(path, columns, origin), data, task)
        elif data.source == "jsonl":
            yield from _rows(_json_rows(path, origin), data, task)
        else:
            yield from _rows(_parquet_rows(path, columns, origin), data, task)


def _rows(rows: Iterator[tuple[str, Row]], data: DataSection, task: TaskSection) -> Iterator[Document]:
    """Documents of (place, row by column name); a missing text is an empty one."""
    for place, row in rows:
        text = _cell(row, data.text_column, "data.text_column", place)
        if not isinstance(text, str | None):
            reason = f"{place} holds {type(text).__name__}, not text"
            raise user_error("data.text_column", reason, "name a column of texts", data.text_column)
        label = None
        if task.kind == "sequence-classification":
            label = _label(_cell(row, data.label_column, "data.label_column", place), data, task, place)
        yield Document(place, _encodable(text or ""), label)


def _cell(row: Row, name: str, key: str, place: str) -> Any:
    if name in row:
        return row[name]
    guess = nearest(name, list(row))
    fix = (f"did you mean {guess!r}? " if guess else "") + "its columns are " + ", ".join(map(repr, row))
    raise user_error(key, f"{place} has no such column", fix, name)


def _label(value: Any, data: DataSection, task: TaskSection, place: str) -> int:
    try:
        label = int(value)
    except (TypeError, ValueError, OverflowError):
        label = None
    if label is None or (isinstance(value, float) and value != label):
        reason = f"{place} has the label {value!r}, which is no integer"
        raise user_error(
            "data.label_column", reason, "name a column of integers, or correct the label", data.label_column
        )
    if not 0 <= label < task.num_labels:
        reason = f"{place} has the label {label}, but labels go from 0 to {task.num_labels - 1}"
        fix = f"set task.num_labels={label + 1}, or correct the label" if label > 0 else "correct the label"
        raise user_error("task.num_labels", reason, fix, task.num_labels)
    return label


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which JSON can spell and UTF-8 can't: they become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _read_text(path: Path, origin: _Origin) -> str:
    try:
        # Bytes, since reading as text would turn \r\n into \n.
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}: byte {error.start}", origin) from error
    except OSError as error:
        raise _unreadable(path, error, origin) from error


def _lines(path: Path, origin: _Origin) -> Iterator[tuple[str, str]]:
    """(`file:line`, line without its end). Only \\n and \\r\\n end a line, unlike in `str.splitlines`."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield f"{path}:{number}", text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}:{number}", origin) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error, origin) from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _not_utf8(place: str, origin: _Origin) -> UserError:
    return origin.error(f"{place} is not UTF-8 text", "convert the file to UTF-8, or leave it out")


def _unreadable(path: Path, error: Exception, origin: _Origin) -> UserError:
    return origin.error(f"{path} can't be read: {first_line(error)}", "make it a readable file, or leave it out")


def _tsv_rows(path: Path, columns: Sequence[str], origin: _Origin) -> Iterator[tuple[str, Row]]:
    """Rows by column name, or by number where the recipe names columns by number (a file without a header).

    Quotes are ordinary characters, as in the GLUE files.
    """
    by_number = all(name.isdecimal() for name in columns)
    header: list[str] | None = None
    for place, line in _lines(path, origin):
        if not line:
            continue
        cells = line.split("\t")
        if by_number:
            yield place, {str(index): cell for index, cell in enumerate(cells)}
        elif header is None:
            header = cells
            for name, key in zip(columns, ("data.text_column", "data.label_column"), strict=False):
                _cell(dict.fromkeys(header), name, key, place)
        elif len(cells) != len(header):
            reason = f"{place} has {len(cells)} cells instead of the header's {len(header)}"
            raise origin.error(reason, "correct the line; quotes don't keep a tab inside a cell")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _json_rows(path: Path, origin: _Origin) -> Iterator[tuple[str, Row]]:
    for place, line in _lines(path, origin):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise origin.error(f"{place} is not JSON: {error}", "write one JSON object a line") from error
        if not isinstance(row, dict):
            raise origin.error(f"{place} is not a JSON object", "write one JSON object a line")
        yield place, row


def _parquet_rows(path: Path, columns: Sequence[str], origin: _Origin) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # A column that isn't there is missed by the reader of the row, which names those that are.
            wanted = list(columns) if set(columns) <= set(names) else names
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error, origin) from error


def _hub_rows(data: DataSection, held_out: bool, origin: _Origin) -> Iterator[tuple[str, Row]]:
    import datasets  # here, since it costs a second and 80 MB that local sources needn't pay

    datasets.utils.logging.set_verbosity_error()

    split = data.validation_split if held_out else data.split
    try:
        rows = datasets.load_dataset(data.path, data.subset, split=split, streaming=data.streaming)
        yield from ((f"{data.path}[{split}]:{number}", row) for number, row in enumerate(rows, 1))
    except Exception as error:  # no network, no such id, no such split: each has its own class
        fix = (
            "check id, subset and split; without a network, give a local folder with data.source=jsonl, parquet or text"
        )
        raise origin.error(f"the hub data set's split {split} can't be read: {first_line(error)}", fix) from error
