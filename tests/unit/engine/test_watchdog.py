"""When a step is too long, and whom the others wait for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_train.config.faults import FaultsSection
from ds_train.data.batches import prefetch
from ds_train.engine import watchdog
from ds_train.engine.ranks import RankInfo
from ds_train.engine.watchdog import Pace, Report, name_late
from ds_train.errors import HUNG_CODE

SECTION = FaultsSection(late_factor=10, late_floor_seconds=3, first_step_seconds=100)


def test_a_step_may_take_a_multiple_of_the_median_per_token() -> None:
    pace = Pace(SECTION)
    assert pace.limit("short", 100) == 100
    pace.add("short", 100, 50.0)  # compiled
    for _ in range(10):
        pace.add("short", 100, 1.0)
    assert pace.limit("short", 100) == pytest.approx(10.0)
    assert pace.limit("short", 400) == pytest.approx(40.0)


def test_no_step_is_late_before_the_floor() -> None:
    pace = Pace(SECTION)
    for _ in range(10):
        pace.add("short", 100, 0.01)
    assert pace.limit("short", 100) == 3


def test_the_first_step_of_a_length_may_compile_and_says_nothing_about_the_others() -> None:
    pace = Pace(SECTION)
    for _ in range(3):
        pace.add("short", 100, 1.0)
    assert pace.limit("long", 400) == 100
    pace.add("long", 400, 90.0)
    assert pace.limit("long", 400) == pytest.approx(40.0)


def report(rank: int, **changes: Any) -> Report:
    usual: dict[str, Any] = {
        "host": f"host{rank}", "step": 7, "seconds": 9.0, "place": "all_reduce", "waits": True, "collectives": {"0": 5},
    }  # fmt: skip
    return Report(rank, **(usual | changes))


def test_ranks_that_say_nothing_are_named_first() -> None:
    assert name_late([report(0), report(2, step=6)], 4).startswith("ranks 1, 3 give no answer")
    assert name_late([report(0)], 2).startswith("rank 1 gives no answer")


def test_the_rank_that_computes_while_the_others_wait_is_late() -> None:
    words = name_late([report(0), report(1, waits=False, place="sleep (user.py:3)"), report(2)], 3)
    assert words == "late is rank 1 on host1, at step 7, in sleep (user.py:3)"


def test_an_older_step_and_fewer_collectives_tell_where_all_wait() -> None:
    assert "rank 1 on host1" in name_late([report(0), report(1, step=6), report(2)], 3)
    assert "rank 2 on host2" in name_late([report(0), report(1), report(2, collectives={"0": 4})], 3)


def test_nobody_is_named_without_a_sign() -> None:
    assert name_late([report(0), report(1, place="broadcast")], 2) == (
        "no rank is behind the others; they are at all_reduce and broadcast"
    )


def test_a_single_rank_says_where_it_is() -> None:
    assert name_late([report(0, waits=False, place="f (a.py:1)")], 1).endswith("in f (a.py:1)")


def test_a_wait_for_samples_that_hangs_names_the_file_and_the_loaders_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    told: list[str] = []

    def blocked_read() -> Iterator[int]:
        yield 1
        while not codes:
            time.sleep(0.01)

    section = FaultsSection(late_factor=10, late_floor_seconds=0.4, first_step_seconds=60)
    info = RankInfo(rank=0, ranks=1, local_rank=0, ranks_per_host=1, device="cpu")
    samples = prefetch(blocked_read, depth=1)
    watched = watchdog.Watchdog(section, info, tmp_path / "faults", told.append)
    monkeypatch.setattr("ds_train.engine.ranks.barrier", lambda: None)
    with watched:
        for number in (1, 2):
            watched.begin_wait(number, Path("/cache/train.tokens"))
            next(samples, None)
            watched.end()
    assert codes[0] == HUNG_CODE
    assert told[0].startswith("loading the data of step 2 from /cache/train.tokens has taken ")
    assert "at step 2, in blocked_read (unit/engine/test_watchdog.py:" in told[0]
    assert "the run hangs (rank 0 on " in capsys.readouterr().err
    assert "blocked_read" in (tmp_path / "faults" / "rank-00000.txt").read_text()


@pytest.mark.parametrize(("device", "completed", "waits"), [("cuda", 6, True), ("cuda", 7, False), ("cpu", 6, False)])
def test_on_a_device_a_rank_waits_while_a_collective_has_not_ended_wherever_its_host_is(
    device: Any, completed: int, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {
        group: {"last_enqueued_collective": "7", "last_started_collective": "7", "last_completed_collective": str(last)}
        for group, last in (("0", 7), ("1", completed))
    }
    monkeypatch.setattr(watchdog, "_flight_records", lambda: [{"pg_status": groups}])
    info = RankInfo(rank=0, ranks=2, local_rank=0, ranks_per_host=2, device=device)
    found = watchdog.Watchdog(SECTION, info, tmp_path, print)._report()
    assert found.waits == waits
    assert found.collectives == {"0": 7, "1": 7}


def test_collectives_are_counted_and_named() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = watchdog._status()  # groups of earlier tests too
        dist.all_reduce(torch.ones(3))
        after = watchdog._status()
        (group,) = [group for group, status in after.items() if status != before.get(group)]
        begun = before[group]["last_enqueued_collective"] if group in before else 0
        assert after[group]["last_enqueued_collective"] == begun + 1
        assert after[group]["last_completed_collective"] == begun + 1
        assert "gloo:all_reduce in 0 default_pg: [[3]] -> [[3]], done" in list(watchdog._last_collectives())[-1]
    finally:
        dist.destroy_process_group()
    place, waits = watchdog._place()
    assert "_place" in place
    assert not waits
