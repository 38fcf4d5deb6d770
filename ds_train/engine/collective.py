"""`python -m ds_train.engine.collective`: one rank of a trial: do all ranks reach one another, and how fast?"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

RESULT = "collective: "
TIMEOUT_S = 120
_ROUNDS = 5
_LARGE_BYTES = {"cpu": 4 * 2**20}
_LARGE_BYTES_ON_DEVICES = 256 * 2**20


def main() -> None:
    """All-reduce small and large messages on every rank; rank 0 prints what they cost."""
    import torch
    import torch.distributed as dist

    from ds_train.engine.ranks import end, leave, meet, rank_info

    info = rank_info()
    meet(info, timedelta(seconds=TIMEOUT_S))
    where: Any = "cpu" if info.device == "cpu" else f"{info.device}:{info.local_rank}"
    small = torch.ones(256, device=where)
    large = torch.ones(_LARGE_BYTES.get(info.device, _LARGE_BYTES_ON_DEVICES) // 4, device=where)

    def seconds(tensor: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(_ROUNDS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if info.device != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - started)
            tensor.fill_(1)
        return best

    latency, duration = seconds(small), seconds(large)
    place = torch.full((info.ranks,), 0.0, device=where)
    place[info.rank] = info.rank
    dist.all_reduce(place)
    right = place.tolist() == list(range(info.ranks))
    if info.is_main:
        carried = 2 * (info.ranks - 1) / info.ranks * large.nbytes
        record = {
            "ranks": info.ranks, "right": right, "latency_s": latency,
            "bytes": large.nbytes, "bytes_per_second": carried / duration,
        }  # fmt: skip
        print(RESULT + json.dumps(record), flush=True)
    leave()
    end(0)


if __name__ == "__main__":
    main()
