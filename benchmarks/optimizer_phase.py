"""The optimizer's phase inside the trainer: its share of a step, ours beside torch's and DeepSpeed's; steps in turn.

    .venv/bin/deepspeed --num_accelerators 2 benchmarks/optimizer_phase.py

One run of each optimizer on the same model, data and ranks (bf16, ZeRO-2 unless asked otherwise), a step of each in
turn. The phase is DeepSpeed's whole `optimizer.step`: norm, unscale, clip, update, 16-bit copy and all-gather; the
update is the optimizer's own part of it. Losses are compared with DeepSpeedCPUAdam's over all steps. That compiles at
first use (a minute or more).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from rich.console import Console
from rich.table import Table

import ds_train.engine.build
from ds_train.config import load
from ds_train.data.prepare import prepare, prepared_tokenizer
from ds_train.engine import job, ranks
from ds_train.engine.build import assemble
from ds_train.engine.loop import train_steps
from ds_train.optim.build import parameter_groups
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
from ds_train.schedule.timeline import make_timeline

KERNELS = {"ours": "auto", "torch fused": "torch", "DeepSpeedCPUAdam": "torch"}


@dataclass
class Variant:
    """One optimizer's run: its steps, and seconds of each step, phase and update."""

    steps: Any
    step: list[float] = field(default_factory=list)
    phase: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    parser.add_argument("--recipe", default="ds_configs/quickstart.yaml")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the recipe's Llama")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=8, help="of a global batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("override", nargs="*", help="recipe keys, such as parallel.offload_optimizer=cpu")
    options = parser.parse_args()
    info = ranks.rank_info()
    ranks.meet(info)
    job.quiet_libraries()
    ranks.return_freed_memory()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        variants = {name: variant(name, options, info, Path(folder)) for name in KERNELS}
        for number in range(options.rounds + 1):
            for made in variants.values():
                take(made, counted=number > 0)
    if info.is_main:
        report(options, info, variants)
    ranks.leave()


def variant(name: str, options: argparse.Namespace, info: ranks.RankInfo, folder: Path) -> Variant:
    run = load(
        options.recipe,
        [
            f"run_root={folder}", f"model.hidden_size={options.hidden}",
            f"model.intermediate_size={options.hidden * 11 // 4}", f"batch.global_samples={options.samples}",
            f"data.sequence_length={options.length}", f"schedule.steps={options.rounds + 1}", "precision.dtype=bf16",
            f"optimizer.kernel={KERNELS[name]}", "track.peak_tflops=1.0", *options.override,
        ],
    )  # fmt: skip
    plan = make_plan(run, Cluster(info.ranks, info.ranks_per_host, info.device))
    prepared = prepare(run)
    made = ds_train.engine.build.build_optimizer
    if name == "DeepSpeedCPUAdam":
        ds_train.engine.build.build_optimizer = deepspeeds
    try:
        parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    finally:
        ds_train.engine.build.build_optimizer = made
    taken = Variant(train_steps(run, plan, info, parts, make_timeline(run, parts.data.samples_per_epoch)))
    timed(parts.engine.optimizer, taken.phase)
    timed(parts.engine.basic_optimizer, taken.update)
    return taken


def deepspeeds(model: Any, section: Any, choice: Any, whole: Any) -> torch.optim.Optimizer:
    groups = parameter_groups(model, section, whole)
    return DeepSpeedCPUAdam(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def timed(owner: Any, seconds: list[float]) -> None:
    """Let `owner.step` note how long it takes."""
    original: Callable[..., Any] = owner.step

    def step(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = original(*given, **named)
        seconds.append(time.perf_counter() - started)
        return result

    owner.step = step


def take(made: Variant, counted: bool) -> None:
    """One step; the seconds of several updates (one a group) are added."""
    ranks.barrier()
    phases, updates = len(made.phase), len(made.update)
    result = next(made.steps)
    made.losses.append(result.loss)
    made.step.append(result.seconds)
    made.phase[phases:] = [sum(made.phase[phases:])]
    made.update[updates:] = [sum(made.update[updates:])]
    if not counted:
        for seconds in (made.step, made.phase, made.update):
            seconds.clear()


def report(options: argparse.Namespace, info: ranks.RankInfo, variants: dict[str, Variant]) -> None:
    ours = variants["ours"]
    headings = ("", "step, ms", "phase, ms", "of it update", "share of a step", "phase x ours", "losses off by")
    table = Table(*headings, box=None)
    reference = variants["DeepSpeedCPUAdam"].losses
    for name, made in variants.items():
        step, phase, update = (statistics.median(seconds) * 1e3 for seconds in (made.step, made.phase, made.update))
        times = phase / (statistics.median(ours.phase) * 1e3)
        table.add_row(
            name, f"{step:.1f}", f"{phase:.1f}", f"{update:.1f}", f"{phase / step:.1%}", f"{times:.2f}",
            f"{max(abs(one / other - 1) for one, other in zip(made.losses, reference, strict=True)):.1e}",
        )  # fmt: skip
    console = Console(width=110)
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    console.print(f"{names}; {info.ranks} ranks of {torch.get_num_threads()} threads; {' '.join(options.override)}")
    console.print(f"hidden size {options.hidden}, {options.samples} samples of {options.length} tokens; "
                  f"medians of {options.rounds} steps in turn")  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
