"""What a user did wrong, said in one form: dotted key, value, reason, nearest fix."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

EXIT_CODE = 2
"""Exit code of every command that ends because of the user's input."""

STOPPED_CODE = 75
"""A run that was told to stop, and has saved: started again, it goes on. (EX_TEMPFAIL of sysexits.h.)"""

HUNG_CODE = 76
"""A run whose step hung, or whose rank no longer answered: RUN/faults says where."""

_NO_VALUE = object()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    `key` is the dotted recipe key (or a path, a host, an argument); `value` is what stands there,
    left out where there is none; `reason` says why it can't be; `fix` says what to do.
    """

    key: str
    reason: str
    fix: str = ""
    value: Any = _NO_VALUE

    @property
    def head(self) -> str:
        """The key with its value."""
        return self.key if self.value is _NO_VALUE else f"{self.key}={shown(self.value)}"

    def __str__(self) -> str:
        end = "" if self.fix.endswith(("?", ".")) else "."
        tail = f" Fix: {self.fix}{end}" if self.fix else ""
        return f"{self.head}: {self.reason.rstrip('.')}.{tail}"


class UserError(Exception):
    """The input can't be worked with. Printed without a traceback; the process exits with code 2."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[Problem]]]:
        # Exceptions travel between ranks by pickle, which would rebuild this one from its text.
        return UserError, (self.problems,)


class Stopped(Exception):
    """The run was told to stop and has ended in order; the process exits with code 75. Any text is for people."""


def user_error(key: str, reason: str, fix: str = "", value: Any = _NO_VALUE) -> UserError:
    """A `UserError` of one problem."""
    return UserError(Problem(key, reason, fix, value))


def outermost(problems: Iterable[Problem]) -> list[Problem]:
    """Those that aren't about a key under another's: a section and what it holds would say the same thing twice."""
    found = list(problems)
    return [problem for problem in found if not any(problem.key.startswith(f"{other.key}.") for other in found)]


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line: messages of many lines begin with the point."""
    if isinstance(error, KeyError):  # its text is the key alone
        return f"no such name: {error}"
    # transformers' config classes say "Class validation error for ...:" or "Validation error for field ...:", and then
    # what is wrong.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Class validation error", "Validation error"))] or lines
    return lines[0] if lines else type(error).__name__


def shown(value: Any) -> str:
    """As a recipe would have it, in one short line."""
    text = _as_yaml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_yaml(value: Any) -> str:
    """True and null in small letters, and quotes where text would be read as something else."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_as_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e6:
        return f"{value:g}"
    text = str(value)
    ambiguous = _is_number(text) or text in ("", "true", "false", "null", "yes", "no", "on", "off") or " " in text
    return repr(text) if isinstance(value, str) and ambiguous else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def print_anything() -> None:
    """Let what is printed have characters that the output's encoding lacks: as escapes, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
