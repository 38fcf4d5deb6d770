"""A damaged checkpoint is never taken for a whole one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_train.checkpoint import native
from ds_train.checkpoint.manifest import MANIFEST, damage, write_manifest, write_text
from ds_train.errors import UserError


class FakeEngine:
    """Writes two shards, as DeepSpeed does."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.content = content

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag / "sub").mkdir(parents=True, exist_ok=True)
        (Path(folder) / tag / "shard0.pt").write_bytes(self.content)
        (Path(folder) / tag / "sub" / "shard1.pt").write_bytes(self.content * 2)


class FullDisk(FakeEngine):
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        super().save_checkpoint(folder, tag, save_latest)
        raise OSError(28, "No space left on device")


def state(step: int) -> native.TrainState:
    return native.TrainState(step, step * 10, {"seed": 1}, {"ranks": 1}, {}, "abc")


def save(folder: Path, step: int, engine: FakeEngine | None = None, keep: int = 2) -> Path:
    return native.save(engine or FakeEngine(), folder, state(step), keep, rank=0, barrier=lambda: None)


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert native.read_state(found) == state(15)
    assert (tmp_path / "latest").read_text() == "step-00000015"


@pytest.mark.parametrize("file", ["shard0.pt", "sub/shard1.pt", "state.json", MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_every_harm_to_every_file_is_noticed(tmp_path: Path, file: str, harm: str) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    target = newest / file
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


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 10, FullDisk())
    found = native.find(tmp_path, "auto", pytest.fail)
    assert found is not None
    assert found.name == "step-00000005"
    save(tmp_path, 15)
    assert not list(tmp_path.glob("*.partial")), "the leftovers of the failed save must go"


def test_no_checkpoint_is_a_fresh_start_but_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert native.find(tmp_path, "auto", pytest.fail) is None
    (save(tmp_path, 5) / "shard0.pt").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        native.find(tmp_path, "auto", lambda text: None)


def test_never_refuses_to_overwrite(tmp_path: Path) -> None:
    assert native.find(tmp_path, "never", pytest.fail) is None
    save(tmp_path, 5)
    with pytest.raises(UserError, match="already holds checkpoints"):
        native.find(tmp_path, "never", pytest.fail)


def test_a_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert native.find(tmp_path, str(path), pytest.fail) == path
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        native.find(tmp_path, str(tmp_path / "nowhere"), pytest.fail)


def test_what_may_and_what_may_not_change_on_resume() -> None:
    recipe = {
        "seed": 1,
        "data": {"source": "text", "workers": 1},
        "track": {"wandb": "off"},
        "optimizer": {"betas": [0.9, 0.95]},
    }
    saved = native.TrainState(5, 50, json.loads(json.dumps(recipe)), {"ranks": 2}, {}, "abc")
    native.check_resumable(saved, recipe | {"track": {"wandb": "online"}}, {"ranks": 2}, "abc")
    native.check_resumable(saved, recipe | {"data": {"source": "text", "workers": 4}}, {"ranks": 2}, "abc")
    native.check_resumable(saved, recipe | {"optimizer": {"betas": (0.9, 0.95)}}, {"ranks": 2}, "abc")
    with pytest.raises(UserError, match=r"(?s)data.source=stdlib.*made with text.*seed=2"):
        native.check_resumable(saved, recipe | {"seed": 2, "data": {"source": "stdlib"}}, {"ranks": 2}, "abc")
    with pytest.raises(UserError, match=r"ranks=4: the checkpoint was saved with 2"):
        native.check_resumable(saved, recipe, {"ranks": 4}, "abc")
    with pytest.raises(UserError, match="data has changed"):
        native.check_resumable(saved, recipe, {"ranks": 2}, "xyz")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    write_manifest(tmp_path, {"step": 1})
    assert damage(tmp_path) is None
