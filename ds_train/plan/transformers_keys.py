"""What the installed transformers knows about families and their config keys, read from its source.

Source: transformers/models/auto/{auto_mappings,modeling_auto}.py and models/*/configuration_*.py (5.23: config
classes are dataclasses with annotated fields).
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

from ds_train.plan.sources import classes, package_folder, parse_source

_HEADS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}

# Keys that PreTrainedConfig takes besides its annotated fields.
_GENERIC = {
    "num_labels": None, "id2label": None, "label2id": None, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": True, "rope_parameters": None, "rope_theta": None, "use_cache": None,
}  # fmt: skip


@cache
def architectures() -> dict[str, str]:
    """Config class name by `model_type`."""
    return _mapping("models/auto/auto_mappings.py", "CONFIG_MAPPING_NAMES")


@cache
def architectures_with_head(task: str) -> frozenset[str]:
    """Every `model_type` that has a model class for the task."""
    return frozenset(_mapping("models/auto/modeling_auto.py", _HEADS[task]))


@cache
def config_fields(arch: str) -> dict[str, Any]:
    """Config keys of a family and their defaults (None where the default is no literal), inherited ones included.

    Keys of the family's `attribute_map` (`hidden_size` for gpt2's `n_embd`) count too. Empty where the
    source can't be found, which checks must take as "anything goes".
    """
    class_name = architectures().get(arch, "")
    tree = _find_class(arch, class_name)
    if tree is None:
        return {}
    fields = dict(_GENERIC)
    fields.update(_own_fields(classes(parse_source("transformers", "configuration_utils.py"))["PreTrainedConfig"]))
    fields.update(_class_fields(tree, class_name))
    return fields


@cache
def attribute_map(arch: str) -> dict[str, str]:
    """The family's own names for common keys: {"hidden_size": "n_embd", ...}."""
    class_name = architectures().get(arch, "")
    tree = _find_class(arch, class_name)
    return _attribute_map(classes(tree)[class_name]) if tree is not None else {}


def _mapping(file: str, name: str) -> dict[str, str]:
    # Only this one assignment is parsed: the whole file takes half a second.
    text = (package_folder("transformers") / file).read_text(encoding="utf-8")
    start = text.find(f"\n{name} = OrderedDict(")
    if start < 0:
        return {}
    statement = ast.parse(text[start : text.index("\n)", start) + 2].strip())
    pairs = next(part for part in ast.walk(statement) if isinstance(part, ast.List))
    return dict(ast.literal_eval(pairs))


def _find_class(arch: str, class_name: str) -> ast.Module | None:
    root = package_folder("transformers") / "models"
    likely = root / arch.replace("-", "_") / f"configuration_{arch.replace('-', '_')}.py"
    candidates = [likely] if likely.is_file() else []
    if not candidates and class_name:  # families whose folder has another name
        pattern = f"class {class_name}("
        candidates = [path for path in root.glob("*/configuration_*.py") if pattern in path.read_text(encoding="utf-8")]
    for path in candidates:
        tree = parse_source("transformers", str(path.relative_to(root.parent)))
        if class_name in classes(tree):
            return tree
    return None


def _class_fields(tree: ast.Module, class_name: str) -> dict[str, Any]:
    known = classes(tree)
    fields: dict[str, Any] = {}
    for base in known[class_name].bases:
        if isinstance(base, ast.Name) and base.id in known:
            fields.update(_class_fields(tree, base.id))
        elif isinstance(base, ast.Name) and base.id != "PreTrainedConfig":
            parent = next((arch for arch, name in architectures().items() if name == base.id), None)
            fields.update(config_fields(parent) if parent else {})
    fields.update(_own_fields(known[class_name]))
    fields.update(dict.fromkeys(_attribute_map(known[class_name])))
    return fields


def _own_fields(node: ast.ClassDef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in ast.unparse(statement.annotation):
                fields[statement.target.id] = _literal(statement.value)
        elif isinstance(statement, ast.FunctionDef) and statement.name in ("__init__", "__post_init__"):
            named = [*statement.args.args, *statement.args.kwonlyargs]
            fields.update({argument.arg: None for argument in named if argument.arg != "self"})
    return fields


def _literal(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # interval(min=0.0, max=1.0)(default=0.02)
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None


def _attribute_map(node: ast.ClassDef) -> dict[str, str]:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "attribute_map" for target in targets):
            value = getattr(statement, "value", None)
            return dict(ast.literal_eval(value)) if value is not None else {}
    return {}
