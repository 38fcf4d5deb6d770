"""`schema`, `plan`, `calibrate`: what can be asked about a recipe without training it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ds_train.cli.options import AsJson, Overrides, Recipe, refuse_beside
from ds_train.config import RunConfig, load
from ds_train.errors import user_error


def schema(
    key: Annotated[str, typer.Argument(help="A key or section, such as parallel.zero_stage; if left out, all.")] = "",
    as_json: AsJson = False,
) -> None:
    """Describe recipe keys: type, default, meaning; or print a JSON Schema for editors."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from ds_train.config.load import known_keys, nearest
    from ds_train.config.reference import json_schema, reference

    if as_json and key:
        raise user_error("--json", "the JSON Schema is of the whole recipe", f"leave out {key}, or --json")
    if as_json:
        print(json.dumps(json_schema(), indent=2))
        return
    rows = reference(key)
    if not rows:
        guess = nearest(key, known_keys())
        fix = f"did you mean {guess}?" if guess else "`ds-train schema` lists all"
        if key.startswith("model.") and not guess:
            fix = "if it is one of the model's transformers config, `ds-train plan` checks it"
        raise user_error("schema", "a recipe has no such key", fix, key)
    console = Console(highlight=False)
    for row in rows:
        default = f" (default: {row.default})" if row.default else ""
        console.print(f"[bold]{row.key}[/]  {escape(row.type + default)}")
        console.print(Padding(escape(row.text), (0, 0, 0, 4), expand=False))


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster to plan for: 16x8:H100 (hosts x devices:kind), or a hostfile.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the launch, on machines like this one; if left out, 1.")
    ] = None,
    ranks_per_host: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each host; if left out, all on one.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Kind of device: cpu, cuda, xpu, hpu, npu; if left out, this machine's.")
    ] = "",
    auto: Annotated[bool, typer.Option("--auto", help="Choose every field that may be auto.")] = False,
    why: Annotated[
        str | None, typer.Option(help="Explain one way to run it: zero3, pipe2+tensor4, zero2+offload+micro4 ...")
    ] = None,
    as_json: AsJson = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw every schedule of the recipe, here and as a PNG.")] = False,
    plot_file: Annotated[Path | None, typer.Option(help="Draw them into this PNG, not into NAME-curves.png.")] = None,
) -> None:
    """What a launch would do, need and reach: layout, memory, step time, or every reason why not. Starts nothing."""
    from ds_train.engine.session import placed
    from ds_train.plan import show
    from ds_train.plan.after_cut import after_cut
    from ds_train.plan.clusters import cluster_of
    from ds_train.plan.search import with_auto
    from ds_train.plan.topology import Cluster, device_here, known_device
    from ds_train.plan.why import explain

    run = load(recipe, overrides or [])
    if cluster is not None:
        refuse_beside(
            f"--cluster={cluster}",
            {"--ranks": ranks, "--ranks-per-host": ranks_per_host, "--device": device},
            "says that already",
        )
        imagined = cluster_of(cluster)
    else:
        known = known_device(device, "--device") if device else device_here()
        ranks = ranks or 1
        on_host = ranks_per_host or ranks
        if ranks % on_host:
            fix = f"give a divisor of {ranks}; hosts are alike"
            raise user_error("--ranks-per-host", f"doesn't divide the {ranks} ranks", fix, on_host)
        imagined = Cluster(ranks, on_host, known, here=known == device_here())
    for other, given in (("--why", why), ("--json", as_json)):
        if given:
            refuse_beside(other, {"--plot": plot, "--plot-file": plot_file}, "draws nothing")
    if auto:
        run = with_auto(run)
    if why is not None:
        explained = explain(run, imagined, why)
        if as_json:
            print(json.dumps(explained.to_dict(), indent=2))
        else:
            show.show_explanation(explained)
        return
    before, later = placed(run, imagined)
    made, after = before.plan, after_cut(later.plan)
    if as_json:
        print(json.dumps(made.to_dict() | {"after_cut": after.to_dict() if after else None}, indent=2, default=str))
    else:
        show.show_plan(made, after=after)
        if plot or plot_file is not None:
            _plot_curves(run, plot_file or Path(f"{run.name}-curves.png"))


def _plot_curves(run: RunConfig, path: Path) -> None:
    from ds_train.schedule.curves import recipe_curves
    from ds_train.track.plot import save_curves, sketch

    found = recipe_curves(run)
    for curve in found.curves:
        print("\n".join(sketch(curve.name, curve.values)))
    save_curves(path, found.axis, found.tokens, [(curve.name, curve.values) for curve in found.curves])
    print(f"over {found.axis}, up to {found.tokens[-1]:,.10g}; drawn in {path.resolve()}")


def calibrate(
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks to measure, such as 1,2,4; if left out, every power of two that fits.")
    ] = "",
    device: Annotated[str, typer.Option(help="Kind of device; if left out, this machine's.")] = "",
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
