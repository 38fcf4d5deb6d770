"""`ds-train`: plan, train, watch and export what a YAML recipe says. `ds-train schema` describes every key of one."""

from __future__ import annotations

import sys

import typer

from ds_train import __version__
from ds_train.cli import data, launching, models, ranks, recipes, runs
from ds_train.errors import EXIT_CODE, UserError, print_anything


def main() -> None:
    """Entry point. What the user got wrong is printed a line per problem, with exit code 2."""
    print_anything()
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def version() -> None:
    """The version of ds_train."""
    print(__version__)


# In the order of `ds-train --help`. They import heavy libraries inside: `schema` and `plan` answer without torch.
COMMANDS = {
    "Before a run": (
        recipes.schema, recipes.plan, recipes.calibrate, launching.doctor, data.prepare, data.tokenizers, ranks.lr_find,
    ),
    "A run": (
        launching.launch, launching.supervise, ranks.profile, runs.top, runs.report, data.explain_step,
    ),
    "A model": (models.export, models.reshard, ranks.prune, models.quantize, models.sparsify),
    "This program": (version,),
}  # fmt: skip

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
