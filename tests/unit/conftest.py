"""Helpers of the unit tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ds_train.config import RunConfig, parse


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes a small valid recipe; sections given by name replace or extend the default ones."""

    def make(**sections: object) -> RunConfig:
        base: dict[str, object] = {
            "run_root": str(tmp_path / "runs"),
            "model": {
                "arch": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "data": {
                "source": "text",
                "path": str(tmp_path / "text"),
                "cache_dir": str(tmp_path / "cache"),
                "sequence_length": 16,
            },
            "batch": {"global_samples": 4},
            "precision": {"dtype": "fp32"},
            "schedule": {"steps": 4},
        }
        for name, section in sections.items():
            old = base.get(name)
            base[name] = (
                {**old, **section}
                if isinstance(old, dict) and isinstance(section, dict) and name != "model"
                else section
            )
        return parse(yaml.safe_dump(base))

    return make
