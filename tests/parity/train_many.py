"""Runs several recipes one after the other in one set of ranks: `train_many.py RECIPE [RECIPE ...]`."""

from __future__ import annotations

import sys

from ds_train.config import load
from ds_train.engine import job, ranks


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        for recipe in sys.argv[1:]:
            job.train(load(recipe), info)

    return ranks.run_to_exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
