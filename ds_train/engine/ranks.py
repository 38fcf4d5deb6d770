"""This process as one rank among many: who it is, how ranks meet, and how they end together."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ds_train.engine.cores import bind_to_cores
from ds_train.engine.network import interface_to
from ds_train.engine.schedulers import scheduler_place
from ds_train.errors import EXIT_CODE, STOPPED_CODE, Stopped, UserError, print_anything, user_error
from ds_train.plan.topology import Device, device_here, known_device

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

MEETING_TIMEOUT = timedelta(hours=4)
"""How long ranks wait for one another: rank 0 may be tokenizing the data while the others wait."""

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_LARGE_BLOCK_BYTES = 2**20

_FAREWELL_S = 20.0
"""How long a rank waits for rank 0 to say what is wrong, before it says it and ends by itself."""


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the launch, from the variables that the launcher sets."""

    rank: int
    ranks: int
    local_rank: int
    ranks_per_host: int
    device: Device

    @property
    def is_main(self) -> bool:
        """Rank 0 speaks, writes and decides."""
        return self.rank == 0


def rank_info() -> RankInfo:
    """This process's place, also where Slurm or OpenMPI started it. Outside of a launcher it is the only rank.

    Imports no torch.
    """
    os.environ.update(scheduler_place(os.environ))
    env = os.environ
    ranks = int(env.get("WORLD_SIZE", 1))
    named = env.get("DS_ACCELERATOR")
    return RankInfo(
        rank=int(env.get("RANK", 0)),
        ranks=ranks,
        local_rank=int(env.get("LOCAL_RANK", 0)),
        ranks_per_host=int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or ranks),  # torchrun says the second
        device=known_device(named, "DS_ACCELERATOR") if named else device_here(),
    )


def meet(info: RankInfo, timeout: timedelta = MEETING_TIMEOUT) -> None:
    """Initialise torch.distributed through DeepSpeed, quietly, and without compiling anything that takes long."""
    os.environ["DS_ACCELERATOR"] = info.device
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if info.ranks == 1:
        os.environ.setdefault("MASTER_PORT", "0")  # nobody else needs to know the port
    if info.ranks > info.ranks_per_host and (interface := interface_to(os.environ["MASTER_ADDR"])) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # It prints what memory is in use, whatever the logger's level (bf16_optimizer.py:54).
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    _import_muon()
    # Its CPU collectives over shared memory take over a minute to compile and leave 66 MB a rank in /dev/shm.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    if info.device == "cuda":
        _check_device(info)
    # Before the first collective: groups of NCCL belong to a device.
    get_accelerator().set_device(info.local_rank)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    if info.device == "cpu":
        from ds_kernels.memory import reuse_memory

        reuse_memory()


def _check_device(info: RankInfo) -> None:
    """Refuse what torch would end with on every rank: a build without CUDA, no driver, a device that isn't there.

    Raises:
        UserError: this rank's device isn't among those that torch sees.
    """
    import torch

    seen = torch.cuda.device_count()
    if info.local_rank < seen:
        return
    where, built = f"on {socket.gethostname()}", torch.version.cuda or torch.version.hip
    if built is None:
        reason = f"torch {torch.__version__} {where} is built without CUDA"
        fix = "install torch's CUDA build, or set cpu to train on the processor"
    elif seen == 0:
        reason = f"torch {torch.__version__} sees no device {where}"
        fix = f"see whether nvidia-smi (or rocm-smi) shows one, and a driver as new as {built}"
    else:
        reason = f"rank {info.rank} is number {info.local_rank} {where}, where torch sees {seen} devices"
        fix = "start one rank for each, or let CUDA_VISIBLE_DEVICES name more"
    raise user_error("DS_ACCELERATOR", reason, fix, info.device)


def _import_muon() -> None:
    """DeepSpeed's Muon, which ZeRO imports whatever the optimizer is: its functions are compiled when they are first
    called, not as they are read. That brings in torch._inductor, a fifth of a rank's start."""
    import torch

    compile_ = torch.compile

    def at_first_call(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: at_first_call(function, **options)
        compiled = cache(lambda: compile_(function, **options))
        return wraps(function)(lambda *arguments, **named: compiled()(*arguments, **named))

    torch.compile = at_first_call  # type: ignore[assignment]
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        torch.compile = compile_


def settle(info: RankInfo, bind_cores: bool = True) -> None:
    """Cores and memory of a rank on a CPU; call it before the first tensor is made and the first thread started."""
    if info.device == "cpu":
        if bind_cores:
            bind_to_cores(info.local_rank, info.ranks_per_host)
        return_freed_memory()


def return_freed_memory() -> None:
    """Let large freed blocks go back to the system at once, on Linux CPUs; call it before the first tensor is made.

    glibc otherwise raises its threshold for own mappings to 32 MB, and what lies below it fragments the heap. Tensors
    of that size are another allocator's (ds_kernels/memory.py). Where that isn't there, what is given back has to be
    mapped again, 4 KiB at a time, so torch asks for huge pages for blocks of 2 MB and more
    (c10/core/impl/alloc_cpu.cpp).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def versions() -> dict[str, str]:
    """Versions of what decides on numbers."""
    libraries = {name: version(name) for name in ("ds_train", "torch", "deepspeed", "transformers")}
    return {"python": platform.python_version(), **libraries}


def leave() -> None:
    """Take torch.distributed down; without it the interpreter's exit aborts now and then."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this rank's process: Python's threads and exit functions come to their end, the interpreter isn't taken down.

    Groups that DeepSpeed still holds outlive `leave`; one of their threads that wants the interpreter's lock while it
    is taken down aborts the process of a run that ended well ("terminate called without an active exception").
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Wait until every rank is here."""
    import torch

    torch.distributed.barrier()


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all ranks, in place."""
    import torch

    if torch.distributed.get_world_size() > 1:  # else it would cost more than a small step
        torch.distributed.all_reduce(tensor)
    return tensor


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what this rank draws from: the CPU's generator and its device's.

    torch.manual_seed seeds every kind of device: for those that aren't there it writes down where it was called from,
    which takes 0.15 ms (torch/cuda/__init__.py, `_lazy_call`).
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def on_main_first(info: RankInfo, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0, then hand its result, or its `UserError`, to every rank. The result must pickle."""
    import torch

    box: list[Any] = [None, None]
    if info.is_main:
        try:
            box[0] = work()
        except UserError as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _main_waits() -> bool:
    """Whether rank 0 is there: it listens where ranks meet."""
    address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True


def run_to_exit_code(body: Callable[[RankInfo], None]) -> int:
    """Run `body` with this process's place. A `UserError` is printed by rank 0, a line per problem; exit code 2. A run
    that was told to stop has exit code 75.

    The launcher kills every rank as soon as one ends badly, so the others leave the word to rank 0 first. Where rank 0
    still waits for them after a while, it hasn't met what they have (a file that their host lacks, say): they tell it.
    """
    print_anything()
    try:
        body(rank_info())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_FAREWELL_S)
        if rank == "0" or _main_waits():
            here = "" if rank == "0" else f" (rank {rank} on {socket.gethostname()})"
            for problem in error.problems:
                print(f"error{here}: {problem}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except Stopped as stopped:
        if str(stopped) and os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        return STOPPED_CODE
    finally:
        if "torch" in sys.modules:
            leave()
    return 0
