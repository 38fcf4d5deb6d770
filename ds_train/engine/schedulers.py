"""What Slurm and OpenMPI tell a process that they started themselves, in the variables of torch.distributed.

`srun` and `mpirun` start ranks directly, without DeepSpeed's launcher. Pure functions of the environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ds_train.errors import user_error

_FIRST_PORT, _PORTS = 20000, 10000


def scheduler_place(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT of a process of `srun` or `mpirun`.

    Empty for any other process, also one with a RANK of its own. MASTER_* that are set are kept.

    Raises:
        UserError: hosts have unequal numbers of ranks, or nothing says where they meet.
    """
    if "RANK" in env:
        return {}
    # The batch script itself has SLURM_PROCID too; only a step has its number of tasks.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _one_device(env, _slurm(env))
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return _one_device(env, _openmpi(env))
    return {}


def _slurm(env: Mapping[str, str]) -> dict[str, str]:
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env["SLURM_STEP_NUM_TASKS"])
    if len(set(counts)) > 1:
        reason = "hosts differ in their ranks, which one layout can't use evenly"
        raise user_error("SLURM_STEP_TASKS_PER_NODE", reason, "give srun --ntasks-per-node", ",".join(map(str, counts)))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    # Steps of one job may run side by side.
    number = int(env.get("SLURM_JOB_ID", 0)) * 16 + int(env.get("SLURM_STEP_ID", 0))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_SIZE": str(counts[0]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or ("127.0.0.1" if len(counts) == 1 else first_node(nodes)),
        "MASTER_PORT": env.get("MASTER_PORT") or str(_FIRST_PORT + number % _PORTS),
    }


def _openmpi(env: Mapping[str, str]) -> dict[str, str]:
    size, on_host = env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_LOCAL_SIZE"]
    if int(size) % int(on_host):
        reason = f"this host has {on_host} of {size} ranks, and all hosts are to have as many"
        raise user_error("OMPI_COMM_WORLD_LOCAL_SIZE", reason, "give mpirun --map-by ppr:N:node", on_host)
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if size == on_host else None)
    if address is None:
        fix = "mpirun -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500, with the name of rank 0's host"
        raise user_error("MASTER_ADDR", "OpenMPI doesn't say where ranks of several hosts meet", fix)
    # Two runs on one host differ in the process that started them.
    job = int(re.sub(r"\D", "", env.get("PMIX_NAMESPACE", "")) or 0)
    return {
        "RANK": env["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": env["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_SIZE": on_host,
        "MASTER_ADDR": address,
        "MASTER_PORT": env.get("MASTER_PORT") or str(_FIRST_PORT + job % _PORTS),
    }


def _one_device(env: Mapping[str, str], place: dict[str, str]) -> dict[str, str]:
    """A scheduler that gives every task a device of its own (--gpus-per-task) numbers it 0 in each."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    return place | {"LOCAL_RANK": "0"} if visible and "," not in visible else place


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of the tasks on each node: `4(x2),3` is 4, 4, 3."""
    counts = []
    for part in text.split(","):
        written = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if written is None:
            raise user_error("SLURM_STEP_TASKS_PER_NODE", "not a list of tasks", "such as 4(x2)", text)
        counts += [int(written[1])] * int(written[2] or 1)
    return counts


def first_node(nodes: str) -> str:
    """First of Slurm's short form of a list of nodes: `gpu[07-09,12]-ib,login1` begins with gpu07-ib.

    Raises:
        UserError: there is no name in it.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise user_error("SLURM_STEP_NODELIST", "it names no node", "set MASTER_ADDR", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
