"""What nvme offload needs of a host, and the folder on its disk that nobody else writes to."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig
from ds_train.engine.ranks import RankInfo
from ds_train.errors import user_error

_SECTIONS = ("offload_optimizer", "offload_param")


def own_disk(run: RunConfig, deepspeed_json: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration with a folder of the run's own for what it swaps: the names of its files are the same
    in all runs, so that two runs on one disk would read each other's states.

    Raises:
        UserError: DeepSpeed can't build what it reads and writes the disk with.
    """
    if not run.parallel.on_disk:
        return deepspeed_json
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        reason = "the headers of libaio, by which DeepSpeed builds its access to the disk, aren't on this host"
        raise user_error("parallel.nvme_path", reason, "install libaio-dev (libaio-devel), or offload to cpu")
    config = copy.deepcopy(deepspeed_json)
    zero = config["zero_optimization"]
    for section in _SECTIONS:
        if "nvme_path" in zero.get(section, {}):
            zero[section]["nvme_path"] = str(_folder(run))
    return config


def clear_disk(run: RunConfig, info: RankInfo) -> None:
    """Remove what a run that has ended swapped; every rank is past its last step."""
    if run.parallel.on_disk and info.local_rank == 0:
        shutil.rmtree(_folder(run), ignore_errors=True)


def _folder(run: RunConfig) -> Path:
    """The same at every start, so that what a crash has left is written over."""
    place = (Path(run.run_root).expanduser() / run.name).resolve()
    return Path(str(run.parallel.nvme_path)) / f"{run.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
