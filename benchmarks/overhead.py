"""What the trainer costs besides DeepSpeed: its step loop against bare `engine.forward/backward/step`, in turn.

    python benchmarks/overhead.py [--steps 10000] [--rounds 100]

One process, one engine, an almost empty Llama, a fixed batch for the bare loop. Rounds of both alternate; the trainer
reads data, keeps its clock and writes a metrics line a step. Milliseconds by the wall, and by the processor, which a
busy machine changes less; medians of the rounds. Beside them: memory, open files and /dev/shm along the way.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from ds_train.config import RunConfig, parse
from ds_train.engine import ranks
from ds_train.engine.ranks import RankInfo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each loop, in all rounds together")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run_to_exit_code(lambda info: measure(info, Path(folder), arguments.steps, arguments.rounds))


def recipe(folder: Path, steps: int) -> RunConfig:
    """The smallest model that is one, on a text of numbers."""
    (folder / "text").mkdir()
    (folder / "text" / "numbers.txt").write_text(" ".join(map(str, range(2000))))
    model = {"arch": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sections: dict[str, Any] = {
        "name": "overhead",
        "run_root": str(folder),
        "model": model | {"num_attention_heads": 1, "num_key_value_heads": 1},
        "data": {
            "source": "text", "path": str(folder / "text"), "cache_dir": str(folder / "cache"), "sequence_length": 8,
            "validation_fraction": 0.0,
        },
        "batch": {"global_samples": 1},
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": steps},
        "checkpoint": {"save_final": False, "export": False},
        "track": {"progress": False, "peak_tflops": 1.0},
    }  # fmt: skip
    return parse(yaml.safe_dump(sections))


def measure(info: RankInfo, folder: Path, steps: int, rounds: int) -> None:
    """Print milliseconds a step of both loops, and what the process holds, round by round."""
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine.build import assemble
    from ds_train.engine.job import make_run_folder, quiet_libraries
    from ds_train.engine.session import Placed, Session
    from ds_train.engine.stop import StopRequest
    from ds_train.engine.watch import RunWatch
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster
    from ds_train.schedule.timeline import make_timeline
    from ds_train.track.phases import collectives_timed
    from ds_train.track.tracker import Tracker

    run = recipe(folder, steps)
    plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
    ranks.meet(info)
    quiet_libraries()
    prepared = prepare(run, progress=False)
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    place = folder / run.name
    make_run_folder(place)
    tracker = Tracker(run, {}, place, True, steps, 0, None)
    watch = RunWatch(run, info, parts, tracker, place, timeline, None)
    build = partial(assemble, run, plan, info, prepared_tokenizer(prepared), prepared)
    placed, stop = Placed(run, plan), StopRequest(run.faults.grace_seconds)
    session = Session(placed, placed, info, parts, build, tracker, place, "", watch, stop)
    batch = parts.data.train.step(0)[0]

    def bare(count: int) -> None:
        for _ in range(count):
            loss = parts.part.loss.train_loss(parts.engine, batch)
            parts.engine.backward(loss)
            parts.engine.step()

    def trainer(done: int, count: int) -> None:
        with collectives_timed(parts.clock, info.device):
            session.train(done, stop_after=done + count)

    size = steps // rounds
    bare(size // 4)
    print(f"{'':5} {'wall, ms a step':^28} {'processor, ms a step':^28}")
    print("round" + f"{'bare':>9}{'trainer':>10}{'over':>9}" * 2 + f"{'RSS MB':>10}{'files':>7}{'/dev/shm':>9}")
    over: list[tuple[float, float]] = []
    for number in range(rounds):
        plain, ours = timed(bare, size), timed(partial(trainer, number * size), size)
        over.append((ours[0] - plain[0], ours[1] - plain[1]))
        if (number + 1) % max(1, rounds // 10) == 0:
            figures = "".join(f"{a:9.3f}{b:10.3f}{b - a:9.3f}" for a, b in zip(plain, ours, strict=True))
            print(f"{number + 1:5}{figures}" + "".join(held()), flush=True)
    tracker.close(0)
    for name, values in zip(("wall", "processor"), zip(*over, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"the trainer adds {middle:.3f} ms a step by the {name}; half of the rounds {low:.3f} to {high:.3f}")
    print(f"its metrics line alone: {tracker_cost(folder):.3f} ms; {rounds} rounds of {size} steps")
    print(
        ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers")), os.cpu_count(), "cores"
    )


def timed(loop: Any, count: int) -> tuple[float, float]:
    """Milliseconds a step of `loop(count)`: by the wall, and of all this process's threads."""
    started = time.perf_counter(), time.process_time()
    loop(count)
    ended = time.perf_counter(), time.process_time()
    return 1e3 * (ended[0] - started[0]) / count, 1e3 * (ended[1] - started[1]) / count


def tracker_cost(folder: Path) -> float:
    """Milliseconds to write one training record, of those that the run wrote."""
    from ds_train.track.metrics import MetricsFile, read_metrics

    record = read_metrics(folder / "overhead" / "metrics.jsonl")[-1]
    file = MetricsFile(folder / "again.jsonl", print)
    return timed(lambda count: [file.write(record) for _ in range(count)], 1000)[0]


def held() -> Iterator[str]:
    """Memory, open files and shared-memory files of this process, as columns."""
    gc.collect()
    process = psutil.Process()
    shared = [path for path in Path("/dev/shm").iterdir() if path.is_file()] if Path("/dev/shm").is_dir() else []
    yield f"{process.memory_info().rss / 2**20:10.1f}"
    yield f"{process.num_fds():7}"
    yield f"{len(shared):9}"


if __name__ == "__main__":
    raise SystemExit(main())
