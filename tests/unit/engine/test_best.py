"""Which evaluation is the best one, and when the run has waited long enough for a better one."""

from __future__ import annotations

import json
import math

from ds_train.config.checkpoint import CheckpointSection
from ds_train.engine.best import Best
from ds_train.engine.loop import EvalResult


def scores(step: int, loss: float, accuracy: float = 0.5) -> EvalResult:
    return EvalResult(step, loss, accuracy, 10, 0.1)


def test_the_least_loss_is_best_and_ties_are_not_better() -> None:
    best = Best(CheckpointSection(best="loss"))
    found = [best.see(scores(step, loss)) for step, loss in enumerate([3.0, 2.0, 2.0, math.nan, 2.5, 1.5])]
    assert found == [True, True, False, False, False, True]
    assert (best.step, best.value) == (5, 1.5)


def test_the_greatest_accuracy_is_best() -> None:
    best = Best(CheckpointSection(best="accuracy"))
    assert [best.see(scores(1, 1.0, share)) for share in (0.1, 0.3, 0.2)] == [True, True, False]


def test_the_loss_of_a_source_is_a_score() -> None:
    best = Best(CheckpointSection(best="loss_code"))
    sources: list[dict[str, float]] = [{"code": 2.0}, {"code": math.nan}, {"code": 1.0}]
    assert [best.see(EvalResult(1, 3.0, 0.5, 10, 0.1, one)) for one in sources] == [True, False, True]


def test_patience_goes_on_after_a_resume() -> None:
    section = CheckpointSection(best="perplexity", patience=3)
    best = Best(section)
    for step, loss in enumerate([1.0, 2.0, 2.0]):
        best.see(scores(step, loss))
    assert not best.patience_ended
    resumed = Best(section, json.loads(json.dumps(best.record())))
    assert (resumed.step, resumed.value) == (0, math.exp(1.0))
    resumed.see(scores(3, 1.0))
    assert resumed.patience_ended
    assert not Best(CheckpointSection(best="loss"), best.record()).record()["step"], "another score begins anew"


def test_nobody_asks() -> None:
    best = Best(CheckpointSection())
    assert not best.see(scores(1, 1.0))
    assert not best.patience_ended
