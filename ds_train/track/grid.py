"""The layout of a run as a grid of ranks: pipeline stages, in them data ranks, in them sequence x tensor."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_NUMBERED = 256
_DRAWN = 4096


def rank_grid(plan: Mapping[str, Any]) -> str:
    """HTML of the grid; a sentence where there are more ranks than can be seen, nothing where the plan is unknown."""
    layout = plan.get("layout") or {}
    pipe, data, sequence, tensor = (int(layout.get(axis, 0)) for axis in ("pipe", "data", "sequence", "tensor"))
    ranks = pipe * data * sequence * tensor
    if ranks == 0:
        return ""
    degrees = {"pipeline": pipe, "data": data, "sequence": sequence, "tensor": tensor}
    words = " × ".join(f"{count} {axis}" for axis, count in degrees.items() if count > 1) or "1 rank"
    stage = plan.get("zero_stage")
    title = f"{words}{f', ZeRO-{stage}' if stage else ''}"
    if ranks > _DRAWN:
        return f"<p>{title}: {ranks:,} ranks</p>"
    on_host = int((plan.get("cluster") or {}).get("ranks_per_host") or ranks)
    hosts = -(-ranks // on_host)
    small = " tiny" if ranks > _NUMBERED else ""
    stages = []
    for p in range(pipe):
        replicas = []
        for d in range(data):
            cells = []
            for s in range(sequence):
                for t in range(tensor):
                    # Tensor fastest, then sequence, data, pipe: neighbours share a host.
                    rank = ((p * data + d) * sequence + s) * tensor + t
                    host = f", host {rank // on_host}" if hosts > 1 else ""
                    about = f"rank {rank}: stage {p}, data {d}, sequence {s}, tensor {t}{host}"
                    odd = " odd" if hosts > 1 and rank // on_host % 2 else ""
                    cells.append(f'<i class="rank{odd}" title="{about}">{"" if small else rank}</i>')
            label = f"<small>data {d}</small>" if data > 1 and not small else ""
            replicas.append(
                f'<div class="replica">{label}<div class="cells" style="--tensor:{tensor}">{"".join(cells)}</div></div>'
            )
        label = f"<small>stage {p}</small>" if pipe > 1 else ""
        stages.append(f'<div class="stage" style="--k:var(--c{p % 8})">{label}{"".join(replicas)}</div>')
    legend = [f"{ranks} rank{'s' if ranks > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"]
    legend += [f"rows of a block: {sequence} sequence ranks"] if sequence > 1 else []
    legend += [f"columns: {tensor} tensor ranks"] if tensor > 1 else []
    legend += ["darker: every second host"] if hosts > 1 else []
    return (
        f'<p class="words">{escape(title)} <small>{escape("; ".join(legend))}</small></p>'
        f'<div class="layout{small}">{"".join(stages)}</div>'
    )
