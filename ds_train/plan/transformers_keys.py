"""What the installed transformers knows about families, their config keys and their models, read from its source.

Nothing is imported: config classes are read as syntax (in 5.23 they are dataclasses with annotated fields), and what
a model supports is read from the text of its modeling file.
Source: transformers/models/auto/{auto_mappings,configuration_auto,modeling_auto}.py, models/*/configuration_*.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ds_train.plan.sources import classes, package_folder, parse_source

Task = Literal["causal-lm", "masked-lm", "sequence-classification"]
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "sequence-classification")

_HEADS: dict[Task, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}

# Keys that `PreTrainedConfig.__post_init__` takes besides the annotated fields.
_GENERIC: dict[str, Any] = {
    "num_labels": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": None,
    "tie_word_embeddings": True,
}  # fmt: skip
OLD_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Older spellings of `rope_parameters`, which constructors of families that have it take."""


@cache
def known_architectures() -> dict[str, str]:
    """Config class name by `model_type`."""
    return {
        "gpt-sw3": "GPT2Config",  # written in another way than the rest (configuration_auto.py)
        **_mapping("models/auto/auto_mappings.py", "CONFIG_MAPPING_NAMES"),
        **_mapping("models/auto/configuration_auto.py", "CONFIG_MAPPING_NAMES"),
    }


@cache
def architectures_with_head(task: Task) -> frozenset[str]:
    """Every `model_type` that has a model class for the task."""
    return frozenset(_mapping("models/auto/modeling_auto.py", _HEADS[task]))


@cache
def model_class(arch: str, task: Task) -> str | None:
    """Name of the family's model class for the task; None where there is none."""
    return _class_name(_mapping("models/auto/modeling_auto.py", _HEADS[task]).get(arch))


@cache
def base_model_class(arch: str) -> str | None:
    """Name of the family's model class without a head."""
    return _class_name(_mapping("models/auto/modeling_auto.py", "MODEL_MAPPING_NAMES").get(arch))


@cache
def config_fields(arch: str) -> dict[str, Any]:
    """Config keys of a family and their defaults (None where the default is no literal), inherited ones included.

    Keys of the family's `attribute_map` (`hidden_size` for gpt2's `n_embd`) count too. Empty where the
    source can't be found, which checks must take as "anything goes".
    """
    found = _find_class(arch)
    if found is None:
        return {}
    base = classes(parse_source("transformers", "configuration_utils.py")).get("PreTrainedConfig")
    fields = dict(_GENERIC) | (_own_fields(base) if base else {}) | _class_fields(*found)
    if "rope_parameters" in fields:
        fields = dict.fromkeys(OLD_ROPE_KEYS) | fields
    return fields


@cache
def attribute_map(arch: str) -> dict[str, str]:
    """The family's own names for common keys: {"hidden_size": "n_embd", ...}."""
    found = _find_class(arch)
    return _attribute_map(classes(found[0])[found[1]]) if found else {}


def takes_list(arch: str, key: str) -> bool | None:
    """Whether the family's config takes a list where `key` is a number elsewhere; None where the source doesn't say."""
    found = _find_class(arch)
    annotation = _annotation(*found, attribute_map(arch).get(key, key)) if found else None
    return None if annotation is None else "list[" in annotation


def _annotation(tree: ast.Module, class_name: str, key: str) -> str | None:
    known = classes(tree)
    for statement in known[class_name].body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == key:
            return ast.unparse(statement.annotation)
    bases = (base.id for base in known[class_name].bases if isinstance(base, ast.Name))
    inherited = (_annotation(tree, base, key) for base in bases if base in known)
    return next((annotation for annotation in inherited if annotation is not None), None)


@cache
def modeling_source(arch: str) -> str:
    """Text of the family's modeling file; empty where there is none."""
    folder = _model_folder(arch)
    files = [folder / f"modeling_{name}.py" for name in (folder.name, arch.replace("-", "_"))]
    return next((file.read_text(encoding="utf-8") for file in reversed(files) if file.is_file()), "")


def supports(arch: str, flag: str) -> bool | None:
    """Whether the family's models set the class attribute `flag`; None where the source doesn't say.

    Flags: `_supports_sdpa`, `_supports_flash_attn`, `_supports_flex_attn`, `supports_gradient_checkpointing`.
    """
    values = re.findall(rf"^ +{flag} *(?::.*)?= *(\w+)", modeling_source(arch), flags=re.MULTILINE)
    if not values:
        return False if "PreTrainedModel)" in modeling_source(arch) else None
    # A value that is computed says nothing; one class that has it is enough.
    return True if "True" in values else False if set(values) == {"False"} else None


def config_tree(arch: str) -> tuple[ast.Module, str] | None:
    """Syntax tree of the family's configuration file, and the name of its config class in it."""
    return _find_class(arch)


def _class_name(value: str | tuple[str, ...] | None) -> str | None:
    return value[0] if isinstance(value, tuple) else value


@cache
def _mapping(file: str, name: str) -> dict[str, str]:
    # Only the literals of this one name are parsed: the whole file takes half a second.
    text = (package_folder("transformers") / file).read_text(encoding="utf-8")
    pairs: dict[str, str] = {}
    for start in re.finditer(rf"^{name}(?: = OrderedDict\(|\.update\()$", text, flags=re.MULTILINE):
        statement = ast.parse(text[start.start() : text.index("\n)", start.end()) + 2])
        call = next(node for node in ast.walk(statement) if isinstance(node, ast.Call))
        pairs.update(ast.literal_eval(call.args[0]))
    return pairs


def _model_folder(arch: str) -> Path:
    special = _special_folders().get(arch, arch).replace("-", "_")
    return package_folder("transformers") / "models" / special


@cache
def _special_folders() -> dict[str, str]:
    return {
        **_mapping("models/auto/auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"),
        **_mapping("models/auto/configuration_auto.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"),
    }


def _find_class(arch: str) -> tuple[ast.Module, str] | None:
    """Syntax tree of the family's configuration file, and the name of its config class in it."""
    name = known_architectures().get(arch)
    if name is None:
        return None
    # A few types (gpt-sw3) share another's class and have no folder with one.
    sharing = [arch, *(other for other, its in known_architectures().items() if its == name and other != arch)]
    for path in [path for each in sharing for path in sorted(_model_folder(each).glob("configuration_*.py"))]:
        tree = parse_source("transformers", str(path.relative_to(package_folder("transformers"))))
        if name in classes(tree):
            return tree, name
    return None


def _class_fields(tree: ast.Module, class_name: str) -> dict[str, Any]:
    known = classes(tree)
    fields: dict[str, Any] = {}
    for base in known[class_name].bases:
        if isinstance(base, ast.Name) and base.id in known:
            fields.update(_class_fields(tree, base.id))
        elif isinstance(base, ast.Name) and base.id != "PreTrainedConfig":
            parent = next((arch for arch, name in known_architectures().items() if name == base.id), None)
            fields.update(config_fields(parent) if parent else {})
    fields.update(_own_fields(known[class_name]))
    for name, own in _attribute_map(known[class_name]).items():
        fields[name] = fields[own] = fields.get(own, fields.get(name))
    return fields


def _own_fields(node: ast.ClassDef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in ast.unparse(statement.annotation):
                fields[statement.target.id] = _literal(statement.value)
        elif isinstance(statement, ast.FunctionDef) and statement.name in ("__init__", "__post_init__"):
            named = [*statement.args.args, *statement.args.kwonlyargs]
            fields.update({argument.arg: None for argument in named if argument.arg not in ("self", *fields)})
            fields.update({key: None for key in _popped(statement) if key not in fields})
    return fields


def _popped(function: ast.FunctionDef) -> list[str]:
    """Keys that a constructor takes out of its `kwargs` by name."""
    return [
        node.args[0].value
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("pop", "get")
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "kwargs"
        if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    ]


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
