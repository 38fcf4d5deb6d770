"""What makes a folder of files whole: a manifest with size and SHA-256 of each, and of itself, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Written:
    """What a file has to be: its name, size and SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str


def write_manifest(folder: Path, extra: dict[str, Any], known: Sequence[Written] = ()) -> None:
    """Write every file of `folder` into its manifest, with `extra`; it appears at once or not at all.

    Files other than the `known` ones are read and hashed.
    """
    files = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in known}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != MANIFEST and name not in files:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST, _sealed({**extra, "files": files}))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where there is none, or one that isn't what was written to the last byte."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.pop(_SEAL, None) is None or text != _sealed(manifest):
        return None
    return manifest


_SEAL = "sha256_of_the_rest"


def _sealed(content: dict[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, _SEAL: seal}, indent=2) + "\n"


def newest_step(checkpoints: Path) -> int:
    """The last step of which there is a checkpoint with a manifest; 0 where there is none."""
    steps = [0]
    for manifest in checkpoints.glob(f"step-*/{MANIFEST}"):
        number = manifest.parent.name.removeprefix("step-")
        if number.isdigit():
            steps.append(int(number))
    return max(steps)


def without_manifest(folder: Path) -> str | None:
    """Why `folder` is no whole checkpoint, in a phrase, as far as its manifest tells without a look at the files."""
    if read_manifest(folder) is not None:
        return None
    if not folder.is_dir():
        return "there is no such folder"
    there = (folder / MANIFEST).is_file()
    return f"{MANIFEST} has other content than was saved" if there else f"{MANIFEST} is missing"


def damage(folder: Path, first: int = 0, every: int = 1) -> str | None:
    """What is wrong with the files of `folder`, in a phrase; None if every one is as the manifest says.

    Where readers share the work, one looks at file `first` of the list and at `every` so many-th after it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return without_manifest(folder)
    for name, expected in islice(manifest["files"].items(), first, None, every):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has other content than was saved"
    return None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old content or the whole new one, also after a crash."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def make_durable(folder: Path) -> None:
    """Make sure that names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for text."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
