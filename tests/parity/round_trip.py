"""Builds the engine of each recipe and exports its untrained model at once, in small files; saves a checkpoint too."""

from __future__ import annotations

import sys
from pathlib import Path

from ds_train.checkpoint import hf, native
from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import job, ranks
from ds_train.engine.build import assemble
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster

FILE_BYTES = 20_000


def body(info: ranks.RankInfo) -> None:
    ranks.meet(info)
    job.quiet_libraries()
    for recipe in sys.argv[1:]:
        run = load(recipe)
        plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
        prepared = ranks.on_main_first(info, lambda run=run: prepare(run, progress=False))
        tokenizer = prepared_tokenizer(prepared)
        parts = assemble(run, plan, info, tokenizer, prepared)
        folder = Path(run.run_root) / run.name
        hf.export(parts.part, tokenizer, folder / "export", hf.model_card(run.name, {"steps": 0}, ""), FILE_BYTES)
        saver = native.Saver(folder / "checkpoints", parts.engine, parts.part, keep_last=1)
        state = native.TrainState(0, 0, run.model_dump(mode="json"), {}, {}, "")
        assert [saved.error for saved in saver.save(state)] == [None]


if __name__ == "__main__":
    sys.exit(ranks.run_to_exit_code(body))
