"""YAML + `a.b=c` overrides -> a frozen `RunConfig`, or every error at once."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ds_train.config.run import RunConfig
from ds_train.errors import Problem, UserError, user_error


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the recipe at `path` and apply `a.b=c` overrides, in order.

    Raises:
        UserError: the file can't be read, isn't YAML, or breaks the schema; all schema errors come at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise user_error(str(path), "no such recipe", _recipes_nearby(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise user_error(str(path), f"the recipe can't be read: {error}", "give a readable UTF-8 YAML file") from None
    return parse(text, overrides, origin=str(path))


def parse(text: str, overrides: Sequence[str] = (), origin: str = "recipe") -> RunConfig:
    """The `RunConfig` of YAML text; `origin` names it in errors. Raises as `load` does."""
    try:
        tree = OmegaConf.create(text)
        if not OmegaConf.is_dict(tree):
            raise user_error(origin, "a recipe is a YAML mapping of sections", "start from a file in ds_configs/")
        merged = OmegaConf.merge(tree, _dotlist(overrides))
        raw = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise user_error(origin, "not valid YAML: " + " ".join(str(error).split()), "correct the line named") from None
    assert isinstance(raw, dict)
    return validate(typing.cast(dict[str, Any], raw))


def validate(raw: Mapping[str, Any]) -> RunConfig:
    """The `RunConfig` of a plain mapping. Raises `UserError` with one problem per error."""
    # A section written with nothing under it reads as null; it means the section's defaults.
    cleaned = {key: value for key, value in raw.items() if value is not None or key not in RunConfig.model_fields}
    try:
        return RunConfig.model_validate(cleaned)
    except ValidationError as error:
        raise UserError(_problems(error)) from None


def dump(run: RunConfig) -> str:
    """The recipe as YAML with every default written out; `parse` reads it back to an equal `RunConfig`."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def known_keys() -> list[str]:
    """Every dotted key of the schema."""
    return list(_walk(RunConfig, ""))


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _walk(section: type[BaseModel], prefix: str) -> typing.Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from _walk(field.annotation, f"{prefix}{name}.")


def _dotlist(overrides: Sequence[str]) -> Any:
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise user_error(override, "an override is written key=value", "for example batch.global_samples=64")
    return OmegaConf.from_dotlist(list(overrides))


def _problems(error: ValidationError) -> list[Problem]:
    """One problem per key; the branches of a union (`int | auto`) that all refused a value become one sentence."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        by_key.setdefault(".".join(_location(item)) or "recipe", []).append(item)
    return [_problem(key, items) for key, items in by_key.items()]


def _problem(key: str, items: Sequence[Any]) -> Problem:
    first = items[0]
    location, kind, value = _location(first), first["type"], first["input"]
    if kind == "extra_forbidden":
        return Problem(key, _unknown_key_reason(location), _unknown_key_fix(location), value)
    if kind == "missing":
        return Problem(key, "required and not given", f"add `{key}`")
    if kind == "value_error":
        return Problem(key, first["msg"].removeprefix("Value error, "))
    messages = [item["msg"].removeprefix("Input should be ") for item in items]
    reason = "should be " + " or ".join(messages) if first["msg"].startswith("Input should be ") else first["msg"]
    return Problem(key, reason, _allowed(location), value)


def _location(item: Any) -> list[str]:
    """The dotted key of a pydantic error, without the names of union branches and list places behind it."""
    parts: list[str] = []
    section: Any = RunConfig
    for part in map(str, item["loc"]):
        if not _is_section(section):
            break
        parts.append(part)
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
    return parts


def _is_section(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _unknown_key_reason(location: Sequence[str]) -> str:
    if location[0] == "compress":
        return "compression is not available in this version"
    where = f"section `{'.'.join(location[:-1])}`" if len(location) > 1 else "the recipe"
    return f"{where} has no such key"


def _unknown_key_fix(location: Sequence[str]) -> str:
    if location[0] == "compress":
        return "remove it, and set a smaller `model` to train a smaller model"
    keys = known_keys()
    prefix = ".".join(location[:-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == prefix]
    tails = {key.rpartition(".")[2]: key for key in siblings}
    # The right word in the wrong section, or a misspelt one in the right section.
    elsewhere = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    best = nearest(location[-1], list(tails))
    guess = elsewhere[0] if elsewhere else tails.get(best or "")
    if guess:
        return f"did you mean `{guess}`?"
    return "known keys here: " + ", ".join(sorted(tails)) + "; `ds-train schema` describes them"


def _allowed(location: Sequence[str]) -> str:
    field = _field_at(location)
    if field is None:
        return "`ds-train schema` describes every key"
    return f"`ds-train schema {'.'.join(location)}` describes it; the default is {_default(field)}"


def _field_at(location: Sequence[str]) -> Any:
    section: Any = RunConfig
    field = None
    for part in location:
        if not _is_section(section) or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        section = field.annotation
    return field


def _default(field: Any) -> str:
    if field.is_required():
        return "none: it is required"
    value = field.get_default(call_default_factory=True)
    return "the section's defaults" if isinstance(value, BaseModel) else repr(value)


def _recipes_nearby(path: Path) -> str:
    try:
        folder = path.parent if path.parent.is_dir() else Path("ds_configs")
        found = sorted(str(file) for file in folder.glob("*.yaml"))
    except OSError:
        found = []
    best = nearest(str(path), found)
    if best:
        return f"did you mean {best}?"
    return "recipes here: " + ", ".join(found) if found else "give the path of a YAML recipe"
