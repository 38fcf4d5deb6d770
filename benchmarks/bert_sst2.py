"""Dev-set accuracy of ds_configs/bert_finetune.yaml on SST-2, over seeds, from real BERT weights (see sst2.py)."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from sst2 import DATA, fine_tune, last_scores, unpack_weights

KEYS = ("optimizer.lr=1.0e-4", "checkpoint.export=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[DATA])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = unpack_weights(Path(folder), options.data)
        accuracies = []
        for seed in range(1, options.seeds + 1):
            started = time.monotonic()
            keys = (*KEYS, *options.overrides)
            run = fine_tune(weights, Path(folder) / f"seed{seed}", options.data, seed, options.ranks, *keys)
            last = last_scores(run)
            accuracies.append(100 * last["accuracy"])
            print(
                f"seed {seed}: {accuracies[-1]:.1f} % of {last['labels']} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"SST-2 dev accuracy: {statistics.mean(accuracies):.1f} % +- {spread:.1f} over {len(accuracies)} seeds")


if __name__ == "__main__":
    main()
