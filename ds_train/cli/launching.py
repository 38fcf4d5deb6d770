"""`launch`, `supervise`, `doctor`: a run on the ranks of this machine or of several."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ds_train.cli.options import AsJson, Exclude, Hostfile, Include, MasterAddr, MasterPort, Overrides, Ranks, Recipe
from ds_train.config import RunConfig, load
from ds_train.errors import EXIT_CODE, STOPPED_CODE

if TYPE_CHECKING:
    from ds_train.engine.launch import Ended


def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
) -> None:
    """Train a recipe on this machine or on the hosts of a hostfile. Exits with the first failing rank's code.

    Hosts and plan are looked at first; nothing is started where a launch would fail.
    """
    run = load(recipe, overrides or [])
    from ds_train.engine import survey
    from ds_train.engine.launch import run as run_ranks
    from ds_train.engine.session import placed
    from ds_train.engine.supervise import MARGIN_S

    hosts = survey.hosts_of(hostfile, include, exclude, ranks)
    found = survey.survey(hosts, master_port, run, recipe)
    survey.refuse(found.findings(), lambda: placed(run, found.cluster()) if found.facts else None)
    world = found.world(master_addr)
    print(survey.describe(world), flush=True)
    ended = run_ranks(world, ["ds_train.engine", recipe, *(overrides or [])], run.faults.grace_seconds + MARGIN_S)
    exit_as(ended)


def supervise(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Failures in a row without a new checkpoint, after which it is given up.")
    ] = 5,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds before a restart, doubled with each in a row.")] = 10.0,
    longest_pause: Annotated[float, typer.Option(min=0.0, help="They grow no further than this.")] = 600.0,
) -> None:
    """Train as `launch` does, and start again from the last checkpoint when it fails; without hosts that are gone.

    What the user has to mend (exit code 2) isn't started again. Each restart is a line of kind `restart` in
    RUN/metrics.jsonl.
    """
    run = load(recipe, overrides or [])
    from ds_train.engine import supervise as supervision
    from ds_train.engine.survey import hosts_of

    supervisor = supervision.Supervisor(
        run,
        supervision.Policy(limit, pause, longest_pause),
        lambda hosts: supervision.find_hosts(run, recipe, hosts, master_addr, master_port),
        supervision.start_run(recipe, overrides or []),
    )
    ended = supervisor.supervise(hosts_of(hostfile, include, exclude, ranks))
    exit_as(ended)


def doctor(
    recipe: Annotated[str, typer.Argument(help="Path of a YAML recipe, to see that it runs there.")] = "",
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    as_json: AsJson = False,
) -> None:
    """Would a launch on these hosts work? A line a finding, with the fix; exit code 1 when it would fail."""
    from dataclasses import asdict

    run = load(recipe, overrides or []) if recipe else None
    from ds_train.engine.doctor import examine
    from ds_train.engine.survey import hosts_of

    hosts = hosts_of(hostfile, include, exclude, ranks)
    found = []
    for finding in examine(hosts, run, recipe, master_addr, master_port):
        found.append(finding)
        if not as_json:
            print(finding, flush=True)
    failed = any(finding.level == "fail" for finding in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    sys.exit(1 if failed else 0)


def start_again_on(
    hostfile: Path | None, ranks: int | None, run: RunConfig, recipe: str, resumes: bool = False
) -> None:
    """Where hosts or ranks are asked for and this isn't one of them: this same command on them, to its end.

    Only a command that `resumes` looks for the recipe's checkpoint.
    """
    if (hostfile is None and ranks is None) or "RANK" in os.environ:
        return
    from ds_train.engine import survey
    from ds_train.engine.launch import run as run_ranks
    from ds_train.engine.supervise import MARGIN_S

    if not resumes:
        run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "never"})})
    found = survey.survey(survey.hosts_of(hostfile, "", "", ranks), run=run, recipe=recipe)
    survey.refuse(found.findings())
    ended = run_ranks(found.world(), ["ds_train.cli", *sys.argv[1:]], run.faults.grace_seconds + MARGIN_S)
    if ended.code == STOPPED_CODE:  # its ranks have said what becomes of it
        sys.exit(STOPPED_CODE)
    exit_as(ended)


def exit_as(ended: Ended) -> NoReturn:
    """End with the exit code of a launch; what the user did wrong has been said by the rank that met it."""
    if ended.code not in (0, EXIT_CODE):
        print(ended if ended.code == STOPPED_CODE else f"error: {ended}", file=sys.stderr)
    sys.exit(ended.code)
