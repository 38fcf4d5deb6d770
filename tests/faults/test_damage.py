"""Files that aren't what was saved, disks that are full, folders that can't be written: said, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from place import Place

from ds_train.checkpoint import native

pytestmark = [pytest.mark.parity, pytest.mark.faults]

LAYOUTS = {"zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}, "pipeline": {"pipeline": 2}}


@pytest.fixture(scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def harmed(path: Path, harm: str) -> None:
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) * 2 // 3] ^= 1
    elif harm == "truncate":
        del content[-1:]
    elif harm == "grow":
        content.append(0)
    path.write_bytes(bytes(content))


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_harm_to_every_file_makes_the_older_one_be_taken(place: Place, layout: str) -> None:
    place.train(place.recipe(layout, 6, LAYOUTS[layout])).check()
    checkpoints = place.run(layout) / "checkpoints"
    newest, older = checkpoints / "step-00000006", checkpoints / "step-00000004"
    files = sorted(path.name for path in newest.iterdir())
    assert {"manifest.json", "state.json"} < set(files)
    kept = shutil.copytree(newest, place.folder / "kept")
    for name in files:
        for harm in ("flip", "truncate", "grow", "remove"):
            (newest / name).unlink() if harm == "remove" else harmed(newest / name, harm)
            notes: list[str] = []
            found = native.find(checkpoints, "auto", notes.append)
            assert found == older, (name, harm)
            assert len(notes) == 1
            assert notes[0].startswith(f"checkpoint step-00000006 is passed over: {name} ")
            shutil.copy(kept / name, newest / name)
    assert native.find(checkpoints, "auto", pytest.fail) == newest


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


@pytest.fixture
def unmount() -> Iterator[list[Path]]:
    """Places that are unmounted at the end."""
    places: list[Path] = []
    yield places
    for place in reversed(places):
        subprocess.run(["umount", str(place)], check=False)


def test_a_full_disk_leaves_the_older_checkpoint_and_the_run(place: Place, unmount: list[Path]) -> None:
    place.train(place.recipe("whole", 12, {"zero_stage": 2})).check()
    checkpoints = place.run("full") / "checkpoints"
    checkpoints.mkdir(parents=True)
    size = sum(file.stat().st_size for file in (place.run("whole") / "checkpoints" / "step-00000012").iterdir())
    mount("-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(checkpoints))
    unmount.append(checkpoints)
    recipe = place.recipe("full", 12, {"zero_stage": 2})
    ended = place.train(recipe).check()
    saves = place.records("full", "save")
    assert [save["error"] is None for save in saves] == [True] + [False] * 5
    assert "No space left on device" in saves[1]["error"]
    assert "step 4 could not be saved: No space left on device" in ended.outputs[0]
    assert place.steps("full") == [2], "the older one is whole"
    assert place.history("full") == place.history("whole"), "the run went on"
    mount("-o", "remount,size=100m", str(checkpoints))
    assert "after step 2" in place.train(recipe).check().outputs[0]
    assert place.history("full") == place.history("whole")
    assert place.steps("full") == [8, 10, 12]


def test_a_disk_that_is_full_for_everything_stops_no_run(place: Place, unmount: list[Path]) -> None:
    place.train(place.recipe("whole", 12, {"zero_stage": 2})).check()
    place.run("full").mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place.run("full")))
    unmount.append(place.run("full"))
    ended = place.train(place.recipe("full", 12, {"zero_stage": 2})).check()
    assert "step 2 could not be saved: No space left on device" in ended.outputs[0]


def test_a_folder_that_became_read_only_stops_no_run(place: Place, unmount: list[Path]) -> None:
    place.train(place.recipe("whole", 12, {"zero_stage": 3})).check()
    recipe = place.recipe("readonly", 12, {"zero_stage": 3})
    checkpoints = place.run("readonly") / "checkpoints"
    shutil.copytree(place.run("whole") / "checkpoints" / "step-00000008", checkpoints / "step-00000008")
    shutil.copy(place.run("whole") / "metrics.jsonl", place.run("readonly"))
    mount("--bind", str(checkpoints), str(checkpoints))
    unmount.append(checkpoints)
    mount("-o", "remount,ro,bind", str(checkpoints))
    ended = place.train(recipe).check()
    assert "step 10 could not be saved: Read-only file system" in ended.outputs[0]
    assert place.steps("readonly") == [8]
    assert place.history("readonly") == place.history("whole")
    mount("-o", "remount,rw,bind", str(checkpoints))
    place.train(recipe).check()
    assert place.steps("readonly") == [8, 10, 12]
    assert place.history("readonly") == place.history("whole")


def test_a_folder_that_may_not_be_written_stops_no_run(place: Place) -> None:
    place.train(place.recipe("whole", 6, {"zero_stage": 2})).check()
    checkpoints = shutil.copytree(place.run("whole"), place.run("foreign")) / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    checkpoints.chmod(0o555)
    ended = place.train(place.recipe("foreign", 6, {"zero_stage": 2}), ordinary=True).check()
    assert "step 6 could not be saved: Permission denied" in ended.outputs[0]
    assert place.steps("foreign") == [2, 4]
    assert place.history("foreign") == place.history("whole")
