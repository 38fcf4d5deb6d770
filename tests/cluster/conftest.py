"""The hosts of these tests, started once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lab import Lab, unavailable

HOSTS = 3


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts and a login machine; skips where there can be none."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    made = Lab(tmp_path_factory.mktemp("lab"))
    try:
        yield made.start(HOSTS)
    finally:
        made.close()


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Path of a recipe that trains a tiny Llama on a text for six steps."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"Line {i} of a text that is {i * i % 97} words long, or {i * 7 % 31}." for i in range(400))
    )
    sections = {
        "name": "tiny",
        "run_root": str(tmp_path / "runs"),
        "model": {
            "arch": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "data": {"source": "text", "path": str(text), "cache_dir": str(tmp_path / "cache"), "sequence_length": 32},
        "batch": {"global_samples": 8, "micro_samples": 2},
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": 6},
        "optimizer": {"lr": 1e-3},
        "track": {"log_every_steps": 1},
        "checkpoint": {"export": False, "save_final": False},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)
