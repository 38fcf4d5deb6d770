"""Recipes for the tests of this room: one small base, changed by dotted keys."""

from __future__ import annotations

import copy
from typing import Any

from ds_train.config import RunConfig
from ds_train.config.load import validate

BASE: dict[str, Any] = {
    "model": {
        "arch": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    },
    "schedule": {"steps": 10},
}  # fmt: skip


def recipe(changes: dict[str, Any] | None = None) -> RunConfig:
    """The base recipe with dotted keys set; a value of None under `model` takes the key away."""
    tree = copy.deepcopy(BASE)
    for path, value in (changes or {}).items():
        *sections, leaf = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        if value is None and sections == ["model"]:
            place.pop(leaf, None)
        else:
            place[leaf] = copy.deepcopy(value)
    return validate(tree)
