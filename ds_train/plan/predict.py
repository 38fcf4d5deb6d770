"""What a run will need and how long its steps will take: memory and time models of one recipe on one cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_train.config import RunConfig
from ds_train.plan.batch import BatchPlan
from ds_train.plan.facts import Facts
from ds_train.plan.hardware import GIB, Hardware, hardware_of
from ds_train.plan.memory import Choice, MemoryModel, RankMemory
from ds_train.plan.model_size import read_config
from ds_train.plan.throughput import StepTime, TimeModel
from ds_train.plan.topology import Cluster, Layout
from ds_train.plan.transformers_keys import known_architectures


@dataclass(frozen=True)
class Prediction:
    """Predicted peak memory of each pipeline stage's ranks, and a step's time where the hardware is known.

    `hardware` names what figures were used; `step` and `tflops_per_device` are None without any. `limit_bytes` and
    `host_limit_bytes` are what a rank has; None where that isn't known.
    """

    stages: tuple[RankMemory, ...]
    limit_bytes: int | None
    host_limit_bytes: int | None
    hardware: str | None
    step: StepTime | None
    tflops_per_device: float | None

    @property
    def worst(self) -> RankMemory:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda rank: (rank.device_bytes, rank.host_bytes))

    @property
    def shortage(self) -> str | None:
        """Why it doesn't fit, as "needs 91.3 GiB of 80.0"; None where it does, or no limit is known."""
        return shortage(self.worst, self.limit_bytes, self.host_limit_bytes)

    @property
    def summary(self) -> str:
        """Peak and step time in a phrase."""
        host = self.worst.host_bytes
        parts = [f"{self.worst.device_bytes / GIB:.2f} GiB a rank at its peak"]
        parts += [f"{host / GIB:.2f} GiB of host memory"] if host else []
        parts += [f"{self.step.seconds:.3g} s a step on {self.hardware}"] if self.step else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "memory": [{"stage": rank.stage, "device": rank.device, "host": rank.host} for rank in self.stages],
            "device_bytes": self.worst.device_bytes,
            "host_bytes": self.worst.host_bytes,
            "limit_bytes": self.limit_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "fits": self.shortage is None,
            "hardware": self.hardware,
            "step_seconds": self.step.seconds if self.step else None,
            "step_parts": self.step.parts() if self.step else None,
            "tflops_per_device": self.tflops_per_device,
        }


def shortage(rank: RankMemory, limit: int | None, host_limit: int | None) -> str | None:
    """Why a rank's peak doesn't fit, in a phrase; None where it does, or no limit is known."""
    if limit is not None and rank.device_bytes > limit:
        return f"needs {rank.device_bytes / GIB:.1f} GiB of {limit / GIB:.1f}"
    if host_limit is not None and rank.host_bytes > host_limit:
        return f"needs {rank.host_bytes / GIB:.1f} GiB of host memory of {host_limit / GIB:.1f}"
    return None


class Predictor:
    """The models of one recipe on one cluster, for any choice of layout, batch and offload."""

    def __init__(self, run: RunConfig, cluster: Cluster, memory: MemoryModel, hardware: Hardware | None) -> None:
        self.memory, self.hardware, self._cluster = memory, hardware, cluster
        self.time = TimeModel(memory, hardware, cluster) if hardware is not None else None
        self.limit = hardware.memory_bytes if hardware is not None else None
        self.host_limit = hardware.host_bytes if hardware is not None else None

    @staticmethod
    def of(facts: Facts) -> Predictor | None:
        """None where the model's sizes aren't known here, or its family's code isn't understood."""
        run = facts.run
        arch, found = facts.arch, facts.outline
        if arch is None or found is None:
            return None
        memory = MemoryModel(run, found, arch, facts.cluster.device)
        return Predictor(run, facts.cluster, memory, hardware_of(facts.cluster))

    def predict(self, choice: Choice) -> Prediction:
        """Memory of every stage, and time."""
        step = self.time.step(choice) if self.time else None
        tflops = self.time.tflops_per_device(choice) if self.time else None
        name = self.hardware.name if self.hardware else None
        return Prediction(tuple(self.memory.ranks(choice)), self.limit, self.host_limit, name, step, tflops)


def unknown(facts: Facts) -> tuple[str, str]:
    """(why nothing can be predicted, what to do about it) where there is no `Predictor` of a recipe."""
    path = facts.run.model.path
    if path is not None and read_config(path, facts.run.model.revision) is None:
        return f"the config.json of {path} isn't on this machine", f"fetch it: hf download {path} config.json"
    if facts.arch not in known_architectures():
        return f"transformers has no family {facts.arch}", "give a model_type of the installed transformers"
    if path is None and facts.vocabulary is None and "vocab_size" not in facts.run.model.config:
        return "the tokenizer's size isn't known before it is loaded", "set model.vocab_size"
    return f"the planner doesn't understand the code of family {facts.arch}", "measure a short run"


def chosen(run: RunConfig, layout: Layout, batch: BatchPlan, stage: int) -> Choice:
    """The choice that a recipe without `auto` makes."""
    parallel = run.parallel
    assert parallel.offload_optimizer != "auto"
    assert parallel.offload_params != "auto"
    return Choice(
        layout, stage, batch.micro_samples, batch.accumulation, parallel.offload_optimizer, parallel.offload_params,
        run.model.activation_checkpointing is True,
    )  # fmt: skip
