"""Recipes that people get wrong, in tests/recipes/bad: each is refused with the lines that stand in its header.

`# plan: ...` holds arguments of `ds-train plan`; each `# expect: ...` is a line that it prints, without its "error: ".
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_train import cli

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "tests" / "recipes" / "bad").glob("*.yaml"))
LINE = re.compile(r"error: [^:=\s][^:]*(=.*)?: .+\. Fix: .+[.?]")


def header(recipe: Path, word: str) -> list[str]:
    """What the lines `# word: ...` at the top of a recipe say."""
    return re.findall(rf"^# {word}: (.*)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)


def command(recipe: Path) -> list[str]:
    """Arguments of `ds-train` that plan the recipe."""
    return ["plan", str(recipe.relative_to(ROOT)), *" ".join(header(recipe, "plan")).split()]


def test_there_are_many() -> None:
    assert len(RECIPES) >= 60


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_it_is_refused_in_so_many_words(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["ds-train", *command(recipe)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert ended.value.code == 2
    assert printed.out == ""
    assert lines == [f"error: {line}" for line in header(recipe, "expect")]
    # Key, perhaps its value, a reason, and a way out.
    assert lines
    assert all(LINE.fullmatch(line) for line in lines)


@pytest.mark.parametrize("name", ["type-several-at-once", "pasted-zero3-of-hf-trainer", "not-yaml"])
def test_a_process_ends_with_code_2_and_no_traceback(name: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == name)
    done = subprocess.run(
        [sys.executable, "-m", "ds_train.cli", *command(recipe)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: {line}" for line in header(recipe, "expect")]
