"""Fields that say `auto`: every legal way to run a recipe on a cluster, scored by predicted memory and step time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ds_train.config import RunConfig
from ds_train.errors import Problem, UserError, user_error
from ds_train.plan.batch import BatchPlan, uneven
from ds_train.plan.facts import Facts
from ds_train.plan.memory import Choice, RankMemory
from ds_train.plan.predict import Predictor, shortage, unknown
from ds_train.plan.rules import check
from ds_train.plan.stage import effective_stage
from ds_train.plan.topology import Cluster, Layout

AUTO_FIELDS = (
    "parallel.pipeline", "parallel.tensor", "parallel.sequence", "parallel.zero_stage", "parallel.offload_optimizer",
    "parallel.offload_params", "model.activation_checkpointing",
)  # fmt: skip
"""Fields that the planner chooses where they say `auto`; batch.micro_samples with them."""

_LARGEST_MICRO = 64
_RUNNERS_UP = 4
# Times that differ by less are equal: the simpler layout wins.
_EQUAL = 0.01
# Share of a device's memory that a choice may fill: predictions err, and a run that dies costs more than one that is
# a little slower.
FILLED = 0.95


@dataclass(frozen=True)
class Scored:
    """One way to run the recipe, with `run` as it is then written."""

    run: RunConfig
    choice: Choice
    memory: RankMemory
    seconds: float

    @property
    def label(self) -> str:
        """In a phrase: "ZeRO-2, tensor 2, micro-batch 4"."""
        return _label(self.choice)


class Rejected(NamedTuple):
    """A class of layouts of which none can run, and why the nearest of them can't."""

    label: str
    reason: str


@dataclass(frozen=True)
class Search:
    """The best ways to run a recipe (at most five), each in another layout, and why other classes were rejected."""

    ranked: tuple[Scored, ...]
    rejected: tuple[Rejected, ...]
    considered: int
    limited: bool
    """Whether a device's memory is known."""

    @property
    def best(self) -> Scored:
        """What `auto` becomes."""
        return self.ranked[0]


def auto_fields(run: RunConfig) -> list[str]:
    """The dotted keys of the recipe that the planner is asked to choose."""
    return [key for key in AUTO_FIELDS if _value(run, key) == "auto"]


def with_auto(run: RunConfig) -> RunConfig:
    """The recipe with every field that may be `auto` set to it."""
    return settle(run, dict.fromkeys(AUTO_FIELDS, "auto") | {"batch.micro_samples": "auto"})


def settle(run: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The recipe with dotted keys of two parts replaced; without the folder for nvme if these are what leaves it."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    settled = run.model_copy(
        update={name: getattr(run, name).model_copy(update=values) for name, values in sections.items()}
    )
    if _may_use_disks(run) and not _may_use_disks(settled):
        return settled.model_copy(update={"parallel": settled.parallel.model_copy(update={"nvme_path": None})})
    return settled


def keep_choice(run: RunConfig, before: RunConfig) -> RunConfig:
    """`run` with its `auto` fields, and the micro-batch with them, as `before` has them."""
    keys = auto_fields(run) + (["batch.micro_samples"] if run.batch.micro_samples == "auto" else [])
    return settle(run, {key: _value(before, key) for key in keys})


def search(run: RunConfig, cluster: Cluster) -> Search:
    """Score every way to run `run` that its explicit fields leave open.

    Raises:
        UserError: nothing fits, with the reasons; or the model or the hardware isn't known.
    """
    asked = _Asked(run, cluster)
    if not asked.scored:
        raise UserError(asked.problems())
    return Search(tuple(_ranked(asked.scored)), tuple(asked.rejections()), asked.considered, asked.limited)


def nearest(run: RunConfig, cluster: Cluster) -> Scored | UserError:
    """The best way to run `run`, or where none fits the one that lacks least memory; what forbids all of them."""
    asked = _Asked(run, cluster)
    if asked.scored:
        return _ranked(asked.scored)[0]
    if asked.short:
        return min(asked.short, key=lambda scored: scored.memory.device_bytes)
    return UserError(asked.problems())


class _Asked:
    """All candidates of one recipe: those that fit, those that are too large, those that a rule forbids."""

    def __init__(self, run: RunConfig, cluster: Cluster) -> None:
        self._run, self._cluster = run, cluster
        self.scored: list[Scored] = []
        self.short: list[Scored] = []
        self._forbidden: dict[str, list[Problem]] = {}
        self._allowed: set[str] = set()
        self.considered = 0
        base = Facts(settle(run, _plain(run)), cluster)
        predictor = Predictor.of(base)
        if predictor is None:
            reason, fix = unknown(base)
            keys = auto_fields(run)
            if not keys:
                raise user_error("model", reason, fix)
            raise user_error(keys[0], f"the planner can't choose it: {reason}", f"{fix}, or write a value", "auto")
        if predictor.time is None:
            raise user_error(
                "--cluster", f"the figures of this {cluster.device} device aren't known",
                "name a device of the table, such as 1x8:H100, or measure it with `ds-train calibrate`",
            )  # fmt: skip
        self._predictor, self._time = predictor, predictor.time
        self._limit = None if predictor.limit is None else int(predictor.limit * FILLED)
        self._base = base
        for layout in self._layouts():
            self._try(layout)

    @property
    def limited(self) -> bool:
        """Whether a device's memory is known."""
        return self._limit is not None

    def problems(self) -> list[Problem]:
        """Why nothing can run."""
        if not self.short and not self._forbidden:  # no layout of so many ranks has the explicit degrees
            return check(self._base)
        if not self.short:
            # What every layout breaks is wrong with the recipe itself.
            common = [set(map(str, problems)) for problems in self._forbidden.values()]
            shared = set.intersection(*common) if common else set()
            first = next(iter(self._forbidden.values()), [])
            return [problem for problem in first if str(problem) in shared] or first
        reasons = [f"{label} {reason}" for label, reason in self.rejections()]
        keys = auto_fields(self._run)
        return [
            Problem(
                keys[0] if keys else "parallel",
                f"nothing fits on {self._cluster.ranks} ranks at {FILLED:.0%} of their memory: {'; '.join(reasons)}",
                "add ranks, shorten data.sequence_length, or let parallel.offload_optimizer=auto use host memory",
                *(["auto"] if keys else []),
            )
        ]

    def rejections(self) -> Iterator[Rejected]:
        """A line per class of layouts that has no member that fits."""
        good = {_class(scored.choice) for scored in self.scored}
        least: dict[str, Scored] = {}
        for scored in self.short:
            name = _class(scored.choice)
            if name not in least or scored.memory.device_bytes < least[name].memory.device_bytes:
                least[name] = scored
        for name, scored in least.items():
            if name not in good:
                lacking = shortage(scored.memory, self._limit, self._predictor.host_limit)
                yield Rejected(name, str(lacking))
        said: set[str] = set()
        for name, problems in sorted(self._forbidden.items(), key=lambda item: item[0].count("+")):
            reasons = {f"{problem.key}: {problem.reason}" for problem in problems}
            if name not in good and name not in least and name not in self._allowed and not reasons & said:
                yield Rejected(name, "; ".join(sorted(reasons)))
            said |= reasons

    # -- candidates --------------------------------------------------------------------------------------------------

    def _layouts(self) -> Iterator[Layout]:
        ranks, parallel = self._cluster.ranks, self._run.parallel
        shares = self._predictor.memory.shares
        on_host = self._cluster.ranks_per_host
        pipes = _options(parallel.pipeline, (n for n in _divisors(ranks) if n <= shares.layers))
        tensors = _options(parallel.tensor, (n for n in _divisors(on_host) if n <= ranks))
        sequences = _options(parallel.sequence, (n for n in _divisors(on_host)))
        for pipe in pipes:
            for tensor in tensors:
                for sequence in sequences:
                    rest, left = divmod(ranks, pipe * tensor * sequence)
                    if left == 0 and rest:
                        yield Layout(pipe, rest, sequence, tensor)

    def _try(self, layout: Layout) -> None:
        run, parallel = self._run, self._run.parallel
        stages = _options(parallel.zero_stage, (0, 1, 2, 3))
        disks = ("nvme",) if parallel.nvme_path else ()
        for stage in stages:
            for optimizer in _options(parallel.offload_optimizer, ("none", "cpu", *disks)):
                for params in _options(parallel.offload_params, ("none", "cpu", *disks)):
                    if parallel.offload_params == "auto" and params != "none" and (stage < 3 or optimizer != params):
                        continue
                    if parallel.offload_optimizer == "auto" and optimizer != "none" and stage == 0:
                        continue
                    values = {
                        "parallel.pipeline": layout.pipe, "parallel.tensor": layout.tensor,
                        "parallel.sequence": layout.sequence, "parallel.zero_stage": stage,
                        "parallel.offload_optimizer": optimizer, "parallel.offload_params": params,
                        "model.activation_checkpointing": run.model.activation_checkpointing is True,
                    }  # fmt: skip
                    variant = settle(run, values)
                    effective = effective_stage(variant)[0]
                    if effective != stage and parallel.zero_stage == "auto":
                        continue  # the same as another candidate
                    sample = Choice(layout, effective, 1, 1, optimizer, params)
                    problems = check(self._base.on(variant))
                    batches = list(self._batches(layout)) if not problems else []
                    if not problems and not batches:
                        problems = uneven(self._run.batch, layout.data)
                    if problems:
                        self._forbidden.setdefault(_class(sample), problems)
                        continue
                    self._allowed.add(_class(sample))
                    self._score(variant, sample, batches)

    def _batches(self, layout: Layout) -> Iterator[BatchPlan]:
        batch = self._run.batch
        share, left = divmod(batch.global_samples, layout.data)
        if left or not share:
            return
        for micro in _options(batch.micro_samples, (n for n in _divisors(share) if n <= _LARGEST_MICRO)):
            if share % micro == 0:
                evaluation = micro if batch.eval_micro_samples == "auto" else batch.eval_micro_samples
                yield BatchPlan(batch.global_samples, micro, evaluation, share // micro)

    def _score(self, variant: RunConfig, sample: Choice, batches: Sequence[BatchPlan]) -> None:
        memory, limit, host_limit = self._predictor.memory, self._limit, self._predictor.host_limit
        supported = self._base.supports("supports_gradient_checkpointing")
        for again in _options(self._run.model.activation_checkpointing, (False, True) if supported else (False,)):
            for batch in sorted(batches, key=lambda batch: batch.micro_samples):
                choice = Choice(
                    sample.layout, sample.stage, batch.micro_samples, batch.accumulation, sample.offload_optimizer,
                    sample.offload_params, bool(again),
                )  # fmt: skip
                self.considered += 1
                peak = memory.worst(choice)
                if shortage(peak, limit, host_limit):
                    self.short.append(Scored(variant, choice, peak, 0.0))
                    break  # a larger micro-batch needs more
                self.scored.append(Scored(variant, choice, peak, self._time.step(choice).seconds))


def _ranked(scored: Sequence[Scored]) -> list[Scored]:
    """The best way of each layout, the best five of them; of equal times the simplest, then the smallest."""
    fastest = min(candidate.seconds for candidate in scored)

    def order(candidate: Scored) -> tuple[Any, ...]:
        steps = int((candidate.seconds / fastest - 1) / _EQUAL)
        choice = candidate.choice
        degrees = choice.layout.pipe * choice.layout.tensor * choice.layout.sequence
        offloads = (choice.offload_optimizer != "none") + (choice.offload_params != "none")
        simple = (degrees, offloads, choice.checkpointing, choice.stage)
        return steps, *simple, candidate.seconds, candidate.memory.device_bytes

    best: dict[Any, Scored] = {}
    for candidate in sorted(scored, key=order):
        best.setdefault((candidate.choice.layout, candidate.choice.stage), candidate)
    kept = list(best.values())[: 1 + _RUNNERS_UP]
    return [Scored(_written(each), each.choice, each.memory, each.seconds) for each in kept]


def _written(scored: Scored) -> RunConfig:
    return settle(
        scored.run,
        {
            "model.activation_checkpointing": scored.choice.checkpointing,
            "batch.micro_samples": scored.choice.micro_samples,
        },
    )


def _plain(run: RunConfig) -> dict[str, Any]:
    """Values that stand for `auto` while facts about the model alone are looked up."""
    plain = dict(zip(AUTO_FIELDS, (1, 1, 1, 1, "none", "none", False), strict=True))
    return {key: value for key, value in plain.items() if _value(run, key) == "auto"}


def _value(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(run, section), name)


def _may_use_disks(run: RunConfig) -> bool:
    return run.parallel.on_disk or "auto" in (run.parallel.offload_optimizer, run.parallel.offload_params)


def _options(value: Any, otherwise: Iterable[Any]) -> list[Any]:
    return list(otherwise) if value == "auto" else [value]


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _class(choice: Choice) -> str:
    """What candidates are counted together as: which techniques are used, not to which degree."""
    layout = choice.layout
    cuts = [
        name
        for name, degree in (("pipeline", layout.pipe), ("tensor", layout.tensor), ("sequence", layout.sequence))
        if degree > 1
    ]
    return " + ".join([f"ZeRO-{choice.stage}", *cuts, *_offloads(choice)])


def _label(choice: Choice) -> str:
    layout = choice.layout
    parts = [f"ZeRO-{choice.stage}"]
    degrees = {"pipeline": layout.pipe, "data": layout.data, "tensor": layout.tensor, "sequence": layout.sequence}
    parts += [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    parts += [f"micro-batch {choice.micro_samples}", *(["checkpointing"] if choice.checkpointing else [])]
    return ", ".join(parts + _offloads(choice))


def _offloads(choice: Choice) -> list[str]:
    offloads = []
    if choice.offload_optimizer != "none":
        offloads.append(f"optimizer on {choice.offload_optimizer}")
    if choice.offload_params != "none":
        offloads.append(f"parameters on {choice.offload_params}")
    return offloads
