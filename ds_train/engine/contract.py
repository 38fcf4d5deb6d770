"""What all ranks must have in common before the first step; the odd one out is named, with its host."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_train.checkpoint.same_run import leaves
from ds_train.engine.ranks import versions
from ds_train.errors import Problem, UserError
from ds_train.models.load import first_names
from ds_train.parallel.build import Part
from ds_train.plan.make import RunPlan

_CHUNK = 2**20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_facts(facts: Mapping[str, Any]) -> None:
    """Compare facts, each by a name, that must be the same on all ranks. Collective.

    Raises:
        UserError: on every rank, a problem for each fact that isn't; of a mapping the keys that differ.
    """
    host = socket.gethostname()
    different = _differing(_gather({name: digest(fact) for name, fact in facts.items()}))
    if not different:
        return
    # Whole facts travel only now.
    own = {name: facts[name] for name in different}
    raise UserError(odd_ones(_gather({"host": host, **leaves(json.loads(json.dumps(own, default=str)))})))


def check_common(recipe: Mapping[str, Any], plan: RunPlan) -> None:
    """Compare recipe, layout, DeepSpeed's configuration, code and libraries of all ranks. Collective.

    Raises:
        UserError: as `check_facts`.
    """
    layout = {axis: getattr(plan.layout, axis) for axis in ("pipe", "data", "tensor", "sequence")}
    check_facts(
        {"recipe": recipe, "layout": layout, "deepspeed.json": plan.deepspeed_json, "code": _code(), **versions()}
    )


def check_parameters(part: Part, stage_3: bool) -> None:
    """Compare the parameters that ranks have in common, bit by bit in effect. Collective.

    Data and sequence ranks hold the same of a layer (with ZeRO-3 each its own run of it), tensor ranks the same of what
    they don't cut, and pipeline stages the same of a weight that two of them use.

    Raises:
        UserError: on every rank, naming the parameters and ranks that differ.
    """
    sums = parameter_sums(part, stage_3)
    # Of all ranks that hold a piece, one whole set of digests is small; the sums travel only where they differ.
    grouped: dict[str, dict[str, str]] = {}
    for (owner, name), value in sums.items():
        grouped.setdefault(owner, {})[name] = value
    own = {owner: digest(values) for owner, values in grouped.items()}
    if not _differing(_gather(own)):
        return
    named = [{f"{name} ({owner})": value for (owner, name), value in one.items()} for one in _gather(sums)]
    hosts = _gather(socket.gethostname())
    raise UserError(odd_ones([{"host": host, **one} for host, one in zip(hosts, named, strict=True)], "the parameter "))


def odd_ones(everyones: Sequence[Mapping[str, Any]], what: str = "") -> list[Problem]:
    """Each fact by which ranks differ that have it, and which of them are fewer. `host` is no fact."""
    problems = []
    for key, values in sorted(_differing(everyones).items()):
        usual = json.loads(Counter(map(json.dumps, values.values())).most_common(1)[0][0])
        odd = [rank for rank, value in values.items() if value != usual]
        places = ", ".join(f"rank {rank} on {everyones[rank]['host']}" for rank in odd[:8])
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        shown = f": {values[odd[0]]} instead of {usual}" if max(len(str(values[odd[0]])), len(str(usual))) < 40 else ""
        fix = next((fix for start, fix in _FIXES.items() if key.startswith(start)), "")
        problems.append(Problem("ranks", f"{what}{key} of {places}{more} isn't that of the other ranks{shown}", fix))
    return problems[:_SHOWN]


_SHOWN = 12
_FIXES = {
    "recipe": "give every host the same recipe and the same overrides",
    "layout": "give every host the same recipe and the same software",
    "deepspeed.json": "give every host the same recipe and the same software",
    "data": "let data.cache_dir be one folder that all hosts see, or prepare it again",
    "code": "give every host the same ds_train",
    **dict.fromkeys(versions(), "install the same versions everywhere"),
}


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def parameter_sums(part: Part, stage_3: bool) -> dict[tuple[str, str], str]:
    """A checksum of what this rank holds of each parameter, by (which ranks hold the same, the parameter's name)."""
    place = part.mesh.place
    whole = first_names(part.outline)
    names = Counter(whole.values())
    keys, sums = [], []
    for name, parameter in part.model.named_parameters():
        held = getattr(parameter, "ds_tensor", None)
        if held is not None and getattr(held.status, "name", "") != "AVAILABLE":
            continue  # on disk
        # A weight with two names may be in two stages of a pipeline.
        stage = f"stage {place.pipe}" if names[whole[name]] == 1 else "all stages"
        cut = getattr(parameter, "tensor_shard", None) is not None
        owner = f"{stage}, tensor {place.tensor}" if cut else f"{stage}, all tensor ranks"
        if stage_3:
            owner += f", data {place.data}, sequence {place.sequence}"
        keys.append((owner, whole[name]))
        sums.append(checksum(parameter.detach() if held is None else _own_run(parameter, held.detach(), part)))
    values = torch.stack([one.cpu() for one in sums]).tolist() if sums else []
    return {key: f"{value & (2**64 - 1):016x}" for key, value in zip(keys, values, strict=True)}


def _own_run(parameter: Any, held: Tensor, part: Part) -> Tensor:
    """What ZeRO-3 keeps of a parameter here, without the last ranks' padding, which it leaves as it finds it."""
    place = part.mesh.place
    start = (place.data * part.mesh.layout.sequence + place.sequence) * held.numel()
    return held.view(-1)[: max(0, parameter.ds_numel - start)]


def checksum(tensor: Tensor) -> Tensor:
    """The bits of `tensor` weighted by their places, summed modulo 2^64: int64, of no dimension."""
    flat = tensor.contiguous().view(-1).view(_BITS[tensor.element_size()])
    places = torch.arange(1, min(_CHUNK, flat.numel()) + 1, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(flat.split(_CHUNK)):
        total = total * 31 + (chunk.long() * (places[: len(chunk)] + number)).sum()
    return total


def _code() -> str:
    """What the sources of this package hash to: two check-outs of one version may differ."""
    total = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _differing(everyones: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Facts that aren't one and the same on the ranks that have them, each as (rank: value)."""
    found: dict[str, dict[int, Any]] = {}
    for rank, own in enumerate(everyones):
        for key, value in own.items():
            if key != "host":
                found.setdefault(key, {})[rank] = value
    return {
        key: values
        for key, values in found.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _gather(own: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return everyones
