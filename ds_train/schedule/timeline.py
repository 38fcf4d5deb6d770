"""The run's clock: which tokens each optimizer step trains on. Everything that changes along a run follows from it.

The clock counts the tokens that have been trained on, over all ranks. A step's shape (samples, length) is a function
of the clock at its start, so the timeline of a run follows from the recipe and the run's length alone: a run is resumed
from its number of steps, and the clock is the same at every number of ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_train.config import RunConfig
from ds_train.schedule.learning_rate import plan_length


@dataclass(frozen=True)
class StepShape:
    """What one optimizer step trains on.

    `samples` samples of `length` tokens over all ranks, a multiple of the recipe's global batch; `before` and `after`
    are the clock at its start and end. Each of the data's windows is cut into `parts` samples, of which the step takes
    numbers `first` onwards, counted along the run. `patch` tokens share a position.
    """

    step: int
    samples: int
    length: int
    before: int
    first: int
    parts: int
    patch: int = 1

    @property
    def after(self) -> int:
        """The clock at the step's end."""
        return self.before + self.samples * self.length


@dataclass(frozen=True)
class Skip:
    """From step `step` (counted from 0) on, samples come from `windows` windows further along the run's order."""

    step: int
    windows: int


@dataclass(frozen=True)
class Timeline:
    """Shapes of all steps, kept as the first step of every stretch of equal ones.

    `total_tokens` is what the run is made for: the place of the last step's end on every curve. `skips` are what
    roll-backs have left out of the data, in the order in which they were decided; they leave steps and clock alone. One
    that goes back further than an earlier one leaves out what that one did, too, and stands in its place.
    """

    stretches: tuple[StepShape, ...]
    steps: int
    total_tokens: int
    skips: tuple[Skip, ...] = ()

    def at(self, step: int) -> StepShape:
        """Shape of step `step`, counted from 0."""
        start = self.stretches[bisect_right([stretch.step for stretch in self.stretches], step) - 1]
        past = step - start.step
        taken = past * start.samples
        before = start.before + taken * start.length
        skipped = start.parts * sum(skip.windows for skip in self._standing() if skip.step <= step)
        return replace(start, step=step, before=before, first=start.first + taken + skipped)

    def skipping(self, first: int, stop: int) -> Timeline:
        """The timeline on which step `first` comes again, and no window of steps `first` to `stop` - 1 does."""
        start, end = self.at(first), self.at(stop - 1)
        windows = -(-(end.first + end.samples) // end.parts) - start.first // start.parts
        return replace(self, skips=(*self.skips, Skip(first, windows)))

    def _standing(self) -> list[Skip]:
        found: list[Skip] = []
        for skip in self.skips:
            found = [*(earlier for earlier in found if earlier.step <= skip.step), skip]
        return found

    def shapes(self, first: int, stop: int) -> Iterator[StepShape]:
        """Shapes of steps `first` to `stop` - 1."""
        return (self.at(step) for step in range(first, stop))

    def tokens_after(self, steps: int) -> int:
        """The clock after `steps` steps."""
        return self.at(steps - 1).after if steps else 0

    def samples_after(self, steps: int) -> int:
        """Samples that `steps` steps have gone past, but for what was left out."""
        last = replace(self, skips=()).at(max(0, steps - 1))
        return last.first + last.samples if steps else 0


def make_timeline(run: RunConfig, samples_per_epoch: int) -> Timeline:
    """The timeline of `run` over data of that many windows.

    As long as a run of full-sized steps, rounded up to whole ones, whatever shapes its steps have.
    """
    length, samples = run.data.sequence_length, run.batch.global_samples
    total = plan_length(run.schedule, samples * length, samples_per_epoch, samples) * samples * length
    return cut_timeline(run, total)


def cut_timeline(run: RunConfig, total_tokens: int) -> Timeline:
    """The timeline of a run of `total_tokens`."""
    window, batch = run.data.sequence_length, run.batch.global_samples
    repack = run.curriculum.how == "repack"
    stages = shape_stages(run)
    stretches: list[StepShape] = []
    step = tokens = windows = 0
    for number, (_, length, patch) in enumerate(stages):
        last = number + 1 == len(stages)
        # Less than a token off: a share that is exact in decimals is a hair more in floats.
        end = total_tokens if last else math.ceil(stages[number + 1][0] * total_tokens - 1e-6)
        samples = batch * (window // length) if run.curriculum.keep_tokens else batch
        count = max(0, math.ceil((end - tokens) / (samples * length)))
        parts = window // length if repack else 1
        # Whole windows: the next length must not start in the middle of one.
        whole = parts // math.gcd(parts, samples)
        count = -(-count // whole) * whole
        if count:
            stretches.append(StepShape(step, samples, length, tokens, windows * parts, parts, patch))
            step += count
            tokens += count * samples * length
            windows += count * samples // parts
    return Timeline(tuple(stretches), step, total_tokens)


def shape_stages(run: RunConfig) -> list[tuple[float, int, int]]:
    """(share of the run at which it begins, tokens per sample, tokens per patch) of each shape of samples."""
    if run.patch.size > 1:
        length = run.data.sequence_length
        return [(0.0, length, run.patch.size), (run.patch.fraction, length, 1)]
    return [(begins, length, 1) for begins, length in _length_stages(run)]


def _length_stages(run: RunConfig) -> list[tuple[float, int]]:
    """(share of the run at which it begins, tokens per sample) of each length that the recipe's samples have."""
    curriculum, full = run.curriculum, run.data.sequence_length
    if curriculum.kind == "none":
        return [(0.0, full)]
    if curriculum.kind == "discrete":
        return list(zip((0.0, *curriculum.until), (*curriculum.lengths, full), strict=True))
    start, power = curriculum.start_length, curriculum.root if curriculum.kind == "root" else 1.0

    def begins(length: int) -> float:
        grown = (length - start) / (full - start)
        return curriculum.fraction * float(grown**power)

    return [(0.0, start), *((begins(length), length) for length in allowed_lengths(run) if length > start)]


def allowed_lengths(run: RunConfig) -> list[int]:
    """The lengths that samples may have, in rising order: divisors of the window, or multiples."""
    curriculum, full = run.curriculum, run.data.sequence_length
    if curriculum.how == "repack" or curriculum.keep_tokens:
        return [length for length in range(1, full + 1) if full % length == 0]
    return [*range(curriculum.multiple, full, curriculum.multiple), full]
