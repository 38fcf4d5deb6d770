"""Checkpoints of a plain torch model on one rank: whole or not there, and never a damaged one taken for a whole one."""

from __future__ import annotations

import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_train.checkpoint import native
from ds_train.checkpoint.manifest import MANIFEST, damage, write_manifest, write_text
from ds_train.checkpoint.native import Saved, Saver
from ds_train.errors import UserError
from ds_train.plan.topology import Coordinates, Layout

SHARD = "rank-00000-0.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained:
    """A model, its optimizer and what DeepSpeed's engine shows of them, without ZeRO."""

    def __init__(self, seed: int, width: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.skipped_steps = 0
        mesh = SimpleNamespace(place=Coordinates(0, 0, 0, 0), layout=Layout(1, 1, 1, 1))
        self.part: Any = SimpleNamespace(outline=self.model, model=self.model, mesh=mesh)

    def step(self) -> float:
        loss = self.model(torch.ones(2, 4)).square().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def saver(self, folder: Path, keep: int = 2, **more: Any) -> Saver:
        return Saver(folder, self, self.part, keep, **more)


def state(step: int) -> native.TrainState:
    return native.TrainState(step, step * 10, {"seed": 1}, {"ranks": 1}, {}, "abc")


def save(folder: Path, step: int, trained: Trained | None = None) -> Saved:
    (saved,) = (trained or Trained(0)).saver(folder).save(state(step))
    return saved


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert native.read_state(found).tokens == 150
    assert (tmp_path / "latest").read_text() == "step-00000015"


def test_the_best_one_is_kept_however_old(tmp_path: Path) -> None:
    saver = Trained(0).saver(tmp_path, keep=1)
    for step, best in ((5, 5), (10, 5), (15, 5), (20, 20), (25, 20)):
        saver.save(replace(state(step), best={"by": "loss", "step": best}))
        kept = sorted(int(path.name[5:]) for path in tmp_path.glob("step-*"))
        assert kept == sorted({best, step})


def test_a_later_one_that_is_damaged_takes_no_place(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 20).path / SHARD).unlink()
    saver = Trained(0).saver(tmp_path, keep=1)
    for step in (10, 15):
        saver.save(state(step))
        found = native.find(tmp_path, "auto", lambda text: None)
        assert found is not None
        assert found.name == f"step-{step:08d}"
    saver.save(state(20))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000020"]
    assert native.find(tmp_path, "auto", pytest.fail) is not None


def test_a_run_that_goes_back_forgets_what_came_later(tmp_path: Path) -> None:
    trained = Trained(0)
    saver = trained.saver(tmp_path, keep=9)
    for step in (5, 10, 15, 20):
        saver.save(state(step))
    (tmp_path / "step-00000010" / SHARD).unlink()
    notes: list[str] = []
    found = native.newest_whole(tmp_path, notes.append, before=15)
    assert found is not None
    assert (found.name, len(notes)) == ("step-00000005", 1)
    assert native.newest_whole(tmp_path, notes.append, before=5) is None
    assert saver.forget_after(5) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005"


@pytest.mark.parametrize("file", [SHARD, "state.json", MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_every_harm_to_every_file_is_noticed(tmp_path: Path, file: str, harm: str) -> None:
    save(tmp_path, 5)
    target = save(tmp_path, 10).path / file
    content = target.read_bytes()
    if harm == "remove":
        target.unlink()
    else:
        middle = len(content) // 2
        target.write_bytes(
            content[:middle]
            if harm == "truncate"
            else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    notes: list[str] = []
    found = native.find(tmp_path, "auto", notes.append)
    assert found is not None
    assert found.name == "step-00000005"
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint step-00000010 is passed over: {file} ")


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 5).path / MANIFEST
    content = path.read_bytes()
    assert damage(path.parent) is None
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert damage(path.parent) is not None, (place, bit)
        path.write_bytes(content[:place])
        assert damage(path.parent) is not None, place


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes, as on a full disk; nor may pytest's output, where it is a file."""
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path, in_background: bool) -> None:
    save(tmp_path, 5)
    trained = Trained(1)
    saver = trained.saver(tmp_path, in_background=in_background)
    with small_disk():
        (saved,) = [*saver.save(state(10)), *saver.wait()]
    assert saved.error is not None
    assert saved.error.startswith("File too large")
    assert not list(tmp_path.glob("*.partial")), "the leftovers of the failed save must go"
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert found.name == "step-00000005"


def test_a_folder_that_may_not_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert "Not a directory" in str(save(tmp_path / "checkpoints", 5).error)


@pytest.mark.parametrize("phase", ["write_fragments", "write_json", "write_manifest", "make_durable", "write_text"])
def test_a_save_that_is_killed_in_any_phase_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    save(tmp_path, 5)

    def killed(*_: Any) -> None:
        raise SystemExit(-9)

    with monkeypatch.context() as patch:
        patch.setattr(native, phase, killed)
        with pytest.raises(SystemExit):
            save(tmp_path, 10)
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert found.name == ("step-00000010" if phase == "write_text" else "step-00000005")
    assert save(tmp_path, 10).error is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005", "step-00000010"]


def test_a_step_that_is_saved_again_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path, 5, Trained(1)).path
    rename, seen = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        result = rename(path, target)
        seen.append(native.find(tmp_path, "auto", pytest.fail))
        return result

    monkeypatch.setattr(Path, "rename", watched)
    assert save(tmp_path, 5, Trained(2)).path == first
    names = ["step-00000005.old", "step-00000005", "step-00000005"]  # moved away, replaced, removed
    assert [path.name for path in seen if path is not None] == names
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)

    def killed(path: Path, **_: Any) -> None:
        (path / MANIFEST).unlink()
        raise SystemExit(-9)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            save(tmp_path, 15)
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert found.name == "step-00000015"
    save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000015", "step-00000020"]


def test_checkpoints_without_manifest_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (save(tmp_path, 15).path / MANIFEST).unlink()
    save(tmp_path, 20)
    assert sorted(path.name[-2:] for path in tmp_path.glob("step-*")) == ["10", "15", "20"]
    save(tmp_path, 25)
    assert sorted(path.name[-2:] for path in tmp_path.glob("step-*")) == ["20", "25"]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_loaded_is_what_was_there_when_it_was_saved(tmp_path: Path, in_background: bool) -> None:
    trained = Trained(1)
    saver = trained.saver(tmp_path, in_background=in_background)
    trained.step()
    ended = saver.save(state(1))
    losses = [trained.step() for _ in range(3)]  # while it is written
    (saved,) = ended or saver.wait()
    assert saved.error is None
    again = Trained(2)
    native.load(again, again.part, saved.path)
    assert [again.step() for _ in range(3)] == losses
    for own, other in zip(again.model.parameters(), trained.model.parameters(), strict=True):
        for kind, value in trained.optimizer.state[other].items():
            assert torch.equal(again.optimizer.state[own][kind], value)


def test_a_saver_that_is_closed_has_saved_and_leaves_no_thread(tmp_path: Path) -> None:
    def writing() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]

    before = writing()
    saver = Trained(1).saver(tmp_path, in_background=True)
    assert saver.save(state(1)) == []
    assert len(writing()) == len(before) + 1
    (saved,) = saver.close()
    assert (saved.error, damage(saved.path)) == (None, None)
    assert writing() == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5).path
    wider = Trained(0, width=5)
    with pytest.raises(
        UserError, match=r"isn't a checkpoint of this model: 0\.weight was saved with the shape \(3, 4\)"
    ):
        native.load(wider, wider.part, path)


def test_old_and_round_steps_are_kept(tmp_path: Path) -> None:
    saver = Trained(0).saver(tmp_path, keep=1, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        saver.save(state(step))
    assert sorted(path.name[-2:] for path in tmp_path.glob("step-*")) == ["10", "20", "25"]


@pytest.mark.parametrize("gone", [SHARD, MANIFEST])
def test_no_checkpoint_is_a_fresh_start_but_only_damaged_ones_are_an_error(tmp_path: Path, gone: str) -> None:
    assert native.find(tmp_path, "auto", pytest.fail) is None
    (save(tmp_path, 5).path / gone).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        native.find(tmp_path, "auto", lambda text: None)


def test_never_refuses_to_overwrite(tmp_path: Path) -> None:
    assert native.find(tmp_path, "never", pytest.fail) is None
    save(tmp_path, 5)
    with pytest.raises(UserError, match="already holds checkpoints"):
        native.find(tmp_path, "never", pytest.fail)


def test_a_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 5).path
    assert native.find(tmp_path, str(path), pytest.fail) == path
    with pytest.raises(UserError, match="there is no such folder"):
        native.find(tmp_path, str(tmp_path / "nowhere"), pytest.fail)
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        native.find(tmp_path, str(tmp_path), pytest.fail)
    later = save(tmp_path, 10).path
    assert native.find(tmp_path, str(later), pytest.fail) == later
    assert native.find(tmp_path / "other", str(path), pytest.fail) == path
    with pytest.raises(UserError, match="it is of step 5, and the run's folder has later ones: step-00000010"):
        native.find(tmp_path, str(path), pytest.fail)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    write_manifest(tmp_path, {"step": 1})
    assert damage(tmp_path) is None
