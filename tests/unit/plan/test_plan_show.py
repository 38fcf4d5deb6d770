"""What people read of a plan."""

from __future__ import annotations

import io
from typing import Any

import pytest
from plan_recipes import recipe
from rich.console import Console

from ds_train.plan.clusters import cluster_of
from ds_train.plan.make import like_steps, make_plan
from ds_train.plan.search import with_auto
from ds_train.plan.show import _seconds, show_plan
from ds_train.plan.topology import Cluster


def shown(changes: dict[str, Any], cluster: Cluster, auto: bool = False) -> str:
    text = io.StringIO()
    run = recipe(changes)
    show_plan(make_plan(with_auto(run) if auto else run, cluster), Console(file=text, width=200))
    return text.getvalue()


def test_a_plan_says_what_the_whole_run_costs() -> None:
    text = shown({"schedule.steps": 3600}, cluster_of("1x8:H100"))
    assert "layout  8 H100 ranks = pipe 1 x data 8 x sequence 1 x tensor 1, ZeRO-1" in text
    assert " GiB of 80.0 GiB at a rank's peak (predicted)" in text
    assert "run     3,600 steps, " in text
    assert " H100-hours (predicted; without start, evaluation and saving)" in text
    assert "1 H100 rank = " in shown({}, cluster_of("1x1:H100"))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"schedule.steps": 7}, 7),
        ({"schedule": {"tokens": 100_000}}, 7),  # of 32 x 512 tokens
        ({"schedule": {"epochs": 1.0}}, None),
        ({"schedule.steps": 7, "patch.size": 4}, None),
        ({"schedule.steps": 7, "curriculum.kind": "linear"}, None),
    ],
)
def test_steps_are_known_where_they_are_alike(changes: dict[str, Any], steps: int | None) -> None:
    assert like_steps(recipe(changes)) == steps


def test_what_is_not_predicted_is_said_with_the_reason() -> None:
    hub = {"model": {"path": "nobody/nothing"}, "data.tokenizer": "model"}
    assert "the config.json of nobody/nothing isn't on this machine; fetch it: hf download" in shown(
        hub, cluster_of("1x8:H100")
    )
    assert "no figures of this xpu device" in shown({}, Cluster(2, 2, "xpu", here=False))
    unknown = {"model": {"arch": "llama"}, "data.tokenizer": "nobody/nothing"}
    assert "the tokenizer's size isn't known before it is loaded; set model.vocab_size" in shown(
        unknown, cluster_of("1x8:H100")
    )


def test_a_choice_is_shown_with_the_next_and_the_rejected() -> None:
    text = shown({}, cluster_of("1x8:H100"), auto=True)
    assert "ways to run it that fill at most 95% of a device's memory" in text
    assert text.count("\nnext ") == 4
    assert "rejected ZeRO-2 + pipeline: parallel.zero_stage: " in text
    assert "fill at most" not in shown({}, cluster_of("1x2:CPU"), auto=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.50 s"), (119.0, "119.00 s"), (600, "10 min"), (9000, "2.5 h"), (1e6, "11.6 days")],
)
def test_times_are_in_the_unit_that_people_would_use(seconds: float, text: str) -> None:
    assert _seconds(seconds) == text
