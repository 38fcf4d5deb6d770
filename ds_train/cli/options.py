"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ds_train.errors import Problem, UserError

Recipe = Annotated[str, typer.Argument(help="Path of a YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Recipe keys to replace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

Hostfile = Annotated[
    Path | None,
    typer.Option("--hostfile", "-H", help="File of hosts, `name slots=N` a line; if left out, this machine."),
]
Include = Annotated[str, typer.Option("--include", "-i", help="Hosts and slots to use: worker-0@worker-1:0,2.")]
Exclude = Annotated[str, typer.Option("--exclude", "-e", help="Hosts and slots not to use.")]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Ranks in all; if left out, every slot of the hostfile, every device of this machine, or 1."
    ),
]
MasterAddr = Annotated[
    str | None,
    typer.Option(help="Address of the first host, where ranks meet; if left out, the one by which ssh reaches it."),
]
MasterPort = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, help="Port where ranks meet; if left out, 29500 on several hosts. A free one if taken."
    ),
]


def refuse_beside(option: str, others: Mapping[str, Any], reason: str) -> None:
    """Refuse the options that `option` leaves nobody to look at; `others` holds what each was given.

    Raises:
        UserError: one was given.
    """
    given = {name: value for name, value in others.items() if value}
    fix = f"leave it out, or {option.partition('=')[0]}"
    if given:
        raise UserError(
            Problem(name, f"{option} {reason}", fix, *([] if value is True else [value]))
            for name, value in given.items()
        )
