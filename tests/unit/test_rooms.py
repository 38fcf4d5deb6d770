"""Rooms import only rooms above them, lazily or not; the pure ones never import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ds_train"

# Rooms of one line don't import one another.
ORDER = (
    {"errors"},
    {"config"},
    {"schedule", "plan"},
    {"track"},
    {"models", "data", "optim"},
    {"parallel"},
    {"compress"},
    {"checkpoint"},
    {"engine"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
PURE = {"errors", "config", "schedule", "plan"}
HEAVY = {"torch", "transformers", "deepspeed", "datasets"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import: inside functions, under TYPE_CHECKING, and by name at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # `from ds_train import engine` names a room behind the import.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def violations(source: str, room: str, place: str) -> list[str]:
    """One line per import, `place:line: what`, that the order of rooms forbids to `room`."""
    if room not in LEVEL:
        return [f"{place}:1: {room} has no place in the order of rooms"]
    found = []
    for line, module in dict.fromkeys(imports(ast.parse(source))):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if not top:
            found.append(f"{place}:{line}: relative import")
        if top in HEAVY and room in PURE:
            found.append(f"{place}:{line}: {room} imports {top}")
        if top == "ds_train" and other != room and LEVEL.get(other, -1) >= LEVEL[room]:
            found.append(f"{place}:{line}: {room} imports {other}")
    return list(dict.fromkeys(found))


def test_imports_go_one_way() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found += violations(path.read_text(), room, str(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "import torch"),
        ("plan", "def f():\n    from transformers import AutoConfig"),
        ("plan", "from ds_train.schedule.learning_rate import plan_length"),
        ("models", "from ds_train.data.build import load_data"),
        ("data", "def f():\n    import ds_train.engine.loop"),
        ("config", "from ds_train import engine"),
        ("track", "from . import progress"),
        ("schedule", "if TYPE_CHECKING:\n    from torch import Tensor, nn"),
        ("plan", "import importlib\nimportlib.import_module('deepspeed.runtime')"),
        ("errors", "from ds_train.config import load"),
        ("cellar", "import json"),
    ],
)
def test_the_test_sees_what_it_is_for(room: str, source: str) -> None:
    found = violations(source, room, "here.py")
    assert len(found) == 1
    line = 1 if "\n" not in source else 2
    assert found[0].startswith(f"here.py:{line}: ")


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from ds_train import __version__\nfrom ds_train.engine.job import run_job"),
        ("track", "import torch\nfrom ds_train.track.progress import StepDisplay"),
        ("plan", "import torchless\nfrom ds_train.errors import UserError"),
    ],
)
def test_the_test_lets_pass_what_is_allowed(room: str, source: str) -> None:
    assert violations(source, room, "here.py") == []
