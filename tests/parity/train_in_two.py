"""Trains several recipes in two halves, the second from a checkpoint: `train_in_two.py HALF END RECIPE ...`."""

from __future__ import annotations

import sys

from ds_train.config import load
from ds_train.engine import job, ranks


def main() -> int:
    half, end, *recipes = sys.argv[1:]

    def body(info: ranks.RankInfo) -> None:
        for recipe in recipes:
            for stop_after in (int(half), int(end)):
                job.train(load(recipe), info, stop_after)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
