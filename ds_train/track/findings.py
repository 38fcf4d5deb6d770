"""What a profile says: a sentence for each thing that costs more than it should, with the recipe key that helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operator:
    """All calls of one operator in the window; time without that of the operators that it called."""

    name: str
    calls: int
    self_ms: float
    share: float


@dataclass(frozen=True)
class RankProfile:
    """What one rank saw over `steps` steps.

    `phase_ms` are a step's milliseconds by phase. `operators` are sorted by time and None on a rank that wasn't
    recorded; `memory` are (ms since the window's beginning, MiB of tensors more than then). `problem` is what went
    wrong with its trace.
    """

    rank: int
    steps: int
    phase_ms: Mapping[str, float]
    operators: Sequence[Operator] | None = None
    memory: Sequence[tuple[float, float]] = field(default=(), repr=False)
    problem: str | None = None


@dataclass(frozen=True)
class Setting:
    """The recipe's own words that remedies depend on."""

    workers: int
    zero_stage: int
    tensor: int
    sequence: int
    pipeline: int
    micro_batches: int
    offload: bool
    compiled: bool
    overlap: bool


_DATA, _COLLECTIVES, _OPTIMIZER, _OTHER = 0.05, 0.15, 0.15, 0.08
_IMBALANCE = 1.15
_IDLE_BEYOND_THEORY = 1.25
_COPIES = 0.08
_CALL_MS = 0.02
_COPYING = ("aten::copy_", "aten::_to_copy", "aten::to")


def findings(profiles: Sequence[RankProfile], setting: Setting) -> list[str]:
    """Sentences, the costliest first; one that says so where nothing stands out.

    Phases are means over all ranks, operators those of the first recorded rank.
    """
    phases = {name: sum(p.phase_ms.get(name, 0.0) for p in profiles) / len(profiles) for name in profiles[0].phase_ms}
    total = sum(phases.values()) or 1.0
    share = {name: ms / total for name, ms in phases.items()}
    recorded = next((p.operators for p in profiles if p.operators), ())
    found = [
        *_of_phases(share, setting),
        *_of_ranks(profiles, setting),
        *_of_operators(recorded, share, setting),
    ]
    if not found:
        work = share.get("forward", 0.0) + share.get("backward", 0.0)
        return [f"Nothing stands out: forward and backward are {work:.0%} of a step."]
    return [text for _, text in sorted(found, reverse=True)]


def _of_phases(share: Mapping[str, float], setting: Setting) -> list[tuple[float, str]]:
    found = []
    if (data := share.get("data", 0.0)) > _DATA:
        more = setting.workers < 4
        remedy = f"raise data.workers (now {setting.workers})" if more else "put data.cache_dir on faster storage"
        found.append((data, f"Data loading is {data:.0%} of the step: {remedy}."))
    if (collectives := share.get("collectives", 0.0)) > _COLLECTIVES:
        found.append((collectives, f"Collectives are {collectives:.0%} of the step: {_cheaper_collectives(setting)}."))
    if (optimizer := share.get("optimizer", 0.0)) > _OPTIMIZER:
        remedy = (
            "set parallel.offload_optimizer=none where memory allows, or raise batch.global_samples"
            if setting.offload
            else "raise batch.global_samples, so that there are fewer updates, or parallel.zero_stage"
        )
        found.append((optimizer, f"The optimizer is {optimizer:.0%} of the step: {remedy}."))
    if (other := share.get("other", 0.0)) > _OTHER:
        remedy = "raise batch.micro_samples, so that there is more to do between"
        found.append((other, f"The host's own work is {other:.0%} of the step: {remedy}."))
    idle, theory = share.get("pipeline", 0.0), (setting.pipeline - 1) / (setting.micro_batches + setting.pipeline - 1)
    if setting.pipeline > 1 and idle > 0.1:
        if idle > _IDLE_BEYOND_THEORY * theory:
            remedy = "balance them by parallel.stage_layers, or lower parallel.pipeline"
        else:
            remedy = "raise batch.global_samples or lower batch.micro_samples, for more micro-batches"
        text = f"Pipeline stages wait for one another for {idle:.0%} of the step, {theory:.0%} in theory: {remedy}."
        found.append((idle, text))
    return found


def _cheaper_collectives(setting: Setting) -> str:
    if setting.zero_stage == 3:
        return "parallel.zero_stage=2 gathers no weights, where it fits; otherwise raise batch.micro_samples"
    if setting.tensor > 1:
        return (
            "lower parallel.tensor, whose ranks meet in every layer, and spread states by parallel.zero_stage instead"
        )
    if setting.sequence > 1:
        return "lower parallel.sequence, whose ranks meet in every layer"
    overlap = "" if setting.overlap else "set parallel.overlap_communication=true on devices, or "
    return f"{overlap}raise batch.global_samples, so that gradients are reduced less often"


def _of_ranks(profiles: Sequence[RankProfile], setting: Setting) -> list[tuple[float, str]]:
    work = [p.phase_ms.get("forward", 0.0) + p.phase_ms.get("backward", 0.0) for p in profiles]
    mean, slowest = sum(work) / len(work), max(range(len(work)), key=work.__getitem__)
    if not mean or work[slowest] / mean < _IMBALANCE:
        return []
    lost = work[slowest] / mean - 1
    if setting.pipeline > 1:
        remedy = "give its stage fewer layers by parallel.stage_layers"
    else:
        remedy = "the others wait for it; look at its host's clocks, temperature and neighbours"
    return [(lost, f"Rank {profiles[slowest].rank} computes {lost:.0%} longer than the mean: {remedy}.")]


def _of_operators(
    operators: Sequence[Operator], share: Mapping[str, float], setting: Setting
) -> list[tuple[float, str]]:
    found = []
    copies = sum(operator.share for operator in operators if operator.name in _COPYING)
    if copies > _COPIES and not setting.compiled:
        what = f"Copies between number formats and layouts are {copies:.0%} of the operators' time"
        found.append((copies, f"{what}: model.compile=true joins them with their neighbours."))
    calls, spent = sum(operator.calls for operator in operators), sum(operator.self_ms for operator in operators)
    if calls and spent / calls < _CALL_MS:
        work = share.get("forward", 0.0) + share.get("backward", 0.0)
        what = f"An operator takes {1e3 * spent / calls:.0f} µs on average, little more than its call"
        found.append((work / 2, f"{what}: raise batch.micro_samples or data.sequence_length."))
    return found


def operator_table(profile: RankProfile, rows: int = 15) -> list[tuple[str, str, str, str]]:
    """(operator, share, milliseconds, calls) of the costliest, a step's."""
    steps = max(1, profile.steps)
    return [
        (op.name, f"{op.share:.1%}", f"{op.self_ms / steps:.2f}", f"{op.calls / steps:,.0f}")
        for op in (profile.operators or ())[:rows]
    ]
