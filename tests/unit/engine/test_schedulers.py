"""The place of ranks that Slurm or OpenMPI started, from environments as they set them."""

from __future__ import annotations

import pytest

from ds_train.engine.ranks import rank_info
from ds_train.engine.schedulers import first_node, scheduler_place, tasks_per_node
from ds_train.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[06-09]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip


def test_a_task_of_srun() -> None:
    place = scheduler_place(SLURM)
    port = int(place.pop("MASTER_PORT"))
    assert place == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "gpu07"}
    assert 1024 < port < 32768, "below the ports that systems give to anybody"
    assert scheduler_place({**SLURM, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)
    assert scheduler_place({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "7"})["MASTER_ADDR"] == "head"
    assert scheduler_place({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8"})["MASTER_ADDR"] == "127.0.0.1"


def test_who_has_a_place_already_keeps_it() -> None:
    assert scheduler_place({}) == {}
    assert scheduler_place({**SLURM, "RANK": "0"}) == {}
    script = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert scheduler_place(script) == {}, "the batch script isn't a task, though it has SLURM_PROCID"


def test_a_device_of_its_own_is_number_0() -> None:
    assert scheduler_place({**SLURM, "CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert scheduler_place({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


def test_a_process_of_torchrun_knows_how_many_share_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (rank_info().ranks, rank_info().ranks_per_host) == (16, 8)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert rank_info().ranks_per_host == 4


def test_a_process_of_mpirun() -> None:
    assert scheduler_place(OPENMPI) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
    }  # fmt: skip
    here = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-vm-123@1"}
    del here["MASTER_ADDR"], here["MASTER_PORT"]
    assert scheduler_place(here)["MASTER_ADDR"] == "127.0.0.1"
    assert scheduler_place(here)["MASTER_PORT"] != scheduler_place({**here, "PMIX_NAMESPACE": "x9@1"})["MASTER_PORT"]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,3(x2)"}, "SLURM_STEP_TASKS_PER_NODE=4,3,3: hosts differ"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "this host has 3 of 4 ranks"),
        ({key: value for key, value in OPENMPI.items() if key != "MASTER_ADDR"}, "mpirun -x MASTER_ADDR"),
    ],
)
def test_what_no_layout_could_use_is_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        scheduler_place(env)
    assert says in str(caught.value)


def test_slurms_short_forms() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("16") == [16]
    with pytest.raises(UserError):
        tasks_per_node("two")
    for nodes, first in (
        ("gpu07", "gpu07"),
        ("a,b", "a"),
        ("gpu[07-09,12],x", "gpu07"),
        ("r[1-2]n[003,7]-ib,z", "r1n003-ib"),
        ("n[5]", "n5"),
    ):
        assert first_node(nodes) == first
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_node("")


def test_a_rank_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {**SLURM, "DS_ACCELERATOR": "cpu"})
    info = rank_info()
    assert (info.rank, info.ranks, info.local_rank, info.ranks_per_host) == (5, 8, 1, 4)
    assert rank_info() == info
