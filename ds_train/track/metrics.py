"""RUN/metrics.jsonl: one JSON object a line, written as it happens, readable after any crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_encode = json.JSONEncoder(allow_nan=False).encode


class MetricsFile:
    """Appends records. A failed write is reported once and never stops the run; later ones are tried again."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn, self._failed = path, warn, False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become the strings "nan", "inf" and "-inf", since JSON has none."""
        try:
            line = _encode(record) + "\n"
        except ValueError:
            line = _encode(_finite(record)) + "\n"
        try:
            self._append(line.encode())
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"metrics can't be written to {self._path}: {_why(error)}; training goes on")
            self._failed = True

    def truncate_after(self, step: int, dropped: str | None = None) -> None:
        """Drop records of later steps and a half-written last line, as a resumed run writes them again.

        `dropped` names a file beside this one that they are appended to.
        """
        try:
            lines = list(_lines(self._path))
            text = "".join(line + "\n" for line, record in lines if record.get("step", 0) <= step)
            if dropped is not None:
                with self._path.with_name(dropped).open("a", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line, record in lines if record.get("step", 0) > step)
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            self._warn(f"metrics after step {step} can't be dropped from {self._path}: {_why(error)}; they stay in it")

    def _append(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                if written < len(line):  # a disk that fills up takes what fits and says so at the next write
                    file.write(line[written:])
            except OSError:
                file.truncate(end)  # the next line must not continue half of this one
                raise


def read_metrics(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """All whole records of a metrics file, or those that end its `last_bytes`; none where there is no file."""
    return [record for _, record in _lines(path, last_bytes)]


def _lines(path: Path, last_bytes: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with its record."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - last_bytes) if last_bytes is not None else 0)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut off
        if isinstance(record, dict):
            yield line, record


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
