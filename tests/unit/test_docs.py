"""What the documents name is there: links, files, recipe keys, snippets, commands with their options."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from typer.main import get_command

from ds_train.cli import app
from ds_train.config import load
from ds_train.config.load import known_keys, validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], key=str)
RECIPES = sorted(ROOT.glob("ds_configs/*.yaml"))
KEYS = set(known_keys())
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS} - {"model", "deepspeed"}))
MINIMAL = {"model": {"arch": "llama"}, "schedule": {"steps": 10}}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / place)) if place else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=named)
def test_files_that_are_named_exist(page: Path) -> None:
    found = re.findall(
        r"(?<![\w/.~])((?:docs|tests|benchmarks|ds_train|ds_configs|kernels|launch)/[\w./*-]+)", page.read_text()
    )
    assert [place for place in found if not list(ROOT.glob(place.rstrip("./")))] == []


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=named)
def test_recipe_keys_that_are_named_exist(page: Path) -> None:
    found = set(re.findall(rf"(?<![\w./])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)?(?![\w(/])", page.read_text()))
    assert {key for key in found if not key.endswith((".md", ".json", ".py"))} - KEYS == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recipe_snippets_are_recipes(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
        snippet = yaml.safe_load(dedent(block))
        indented = block.startswith("    ")  # what follows in the section that a snippet before it began
        validate(MINIMAL | ({"compress": {"prune": snippet}} if indented else snippet))


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each line that calls ds-train."""
    prefix = r"#   " if page.suffix == ".yaml" else ""
    for line in re.findall(rf"^{prefix}ds-train (.*)$", page.read_text(), re.M):
        yield shlex.split(line.replace("[key=value ...]", ""), comments=True)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=named)
def test_commands_take_the_options_that_are_named(page: Path) -> None:
    group: Any = get_command(app)
    for name, *arguments in commands(page):
        redirected = arguments.index(">") if ">" in arguments else len(arguments)
        group.commands[name].make_context(name, arguments[:redirected])
        recipe = next((word for word in arguments if word.endswith(".yaml") and (ROOT / word).is_file()), None)
        if recipe is not None:
            load(ROOT / recipe, [word for word in arguments if re.match(r"[a-z_.]+=", word)])
