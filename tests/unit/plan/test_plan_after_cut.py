"""What a plan says of a run from its cut on is what it says of a recipe of the smaller model."""

from __future__ import annotations

import io
from typing import Any

import pytest
from plan_recipes import recipe
from rich.console import Console

from ds_train.plan.after_cut import AfterCut, after_cut
from ds_train.plan.clusters import cluster_of
from ds_train.plan.make import make_plan
from ds_train.plan.show import show_plan

CLUSTER = cluster_of("1x8:H100")
GPT2 = {"arch": "gpt2", "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024}
MIXTRAL = {
    "arch": "mixtral", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_local_experts": 8, "max_position_embeddings": 1024,
}  # fmt: skip
GEMMA3 = {
    "arch": "gemma3_text", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip


def after(changes: dict[str, Any]) -> AfterCut:
    found = after_cut(make_plan(recipe(changes), CLUSTER))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("whole", "prune", "smaller"),
    [
        (
            {},
            {"heads": 0.5, "ffn": 0.25, "layers": 3},
            {
                "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.head_dim": 64,
                "model.intermediate_size": 1152, "model.num_hidden_layers": 5,
            },
        ),
        ({}, {"hidden": 0.5}, {"model.hidden_size": 256, "model.head_dim": 64}),
        (
            {"model": GPT2},
            {"heads": 0.25, "hidden": 0.25},
            {"model": GPT2 | {"n_embd": 384, "n_head": 6, "n_inner": 2048}},
        ),
        ({"model": MIXTRAL}, {"experts": 0.5}, {"model": MIXTRAL | {"num_local_experts": 4}}),
        ({"model": GEMMA3}, {"layers": 2, "ffn": 0.5}, {"model": GEMMA3 | {"num_hidden_layers": 4} | {
            "intermediate_size": 512}}),
    ],
)  # fmt: skip
def test_sizes_memory_and_time_are_those_of_the_smaller_model(
    whole: dict[str, Any], prune: dict[str, Any], smaller: dict[str, Any]
) -> None:
    found, expected = after(whole | {"compress.prune": prune}), make_plan(recipe(smaller), CLUSTER)
    assert found.size is not None
    assert found.size.parameters == expected.parameters
    assert found.predicted == expected.predicted
    assert found.predicted is not None


def test_a_size_that_is_asked_for_is_kept() -> None:
    asked = {"heads": 0.5, "ffn": 0.5, "parameters": 15_000_000}
    found = after({"compress.prune": asked})
    assert found.size is not None
    assert 13_500_000 < (found.size.parameters or 0) <= 15_000_000


def test_the_layout_is_the_plans() -> None:
    layout = {"parallel": {"tensor": 2, "zero_stage": 3}}
    found = after({"compress.prune": {"ffn": 0.5}} | layout)
    assert found.predicted == make_plan(recipe({"model.intermediate_size": 768} | layout), CLUSTER).predicted


@pytest.mark.parametrize(
    ("prune", "line"),
    [
        ({"ffn": 0.5, "end": 0.7}, "cut     after 70% of the run: about "),
        ({"ffn": 0.5, "latency": 0.5}, "cut     after 50% of the run, to sizes that measured times will tell"),
    ],
)
def test_a_plan_has_a_line_on_the_cut(prune: dict[str, Any], line: str) -> None:
    text, run = io.StringIO(), recipe({"compress.prune": prune, "schedule.steps": 1000})
    plan = make_plan(run, CLUSTER)
    show_plan(plan, Console(file=text, width=200), after_cut(plan))
    assert line in text.getvalue()
    assert ("run     1,000 steps" in text.getvalue()) == ("latency" not in prune)
    assert after_cut(make_plan(recipe(), CLUSTER)) is None
