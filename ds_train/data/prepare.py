"""Tokenize once: documents -> memory-mapped token files with a manifest, reused by every later run.

CACHE/<key>/manifest.json               hashes, counts, tokenizer, versions; written last
CACHE/<key>/{train,validation}.tokens   uint16 or uint32, documents one after the other
CACHE/<key>/{train,validation}.offsets  int64, document i is tokens[offsets[i]:offsets[i + 1]]
CACHE/<key>/{train,validation}.labels   int64, one per document (sequence-classification)
CACHE/<key>/{train,validation}.sources  text, one line per document: where it came from
CACHE/<key>/tokenizer/                  the tokenizer, as transformers saves it
The key is a hash of all that decides the content, so another source or tokenizer is another folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ds_train.config import RunConfig
from ds_train.config.data import DataSection
from ds_train.data.in_time import in_time
from ds_train.data.sources import Document, documents, has_held_out, local_files
from ds_train.data.tokenizer import Encoder, fingerprint, load_saved, load_tokenizer, train_bpe, vocabulary_size
from ds_train.errors import UserError, user_error

FORMAT = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
SHAPE_KEYS = ("packing", "packing_by", "padding_free")
"""Keys of the `data` section that say how tokens become samples, and leave the tokens as they are."""
# Texts go to the tokenizer in batches of at most so many, and so many characters (a token takes some 100 bytes there).
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 2**20
# With fewer documents than this, the end of each is held out instead of whole documents.
_FEW_DOCUMENTS = 50
_ABANDONED_S = 24 * 3600.0

Encoded = tuple[Document, NDArray[np.int64]]


@dataclass(frozen=True)
class TokenFile:
    """A split of prepared data, memory-mapped: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    sources: Path

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return len(self.offsets) - 1

    def source(self, document: int) -> str:
        """Where document number `document` came from: a file, `file:line` or `id:row`."""
        lines, ends = self._source_lines
        start = 0 if document == 0 else int(ends[document - 1]) + 1
        return lines[start : int(ends[document])].decode()

    def sha256(self, document: int) -> str:
        """Hex SHA-256 of the document's tokens, as int64 in little-endian bytes."""
        if document not in self._hashes:
            tokens = self.tokens[self.offsets[document] : self.offsets[document + 1]]
            self._hashes[document] = hashlib.sha256(np.asarray(tokens, dtype="<i8").tobytes()).hexdigest()
        return self._hashes[document]

    @cached_property
    def _hashes(self) -> dict[int, str]:
        return {}

    @cached_property
    def _source_lines(self) -> tuple[mmap.mmap, NDArray[np.int64]]:
        with self.sources.open("rb") as file:
            lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return lines, np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))


def prepare(run: RunConfig, progress: bool = False) -> Path:
    """Folder of the recipe's prepared data; made now if it isn't there yet.

    Safe to be killed, and to be run by several processes at once: a folder appears whole or not at all.

    Raises:
        UserError: what the source, the tokenizer or the cache folder refuse, or a source without text.
    """
    # A tokenizer that will be trained follows from the source and the size, so those stand for it in the key.
    tokenizer = None if run.data.train_vocabulary else load_tokenizer(run)
    key = content_key(run, fingerprint(tokenizer) if tokenizer else f"bpe-{run.data.train_vocabulary}")
    cache = Path(run.data.cache_dir).expanduser()
    folder = cache / key
    if (folder / MANIFEST).is_file():
        return folder
    # A name of its own: another process may be preparing the same data.
    partial = cache / f"{key}.partial-{uuid.uuid4().hex[:12]}"
    _remove_abandoned(cache)
    try:
        partial.mkdir(parents=True)
        _write(run, tokenizer, partial, progress)
        _publish(partial, folder)
    except OSError as error:  # those of reading the source are UserErrors already
        reason = f"can't be written: {error.strerror or error}"
        raise user_error(
            "data.cache_dir", reason, "choose a folder that you may write to, with space left", cache
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        UserError: the folder has none, or it is damaged.
    """
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{folder / MANIFEST} is missing or damaged") from error


def prepared_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that the folder's tokens were made with; one with code of its own has to be trusted again."""
    return load_saved(folder / "tokenizer", trust_remote_code)


def open_split(folder: Path, split: str) -> TokenFile | None:
    """Memory-map `train` or `validation`; None where the split has no tokens.

    Raises:
        UserError: a file is missing or has another size than the manifest says.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise _damaged(folder, f"prepared file {path} {found}")
    if manifest["splits"][split]["tokens"] == 0:
        return None

    def mapped(suffix: str, dtype: str) -> NDArray[Any]:
        return np.memmap(folder / f"{split}.{suffix}", dtype=dtype, mode="r").view(np.ndarray)

    labels = mapped("labels", "int64") if manifest["labelled"] else None
    return TokenFile(
        mapped("tokens", manifest["dtype"]), mapped("offsets", "int64"), labels, folder / f"{split}.sources"
    )


def content_key(run: RunConfig, tokenizer: str) -> str:
    """Name of the prepared folder: a hash of all that decides what is in it. `tokenizer` is its fingerprint.

    Local files count by path, size and time of change, those of a local folder in the hub's form too; a data set on the
    hub by its id alone.
    """
    data = run.data
    files = local_files(data) + (local_files(data, held_out=True) if data.validation_path else [])
    if data.source == "hub" and data.path is not None:
        files += sorted(path for path in Path(data.path).rglob("*") if path.is_file())
    other = {"cache_dir", "workers", "tokenizer", "sequence_length", "streaming", "label_column", *SHAPE_KEYS}
    content = {
        "format": FORMAT,
        "data": data.model_dump(mode="json", exclude=other),
        "tokenizer": tokenizer,
        "files": [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
    }
    if data.source == "stdlib":
        content["python"] = platform.python_version()
    if run.task.kind == "sequence-classification":
        content["classes"] = [data.label_column, run.task.num_labels, data.sequence_length]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes have left half written: nothing in it has been written to for a day."""
    for partial in cache.glob("*.partial-*"):
        try:
            last = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        except OSError:  # its own process has just finished with it
            continue
        if time.time() - last > _ABANDONED_S:
            shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise
        if not (folder / MANIFEST).is_file():  # else another process was first, with the same content
            raise _damaged(folder, f"{folder} is not whole") from error


def _damaged(folder: Path, reason: str) -> UserError:
    return user_error("data.cache_dir", reason, f"remove {folder}; it is prepared again", folder.parent)


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, stack: ExitStack, folder: Path, split: str, dtype: str, labelled: bool) -> None:
        def file(suffix: str) -> IO[bytes]:
            return stack.enter_context((folder / f"{split}.{suffix}").open("wb"))

        self._tokens, self._offsets, self._sources = file("tokens"), file("offsets"), file("sources")
        self._labels = file("labels") if labelled else None
        self._dtype = dtype
        self.documents = self.tokens = self.text_bytes = 0
        self._offsets.write(np.int64(0).tobytes())

    def add(self, document: Document, ids: NDArray[np.int64], text_bytes: int) -> None:
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._offsets.write(np.int64(self.tokens).tobytes())
        self._sources.write(document.source.replace("\n", " ").encode(errors="replace") + b"\n")
        if self._labels is not None:
            self._labels.write(np.int64(document.label or 0).tobytes())

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}


def _write(run: RunConfig, tokenizer: Any, folder: Path, progress: bool) -> None:
    data, task = run.data, run.task
    if tokenizer is None:
        texts = (document.text for document in _read(run))
        tokenizer = train_bpe(_shown(texts, "training the tokenizer", progress), int(data.train_vocabulary or 0))
    # Before encoding, which leaves a length to cut at in the tokenizer.
    tokenizer.save_pretrained(folder / "tokenizer")
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    labelled = task.kind == "sequence-classification"
    own = data.tokenizer == "bytes" or data.train_vocabulary is not None
    encoder = Encoder(tokenizer, own, labelled, data.sequence_length)
    with ExitStack() as stack:
        train, validation = (_SplitWriter(stack, folder, split, dtype, labelled) for split in SPLITS)
        encoded = _encode(encoder, _read(run), progress)
        if has_held_out(data):
            _fill(train, encoded)
            _fill(validation, _encode(encoder, _read(run, held_out=True), progress))
        else:
            _split(encoded, data.validation_fraction, labelled, train, validation)
    _check_not_empty(data, train.tokens, validation.tokens)
    _write_manifest(
        folder,
        {
            "format": FORMAT,
            "source": data.model_dump(mode="json", exclude={"cache_dir", "workers", *SHAPE_KEYS}),
            "task": task.kind,
            "tokenizer": fingerprint(tokenizer),
            "vocabulary": vocabulary_size(tokenizer),
            "dtype": dtype,
            "labelled": labelled,
            "splits": {"train": train.counts(), "validation": validation.counts()},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ds_train", "tokenizers", "transformers", "datasets", "numpy")},
            },
        },
    )


def _read(run: RunConfig, held_out: bool = False) -> Iterator[Document]:
    def read(opened: Callable[[str], None]) -> Iterator[Document]:
        return documents(run.data, run.task, held_out, opened)

    return in_time(read, run.faults.first_step_seconds)


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """`facts`, the size and hash of every file, and `content`: one hash of the tokens, wherever they came from."""
    files = {str(path.relative_to(folder)): _file_record(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    content = [files[name]["sha256"] for name in files if name.endswith((".tokens", ".offsets", ".labels"))]
    facts = {**facts, "content": hashlib.sha256("".join(content).encode()).hexdigest(), "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _check_not_empty(data: DataSection, train: int, validation: int) -> None:
    if train == 0:
        key, value = ("data.path", data.path) if data.path else ("data.source", data.source)
        fix = "check the files and data.text_column, or hold out less"
        raise user_error(key, "there is no text to train on", fix, value)
    if has_held_out(data) and validation == 0:
        key = "data.validation_split" if data.source == "hub" else "data.validation_path"
        reason = "there is no text to evaluate on"
        raise user_error(key, reason, "check it, or leave it out", data.validation_split or data.validation_path)


def _encode(encoder: Encoder, stream: Iterator[Document], progress: bool) -> Iterator[Encoded]:
    """Documents with their tokens; empty texts are left out. The tokenizer's own threads work on each batch."""
    kept = (document for document in stream if document.text)
    for batch in _batched(_shown(kept, "tokenizing", progress)):
        rows = encoder([document.text for document in batch])
        yield from ((document, ids) for document, ids in zip(batch, rows, strict=True) if len(ids))


def _batched(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in stream:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fill(split: _SplitWriter, encoded: Iterator[Encoded]) -> None:
    for document, ids in encoded:
        split.add(document, ids, len(document.text.encode()))


def _split(
    encoded: Iterator[Encoded], fraction: float, labelled: bool, train: _SplitWriter, validation: _SplitWriter
) -> None:
    """Hold out whole documents by their number. Where there are few, the end of each (a label can't be cut), or the
    last document where no end would have a token to predict."""
    first = list(itertools.islice(encoded, _FEW_DOCUMENTS))
    few = len(first) < _FEW_DOCUMENTS and not labelled
    short = few and len(first) > 1 and fraction > 0 and max(int(len(ids) * fraction) for _, ids in first) < 2
    for number, (document, ids) in enumerate(itertools.chain(first, encoded)):
        text_bytes = len(document.text.encode())
        if short or not few:
            aside = number == len(first) - 1 if short else held_out(number, fraction)
            (validation if aside else train).add(document, ids, text_bytes)
            continue
        tail = int(len(ids) * fraction)
        cut = len(ids) - (tail if tail > 1 else 0)
        cut_bytes = text_bytes * cut // len(ids)
        train.add(document, ids[:cut], cut_bytes)
        if cut < len(ids):
            validation.add(document, ids[cut:], text_bytes - cut_bytes)


def held_out(number: int, fraction: float) -> bool:
    """Whether document `number` is held out: one of each 1 / fraction documents in a row, chosen by a hash.

    The same documents whatever the seed. Their number among n documents is within one of n * fraction; drawn one by
    one they could be none.
    """
    part, whole = Fraction(fraction).limit_denominator(10**9).as_integer_ratio()
    if part == 0:
        return False
    block = number * part // whole
    first, stop = -(-block * whole // part), -(-(block + 1) * whole // part)
    digest = hashlib.sha256(f"held out {block}".encode()).digest()
    return number == first + int.from_bytes(digest[:8], "little") % (stop - first)


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _shown(stream: Iterator[Any], what: str, progress: bool) -> Iterator[Any]:
    if not progress:
        return stream
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    def counted() -> Iterator[Any]:
        columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} documents"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            for item in stream:
                yield item
                bar.advance(task)

    return counted()
