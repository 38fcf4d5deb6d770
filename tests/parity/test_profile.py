"""A profiled run trains as any other, and leaves a trace of the ranks and steps that it was asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from plain_loop import history_of, write_corpus, write_recipe, write_weights
from ranks import run_ranks

pytestmark = pytest.mark.parity


def test_steps_of_a_pipeline_are_recorded_without_a_trace_in_the_loss(tmp_path: Path) -> None:
    corpus, weights = write_corpus(tmp_path / "corpus"), tmp_path / "llama"
    write_weights(weights, "llama")
    recipe = write_recipe(tmp_path, "plain", corpus, weights, "llama", {"pipeline": 2})
    ended = run_ranks(2, ["tests/parity/profile_steps.py", str(recipe)]).check()
    plain, profiled = history_of(tmp_path, "plain"), history_of(tmp_path, "profiled")
    assert profiled == plain[:6]
    folder = tmp_path / "runs" / "profiled" / "profile"
    assert {path.name for path in folder.iterdir()} == {"profile.html", "profile.json", "rank-1.trace.json.gz"}
    summary = json.loads((folder / "profile.json").read_text())
    assert summary["steps"] == [3, 4]
    silent, recorded = summary["ranks"]
    assert silent["operators"] is None
    assert silent["steps"] == recorded["steps"] == 2
    assert all(profile["phase_ms"]["pipeline"] > 0 for profile in (silent, recorded))
    names = {operator["name"] for operator in recorded["operators"]}
    assert "aten::mm" in names or "aten::addmm" in names
    assert sum(operator["share"] for operator in recorded["operators"]) == pytest.approx(1.0, abs=0.1)
    assert len(recorded["memory"]) > 100
    events = json.loads(gzip.decompress((folder / "rank-1.trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") in names for event in events)
    assert summary["findings"]
    assert all(sentence in ended.outputs[0] for sentence in summary["findings"])
