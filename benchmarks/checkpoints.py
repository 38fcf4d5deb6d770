"""What a checkpoint costs a run: the time that training stands still, saving at once and in the background, in turn.

Beside it the speed of writing, against that of the disk: the same bytes written once and brought to the disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ds_train.checkpoint import native
from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import job, ranks
from ds_train.engine.build import assemble
from ds_train.engine.loop import train_steps
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
from ds_train.schedule.timeline import make_timeline

_CHUNK = 16 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="ds_configs/quickstart.yaml")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the recipe's Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps between two saves")
    options = parser.parse_args()
    info = ranks.rank_info()
    ranks.meet(info)
    job.quiet_libraries()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        measure(options, info, Path(folder))
    ranks.leave()


def measure(options: argparse.Namespace, info: ranks.RankInfo, folder: Path) -> None:
    sizes = [f"model.hidden_size={options.hidden}", f"model.intermediate_size={options.hidden * 11 // 4}"]
    total = 2 * options.rounds * options.steps
    run = load(options.recipe, [*sizes, f"schedule.steps={total}", "data.sequence_length=128"])
    plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
    prepared = prepare(run)
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    savers = [
        native.Saver(folder / kind, parts.engine, parts.part, keep_last=1, in_background=kind == "background")
        for kind in ("at once", "background")
    ]
    state = native.TrainState(0, 0, {}, {}, {}, "")
    steps = train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch))
    stalls: list[list[native.Saved]] = [[], []]
    disk: list[float] = []
    for _ in range(options.rounds):
        for saver, saved in zip(savers, stalls, strict=True):
            saved.extend(saver.save(state))
            for _ in range(options.steps):
                next(steps)
        stalls[1].extend(savers[1].wait())
        disk.append(write_once(folder / "plain", stalls[0][-1].bytes))
    report([min(save.stall_seconds for save in saved) for saved in stalls], stalls[0], min(disk))


def write_once(path: Path, size: int) -> float:
    """Seconds that `size` bytes take to the disk."""
    data = os.urandom(_CHUNK)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // _CHUNK):
            file.write(data)
        file.write(data[: size % _CHUNK])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    return time.perf_counter() - started


def report(stalls: list[float], saved: list[native.Saved], disk: float) -> None:
    size = saved[0].bytes
    table = Table("", "standing still, s", "of saving at once", "MB/s", "of the disk's", box=None)
    fastest = min(save.seconds for save in saved)
    table.add_row("at once", f"{stalls[0]:.3f}", "1.00", f"{size / fastest / 1e6:.0f}", f"{disk / fastest:.2f}")
    table.add_row("in the background", f"{stalls[1]:.3f}", f"{stalls[1] / stalls[0]:.2f}", "", "")
    table.add_row("the disk", "", "", f"{size / disk / 1e6:.0f}", "1.00")
    console = Console(width=100)
    console.print(f"{size / 1e6:.0f} MB a checkpoint, least of {len(saved)} rounds in turn")
    console.print(table)


if __name__ == "__main__":
    main()
