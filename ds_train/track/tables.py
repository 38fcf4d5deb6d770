"""RUN/csv: a table for each kind of record, for spreadsheets and data frames."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tables:
    """Appends records to KIND.csv. A record with a new key adds a column, which rewrites its table."""

    def __init__(self, folder: Path, done: int) -> None:
        """Rows of steps after `done`, of a run that is continued, are dropped: they will be written again."""
        self._folder = folder
        self._columns: dict[str, list[str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.go_back(done)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Append a record."""
        kind = str(record["kind"])
        row = {key: value for key, value in record.items() if key != "kind"}
        columns = self._columns.get(kind, [])
        if new := [key for key in row if key not in columns]:
            self._rewrite(kind, columns + new, _read(self._path(kind)))
        with self._path(kind).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns[kind], restval="").writerow(row)

    def go_back(self, step: int) -> None:
        """Drop the rows of later steps."""
        for path in self._folder.glob("*.csv"):
            rows = _read(path)
            kept = [row for row in rows if float(row.get("step") or 0) <= step]
            self._rewrite(path.stem, list(rows[0]) if rows else [], kept)

    def finish(self, folder: Path, exit_code: int) -> None:
        """Nothing is open between records."""

    def _path(self, kind: str) -> Path:
        return self._folder / f"{kind}.csv"

    def _rewrite(self, kind: str, columns: list[str], rows: list[dict[str, str]]) -> None:
        partial = self._folder / f"{kind}.partial"
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self._path(kind))
        self._columns[kind] = columns


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # What a crash cut off in the middle of a row has no value for its last columns.
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
