"""What benchmarks print: the machine, and tables that docs/performance.md carries as they are."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def machine() -> str:
    """Processor, its bf16 units, cores, how busy they were (15 minutes), and versions of what decides on speed."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        cpu = next((line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), cpu)
        units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{unit}\b", text)]
        flags = f" ({', '.join(units)})"
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
    return f"{cpu}{flags}, {cores} cores, load {load:.1f}; {names}; Python {platform.python_version()}"


def show(notes: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print it."""
    console = Console(width=160)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    for note in notes:
        console.print(note, highlight=False)
    console.print(table)


def put_into_docs(name: str, notes: Sequence[str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Replace what docs/performance.md has between the marks of `name`."""
    lines = [f"| {' | '.join(row)} |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *rows)]
    block = "\n".join([*(f"{note[0].upper()}{note[1:]}.\n" for note in notes), *lines])
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    text = DOCS.read_text(encoding="utf-8")
    at = text.index(begin) + len(begin)
    DOCS.write_text(f"{text[:at]}{block}\n{text[text.index(end, at) :]}", encoding="utf-8")
