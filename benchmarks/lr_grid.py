"""The learning rate that `ds-train lr-find` names, against a grid of eight: held-out loss at the end of each run.

.venv/bin/python benchmarks/lr_grid.py [RECIPE] [--steps 200] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launching import ROOT

from ds_train.track.metrics import read_metrics

GRID = [2.5e-4 * 2**place for place in range(8)]


def ds_train(command: str, options: argparse.Namespace, folder: Path, *overrides: str) -> Path:
    """Run a command on the recipe; its run folder."""
    name = f"run-{len(list(folder.iterdir()))}"
    more = [*options.override, *overrides, f"schedule.steps={options.steps}", f"name={name}", f"run_root={folder}"]
    line = [sys.executable, "-m", "ds_train.cli", command, options.recipe, "--ranks", str(options.ranks), *more]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return folder / name


def named(options: argparse.Namespace, folder: Path) -> float:
    return float(json.loads((ds_train("lr-find", options, folder) / "lr-find.json").read_text())["value"])


def held_out_loss(options: argparse.Namespace, folder: Path, rate: float) -> float:
    keep = [
        "checkpoint.export=false", "checkpoint.save_final=false", "track.progress=false", "track.sample_prompt=null",
    ]  # fmt: skip
    run = ds_train("launch", options, folder, f"optimizer.lr={rate}", *keep)
    return float([record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"][-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="ds_configs/quickstart.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--named", type=float, help="what lr-find has named, instead of asking it again")
    parser.add_argument("override", nargs="*", help="recipe keys to replace")
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = options.named or named(options, folder)
        print(f"lr-find names {found:.3g}", flush=True)
        losses: dict[float, float] = {}
        for rate in [*GRID, found]:
            losses[rate] = held_out_loss(options, folder, rate)
            mark = "  named by lr-find" if rate == found else ""
            print(f"{rate:.3g}  held-out loss {losses[rate]:.4f}{mark}", flush=True)
    best = min(losses[rate] for rate in GRID)
    print(f"{losses[found] / best - 1:+.1%} of the best of the grid, {options.steps} steps")
    return 0 if losses[found] <= 1.02 * best else 1


if __name__ == "__main__":
    sys.exit(main())
