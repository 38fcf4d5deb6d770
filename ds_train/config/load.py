"""YAML + `a.b=c` overrides -> a frozen `RunConfig`, or every error at once."""

from __future__ import annotations

import contextlib
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ds_train.config.names import OTHER_NAMES
from ds_train.config.reference import default_text, reference
from ds_train.config.run import RunConfig
from ds_train.errors import Problem, UserError, first_line, user_error


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
    except IsADirectoryError:
        raise user_error(str(path), "a folder, not a recipe", _recipes_nearby(path / "*")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise user_error(str(path), f"the recipe can't be read: {error}", "give a readable UTF-8 YAML file") from None
    return parse(text, overrides, origin=str(path))


def parse(text: str, overrides: Sequence[str] = (), origin: str = "recipe") -> RunConfig:
    """The `RunConfig` of YAML text; `origin` names it in errors. Raises as `load` does."""
    with _reported(origin, "not valid YAML", "correct the line named"):
        tree = OmegaConf.create(text)
    if not OmegaConf.is_dict(tree):
        raise user_error(origin, "a recipe is a YAML mapping of sections", "start from a file in ds_configs/")
    changes = [_change(override) for override in overrides]
    with _reported(origin, "it doesn't fit together", "correct the key named"):
        raw = OmegaConf.to_container(OmegaConf.merge(tree, *changes), resolve=True)
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
    tree = _without_interpolation(run.model_dump(mode="json"))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _without_interpolation(value: Any) -> Any:
    """Plain values whose texts OmegaConf reads as they are: it would look for what `${` begins."""
    if isinstance(value, dict):
        return {key: _without_interpolation(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_interpolation(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def known_keys() -> list[str]:
    """Every dotted key of the schema."""
    return [row.key for row in reference()]


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that `word` was probably meant to be, in whatever case, or None."""
    in_lower_case = {other.lower(): other for other in reversed(known)}
    # Long words have much in common by chance.
    matches = difflib.get_close_matches(word.lower(), in_lower_case, n=1, cutoff=0.6 if len(word) < 8 else 0.72)
    return in_lower_case[matches[0]] if matches else None


@contextlib.contextmanager
def _reported(key: str, reason: str, fix: str) -> Iterator[None]:
    """What YAML's reader and OmegaConf raise becomes the user's error, in one line."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise user_error(error.full_key or key, f"{reason}: {first_line(error)}", fix) from None
    except yaml.YAMLError as error:
        text = " ".join(str(error).split()).replace('"<unicode string>", ', "")
        raise user_error(key, f"{reason}: {text}", fix) from None


def _change(override: str) -> Any:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise user_error(override, "an override is written key=value", "for example batch.global_samples=64")
    with _reported(override, "the value is not valid YAML", "quote it, for the shell too"):
        return OmegaConf.from_dotlist([override])


def _problems(error: ValidationError) -> list[Problem]:
    """One problem per key; the branches of a union (`int | auto`) that all refused a value become one sentence."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        by_key.setdefault((".".join(_location(item)) or "recipe") + _place(item), []).append(item)
    return [_problem(key, items) for key, items in by_key.items()]


def _problem(key: str, items: Sequence[Any]) -> Problem:
    first = items[0]
    location, kind, value = _location(first), first["type"], first["input"]
    if kind == "extra_forbidden":
        return Problem(key, _unknown_key_reason(location), _unknown_key_fix(location), value)
    if kind == "invalid_key":
        return Problem(key, "keys are text, and this one is a number", "remove it")
    if kind == "missing" and len(location) == len(first["loc"]):
        return Problem(key, "required and not given", _REMEDY.get(key, f"add `{key}`"))
    if kind == "value_error":
        return Problem(key, first["msg"].removeprefix("Value error, "), _REMEDY.get(key, ""))
    expected = " or ".join(_expected(item) for item in items)
    if isinstance(value, str) and _means_null(value, _field_at(location)):
        expected += " or null"
    return Problem(key, f"should be {expected}", _fix(location, kind, value), value)


# What a user can do about errors that are about a whole section.
_REMEDY = {
    "model": "give `model.path` (pretrained weights) or `model.arch` (random weights), not both",
    "schedule": "give one, such as schedule.steps=1000, and leave the others out or null",
}

# pydantic's error types in the words of a YAML author; {} is the bound.
_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def _expected(item: Any) -> str:
    if item["type"] in ("missing", "too_long"):  # of a list of fixed length
        return f"a list of {len(typing.get_args(_field_at(_location(item)).annotation))}"
    context = {name: _plain(value) for name, value in item.get("ctx", {}).items()}
    known = _EXPECTED.get(item["type"])
    return known.format(**context) if known else str(item["msg"]).removeprefix("Input should be ")


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _fix(location: Sequence[str], kind: str, value: Any) -> str:
    field = _field_at(location)
    if field is None:
        return "`ds-train schema` describes every key"
    choices = list(_choices(field.annotation))
    if isinstance(value, str):
        if _means_null(value, field):
            return "write null"
        guess = nearest(value, [choice for choice in choices if isinstance(choice, str)])
        if guess:
            return f"did you mean {guess}?"
    if kind == "string_type" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'write "{value}", quotes included'
    default = default_text(field)
    described = f"`ds-train schema {'.'.join(location)}` describes it"
    return f"{described}; the default is {default}" if default else described


def _means_null(value: str, field: Any) -> bool:
    return field is not None and None in _choices(field.annotation) and value.lower() in ("none", "nil")


def _choices(annotation: Any) -> Iterator[Any]:
    """The values that a type names: those of a Literal, and None."""
    for argument in typing.get_args(annotation):
        if argument is type(None):
            yield None
        elif isinstance(argument, (str, int)):
            yield argument
        else:
            yield from _choices(argument)


def _place(item: Any) -> str:
    """`[1]` for an error in one element of a list."""
    behind = item["loc"][len(_location(item)) :]
    return f"[{behind[0]}]" if behind and isinstance(behind[0], int) and item["type"] != "missing" else ""


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
    where = f"section `{'.'.join(location[:-1])}`" if len(location) > 1 else "the recipe"
    return f"{where} has no such key"


def _unknown_key_fix(location: Sequence[str]) -> str:
    keys = known_keys()
    prefix = ".".join(location[:-1])
    if location[-1] in OTHER_NAMES:
        return f"did you mean `{OTHER_NAMES[location[-1]]}`?"
    siblings = [key for key in keys if key.rpartition(".")[0] == prefix]
    tails = {key.rpartition(".")[2]: key for key in siblings}
    # The right word in the wrong section, or a misspelt one in the right section.
    elsewhere = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    best = nearest(location[-1], list(tails))
    guess = elsewhere[0] if elsewhere else tails.get(best or "")
    if guess:
        return f"did you mean `{guess}`?"
    return "known keys here: " + ", ".join(sorted(tails)) + "; `ds-train schema` describes them"


def _field_at(location: Sequence[str]) -> Any:
    section: Any = RunConfig
    field = None
    for part in location:
        if not _is_section(section) or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        section = field.annotation
    return field


def _recipes_nearby(path: Path) -> str:
    try:
        folders = (path.parent, Path("ds_configs"))
        found = sorted({str(file) for folder in folders for file in folder.glob("[!.]*.yaml")})
    except OSError:
        found = []
    best = nearest(str(path), found)
    if best:
        return f"did you mean {best}?"
    return "recipes here: " + ", ".join(found) if found else "give the path of a YAML recipe"
