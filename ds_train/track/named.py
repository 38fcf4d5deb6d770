"""Records -> numbers by name, grouped as a dashboard shows them: train/loss, speed/mfu, memory/memory_mb, eval/loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_train.track.runs import number

GROUPS = ("train", "eval", "speed", "memory", "host", "save")
"""Groups that there always are; an event has one by the name of its kind."""

_UNNAMED = ("kind", "step", "tokens", "time")
_SPEED = ("tokens_per_second", "mfu", "seconds", "imbalance", "slowest_rank")


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by group and name; lists, one value a host, by place: host/0/cpu_percent."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in _UNNAMED:
            continue
        if isinstance(value, list) and key.startswith("host_"):
            found |= {f"host/{place}/{key.removeprefix('host_')}": number(item) for place, item in enumerate(value)}
        elif isinstance(value, bool):
            found[f"{_group(record, key)}/{key}"] = float(value)
        elif not math.isnan(number(value)) or value == "nan":
            found[f"{_group(record, key)}/{key}"] = number(value)
    return found


def _group(record: Mapping[str, Any], key: str) -> str:
    if record["kind"] != "train":
        return str(record["kind"])
    if key.startswith("memory_"):
        return "memory"
    return "speed" if key in _SPEED or key.endswith("_ms") else "train"
