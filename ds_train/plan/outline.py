"""Every parameter of a transformers model, by name and shape, without torch and without importing transformers.

A family's own constructors are run with stand-ins for torch's modules: `nn.Linear(4096, 1024)` notes two shapes and
takes no memory. What isn't understood gives no outline, never a wrong one that goes unnoticed: a shape that depends
on something unknown refuses itself. Source: transformers/models/*/{configuration,modeling}_*.py as installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_train.plan.constructors import build_config, model_classes, modeling_tree
from ds_train.plan.sources import classes
from ds_train.plan.stand_ins import Config, Module, NotUnderstood, Parameter
from ds_train.plan.transformers_keys import Task, base_model_class, model_class

__all__ = ["Outline", "Parameter", "gives_plain_logits", "outline"]


@dataclass(frozen=True)
class Outline:
    """A model as the planner sees it.

    `parameters` in the order of `named_parameters()`, tied ones once; `tensor_plan` and `pipeline_plan` as the config
    class has them, names relative to the base model, `prefix` being its name in the model ("model."); `head_plan` are
    styles of modules outside of the base model. `config` are the values after the config class has filled them in.
    `head` and `embedding` name the modules of the output and input embeddings; `plain_head` says that the model's
    forward returns the head's output as it is. `tied`: both share their weight.
    """

    parameters: tuple[Parameter, ...]
    config: Mapping[str, Any]
    prefix: str
    tensor_plan: Mapping[str, str]
    head_plan: Mapping[str, str]
    pipeline_plan: tuple[str, ...]
    head: str | None
    embedding: str | None
    plain_head: bool
    tied: bool

    @property
    def elements(self) -> int:
        """Parameters of the whole model."""
        return sum(parameter.elements for parameter in self.parameters)


def outline(arch: str, task: Task, keys: Mapping[str, Any]) -> Outline | None:
    """The outline of a model of family `arch` with config `keys`; None where the family's code isn't understood."""
    return _outline(arch, task, tuple(sorted((key, _Frozen(value)) for key, value in keys.items())))


class _Frozen:
    """A config value as part of a cache key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and repr(self.value) == repr(other.value)

    def __lt__(self, other: _Frozen) -> bool:
        return repr(self.value) < repr(other.value)


@cache
def _outline(arch: str, task: Task, keys: tuple[tuple[str, _Frozen], ...]) -> Outline | None:
    name = model_class(arch, task)
    tree = modeling_tree(arch)
    if name is None or tree is None or name not in classes(tree):
        return None
    try:
        config = build_config(arch, {key: value.value for key, value in keys})
        base = base_model_class(arch)
        namespace = model_classes(tree, base)
        model = namespace[name](config)
        return _read(model, config, tree, name)
    except Exception:  # any family's code may do anything with a stand-in
        return None


def _read(model: Module, config: Config, tree: ast.Module, name: str) -> Outline:
    found = list(model.named())
    if not found or any(not isinstance(size, int) or size < 0 for parameter in found for size in parameter.shape):
        raise NotUnderstood
    prefix = type(model).base_model_prefix
    prefix = f"{prefix}." if isinstance(prefix, str) and prefix in model._children else ""
    tie = getattr(config, "tie_word_embeddings", True)
    tied_keys = getattr(type(model), "_tied_weights_keys", None)
    tied_keys = tied_keys if isinstance(tied_keys, dict) and tie else {}
    owner = {
        parameter.name: source
        for parameter in found
        for pattern, source in tied_keys.items()
        if re.search(pattern, parameter.name)
    }
    kept = tuple(parameter for parameter in found if parameter.name not in owner)
    embedding = _embedding(found, prefix, config)
    head, plain = _head(tree, name, model)
    tied = head is not None and owner.get(f"{head}.weight", "").removesuffix(".weight") == (embedding or "-")
    own = type(config)
    head_plan = getattr(type(model), "_tp_plan", None)
    return Outline(
        kept,
        vars(config),
        prefix,
        _text_values(getattr(own, "base_model_tp_plan", None)),
        _text_values(head_plan),
        tuple(getattr(own, "base_model_pp_plan", None) or ()),
        head,
        embedding,
        plain,
        tied,
    )


def _text_values(plan: Any) -> dict[str, str]:
    return {str(k): v for k, v in plan.items() if isinstance(v, str)} if isinstance(plan, dict) else {}


def _embedding(found: list[Parameter], prefix: str, config: Config) -> str | None:
    """The input embedding: the first table with a row per token."""
    vocabulary = getattr(config, "vocab_size", None)
    tables = [p for p in found if p.kind == "Embedding" and p.shape[:1] == (vocabulary,)]
    return tables[0].name.removesuffix(".weight") if tables else None


def _head(tree: ast.Module, name: str, model: Module) -> tuple[str | None, bool]:
    """(the head's name, whether forward does nothing with its logits)."""
    forward = next(
        (node for node in classes(tree)[name].body if isinstance(node, ast.FunctionDef) and node.name == "forward"),
        None,
    )
    heads = [child for child, module in model._children.items() if type(module).__name__ == "Linear"]
    if forward is not None and len(heads) == 1:
        return heads[0], gives_plain_logits(forward, heads[0])
    nested = [
        path for path, module in model.walk("") if path.endswith(".decoder") and type(module).__name__ == "Linear"
    ]
    return (nested[0] if len(nested) == 1 else heads[0] if len(heads) == 1 else None), False


def gives_plain_logits(forward: ast.AST, head: str) -> bool:
    """Whether a model's forward, as syntax, assigns `logits` once, from the call of its module `head`."""
    assigned = [
        node for node in ast.walk(forward) if isinstance(node, (ast.Assign, ast.AugAssign)) and _assigns_logits(node)
    ]
    if len(assigned) != 1 or not isinstance(assigned[0], ast.Assign):
        return False
    call = assigned[0].value
    return isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{head}"


def _assigns_logits(node: ast.Assign | ast.AugAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(part, ast.Name) and part.id == "logits" for target in targets for part in ast.walk(target))
