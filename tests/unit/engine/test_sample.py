"""The sample at the end of a run is of the weights that are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ds_train.config import RunConfig
from ds_train.engine.job import _log_sample
from ds_train.track.metrics import read_metrics
from ds_train.track.tracker import Tracker


def test_a_sample_names_the_step_that_is_exported(
    tmp_path: Path, recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_train.checkpoint.hf.generate_sample", lambda _, prompt, *__: f"{prompt} upon")
    run = recipe(track={"sample_prompt": "once", "progress": False})
    tracker = Tracker(run, {}, tmp_path, True, 60, 0, None)
    _log_sample(run, tmp_path, tracker, exported=3, last=9)  # stopped early, long before step 60
    tracker.close(0)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["prompt"], line["text"]) == (3, "once", " upon")
