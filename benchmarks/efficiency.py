"""Fewer tokens, better steps: each technique against the plain run, at equal tokens and at equal time, over seeds.

    .venv/bin/python benchmarks/efficiency.py                  # the standard library; an hour on one core
    .venv/bin/python benchmarks/efficiency.py --text FILE      # any text
    .venv/bin/python benchmarks/efficiency.py --techniques curriculum "patches of 2"

Every technique trains twice: on the plain run's tokens, and on as many tokens as it does in a share of the plain run's
time (`--share`, by the rate of its first run). Time is the processor time of the training steps on one thread, which
other work on the machine hardly changes; evaluation isn't counted. All runs of a seed are made in turn in one process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "curriculum": {"curriculum": {"kind": "linear", "start_length": 64, "fraction": 0.6}},
    "curriculum, discrete": {"curriculum": {"kind": "discrete", "lengths": [64, 256], "until": [0.5, 0.8]}},
    "token dropping": {"token_drop": {"kind": "random-ltd", "start_keep": 0.5, "fraction": 0.7, "multiple": 32}},
    "patches of 4": {"patch": {"size": 4, "fraction": 0.66}},
    "patches of 2": {"patch": {"size": 2, "fraction": 0.5}},
}
WINDOW, GLOBAL = 512, 8


def recipe(folder: Path, text: Path | None, seed: int, tokens: int, sections: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = {"source": "stdlib", "max_documents": 400}
    if text is not None:
        source = {"source": "text", "path": str(text.resolve())}
    return {
        "name": "efficiency",
        "seed": seed,
        "run_root": str(folder),
        "model": {
            "arch": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
        },
        "data": source | {"train_vocabulary": 1024, "sequence_length": WINDOW, "validation_fraction": 0.05},
        "batch": {"global_samples": GLOBAL, "micro_samples": GLOBAL},
        "parallel": {"zero_stage": 1},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"tokens": tokens, "warmup_fraction": 0.05},
        "track": {"eval_samples": 64, "peak_tflops": 1.0},
    } | sections  # fmt: skip


def train(raw: dict[str, Any], info: Any) -> tuple[float, float, int]:
    """(held-out loss in nats per token, processor seconds of the steps, tokens trained on)."""
    from ds_train.config.load import validate
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine.build import assemble
    from ds_train.engine.loop import evaluate, train_steps
    from ds_train.plan.make import make_plan
    from ds_train.plan.topology import Cluster
    from ds_train.schedule.timeline import make_timeline

    run = validate(raw)
    plan = make_plan(run, Cluster(1, 1, info.device))
    prepared = prepare(run)
    parts = assemble(run, plan, info, prepared_tokenizer(prepared), prepared)
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    started = time.process_time()
    for result in train_steps(run, plan, info, parts, timeline):
        last = result
    seconds = time.process_time() - started
    scores = evaluate(run, parts, last.step)
    assert scores is not None
    parts.engine.destroy()
    return scores.loss, seconds, last.tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file or folder instead of the standard library")
    parser.add_argument("--steps", type=int, default=200, help="steps of the plain run, of 4,096 tokens each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--techniques", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    parser.add_argument("--share", type=float, default=0.8, help="of the plain run's time that the second runs get")
    arguments = parser.parse_args()
    import torch

    from ds_train.engine import ranks

    torch.set_num_threads(1)

    def body(info: ranks.RankInfo) -> None:
        ranks.meet(info)
        ranks.return_freed_memory()
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), arguments, info)

    return ranks.run_to_exit_code(body)


def report(folder: Path, arguments: argparse.Namespace, info: Any) -> None:
    step_tokens = WINDOW * GLOBAL
    budget = arguments.steps * step_tokens
    techniques = {name: TECHNIQUES[name] for name in arguments.techniques if name != "plain"}
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in ("plain", *techniques)}
    train(recipe(folder, arguments.text, 1, 3 * step_tokens, {}), info)  # warms up data and allocator
    for seed in arguments.seeds:
        plain_loss, plain_seconds, _ = train(recipe(folder, arguments.text, seed, budget, {}), info)
        rows["plain"].append((plain_loss, 1.0, plain_loss, 1.0))
        for name, sections in techniques.items():
            loss, seconds, tokens = train(recipe(folder, arguments.text, seed, budget, sections), info)
            more = round(arguments.share * plain_seconds / (seconds / tokens) / step_tokens) * step_tokens
            timed_loss, timed_seconds, _ = train(recipe(folder, arguments.text, seed, more, sections), info)
            rows[name].append((loss, seconds / plain_seconds, timed_loss, timed_seconds / plain_seconds))
            print(f"seed {seed}  {name}: {rows[name][-1]}  plain {plain_loss:.4f} in {plain_seconds:.1f} s", flush=True)
    source = arguments.text or "standard library"
    print(f"\n{source}, {budget:,} tokens, seeds {arguments.seeds}, Python {platform.python_version()}\n")
    print("| technique | loss at equal tokens | time of the plain run | loss in a share of its time | that share |")
    print("|---|---|---|---|---|")
    for name, found in rows.items():
        cells = [spread([row[column] for row in found], digits) for column, digits in ((0, 4), (1, 2), (2, 4), (3, 2))]
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
