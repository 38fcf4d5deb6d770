"""`lr-find`, `prune`, `profile`: commands that are themselves run by every rank of a launch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ds_train.cli.launching import start_again_on
from ds_train.cli.options import Hostfile, Overrides, Ranks, Recipe
from ds_train.config import RunConfig, load
from ds_train.config.reference import reference
from ds_train.errors import user_error


def lr_find(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    ranks: Ranks = None,
    lowest: Annotated[float, typer.Option(min=0.0, help="Lowest learning rate of the sweep.")] = 1e-6,
    highest: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the sweep.")] = 100,
    probe_steps: Annotated[int, typer.Option(min=10, help="Steps of each run at a constant rate.")] = 50,
    safety: Annotated[float, typer.Option(min=1.0, help="The largest stable rate is divided by this.")] = 1.25,
    proxy_width: Annotated[int | None, typer.Option(min=1, help="Search on a model of this hidden size.")] = None,
) -> None:
    """Find a learning rate for the recipe by a range test; RUN/lr-find.json and .png say how."""
    if not 0 < lowest < highest:
        raise user_error("--lowest", f"isn't above 0 and below --highest={highest:g}", "give a range", lowest)
    run = load(recipe, overrides or [])
    start_again_on(hostfile, ranks, run, recipe)
    from ds_train.engine.lr_find import RangeTest, find
    from ds_train.engine.ranks import RankInfo, end, run_to_exit_code

    test = RangeTest(lowest, highest, steps, probe_steps, safety, proxy_width)

    def body(info: RankInfo) -> None:
        record = find(run, info, test)
        if info.is_main:
            print(f"optimizer.lr={record['value']:.3g}: {record['reasoning']}")
            if record["proxy"] is not None:
                factors = json.dumps(record["proxy"]["lr_factors"])
                print(f"from width {proxy_width}: {record['proxy']['rule']}")
                print(f"optimizer.lr_factors={factors}")
            print(f"{record['seconds']:.0f} s; {Path(run.run_root).expanduser() / run.name}/lr-find.json and .png")

    end(run_to_exit_code(body))


def prune(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    ranks: Ranks = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step-* to prune; if left out, the recipe's first weights.")
    ] = None,
) -> None:
    """Prune at once, without training: score the recipe's units on `score_steps` steps of its data, cut, and export.

    RUN/pruned is a transformers folder of the smaller model.
    """
    run = load(recipe, overrides or [])
    start_again_on(hostfile, ranks, run, recipe)
    from ds_train.engine.prune_once import prune_once
    from ds_train.engine.ranks import RankInfo, end, run_to_exit_code

    def body(info: RankInfo) -> None:
        done = prune_once(run, info, checkpoint)
        if info.is_main:
            print(done.summary)
            print(done.folder.resolve())

    end(run_to_exit_code(body))


_NOT_PROFILED = (
    "checkpoint.every_steps", "checkpoint.keep_every", "checkpoint.push_to", "checkpoint.best", "checkpoint.patience",
    "health.on_spike", "health.max_roll_backs", "track.also", "track.sample_prompt",
)  # fmt: skip
"""Keys of what takes time or writes beside the steps that `profile` looks at: it takes their defaults."""


def profiled_recipe(recipe: str, overrides: Sequence[str], first: int, last: int, record: str) -> RunConfig:
    """The recipe with steps `first` to `last` recorded on ranks `record`, under a name of its own."""
    asked = load(recipe, overrides)
    changes = [
        f"name={asked.name}-profile", f"track.profile_steps=[{first},{last}]", f"track.profile_ranks=[{record}]",
        "track.wandb=off", "checkpoint.save_final=false", "checkpoint.export=false",
        *(f"{row.key}={row.default}" for row in reference() if row.key in _NOT_PROFILED),
        *(["track.eval_samples=1"] if asked.data.holds_out else []),
    ]  # fmt: skip
    return load(recipe, [*overrides, *changes])


def profile(
    recipe: Recipe,
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option(help="Steps to record, both included: i..j.")] = "6..8",
    record: Annotated[str, typer.Option(help="Ranks to record, separated by commas.")] = "0",
    hostfile: Hostfile = None,
    ranks: Ranks = None,
) -> None:
    """Train up to step j under torch's profiler: traces, operators, memory, and what to change. Saves no checkpoint.

    The run's schedules are the recipe's; RUN-profile/profile has what was found.
    """
    try:
        first, last = (int(step) for step in steps.split(".."))
    except ValueError:
        raise user_error("--steps", "not a range of steps", "write 6..8", steps) from None
    run = profiled_recipe(recipe, overrides or [], first, last, record)
    start_again_on(hostfile, ranks, run, recipe, resumes=True)
    from ds_train.engine.job import train
    from ds_train.engine.ranks import end, run_to_exit_code

    end(run_to_exit_code(lambda info: train(run, info, stop_after=last)))
