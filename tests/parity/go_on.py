"""Goes on from a checkpoint in the layout of each recipe: `go_on.py CHECKPOINT RECIPE ... [-- CHECKPOINT RECIPE ...]`.

First the checkpoint is loaded and saved again untouched, under `resaved` of the recipe's run folder; then the recipe is
trained from it.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

from ds_train.checkpoint import native
from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import job, ranks
from ds_train.engine.build import assemble
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster


def body(info: ranks.RankInfo) -> None:
    ranks.meet(info)
    job.quiet_libraries()
    for between, group in itertools.groupby(sys.argv[1:], key="--".__eq__):
        if not between:
            go_on(info, *map(Path, group))


def go_on(info: ranks.RankInfo, checkpoint: Path, *recipes: Path) -> None:
    for recipe in recipes:
        run = load(recipe, [f"checkpoint.resume={checkpoint}"])
        plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
        prepared = ranks.on_main_first(info, lambda run=run: prepare(run))
        parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
        native.load(parts.engine, parts.part, checkpoint)
        saver = native.Saver(Path(run.run_root) / run.name / "resaved", parts.engine, parts.part, keep_last=1)
        (saved,) = saver.save(replace(native.read_state(checkpoint), known={}))
        assert saved.error is None, saved.error
        job.train(run, info)


if __name__ == "__main__":
    sys.exit(ranks.run_to_exit_code(body))
