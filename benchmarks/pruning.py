"""BERT pruned while it is fine-tuned on SST-2: dev accuracy, encoder parameters, and measured inference time.

Weights and data are those of sst2.py. Each model is trained as ds_configs/bert_finetune.yaml says, with and
without pruning; inference is plain transformers on the exported folders (fp32, batches of 32 x 64 tokens, this CPU),
the models taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sst2 import fine_tune, last_scores, unpack_weights

BATCH, LENGTH, ROUNDS = 32, 64, 15
WHEN = ["compress.prune.start=0.25", "compress.prune.end=0.5", "compress.prune.score_steps=64"]
CASES: dict[str, list[str]] = {
    "unpruned": [],
    "three quarters of the channels": ["compress.prune.ffn=0.75", *WHEN],
    "two of six layers, and those channels": ["compress.prune.ffn=0.75", "compress.prune.layers=2", *WHEN],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="recipe keys to replace")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = unpack_weights(folder)
        accuracies: dict[str, list[float]] = {case: [] for case in CASES}
        for seed in range(1, options.seeds + 1):
            for number, (case, keys) in enumerate(CASES.items()):
                accuracies[case].append(_train(weights, folder / f"{number}-seed{seed}", seed, options, keys))
        models = {case: _load(folder / f"{number}-seed1" / "export") for number, case in enumerate(CASES)}
        times = _inference(models)
        whole = _encoder(models["unpruned"])
        for case, found in accuracies.items():
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(
                f"{case:40} {statistics.mean(found):5.1f} % +- {spread:.1f}  encoder {_encoder(models[case]):,} "
                f"({1 - _encoder(models[case]) / whole:.0%} less)  {1e3 * times[case]:.1f} ms a batch "
                f"({times['unpruned'] / times[case]:.2f} x)",
                flush=True,
            )


def _train(weights: Path, run: Path, seed: int, options: Any, keys: list[str]) -> float:
    """Accuracy on the dev set in percent."""
    started = time.monotonic()
    last = last_scores(fine_tune(weights, run, seed, options.ranks, "optimizer.lr=1.0e-4", *keys, *options.overrides))
    accuracy = 100 * float(last["accuracy"])
    print(f"{run.name}: {accuracy:.1f} % of {last['labels']} ({time.monotonic() - started:.0f} s)", flush=True)
    return accuracy


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def _encoder(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.bert.encoder.parameters())


def _inference(models: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a batch, the models taking turns after a warm-up."""
    import torch

    tokens = torch.randint(1000, 20000, (BATCH, LENGTH))
    seconds: dict[str, list[float]] = {case: [] for case in models}
    with torch.inference_mode():
        for round_ in range(ROUNDS + 2):
            for case, model in models.items():
                started = time.perf_counter()
                model(input_ids=tokens)
                if round_ >= 2:
                    seconds[case].append(time.perf_counter() - started)
    return {case: statistics.median(found) for case, found in seconds.items()}


if __name__ == "__main__":
    main()
