"""Trains a recipe as it is, then under the profiler: `profile_steps.py RECIPE`. Says whether the first run met it."""

from __future__ import annotations

import sys

import torch

from ds_train.config import load
from ds_train.engine import job, ranks


def body(info: ranks.RankInfo) -> None:
    job.train(load(sys.argv[1]), info)
    assert "ds_train.engine.profile" not in sys.modules, "the profiler is imported where nobody asked for it"
    assert not torch.autograd._profiler_enabled()
    changes = ["name=profiled", "track.profile_steps=[3,4]", "track.profile_ranks=[1]"]
    job.train(load(sys.argv[1], changes), info, stop_after=6)
    assert not torch.autograd._profiler_enabled()


if __name__ == "__main__":
    sys.exit(ranks.run_to_exit_code(body))
