"""Tokenize once: documents -> memory-mapped token files with a manifest, reused by every later run.

CACHE/<key>/manifest.json               hashes, counts, tokenizer; written last
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
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ds_train.config import RunConfig
from ds_train.data.sources import Document, documents, local_files
from ds_train.data.tokenizer import fingerprint, load_saved, load_tokenizer, train_bpe
from ds_train.errors import user_error

FORMAT = 1
MANIFEST = "manifest.json"
_BATCH = 256
# With fewer documents than this, the end of each is held out instead of whole documents.
_FEW_DOCUMENTS = 50


@dataclass(frozen=True)
class TokenFile:
    """A split of prepared data, memory-mapped."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    sources: Path

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return len(self.offsets) - 1


def prepare(run: RunConfig, progress: bool = False) -> Path:
    """Folder of the recipe's prepared data; made now if it isn't there yet.

    Safe to be killed, and to be run by several processes at once: a folder appears whole or not at all.

    Raises:
        UserError: what the source, the tokenizer or the cache folder refuse, or a source without text.
    """
    # A tokenizer that will be trained follows from the source and the size, so those stand for it in the key.
    tokenizer = None if run.data.train_vocabulary else load_tokenizer(run)
    key = _content_key(run, fingerprint(tokenizer) if tokenizer else f"bpe-{run.data.train_vocabulary}")
    cache = Path(run.data.cache_dir).expanduser()
    folder = cache / key
    if (folder / MANIFEST).is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=cache))
    except OSError as error:
        raise user_error("data.cache_dir", f"can't be written: {error.strerror}", "choose another folder", cache) from error
    try:
        _write(run, tokenizer, partial, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder."""
    return dict(json.loads((folder / MANIFEST).read_text()))


def prepared_tokenizer(folder: Path) -> Any:
    """The tokenizer that the folder's tokens were made with."""
    return load_saved(folder / "tokenizer")


def open_split(folder: Path, split: str) -> TokenFile | None:
    """Memory-map `train` or `validation`; None where the split has no documents.

    Raises:
        UserError: a file is missing or has another size than the manifest says.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            reason = f"prepared file {path} has {size} bytes instead of {expected['bytes']}"
            raise user_error("data.cache_dir", reason, f"remove {folder}; it is prepared again", folder.parent)
    if manifest["splits"][split]["tokens"] == 0:
        return None
    tokens: NDArray[Any] = np.memmap(folder / f"{split}.tokens", dtype=manifest["dtype"], mode="r")
    offsets = np.fromfile(folder / f"{split}.offsets", dtype=np.int64)
    labels = np.fromfile(folder / f"{split}.labels", dtype=np.int64) if manifest["labelled"] else None
    return TokenFile(tokens, offsets, labels, folder / f"{split}.sources")


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

    def add(self, ids: list[int], document: Document, text_bytes: int) -> None:
        self._tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._offsets.write(np.int64(self.tokens).tobytes())
        self._sources.write(document.source.replace("\n", " ").encode() + b"\n")
        if self._labels is not None:
            self._labels.write(np.int64(document.label or 0).tobytes())

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}


def _write(run: RunConfig, tokenizer: Any, folder: Path, progress: bool) -> None:
    data, task = run.data, run.task
    if tokenizer is None:
        texts = (document.text for document in documents(data, task))
        tokenizer = train_bpe(_shown(texts, "training the tokenizer", progress), int(data.train_vocabulary or 0))
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    labelled = task.kind == "sequence-classification"
    explicit = data.validation_path is not None or data.validation_split is not None
    with ExitStack() as stack:
        train = _SplitWriter(stack, folder, "train", dtype, labelled)
        validation = _SplitWriter(stack, folder, "validation", dtype, labelled)
        encoded = _encode(run, tokenizer, documents(data, task), progress)
        if explicit:
            for document, ids in encoded:
                train.add(ids, document, len(document.text.encode()))
            for document, ids in _encode(run, tokenizer, documents(data, task, held_out=True), progress):
                validation.add(ids, document, len(document.text.encode()))
        else:
            _split(encoded, data.validation_fraction, labelled, train, validation)
    if train.tokens == 0:
        raise user_error("data", "the source has no text to train on", "check data.path, data.text_column and the files")
    tokenizer.save_pretrained(folder / "tokenizer")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "format": FORMAT,
        "source": data.model_dump(mode="json", exclude={"cache_dir", "workers"}),
        "tokenizer": fingerprint(tokenizer),
        "vocabulary": len(tokenizer),
        "dtype": dtype,
        "labelled": labelled,
        "splits": {"train": train.counts(), "validation": validation.counts()},
        "files": {str(path.relative_to(folder)): _file_record(path) for path in files},
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _encode(
    run: RunConfig, tokenizer: Any, stream: Iterator[Document], progress: bool
) -> Iterator[tuple[Document, list[int]]]:
    """Documents with their token ids; empty texts are left out. The tokenizer's own threads work on each batch."""
    labelled = run.task.kind == "sequence-classification"
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    kept = (document for document in stream if document.text)
    for batch in _batched(_shown(kept, "tokenizing", progress), _BATCH):
        texts = [document.text for document in batch]
        if labelled:
            rows = tokenizer(texts, truncation=True, max_length=run.data.sequence_length)["input_ids"]
        else:
            rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            if end is not None:
                rows = [[*row, end] for row in rows]
        yield from zip(batch, rows, strict=True)


def _split(
    encoded: Iterator[tuple[Document, list[int]]], fraction: float, labelled: bool, train: _SplitWriter, validation: _SplitWriter
) -> None:
    """Hold out whole documents by a hash of their number, or the end of each where there are few."""
    first = list(itertools.islice(encoded, _FEW_DOCUMENTS))
    few = len(first) < _FEW_DOCUMENTS and not labelled
    for number, (document, ids) in enumerate(itertools.chain(first, encoded)):
        text_bytes = len(document.text.encode())
        if few:
            cut = len(ids) - int(len(ids) * fraction)
            train.add(ids[:cut], document, text_bytes * cut // len(ids))
            if cut < len(ids):
                validation.add(ids[cut:], document, text_bytes - text_bytes * cut // len(ids))
        else:
            (validation if _held_out(number, fraction) else train).add(ids, document, text_bytes)


def _held_out(number: int, fraction: float) -> bool:
    digest = hashlib.sha256(f"held out {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def _content_key(run: RunConfig, tokenizer: str) -> str:
    data = run.data
    files = [local_files(data)] + ([local_files(data, held_out=True)] if data.validation_path else [])
    content = {
        "format": FORMAT,
        "data": data.model_dump(mode="json", exclude={"cache_dir", "workers", "packing", "tokenizer", "sequence_length"}),
        "tokenizer": tokenizer,
        "files": [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in itertools.chain(*files)],
    }
    if run.task.kind == "sequence-classification":
        content |= {"labels": run.task.num_labels, "length": data.sequence_length}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


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


def _batched(stream: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(stream)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
