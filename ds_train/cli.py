"""`ds-train`: look at the schema, plan a run, prepare its data, watch it, report on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ds_train import __version__
from ds_train.config import RunConfig, load
from ds_train.errors import EXIT_CODE, STOPPED_CODE, UserError, user_error

if TYPE_CHECKING:
    from ds_train.engine.launch import Ended

# Heavy libraries are imported inside commands: `schema` and `plan` answer without torch.
app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)

Recipe = Annotated[str, typer.Argument(help="Path of a YAML recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Recipe keys to replace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="Hosts, `name slots=N` a line; this machine without it.")
]
Include = Annotated[str, typer.Option("--include", "-i", help="Hosts and slots to use: worker-0@worker-1:0,2.")]
Exclude = Annotated[str, typer.Option("--exclude", "-e", help="Hosts and slots not to use.")]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Ranks in all; every slot without it, every device of this machine, or 1.")
]
MasterAddr = Annotated[
    str | None, typer.Option(help="Address of the first host that ranks meet at; the one ssh reaches it by.")
]
MasterPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port that ranks meet at; a free one where it is taken.")
]


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
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the launch on machines like this one.")] = 1,
    ranks_per_host: Annotated[
        int | None, typer.Option(min=1, help="Ranks of one host; all of them without it.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Kind of device: cpu, cuda, xpu, hpu, npu; this machine's own without it.")
    ] = "",
    auto: Annotated[bool, typer.Option("--auto", help="Choose every field that may be auto.")] = False,
    why: Annotated[
        str | None, typer.Option(help="Explain one way to run it: zero3, pipe2+tensor4, zero2+offload+micro4 ...")
    ] = None,
    as_json: AsJson = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw every schedule of the recipe, here and as a PNG.")] = False,
    plot_file: Annotated[Path | None, typer.Option(help="The PNG; NAME-curves.png here without it.")] = None,
) -> None:
    """What a launch would do, need and reach: layout, memory, step time, or every reason why not. Starts nothing."""
    from ds_train.engine.session import Placed, after_cut
    from ds_train.plan import show
    from ds_train.plan.clusters import cluster_of
    from ds_train.plan.make import make_plan
    from ds_train.plan.search import with_auto
    from ds_train.plan.topology import Cluster, device_here, known_device
    from ds_train.plan.why import explain

    run = load(recipe, overrides or [])
    if cluster is not None:
        imagined = cluster_of(cluster)
    else:
        known = known_device(device, "--device") if device else device_here()
        on_host = ranks_per_host or ranks
        if ranks % on_host:
            fix = f"give a divisor of {ranks}; hosts are alike"
            raise user_error("--ranks-per-host", f"doesn't divide the {ranks} ranks", fix, on_host)
        imagined = Cluster(ranks, on_host, known, here=known == device_here())
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
    after_cut(Placed(run, made), imagined)
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
    hostfile: Hostfile = None,
    ranks: Ranks = None,
    lowest: Annotated[float, typer.Option(min=0.0, help="Lowest learning rate of the sweep.")] = 1e-6,
    highest: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the sweep.")] = 100,
    probe_steps: Annotated[int, typer.Option(min=10, help="Steps of each run at a constant rate.")] = 50,
    safety: Annotated[float, typer.Option(min=1.0, help="The largest stable rate is divided by this.")] = 1.25,
    proxy_width: Annotated[int | None, typer.Option(min=1, help="Search on a model of this hidden size.")] = None,
) -> None:
    """Find a learning rate for the recipe by a range test; RUN/lr-find.json and .png say how."""
    if not 0 < lowest < highest:
        raise user_error("--lowest", f"isn't above 0 and below --highest={highest:g}", "give a range", lowest)
    run = load(recipe, overrides or [])
    _start_again_on(hostfile, ranks, run, recipe)
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


@app.command()
def prune(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    ranks: Ranks = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step-* to prune; the recipe's first weights without it.")
    ] = None,
) -> None:
    """Prune at once, without training: score the recipe's units on `score_steps` steps of its data, cut, and export.

    RUN/pruned is a transformers folder of the smaller model.
    """
    run = load(recipe, overrides or [])
    _start_again_on(hostfile, ranks, run, recipe)
    from ds_train.engine.prune_once import prune_once
    from ds_train.engine.ranks import RankInfo, run_to_exit_code

    def body(info: RankInfo) -> None:
        done = prune_once(run, info, checkpoint)
        if info.is_main:
            print(done.summary)
            print(done.folder.resolve())

    sys.exit(run_to_exit_code(body))


@app.command()
def launch(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
) -> None:
    """Train a recipe on this machine or on the hosts of a hostfile. Exits with the first failing rank's code.

    Hosts and plan are looked at first; nothing is started where a launch would fail.
    """
    run = load(recipe, overrides or [])
    from ds_train.engine import survey
    from ds_train.engine.launch import run as run_ranks
    from ds_train.engine.session import Placed, after_cut
    from ds_train.engine.supervise import MARGIN_S
    from ds_train.plan.make import make_plan

    hosts = survey.hosts_of(hostfile, include, exclude, ranks)
    found = survey.survey(hosts, master_port, run, recipe)
    survey.refuse(found.findings())
    world = found.world(master_addr)
    after_cut(Placed(run, make_plan(run, found.cluster())), found.cluster())
    print(survey.describe(world), flush=True)
    ended = run_ranks(world, ["ds_train.engine", recipe, *(overrides or [])], run.faults.grace_seconds + MARGIN_S)
    _exit_as(ended)


@app.command()
def supervise(
    recipe: Recipe,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Failures in a row without a new checkpoint, after which it is given up.")
    ] = 5,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds before a restart, doubled with each in a row.")] = 10.0,
    longest_pause: Annotated[float, typer.Option(min=0.0, help="They grow no further than this.")] = 600.0,
) -> None:
    """Train as `launch` does, and start again from the last checkpoint when it fails; without hosts that are gone.

    What the user has to mend (exit code 2) isn't started again. Each restart is a line of kind `restart` in
    RUN/metrics.jsonl.
    """
    run = load(recipe, overrides or [])
    from ds_train.engine import supervise as supervision
    from ds_train.engine.survey import hosts_of

    supervisor = supervision.Supervisor(
        run,
        supervision.Policy(limit, pause, longest_pause),
        lambda hosts: supervision.find_hosts(run, recipe, hosts, master_addr, master_port),
        supervision.start_run(recipe, overrides or []),
    )
    ended = supervisor.supervise(hosts_of(hostfile, include, exclude, ranks))
    _exit_as(ended)


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="Path of a YAML recipe, to see that it runs there.")] = "",
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    ranks: Ranks = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    as_json: AsJson = False,
) -> None:
    """Would a launch on these hosts work? A line a finding, with the fix; exit code 1 when it would fail."""
    from dataclasses import asdict

    run = load(recipe, overrides or []) if recipe else None
    from ds_train.engine.doctor import examine
    from ds_train.engine.survey import hosts_of

    hosts = hosts_of(hostfile, include, exclude, ranks)
    found = []
    for finding in examine(hosts, run, recipe, master_addr, master_port):
        found.append(finding)
        if not as_json:
            print(finding, flush=True)
    failed = any(finding.level == "fail" for finding in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    sys.exit(1 if failed else 0)


@app.command()
def profile(
    recipe: Recipe,
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option(help="Steps to record, both included: i..j.")] = "6..8",
    record: Annotated[str, typer.Option(help="Ranks to record, separated by commas.")] = "0",
    hostfile: Hostfile = None,
    ranks: Ranks = None,
) -> None:
    """Train up to step j under torch's profiler: traces, operators, memory, and what to change. Saves no checkpoint.

    The run's schedules are the recipe's; RUN-profile/profile has what was found.
    """
    try:
        first, last = (int(step) for step in steps.split(".."))
    except ValueError:
        raise user_error("--steps", "not a range of steps", "write 6..8", steps) from None
    changes = [
        f"track.profile_steps=[{first},{last}]", f"track.profile_ranks=[{record}]", "track.wandb=off", "track.also=[]",
        "track.wandb_artifacts=off", "checkpoint.every_steps=null", "checkpoint.save_final=false",
        "checkpoint.export=false", "checkpoint.push_to=null", "track.sample_prompt=null", "track.eval_samples=1",
    ]  # fmt: skip
    name = load(recipe, overrides or []).name
    run = load(recipe, [*(overrides or []), *changes, f"name={name}-profile"])
    _start_again_on(hostfile, ranks, run, recipe)
    from ds_train.engine.job import train
    from ds_train.engine.ranks import run_to_exit_code

    sys.exit(run_to_exit_code(lambda info: train(run, info, stop_after=last)))


def _start_again_on(hostfile: Path | None, ranks: int | None, run: RunConfig, recipe: str) -> None:
    """Where hosts or ranks are asked for and this isn't one of them: this same command on them, to its end."""
    import os

    if (hostfile is None and ranks is None) or "RANK" in os.environ:
        return
    from ds_train.engine import survey
    from ds_train.engine.launch import run as run_ranks

    found = survey.survey(survey.hosts_of(hostfile, "", "", ranks), run=run, recipe=recipe)
    survey.refuse(found.findings())
    _exit_as(run_ranks(found.world(), ["ds_train.cli", *sys.argv[1:]]))


def _exit_as(ended: Ended) -> NoReturn:
    """End with the exit code of a launch; what the user did wrong has been said by the rank that met it."""
    if ended.code not in (0, EXIT_CODE):
        print(ended if ended.code == STOPPED_CODE else f"error: {ended}", file=sys.stderr)
    sys.exit(ended.code)


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


@app.command(name="explain-step")
def explain_step(
    run: Annotated[Path, typer.Argument(help="Folder of a run: run_root/name.")],
    step: Annotated[int, typer.Argument(help="Step, counted from 1 as in metrics.jsonl.")],
    rollbacks: Annotated[
        int | None, typer.Option(min=0, help="As the run was after so many roll-backs; after all of them without it.")
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


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A run's folder with its export, or a transformers folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder that transformers will load; replaced if it is there.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.")] = 8,
    group: Annotated[int, typer.Option(min=0, help="Inputs that share a scale; 0 is one scale a row.")] = 0,
    method: Annotated[str, typer.Option(help="rtn (to nearest), gptq or awq (with samples).")] = "rtn",
    recipe: Annotated[Path | None, typer.Option(help="Recipe of the samples; the run's own without it.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that are looked at.")] = 128,
) -> None:
    """Round a trained model's linear layers to few bits, packed as compressed-tensors. Takes one process."""
    if bits not in (4, 8):
        raise user_error("--bits", "no such number of bits", "4 or 8", bits)
    if method not in ("rtn", "gptq", "awq"):
        raise user_error("--method", "no such method", "rtn, gptq or awq", method)
    from ds_train.checkpoint import offline

    done = offline.quantize(source, folder, bits, group, method, recipe, samples)  # type: ignore[arg-type]
    scaled = f"; the inputs of {done.scaled} linear layers are scaled" if method == "awq" else ""
    print(f"{folder.resolve()}: {done.after / 1e6:,.2f} MB of weights, {done.before / 1e6:,.2f} MB before{scaled}")


@app.command()
def sparsify(
    source: Annotated[Path, typer.Argument(help="A run's folder with its export, or a transformers folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder that transformers will load; replaced if it is there.")],
    pattern: Annotated[str, typer.Option(help="Zeros of a row: 2:4 (two in four neighbours), or a share.")] = "2:4",
    method: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt (both with samples).")] = "wanda",
    recipe: Annotated[Path | None, typer.Option(help="Recipe of the samples; the run's own without it.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that are looked at.")] = 128,
) -> None:
    """Set weights of a trained model's linear layers to zero; compress.keep_zeros trains it so. Takes one process."""
    if method not in ("magnitude", "wanda", "sparsegpt"):
        raise user_error("--method", "no such method", "magnitude, wanda or sparsegpt", method)
    from ds_train.checkpoint import offline
    from ds_train.compress.sparsity import Pattern

    zeros, colon, group = pattern.partition(":")
    try:
        chosen = Pattern(int(zeros) / int(group), int(group)) if colon else Pattern(float(zeros))
    except (ValueError, ZeroDivisionError):
        chosen = Pattern(1.0)
    if not 0 < chosen.share < 1:
        raise user_error("--pattern", "not a share of a row", "such as 2:4 or 0.5", pattern)
    share = offline.sparsify(source, folder, chosen, method, recipe, samples)  # type: ignore[arg-type]
    print(f"{folder.resolve()}: {share:.1%} of the blocks' linear weights are zero")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or metrics.jsonl files.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html, or report.html for several.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write each curve as a PNG into this folder.")] = None,
    axis: Annotated[str, typer.Option(help="step, tokens or hours; what compares these runs without it.")] = "",
) -> None:
    """One HTML page about one run, or several on top of one another: curves, where time goes, events, layout."""
    from ds_train.track.report import AXES, write_pngs, write_report
    from ds_train.track.runs import read_run

    chosen = next((known for known in AXES if known == axis), None)
    if axis and chosen is None:
        raise user_error("--axis", "no such axis", f"one of {', '.join(AXES)}", axis)
    runs = [read_run(folder) for folder in folders]
    single = folders[0] if folders[0].is_dir() else folders[0].parent
    page = out or (single if len(runs) == 1 else Path()) / "report.html"
    write_report(runs, page, chosen)
    print(page.resolve())
    for path in write_pngs(runs, png, chosen) if png is not None else []:
        print(path.resolve())


@app.command()
def top(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or its metrics.jsonl.")],
    once: Annotated[bool, typer.Option("--once", help="Print what there is and end; needs no terminal.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the file.")] = 1.0,
) -> None:
    """Watch a run from its metrics.jsonl: progress, loss, speed, where time goes, what happened. Ctrl-C ends it."""
    from ds_train.track.top import show_once, watch

    if once:
        show_once(folder)
    else:
        watch(folder, every)


@app.command()
def version() -> None:
    """The version of ds_train."""
    print(__version__)


if __name__ == "__main__":
    main()
