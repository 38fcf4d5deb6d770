"""What a user got wrong ends every rank with exit code 2 and one line from rank 0."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks

pytestmark = pytest.mark.parity


def recipe(folder: Path, **sections: Any) -> str:
    (folder / "text.txt").write_text("some words to learn from\n" * 50)
    base: dict[str, Any] = {
        "run_root": str(folder / "runs"),
        "model": {
            "arch": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {
            "source": "text",
            "path": str(folder / "text.txt"),
            "cache_dir": str(folder / "cache"),
            "sequence_length": 32,
        },
        "batch": {"global_samples": 4},
        "precision": {"dtype": "fp32"},
        "schedule": {"steps": 1},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return str(path)


CASES = {
    "more-ranks": ({"parallel": {"ranks": 4}}, "parallel.ranks=4: the recipe is made for 4 ranks and 2 were started"),
    "missing-file": ({"data": {"path": "/nowhere/at/all"}}, "data.path=/nowhere/at/all"),
    "vocabulary": ({"model": {"vocab_size": 100}}, "model.vocab_size=100: vocabulary mismatch"),
    "no-network": (
        {"model": {"path": "nobody/nothing", "arch": None}, "data": {"tokenizer": "bytes"}},
        "model.path=nobody/nothing",
    ),
    "folder": ({"run_root": "/proc/nothing"}, "run_root=/proc/nothing/run: the run folder can't be written"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_from_rank_0_and_nobody_hangs(case: str, tmp_path: Path) -> None:
    changes, message = CASES[case]
    path = recipe(tmp_path, **changes)
    if case == "no-network":
        text = yaml.safe_load(Path(path).read_text())
        text["model"] = {"path": "nobody/nothing"}
        Path(path).write_text(yaml.safe_dump(text))
    started = time.monotonic()
    # A launcher ends the other ranks as soon as one has failed; by themselves they wait longer for rank 0's words.
    ended = run_ranks(2, ["launch/train.py", path], timeout_s=90, settle_s=1)
    assert ended.codes[0] == 2, ended.outputs[0]
    assert ended.codes[1] in (2, -9), ended.outputs[1]
    errors = [line for line in ended.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in "".join(ended.outputs)
    assert "error" not in ended.outputs[1]
    assert time.monotonic() - started < 80
