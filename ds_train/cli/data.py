"""`prepare`, `tokenizers`, `explain-step`: the text that a run trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ds_train.cli.options import AsJson, Overrides, Recipe
from ds_train.config import load
from ds_train.errors import user_error


def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Tokenize the recipe's data once, before a run; every later run reuses it."""
    run = load(recipe, overrides or [])
    from ds_train.data.build import open_samples, packing_efficiency
    from ds_train.data.prepare import prepare as prepare_data
    from ds_train.data.prepare import read_manifest

    folder = prepare_data(run, progress=True)
    manifest = read_manifest(folder)
    print(f"{folder}: vocabulary {manifest['vocabulary']:,}")
    for split, counts in manifest["splits"].items():
        per_token = counts["text_bytes"] / max(1, counts["tokens"])
        print(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['text_bytes']:,} bytes of text, {per_token:.2f} bytes a token"
        )
        samples = open_samples(run, folder, split)
        efficiency = packing_efficiency(samples) if samples is not None else None
        if samples is not None and efficiency is not None:
            print(
                f"  {split}: {len(samples):,} windows of {run.data.sequence_length} tokens by {run.data.packing_by}, "
                f"{efficiency:.2%} of them text"
            )


def tokenizers(
    recipe: Recipe,
    overrides: Overrides = None,
    sizes: Annotated[
        str, typer.Option(help="Vocabulary sizes, separated by commas.")
    ] = "512,1024,2048,4096,8192,16384",
    max_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of the recipe's text to look at.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Train BPE tokenizers of several sizes on the recipe's data: tokens and training FLOPs per byte of each."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    run = load(recipe, overrides or [])
    from ds_train.data.vocabularies import compare_vocabularies

    try:
        wanted = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise user_error("--sizes", "not whole numbers separated by commas", "such as 1024,4096", sizes) from None
    rows = compare_vocabularies(run, wanted, int(max_mb * 1e6))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    cheapest = min((row.flops_per_byte for row in rows if row.flops_per_byte is not None), default=None)
    table = Table(box=None, pad_edge=False)
    for column in ("vocabulary", "bytes/token", "tokens/byte", "parameters", "FLOPs/byte", "of the cheapest"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = (f"{row.size:,}", f"{1 / row.tokens_per_byte:.3f}", f"{row.tokens_per_byte:.4f}")
        cost = ("unknown", "unknown", "")
        if row.parameters is not None and row.flops_per_byte is not None and cheapest is not None:
            cost = (f"{row.parameters:,}", f"{row.flops_per_byte:.4g}", f"{row.flops_per_byte / cheapest:.3f}")
        table.add_row(*counts, *cost)
    Console().print(table)
    if cheapest is not None:
        best = next(row.size for row in rows if row.flops_per_byte == cheapest)
        print(f"a byte is cheapest with data.train_vocabulary={best}")


def explain_step(
    run: Annotated[Path, typer.Argument(help="Folder of a run: run_root/name.")],
    step: Annotated[int, typer.Argument(help="Step, counted from 1 as in metrics.jsonl.")],
    rollbacks: Annotated[
        int | None, typer.Option(min=0, help="As the run was after so many roll-backs; if left out, after all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which documents a step trained on, or will: source, tokens of it, SHA-256. From the run's recipe and its data."""
    from ds_train.data import ledger

    explained = ledger.explain_step(run, step, rollbacks)
    if as_json:
        print(json.dumps(explained, indent=2))
        return
    size = f"{explained['samples']} samples of {explained['sequence_length']} tokens"
    print(f"step {step}: {size}, tokens {explained['tokens_before']:,} to {explained['tokens_after'] - 1:,} of the run")
    for portion in explained["documents"]:
        place = f"document {portion['document']}, tokens {portion['start']} to {portion['stop'] - 1}"
        print(f"  sample {portion['sample']}: {portion['source']}, {place}, sha256 {portion['sha256'][:16]}")
