"""What the tests of faults share: ranks that start quickly, a small text, recipes, and what a run has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Zygote
from place import Place


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    zygote.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
