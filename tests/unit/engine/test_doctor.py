"""The doctor plans a recipe on the hosts as a launch would, from its first step to its last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_train.cli.launching import start_again_on
from ds_train.config import RunConfig
from ds_train.engine import doctor, launch
from ds_train.engine.findings import Finding
from ds_train.engine.supervise import find_hosts
from ds_train.engine.survey import survey
from ds_train.errors import UserError
from ds_train.plan.hostfile import Host

Recipe = Callable[..., RunConfig]


@pytest.fixture
def plan_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[RunConfig], list[str]]:
    """What the doctor says of a recipe on two ranks of this machine, without building kernels or starting ranks."""
    (tmp_path / "text").write_text("what the recipe trains on")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(doctor, "_kernels", lambda surveyed: [])
    monkeypatch.setattr(doctor, "_collective", lambda world: Finding("ok", "collective", "not tried"))

    def examined(run: RunConfig) -> list[str]:
        found = doctor.examine([Host("localhost", (0, 1))], run)
        return [str(finding) for finding in found if finding.check in ("recipe", "collective")]

    return examined


def pruned(recipe: Recipe, **parallel: Any) -> RunConfig:
    return recipe(compress={"prune": {"layers": 1, "parallel": parallel}})


def test_the_layout_from_the_cut_on_is_looked_at(recipe: Recipe, plan_lines: Callable[[RunConfig], list[str]]) -> None:
    found = plan_lines(pruned(recipe, tensor=2, zero_stage=2))
    assert found[0] == "ok    recipe      2 ranks as pipe 1, data 2, sequence 1, tensor 1, ZeRO-1"
    assert "ok    recipe      from the cut on 2 ranks as pipe 1, data 1, sequence 1, tensor 2, ZeRO-2" in found
    assert found[-1] == "ok    collective  not tried"


def test_what_is_wrong_with_it_is_a_failure(recipe: Recipe, plan_lines: Callable[[RunConfig], list[str]]) -> None:
    failure, *others, untried = plan_lines(pruned(recipe, tensor=3))
    assert not [line for line in others if not line.startswith("fail")], others
    assert failure.startswith(
        "fail  recipe      compress.prune.parallel.pipeline x tensor x sequence=3: it doesn't divide"
    )
    assert untried == "note  collective  tried when nothing else fails"


def test_a_layout_that_stays_is_a_line(recipe: Recipe, plan_lines: Callable[[RunConfig], list[str]]) -> None:
    assert len([line for line in plan_lines(recipe()) if line.startswith("ok    recipe")]) == 1


def test_paths_that_are_not_here_are_said_before_ranks_start(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "step-00000001").mkdir()
    run = recipe(
        data={"path": str(tmp_path / "corpsu"), "validation_path": str(tmp_path / "corpus")},
        checkpoint={"resume": str(tmp_path / "step-00000001")},
    )
    found = [finding.problem() for finding in survey([Host("localhost", (0,))], run=run).findings() if finding.host]
    assert [str(problem) for problem in found] == [
        f"data.path={tmp_path}/corpsu: there is no such file, folder or glob. Fix: did you mean {tmp_path}/corpus?",
        (
            f"checkpoint.resume={tmp_path}/step-00000001: manifest.json is missing. "
            "Fix: give the folder of a whole checkpoint, or auto."
        ),
    ]


def test_a_supervised_run_goes_on_without_what_it_began_from(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "text").write_text("what the recipe trains on")
    run, here = recipe(checkpoint={"resume": str(tmp_path / "gone")}), [Host("localhost", (0,))]
    with pytest.raises(UserError, match="there is no such folder"):
        find_hosts(run, "", here, None, None)
    own = tmp_path / "runs" / run.name / "checkpoints" / "step-00000004"
    own.mkdir(parents=True)
    (own / "manifest.json").write_text("{}")
    assert find_hosts(run, "", here, None, None)[0] == here


@pytest.mark.parametrize("resumes", [False, True])
def test_only_a_command_that_resumes_looks_for_the_checkpoint(
    resumes: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "text").write_text("what the recipe trains on")
    started: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda *args: started.append(args) or launch.Ended(0))
    with pytest.raises(UserError if resumes else SystemExit, match="there is no such folder" if resumes else "0"):
        start_again_on(None, 1, recipe(checkpoint={"resume": str(tmp_path / "gone")}), "recipe.yaml", resumes)
    assert bool(started) is not resumes
