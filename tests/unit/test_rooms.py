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
    {"parallel", "compress"},
    {"checkpoint"},
    {"engine"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
PURE = {"errors", "config", "schedule", "plan"}
HEAVY = {"torch", "transformers", "deepspeed", "datasets"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.lineno, node.module or ""


def violations(source: str, room: str, place: str) -> list[str]:
    found = []
    for line, module in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        if top in HEAVY and room in PURE:
            found.append(f"{place}:{line}: {room} imports {top}")
        other = rest.partition(".")[0]
        if top == "ds_train" and other and other != room and LEVEL[other] >= LEVEL[room]:
            found.append(f"{place}:{line}: {room} imports {other}")
    return found


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
    ],
)
def test_the_test_sees_what_it_is_for(room: str, source: str) -> None:
    assert len(violations(source, room, "here")) == 1
