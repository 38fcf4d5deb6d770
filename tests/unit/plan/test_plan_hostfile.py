"""The hostfile's format: what DeepSpeed's own parser takes gives the same hosts, and what is wrong is named by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_train.errors import UserError
from ds_train.plan.clusters import cluster_of
from ds_train.plan.hostfile import Host, read_hostfile, select


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "a slots=1",
        "a slots=8\nb slots=8\n",
        "# all\n\nworker-1   slots=4  # first\n\tworker-2 slots=2\n",
        "10.0.0.1 slots=3",
    ],
)
def test_hosts_are_those_of_deepspeeds_parser(text: str, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = written(tmp_path, text)
    assert read_hostfile(path) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it names no host"),
        ("# nothing\n\n", "it names no host"),
        ("a\n", "hosts:1=a: this host has no slots"),
        ("a slots=8\nb slot=8\n", "hosts:2='b slot=8': this isn't a host"),
        ("a slots=8 b slots=8\n", "hosts:1='a slots=8 b slots=8': this isn't a host"),
        ("slots=8\n", "hosts:1=slots=8: this isn't a host"),
        ("a slots=0\n", "hosts:1='a slots=0': slots is a whole number from 1 to 4096"),
        ("a slots=two\n", "slots is a whole number"),
        ("a slots=8x\n", "slots is a whole number"),
        ("a slots=-1\n", "slots is a whole number"),
        ("a slots=99999\n", "slots is a whole number"),
        ("a slots=\n", "hosts:1='a slots=': this isn't a host"),
        ("a slots=2\n\nb slots=2\na slots=4\n", "hosts:4=a: this host is on line 1 already"),
        ("worker-[0-3] slots=8\n", "hosts:1=worker-[0-3]: a host's name has"),
        ("-oProxyCommand=reboot slots=8\n", "hosts:1=-oProxyCommand=reboot: a host's name has"),
        ("me@a slots=8\n", "a user's name belongs in ~/.ssh/config"),
    ],
)
def test_a_wrong_line_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_hostfile(written(tmp_path, text))
    assert says in str(caught.value)


def test_every_wrong_line_is_named_at_once_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_hostfile(written(tmp_path, "a\nb slots=x\nc slots=1\n"))
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="can't be read"):
        read_hostfile(tmp_path / "none")


def test_a_plan_takes_a_hostfile(tmp_path: Path) -> None:
    cluster = cluster_of(str(written(tmp_path, "a slots=4\nb slots=4\n")))
    assert (cluster.ranks, cluster.ranks_per_host) == (8, 4)
    with pytest.raises(UserError, match="hosts differ in their slots: a has 4, b has 2"):
        cluster_of(str(written(tmp_path, "a slots=4\nb slots=2\n")))


POOL = [("worker-0", 4), ("worker-1", 4), ("gpu.b", 2)]


@pytest.mark.parametrize("side", ["include", "exclude"])
@pytest.mark.parametrize(
    "text",
    [
        "worker-0",
        "worker-1:0,2",
        "worker-0@worker-1:0,2",
        "worker-1:3@worker-0",
        "worker-1:0@worker-1:2",
        "gpu.b:1,0,1",
        "worker-0:0,1,2,3@gpu.b",
        "",
    ],
)
def test_filters_take_the_slots_of_deepspeeds_parser(text: str, side: str) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    include, exclude = (text, "") if side == "include" else ("", text)
    theirs = parse_inclusion_exclusion(dict(POOL), include, exclude)
    assert select(POOL, include, exclude) == [Host(name, tuple(slots)) for name, slots in theirs.items()]


@pytest.mark.parametrize(
    ("include", "exclude", "says"),
    [
        ("worker-0", "worker-1", "--include says already what is taken"),
        ("worker-7", "", "--include=worker-7: the hostfile has no such host. Fix: one of worker-0, worker-1, gpu.b."),
        ("worker-0@@worker-1", "", "a host's name is missing"),
        ("worker-0:4", "", "worker-0 has no slot 4. Fix: its slots are 0 to 3."),
        ("worker-0:", "", "slots are whole numbers between commas"),
        ("worker-0:0-2", "", "slots are whole numbers between commas"),
        ("worker-0:0:1", "", "slots are whole numbers between commas"),
        ("worker-0@worker-0:1", "", "worker-0 is there whole and by slots"),
        ("", "worker-0@worker-1@gpu.b", "it leaves no host"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(include: str, exclude: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        select(POOL, include, exclude)
    assert says in str(caught.value)


def test_every_wrong_part_of_a_filter_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        select(POOL, exclude="nobody@worker-0:9@worker-1")
    assert len(caught.value.problems) == 2
