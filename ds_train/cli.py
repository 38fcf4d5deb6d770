"""`ds-train`: look at the schema, plan a run, prepare its data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ds_train import __version__
from ds_train.config import RunConfig, load
from ds_train.errors import EXIT_CODE, UserError, user_error

# Heavy libraries are imported inside commands: `schema` and `plan` answer without torch.
app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)

Recipe = Annotated[str, typer.Argument(help="Path of a YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Recipe keys to replace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Entry point. What the user got wrong is printed a line per problem, with exit code 2."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_CODE)


@app.command()
def schema(
    key: Annotated[str, typer.Argument(help="A key or section, such as parallel.zero_stage; all without it.")] = "",
    as_json: AsJson = False,
) -> None:
    """The reference of every recipe key, or a JSON Schema that editors use."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from ds_train.config.load import known_keys, nearest
    from ds_train.config.reference import json_schema, reference

    if as_json:
        print(json.dumps(json_schema(), indent=2))
        return
    rows = reference(key)
    if not rows:
        guess = nearest(key, known_keys())
        raise user_error("schema", "a recipe has no such key", f"did you mean {guess}?" if guess else "", key)
    console = Console(highlight=False)
    for row in rows:
        default = f" (default: {row.default})" if row.default else ""
        console.print(f"[bold]{row.key}[/]  {escape(row.type + default)}")
        console.print(Padding(escape(row.text), (0, 0, 0, 4), expand=False))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster to plan for: 16x8:H100 (hosts x devices:kind), or a hostfile.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the imagined launch on machines like this one.")] = 1,
    ranks_per_host: Annotated[
        int | None, typer.Option(min=1, help="Ranks of one host; all of them without it.")
    ] = None,
    device: Annotated[str, typer.Option(help="Kind of device: cpu, cuda, xpu, hpu, npu.")] = "cpu",
    auto: Annotated[bool, typer.Option("--auto", help="Choose every field that may be auto.")] = False,
    why: Annotated[
        str | None, typer.Option(help="Explain one way to run it: zero3, pipe2+tensor4, zero2+offload+micro4 ...")
    ] = None,
    as_json: AsJson = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw every schedule of the recipe, here and as a PNG.")] = False,
    plot_file: Annotated[Path | None, typer.Option(help="The PNG; NAME-curves.png here without it.")] = None,
) -> None:
    """What a launch would do, need and reach: layout, memory, step time, or every reason why not. Starts nothing."""
    from ds_train.plan import show
    from ds_train.plan.clusters import cluster_of
    from ds_train.plan.make import make_plan
    from ds_train.plan.search import with_auto
    from ds_train.plan.topology import Cluster, known_device
    from ds_train.plan.why import explain

    run = load(recipe, overrides or [])
    if cluster is not None:
        imagined = cluster_of(cluster)
    else:
        known = known_device(device, "--device")
        on_host = ranks_per_host or ranks
        if ranks % on_host:
            fix = f"give a divisor of {ranks}; hosts are alike"
            raise user_error("--ranks-per-host", f"doesn't divide the {ranks} ranks", fix, on_host)
        imagined = Cluster(ranks, on_host, known, here=False)
    if auto:
        run = with_auto(run)
    if why is not None:
        explained = explain(run, imagined, why)
        if as_json:
            print(json.dumps(explained.to_dict(), indent=2))
        else:
            show.show_explanation(explained)
        return
    made = make_plan(run, imagined)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2, default=str))
    else:
        show.show_plan(made)
        if plot:
            _plot_curves(run, plot_file or Path(f"{run.name}-curves.png"))


@app.command()
def calibrate(
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks to measure, such as 1,2,4; every power of two that fits without it.")
    ] = "",
    device: Annotated[str, typer.Option(help="Kind of device; this machine's own without it.")] = "",
) -> None:
    """Measure this machine (products, memory, collectives) for the plans that are made on it. Takes a minute."""
    from ds_train.engine.calibrate import calibrate as measure
    from ds_train.engine.calibrate import default_counts
    from ds_train.plan.hardware import store_calibration
    from ds_train.plan.topology import device_here, known_device

    kind = known_device(device, "--device") if device else device_here()
    try:
        counts = sorted({int(count) for count in ranks.split(",")}) if ranks else default_counts(kind)
    except ValueError:
        raise user_error("--ranks", "not a list of numbers", "write 1,2,4", ranks) from None
    if counts[0] < 1:
        raise user_error("--ranks", "there is at least one rank", "write 1,2,4", ranks)
    measured = measure(kind, counts, lambda text: print(text, file=sys.stderr))
    for count, total in measured.totals.items():
        share = 1 / int(count)
        print(
            f"{count} rank{'s' if count != '1' else ''}, each: "
            f"fp32 {total['flops_fp32'] * share / 1e9:,.0f} GFLOP/s, bf16 {total['flops_bf16'] * share / 1e9:,.0f}, "
            f"memory {total['memory_bytes_per_second'] * share / 1e9:.1f} GB/s"
            + (f", link {total['link_bytes_per_second'] * share / 1e9:.2f} GB/s" if count != "1" else "")
        )
    print(store_calibration(measured))


def _plot_curves(run: RunConfig, path: Path) -> None:
    from ds_train.schedule.curves import recipe_curves
    from ds_train.track.plot import save_curves, sketch

    found = recipe_curves(run)
    for curve in found.curves:
        print("\n".join(sketch(curve.name, curve.values)))
    print(f"over {found.axis}, up to {found.tokens[-1]:,.10g}; drawn in {path.resolve()}")
    save_curves(path, found.axis, found.tokens, [(curve.name, curve.values) for curve in found.curves])


@app.command()
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


@app.command()
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


@app.command(name="lr-find")
def lr_find(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this host.")] = 1,
    lowest: Annotated[float, typer.Option(min=0.0, help="Lowest learning rate of the sweep.")] = 1e-6,
    highest: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the sweep.")] = 100,
    probe_steps: Annotated[int, typer.Option(min=10, help="Steps of each run at a constant rate.")] = 50,
    safety: Annotated[float, typer.Option(min=1.0, help="The largest stable rate is divided by this.")] = 1.25,
    proxy_width: Annotated[int | None, typer.Option(min=1, help="Search on a model of this hidden size.")] = None,
) -> None:
    """Find a learning rate for the recipe by a range test; RUN/lr-find.json and .png say how.

    On several hosts: `deepspeed --hostfile ... --no_local_rank --module ds_train.cli lr-find RECIPE`.
    """
    if not 0 < lowest < highest:
        raise user_error("--lowest", f"isn't above 0 and below --highest={highest:g}", "give a range", lowest)
    run = load(recipe, overrides or [])
    _start_ranks(ranks)
    from ds_train.engine.lr_find import RangeTest, find
    from ds_train.engine.ranks import RankInfo, run_to_exit_code

    test = RangeTest(lowest, highest, steps, probe_steps, safety, proxy_width)

    def body(info: RankInfo) -> None:
        record = find(run, info, test)
        if info.is_main:
            print(f"optimizer.lr={record['value']:.3g}: {record['reasoning']}")
            if record["proxy"] is not None:
                factors = json.dumps(record["proxy"]["lr_factors"])
                print(f"from width {proxy_width}: {record['proxy']['rule']}")
                print(f"optimizer.lr_factors={factors}")
            print(f"{record['seconds']:.0f} s; {Path(run.run_root).expanduser() / run.name}/lr-find.json and .png")

    sys.exit(run_to_exit_code(body))


def _start_ranks(ranks: int) -> None:
    """Start this command again on `ranks` ranks of this host, and end with them; nothing where it is one already."""
    import os
    import subprocess

    if ranks == 1 or "RANK" in os.environ:
        return
    from ds_train.engine.port import free_port

    launcher = Path(sys.executable).with_name("deepspeed")
    started = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    quiet = ["--log_level", "error", "--no_local_rank", "--module", "ds_train.cli"]
    sys.exit(subprocess.run([*started, *quiet, *sys.argv[1:]]).returncode)


@app.command()
def prune(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this host.")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step-* to prune; the recipe's first weights without it.")
    ] = None,
) -> None:
    """Prune at once, without training: score the recipe's units on `score_steps` steps of its data, cut, and export.

    RUN/pruned is a transformers folder of the smaller model.
    """
    run = load(recipe, overrides or [])
    _start_ranks(ranks)
    from ds_train.engine.prune_once import prune_once
    from ds_train.engine.ranks import RankInfo, run_to_exit_code

    def body(info: RankInfo) -> None:
        done = prune_once(run, info, checkpoint)
        if info.is_main:
            print(done.summary)
            print(done.folder.resolve())

    sys.exit(run_to_exit_code(body))


Checkpoint = Annotated[Path, typer.Argument(help="RUN/checkpoints/step-*, of any layout.")]


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Folder that transformers will load; replaced if it is there.")],
    dtype: Annotated[str, typer.Option(help="Number format of the weights: fp32, bf16, fp16.")] = "bf16",
) -> None:
    """Write a checkpoint as a transformers folder, from its fp32 weights, without starting its run."""
    formats = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if dtype not in formats:
        raise user_error("--dtype", "no such number format", "one of fp32, bf16, fp16", dtype)
    import torch

    from ds_train.checkpoint import offline

    offline.export(checkpoint, folder, getattr(torch, formats[dtype]))
    print(folder.resolve())


@app.command()
def reshard(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
    file_gb: Annotated[float, typer.Option(min=0.001, help="Size of its files.")] = 5.0,
) -> None:
    """Write a checkpoint again in few files of whole parameters, verified. A run resumes from either on any layout."""
    from ds_train.checkpoint import offline

    offline.rewrite(checkpoint, folder, int(file_gb * 1e9))
    print(f"{folder.resolve()}: continue it with checkpoint.resume={folder}")


@app.command()
def version() -> None:
    """The version of ds_train."""
    print(__version__)


if __name__ == "__main__":
    main()
