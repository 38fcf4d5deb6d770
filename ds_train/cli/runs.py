"""`report`, `top`: what a run has written into its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_train.errors import user_error


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or metrics.jsonl files.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; if left out, RUN/report.html, or report.html for several runs.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write each curve as a PNG into this folder.")] = None,
    axis: Annotated[str, typer.Option(help="step, tokens or hours; if left out, what compares these runs.")] = "",
) -> None:
    """One HTML page about one run, or several on top of one another: curves, where time goes, events, layout."""
    from ds_train.track.report import AXES, write_pngs, write_report
    from ds_train.track.runs import read_run, told_apart

    chosen = next((known for known in AXES if known == axis), None)
    if axis and chosen is None:
        raise user_error("--axis", "no such axis", f"one of {', '.join(AXES)}", axis)
    runs = told_apart([read_run(folder) for folder in folders], folders)
    single = folders[0] if folders[0].is_dir() else folders[0].parent
    page = out or (single if len(runs) == 1 else Path()) / "report.html"
    write_report(runs, page, chosen)
    print(page.resolve())
    for path in write_pngs(runs, png, chosen) if png is not None else []:
        print(path.resolve())


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
