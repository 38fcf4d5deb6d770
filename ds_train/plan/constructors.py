"""Runs the constructors of a family's config and model classes with stand-ins, without importing transformers.

Classes are compiled from the syntax of the installed source, without their forward passes, decorators and annotations;
names that the file imports from elsewhere stand for anything.
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
import operator
from collections.abc import Mapping
from functools import cache
from typing import Any

from ds_train.plan.sources import classes
from ds_train.plan.stand_ins import (
    ANYTHING,
    NN,
    TORCH,
    Anything,
    Config,
    Conv1D,
    Linear,
    Module,
    NotUnderstood,
    PreTrained,
)
from ds_train.plan.transformers_keys import (
    attribute_map,
    config_fields,
    config_tree,
    known_architectures,
    modeling_source,
)


@cache
def modeling_tree(arch: str) -> ast.Module | None:
    source = modeling_source(arch)
    return ast.parse(source) if source else None


def build_config(arch: str, keys: Mapping[str, Any]) -> Config:
    own: Any = _config_class(arch)
    values = {"_attn_implementation": "eager", "chunk_size_feed_forward": 0, "is_encoder_decoder": False}
    values |= config_fields(arch)
    config: Config = own(values)
    config.update({"num_labels": 2} | dict(keys))
    config.__post_init__()
    for name in ("rope_parameters", "rope_scaling"):
        if name in vars(config):  # what frequencies depend on, and no shape
            setattr(config, name, _ROPE if config.to_dict()[name] is None else config.to_dict()[name])
    return config


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


@cache
def _config_class(arch: str) -> type[Config]:
    found = config_tree(arch)
    if found is None:
        raise NotUnderstood(arch)
    tree, name = found
    known = classes(tree)

    def base_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in namespace:
            return namespace[node.id]
        parent = next((arch for arch, its in known_architectures().items() if its == ast.unparse(node)), None)
        return _config_class(parent) if parent else Config

    namespace: dict[str, Any] = {"Config": Config}
    for node in known.values():
        if node.name == name or any(isinstance(base, ast.Name) and base.id == node.name for base in known[name].bases):
            bases = tuple(base_of(base) for base in node.bases) or (Config,)
            body = [part for part in node.body if _wanted_of_config(part)]
            namespace[node.name] = _made(node, body, bases, namespace)
    made: type[Config] = namespace[name]
    made.attribute_map = attribute_map(arch)
    return made


_PLANS = ("base_model_tp_plan", "base_model_pp_plan")


def _wanted_of_config(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return not (node.name.startswith("validate") or node.name == "__init__")
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in _PLANS for t in node.targets)


def model_classes(tree: ast.Module, base: str | None) -> dict[str, Any]:
    """The classes of a modeling file, made of stand-ins, by name."""
    namespace: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(_base(part, namespace, base) for part in node.bases) or (object,)
            body = [part for part in node.body if _wanted_of_model(part)]
            if "Rotary" in node.name:
                namespace[node.name] = type(node.name, (Module,), {})
            else:
                namespace[node.name] = _made(node, body, _ordered(bases), namespace)
        elif isinstance(node, ast.FunctionDef):
            namespace[node.name] = _function(node, object, namespace)
        elif isinstance(node, ast.ImportFrom):
            namespace |= {a.asname or a.name: vars(NN)[a.name] for a in node.names if _of_torch(node, a.name)}
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            _assign(node, namespace)
    return namespace


def _of_torch(node: ast.ImportFrom, name: str) -> bool:
    return node.module == "torch.nn" and name in vars(NN)


def _assign(node: ast.Assign, namespace: dict[str, Any]) -> None:
    """A constant or a table of classes of the module."""
    (target,) = node.targets
    assert isinstance(target, ast.Name)
    names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
    if all(name in namespace for name in names) and not any(isinstance(p, ast.Call) for p in ast.walk(node.value)):
        expression = ast.fix_missing_locations(ast.Expression(node.value))
        namespace[target.id] = eval(compile(expression, "<transformers>", "eval"), dict(namespace))


def _base(node: ast.expr, namespace: dict[str, Any], base: str | None) -> Any:
    name = ast.unparse(node).split("[")[0]
    if name in namespace:
        return namespace[name]
    if name == "PreTrainedModel":
        return PreTrained
    if name == "GenericForSequenceClassification":
        return _generic_classifier(base, namespace)
    known = getattr(NN, name.removeprefix("nn."), None) if name.startswith("nn.") else None
    if isinstance(known, type):
        return known
    return Module if name.endswith(("Layer", "Module", "Model")) else object


def _ordered(bases: tuple[Any, ...]) -> tuple[Any, ...]:
    """The bases without `object` and repeats, so that an order of them exists."""
    kept = [base for base in dict.fromkeys(bases) if base is not object]
    needed = [b for b in kept if not any(b is not o and isinstance(o, type) and issubclass(o, b) for o in kept)]
    return tuple(needed) or (object,)


def _wanted_of_model(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name not in ("forward", "_init_weights")
    return isinstance(node, (ast.Assign, ast.AnnAssign))


def _made(node: ast.ClassDef, body: list[ast.stmt], bases: tuple[Any, ...], namespace: dict[str, Any]) -> type:
    """The class with its constructors and helpers, decorators and annotations left out."""
    members: dict[str, Any] = {"__module__": "transformers"}
    made = type(node.name, bases, members)
    for part in body:
        if isinstance(part, ast.FunctionDef):
            kinds = {ast.unparse(decorator) for decorator in part.decorator_list}
            function = _function(part, made, namespace)
            wrap = property if "property" in kinds else staticmethod if "staticmethod" in kinds else (
                classmethod if "classmethod" in kinds else None
            )  # fmt: skip
            setattr(made, part.name, wrap(function) if wrap else function)
        else:
            _class_value(part, made, namespace)
    return made


def _class_value(part: ast.stmt, made: Any, namespace: dict[str, Any]) -> None:
    value = getattr(part, "value", None)
    targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
    if value is None or len(targets) != 1 or not isinstance(targets[0], ast.Name):
        return
    try:
        setattr(made, targets[0].id, ast.literal_eval(value))
    except ValueError:
        return


def _function(node: ast.FunctionDef, owner: type, namespace: dict[str, Any]) -> Any:
    """A method as a Python function whose unknown global names are stand-ins; `super()` works in it."""
    plain = _definition(node.name, _bare(node.args), node.body)
    # A cell named __class__ is what `super()` without arguments looks for.
    cell = ast.arguments([], [ast.arg("__class__")], None, [], [], None, [])
    wrapper = _definition("_make", cell, [plain, ast.Return(ast.Name(node.name, ast.Load()))])
    module = ast.fix_missing_locations(ast.Module([wrapper], []))
    scope = _globals_for(node, namespace)
    exec(compile(module, "<transformers>", "exec"), scope)
    return scope["_make"](owner)


def _definition(name: str, arguments: ast.arguments, body: list[ast.stmt]) -> ast.FunctionDef:
    made = ast.parse(f"def {name}(): ...").body[0]
    assert isinstance(made, ast.FunctionDef)
    made.args, made.body = arguments, body
    return made


def _bare(arguments: ast.arguments) -> ast.arguments:
    """Arguments without annotations, which may name anything."""

    def bare(argument: ast.arg) -> ast.arg:
        return ast.arg(argument.arg)

    return ast.arguments(
        [bare(each) for each in arguments.posonlyargs],
        [bare(each) for each in arguments.args],
        bare(arguments.vararg) if arguments.vararg else None,
        [bare(each) for each in arguments.kwonlyargs],
        arguments.kw_defaults,
        bare(arguments.kwarg) if arguments.kwarg else None,
        arguments.defaults,
    )


_UNSAFE = ("open", "exec", "eval", "input", "compile", "__import__", "breakpoint")
_SAFE_BUILTINS = {name: getattr(builtins, name) for name in dir(builtins) if name not in _UNSAFE}
_KNOWN = {
    "torch": TORCH, "nn": NN, "math": math, "Conv1D": Conv1D, "functools": functools, "partial": functools.partial,
    "operator": operator, "PreTrainedModel": PreTrained,
}  # fmt: skip


def _globals_for(node: ast.FunctionDef, namespace: dict[str, Any]) -> dict[str, Any]:
    """Globals of one function. Its names are looked up when it runs, since classes may stand below it in the file."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    scope: dict[str, Any] = {"__builtins__": _SAFE_BUILTINS}
    for name in names:
        if name in _KNOWN:
            scope[name] = _KNOWN[name]
        elif name not in _SAFE_BUILTINS:
            scope[name] = _Late(name, namespace)
    return scope


class _Late(Anything):
    """A global name of the module, looked up when it is used; anything where the module doesn't define it."""

    def __init__(self, name: str, namespace: dict[str, Any]) -> None:
        vars(self)["_name"], vars(self)["_namespace"] = name, namespace

    @property
    def _it(self) -> Any:
        return self._namespace.get(self._name, ANYTHING)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self._it, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._it(*arguments, **options)

    def __getitem__(self, key: Any) -> Any:
        return self._it[key]

    def __bool__(self) -> bool:
        return bool(self._it)


def _generic_classifier(base: str | None, namespace: dict[str, Any]) -> type:
    class Generic(PreTrained):
        """transformers' GenericForSequenceClassification: the base model and a `score` without bias."""

        def __init__(self, config: Any, *_: Any, **__: Any) -> None:
            super().__init__(config)
            if base is None or base not in namespace:
                raise NotUnderstood
            setattr(self, type(self).base_model_prefix, namespace[base](config))
            hidden = getattr(config, "hidden_size", None)
            self.score = Linear(hidden, getattr(config, "num_labels", None) or 2, bias=False)

    return Generic
