"""Which keys DeepSpeed's own source reads, so that raw `deepspeed:` keys can be checked; it ignores unknown ones itself.

Read from the installed source by its syntax, without importing it: top-level keys from the calls that look a key up
in `param_dict`, nested ones from the fields of its config models.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

from ds_train.config.load import nearest
from ds_train.errors import Problem
from ds_train.plan.deepspeed_json import OWNED
from ds_train.plan.sources import classes, package_folder, string_constants

# Files that read top-level keys, and where the names of those keys are defined.
_READERS = (
    "runtime/config.py", "runtime/zero/config.py", "runtime/precision_config.py", "monitor/config.py", "comm/config.py",
    "profiling/config.py", "runtime/activation_checkpointing/config.py", "runtime/swap_tensor/aio_config.py",
    "runtime/tensor_parallel/config.py", "compile/config.py", "datastates/config.py",
)  # fmt: skip
_CONSTANTS = (
    "constants.py", "runtime/constants.py", "runtime/config.py", "runtime/zero/config.py", "runtime/precision_config.py",
    "runtime/activation_checkpointing/config.py", "runtime/swap_tensor/constants.py", "runtime/data_pipeline/constants.py",
    "monitor/constants.py", "monitor/config.py", "comm/constants.py", "profiling/constants.py",
    "runtime/tensor_parallel/config.py",
)  # fmt: skip

# Top-level keys that are read by other means than a look-up in `param_dict`.
_ELSEWHERE = frozenset({"comms_logger"})

# Sections whose fields are one config model.
_SECTION_MODELS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
}


def check_raw(raw: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with raw `deepspeed:` keys: owned by the plan, removed, unknown, or left to `"auto"`."""
    problems: list[Problem] = []
    for path, value in _paths(raw):
        key = f"deepspeed.{path}"
        owner = next((OWNED[own] for own in (path, *_parents(path)) if own in OWNED), None)
        if owner is not None:
            problems.append(Problem(key, "the plan owns this key", _instead(owner), value))
        elif path in removed_keys():
            problems.append(Problem(key, removed_keys()[path], "remove it", value))
        elif value == "auto":
            problems.append(Problem(key, 'DeepSpeed takes "auto" for a value here', "write the value itself", value))
        else:
            problems += _unknown(path, value)
    # A section and the keys under it say the same thing; the shorter path says it better.
    return [
        problem for problem in problems if not any(problem.key.startswith(other.key + ".") for other in problems)
    ]


@cache
def top_level_keys() -> frozenset[str]:
    """Keys that DeepSpeed looks up at the top level of its JSON."""
    constants: dict[str, str] = {}
    for file in _CONSTANTS:
        constants.update(string_constants(tree) if (tree := _parse(file)) else {})
    keys = {*_ELSEWHERE, *OWNED}
    for file in _READERS:
        tree = _parse(file)
        if tree is not None:
            keys.update(key for node in ast.walk(tree) for key in _looked_up(node, constants))
    return frozenset(keys)


@cache
def section_fields(section: str) -> frozenset[str] | None:
    """Field names and aliases of a section that is one config model; None for the others."""
    if section not in _SECTION_MODELS:
        return None
    file, name = _SECTION_MODELS[section]
    tree = _parse(file)
    node = classes(tree).get(name) if tree else None
    if node is None:
        return None
    fields: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields.add(statement.target.id)
            if isinstance(statement.value, ast.Call):
                aliases = [part.value for part in statement.value.keywords if part.arg == "alias"]
                fields.update(alias.value for alias in aliases if isinstance(alias, ast.Constant))
    return frozenset(fields)


@cache
def removed_keys() -> dict[str, str]:
    """Keys that this DeepSpeed refuses because their feature is gone, with its own first sentence about each."""
    tree = _parse("runtime/config.py")
    removed: dict[str, str] = {}
    for node in tree.body if tree else []:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        prefix = {"_REMOVED_TOP_LEVEL_CONFIG_KEYS": "", "_REMOVED_ZERO_CONFIG_KEYS": "zero_optimization."}.get(name)
        if prefix is not None and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, message in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant):
                    removed[prefix + str(key.value)] = _first_sentence(message)
    return removed


def _instead(owner: str) -> str:
    return f"set {owner} instead" if not owner.startswith("nothing") else owner.replace("nothing", "leave it out")


def _unknown(path: str, value: Any) -> list[Problem]:
    section, _, leaf = path.rpartition(".")
    known = top_level_keys() if not section else section_fields(section)
    if known is None or leaf in known:
        return []
    guess = nearest(leaf, sorted(known))
    fix = f"did you mean `deepspeed.{section + '.' if section else ''}{guess}`?" if guess else "remove it"
    return [Problem(f"deepspeed.{path}", "DeepSpeed knows no such key and would ignore it", fix, value)]


def _looked_up(node: ast.AST, constants: Mapping[str, str]) -> list[str]:
    """Keys that a piece of syntax looks up in DeepSpeed's `param_dict`."""
    candidates: list[ast.expr] = []
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and _is_param_dict(node.func.value):
            candidates = node.args[:1]  # param_dict.get(KEY)
        elif any(_is_param_dict(argument) for argument in node.args):
            candidates = node.args[1:2]  # get_scalar_param(param_dict, KEY, default)
    elif isinstance(node, ast.FunctionDef) and any(argument.arg == "param_dict" for argument in node.args.args):
        candidates = node.args.defaults  # get_communication_data_type(param_dict, comm_type=KEY)
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        right = node.comparators[0]
        right = right.func.value if isinstance(right, ast.Call) and isinstance(right.func, ast.Attribute) else right
        candidates = [node.left] if _is_param_dict(right) else []  # KEY in param_dict.keys()
    elif isinstance(node, ast.Subscript) and _is_param_dict(node.value):
        candidates = [node.slice]  # param_dict[KEY]
    keys: list[str] = []
    for found in candidates:
        if isinstance(found, ast.Constant) and isinstance(found.value, str):
            keys.append(found.value)
        elif isinstance(found, ast.Name) and found.id in constants:
            keys.append(constants[found.id])
    return keys


def _is_param_dict(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("param_dict", "_param_dict")


def _first_sentence(node: ast.expr) -> str:
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(piece.value) for piece in pieces if isinstance(piece, ast.Constant))
    return text.split(". ")[0].rstrip(". ")


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:size]) for size in range(1, len(parts))]


def _parse(file: str) -> ast.Module | None:
    path = package_folder("deepspeed") / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
