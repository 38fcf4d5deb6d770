"""What a profile says: each cost has its sentence, and each remedy is a key that recipes have."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ds_train.config.load import known_keys
from ds_train.track.findings import Operator, RankProfile, Setting, findings
from ds_train.track.profile_page import profile_page

SETTING = Setting(
    workers=1,
    zero_stage=2,
    tensor=1,
    sequence=1,
    pipeline=1,
    micro_batches=4,
    offload=False,
    compiled=False,
    overlap=False,
)
BALANCED = {
    "data": 1.0,
    "forward": 30.0,
    "backward": 60.0,
    "collectives": 5.0,
    "pipeline": 0.0,
    "optimizer": 3.0,
    "other": 1.0,
}


def setting(**changes: Any) -> Setting:
    return Setting(**(vars(SETTING) | changes))


def profile(rank: int = 0, operators: list[Operator] | None = None, **phases: float) -> RankProfile:
    return RankProfile(rank, 3, BALANCED | phases, operators)


@pytest.mark.parametrize(
    ("profiles", "where", "words"),
    [
        ([profile(data=30.0)], SETTING, ["Data loading is 23%", "raise data.workers (now 1)"]),
        ([profile(data=30.0)], setting(workers=8), ["data.cache_dir"]),
        ([profile(collectives=50.0)], SETTING, ["Collectives are 34%", "batch.global_samples"]),
        ([profile(collectives=50.0)], setting(zero_stage=3), ["parallel.zero_stage=2"]),
        ([profile(collectives=50.0)], setting(tensor=2), ["lower parallel.tensor"]),
        ([profile(collectives=50.0)], setting(sequence=2), ["lower parallel.sequence"]),
        ([profile(optimizer=40.0)], SETTING, ["The optimizer is 29%", "batch.global_samples"]),
        ([profile(optimizer=40.0)], setting(offload=True), ["parallel.offload_optimizer=none"]),
        ([profile(other=20.0)], SETTING, ["host's own work is 17%", "batch.micro_samples"]),
        ([profile(pipeline=50.0)], setting(pipeline=2), ["33% of the step, 20% in theory", "parallel.stage_layers"]),
        ([profile(pipeline=25.0)], setting(pipeline=2), ["20% of the step, 20% in theory", "batch.global_samples"]),
        ([profile(0), profile(1, forward=75.0)], SETTING, ["Rank 1 computes 20% longer"]),
        ([profile(0), profile(1, forward=75.0)], setting(pipeline=2), ["Rank 1", "parallel.stage_layers"]),
        ([profile(operators=[Operator("aten::copy_", 9, 20.0, 0.2)])], SETTING, ["Copies", "20%", "model.compile"]),
        ([profile(operators=[Operator("aten::mm", 9000, 45.0, 1.0)])], SETTING, ["5 µs", "batch.micro_samples"]),
        ([profile()], SETTING, ["Nothing stands out: forward and backward are 90%"]),
    ],
)
def test_a_sentence_for_each_cost(profiles: list[RankProfile], where: Setting, words: list[str]) -> None:
    found = findings(profiles, where)
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found
    keys = set(known_keys())
    for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", found[0]):
        assert key in keys


def test_the_costliest_comes_first() -> None:
    found = findings([profile(data=20.0, collectives=80.0)], SETTING)
    assert [text.split()[0] for text in found] == ["Collectives", "Data"]


def test_the_page_names_ranks_operators_and_findings() -> None:
    recorded = RankProfile(
        1, 3, BALANCED, [Operator("aten::mm<x>", 30, 60.0, 0.6)], [(0.0, 1.0), (5.0, 3.0), (9.0, 2.0)]
    )
    text = profile_page("mine", (5, 7), [profile(), recorded], ["Data loading is 23% of the step."])
    for words in (
        "mine, steps 5 to 7",
        "Data loading is 23%",
        "Operators of rank 1",
        "aten::mm&lt;x&gt;",
        "20.00",
        "Memory",
    ):
        assert words in text
    assert "Operators of rank 0" not in text
    assert ">rank 1</span>" in text, "whose line it is"
    (memory,) = json.loads(text.split('id="data">')[1].split("</script>")[0])["memory"]["curves"]
    assert (memory["x"], memory["y"]) == ([0, 5, 5, 9, 9], [1, 1, 3, 3, 2]), "it is held until the next is taken"
