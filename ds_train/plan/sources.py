"""Reads other packages' source files without importing them, so that plans answer at once."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def package_folder(package: str) -> Path:
    """Folder of an installed top-level package. Raises ModuleNotFoundError where it isn't installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


@cache
def parse_source(package: str, file: str) -> ast.Module:
    """Syntax tree of a file of an installed package."""
    return ast.parse((package_folder(package) / file).read_text(encoding="utf-8"))


def classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    """Top-level classes of a module by name."""
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def constants(tree: ast.Module) -> dict[str, Any]:
    """Top-level `NAME = literal` assignments of a module, of texts, numbers, booleans and None."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
