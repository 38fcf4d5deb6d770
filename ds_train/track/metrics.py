"""RUN/metrics.jsonl: one JSON object a line, written as it happens, readable after any crash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends records. A failed write is reported once and never stops the run; later ones are tried again."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn, self._failed = path, warn, False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinities become the strings "nan", "inf" and "-inf", since JSON has none."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"metrics can't be written to {self._path}: {error.strerror}; training goes on")
            self._failed = True

    def truncate_after(self, step: int) -> None:
        """Drop records of later steps and a half-written last line, as a resumed run writes them again."""
        kept = [record for record in read_metrics(self._path) if record.get("step", 0) <= step]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut off
        if isinstance(record, dict):
            records.append(record)
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
