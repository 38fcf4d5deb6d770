"""The schema as people and editors read it: a row per key, and a JSON Schema."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_train.config.run import RunConfig


class KeyReference(NamedTuple):
    """One recipe key: dotted name, type, default ("required" where there is none), docstring."""

    key: str
    type: str
    default: str
    text: str


def reference(prefix: str = "") -> list[KeyReference]:
    """Every key at or under `prefix`, in the order of the schema; sections come before their keys."""
    rows = list(_walk(RunConfig, ""))
    return [row for row in rows if not prefix or row.key == prefix or row.key.startswith(prefix + ".")]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, for editors. `model` takes keys of any transformers config besides its own."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "ds_train recipe"
    schema["$defs"]["ModelSection"]["additionalProperties"] = True
    return schema


def default_text(field: FieldInfo) -> str:
    """The default as a recipe would write it: `null`, `true`, `[0.9, 0.95]`; empty where there is none."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required() or isinstance(default, BaseModel):
        return ""
    return _yaml(default)


def _walk(section: type[BaseModel], prefix: str) -> Iterator[KeyReference]:
    for name, field in section.model_fields.items():
        key, annotation = prefix + name, field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield KeyReference(key, "section", "", _one_line(annotation.__doc__ or ""))
            yield from _walk(annotation, key + ".")
        else:
            default = "required" if field.is_required() else default_text(field)
            yield KeyReference(key, _type(annotation), default, _one_line(field.description or ""))


def _type(annotation: Any) -> str:
    """A type as a YAML author reads it: `int | auto`, `str | null`, `list of str`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (tuple, list):
        count = "" if origin is list or Ellipsis in arguments else f"{len(arguments)} "
        return f"list of {count}{_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
