"""The hostfile's format: what DeepSpeed's own parser takes gives the same hosts, and what is wrong is named by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_train.errors import UserError
from ds_train.plan.clusters import cluster_of
from ds_train.plan.hostfile import read_hostfile


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
        ("a\n", "hosts:1=a: this isn't a host"),
        ("a slots=8\nb slot=8\n", "hosts:2='b slot=8': this isn't a host"),
        ("a slots=0\n", "hosts:1='a slots=0': slots is a whole number above 0"),
        ("a slots=two\n", "slots is a whole number above 0"),
        ("a slots=2\nb slots=2\na slots=4\n", "hosts:3=a: this host is there twice"),
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
