"""How fast a run goes and what it takes, since its last metrics line: of all ranks, by one small collective a line."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import psutil
import torch

from ds_train.config import RunConfig
from ds_train.engine.build import Assembly
from ds_train.engine.loop import StepResult
from ds_train.engine.ranks import RankInfo, all_sum
from ds_train.track.flops import flops_per_token, mfu
from ds_train.track.memory import memory
from ds_train.track.peak import measure_peak_flops
from ds_train.track.phases import PHASES

_LOOK_EVERY_S = 1.0
_LOOK_AT_MEMORY_EVERY_S = 0.1


class Speed:
    """Rates, phases of the step and memory since the last call of `take`."""

    def __init__(self, run: RunConfig, parts: Assembly, info: RankInfo) -> None:
        parameters = parts.part.matrix_parameters
        config = parts.model.config
        self._flops_per_token = cache(lambda length: flops_per_token(config, parameters, length))
        peak = run.track.peak_tflops
        rank_peak = measure_peak_flops(parts.model.dtype, parts.engine.device) if peak == "auto" else peak * 1e12
        self._peak_flops = rank_peak * info.ranks
        self._info, self._clock, self._device = info, parts.clock, parts.engine.device
        self._host: dict[str, float] = {"host_cpu_percent": 0.0, "host_memory_percent": 0.0}
        self._memory: dict[str, float] = {}
        self._host_seen_s = self._memory_seen_s = -math.inf
        self._pipeline = parts.part.pipeline is not None
        self._reset()

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._steps += 1
        self._tokens += result.real_tokens
        positions = result.real_tokens / result.patch
        self._flops += positions * self._flops_per_token(result.sequence_length // result.patch)
        self._seconds += result.seconds

    def add_save(self, stall_seconds: float) -> None:
        """Count a save, during which no step was trained for that long."""
        self._save_seconds += stall_seconds

    def take(self) -> dict[str, Any]:
        """What a metrics line says of them. Collective.

        tokens_per_second and mfu are the whole run's. `step_ms` is a step's time, the mean of steps and ranks: a rank
        that begins early waits for the others within its step. `<phase>_ms` are the parts of it; `save_ms` come on top.
        `imbalance` is the slowest rank's time of forward and backward over the mean's, `slowest_rank` that rank.
        memory_mb and memory_peak_mb are the fullest rank's, host_cpu_percent and host_memory_percent those of each
        host.
        """
        rows = self._of_all_ranks()
        steps, seconds = max(1, self._steps), sum(row["seconds"] for row in rows) / len(rows)
        record: dict[str, Any] = {
            "tokens_per_second": self._tokens / (seconds or math.inf),
            "mfu": mfu(self._flops / (seconds or math.inf), self._peak_flops),
            "step_ms": 1e3 * seconds / steps,
            "save_ms": 1e3 * self._save_seconds / steps,
        }
        spent = {phase: 1e3 * sum(row[phase] for row in rows) / len(rows) / steps for phase in PHASES}
        # What no phase knows of: from the step's end, which the clock sees, to that of this host.
        spent["other"] = max(0.0, record["step_ms"] - sum(spent.values()) + spent["other"])
        record |= {f"{phase}_ms": ms for phase, ms in spent.items() if self._pipeline or phase != "pipeline"}
        work = [row["forward"] + row["backward"] for row in rows]
        record["imbalance"] = max(work) * len(work) / (sum(work) or math.inf)
        record["slowest_rank"] = work.index(max(work))
        record |= {name: max(row[name] for row in rows) for name in ("memory_mb", "memory_peak_mb")}
        for name in ("host_cpu_percent", "host_memory_percent"):
            record[name] = [round(row[name], 1) for row in rows[:: self._info.ranks_per_host]]
        self._reset()
        return record

    def _reset(self) -> None:
        self._steps, self._tokens, self._seconds, self._flops, self._save_seconds = 0, 0, 0.0, 0.0, 0.0

    def _of_all_ranks(self) -> list[dict[str, float]]:
        own = {"seconds": self._seconds} | self._clock.take() | self._see_memory() | self._see_host()
        if self._info.ranks == 1:
            return [own]
        table = torch.zeros(self._info.ranks, len(own), dtype=torch.float64)
        table[self._info.rank] = torch.tensor(list(own.values()), dtype=torch.float64)
        gathered: Sequence[Sequence[float]] = all_sum(table.to(self._device)).tolist()
        return [dict(zip(own, row, strict=True)) for row in gathered]

    def _see_memory(self) -> dict[str, float]:
        """Not at every step of a small model: asking the system takes longer than writing the record."""
        now = time.monotonic()
        if now - self._memory_seen_s > _LOOK_AT_MEMORY_EVERY_S:
            self._memory_seen_s, self._memory = now, memory(self._info.device)
        return self._memory

    def _see_host(self) -> dict[str, float]:
        """One rank of each host tells; the share of processors in use is that since it last looked."""
        now = time.monotonic()
        if self._info.local_rank == 0 and now - self._host_seen_s > _LOOK_EVERY_S:
            self._host_seen_s = now
            memory_percent = psutil.virtual_memory().percent
            self._host = {"host_cpu_percent": psutil.cpu_percent(), "host_memory_percent": memory_percent}
        return self._host
