"""What a run makes of its losses: steps that were skipped, losses that leap, and when to go back or to end.

A function of the losses over all ranks and of what a checkpoint holds, so every rank decides the same, and a resumed
run as the unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from ds_train.config.health import HealthSection

if TYPE_CHECKING:
    from ds_train.engine.loop import StepResult

_NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal noise
_SMALLEST_DEVIATION = 0.01  # of the median
Cause = Literal["loss", "gradient", "loss-scale"]


@dataclass(frozen=True)
class LossScale:
    """fp16's loss scale after a step; `can_fall` where another overflow would make it smaller."""

    value: float
    can_fall: bool


@dataclass(frozen=True)
class Verdict:
    """What is to be done after a step: `lines` are for metrics.jsonl, `words` for people.

    `onset` is the first step (counted from 1) of the spike that is rolled back.
    """

    action: Literal["go-on", "roll-back", "stop"] = "go-on"
    lines: tuple[dict[str, Any], ...] = ()
    words: tuple[str, ...] = ()
    onset: int = 0


@dataclass
class HealthState:
    """What the next verdict depends on, as a checkpoint holds it.

    `losses` are the last ones of samples of one `shape` (length, patch); `outliers` and `nonfinite` count steps in a
    row, `skipped` and `roll_backs` those of the run.
    """

    losses: list[float] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    outliers: int = 0
    nonfinite: int = 0
    skipped: int = 0
    roll_backs: int = 0


class Health:
    """Judges the steps of a run, one after the other."""

    def __init__(self, section: HealthSection, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `record` gave when the checkpoint was saved that the run goes on from."""
        self._section, self._state = section, HealthState(**dict(saved or {}))

    def record(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return asdict(self._state)

    def see(self, result: StepResult, scale: LossScale | None = None) -> Verdict:
        """Judge a step. `scale` is given for fp16."""
        state, shape = self._state, [result.sequence_length, result.patch]
        if state.shape != shape:
            state.losses, state.outliers, state.shape = [], 0, shape
        if not result.applied:
            return self._skipped(result, scale)
        state.nonfinite = 0
        center, deviation = self._usual(result.loss)
        outlier = deviation is not None and result.loss > center + self._section.spike_threshold * deviation
        state.outliers = state.outliers + 1 if outlier else 0
        state.losses = [*state.losses, result.loss][-self._section.spike_window :]
        if deviation is None or state.outliers != self._section.spike_steps or self._section.on_spike == "ignore":
            return Verdict()
        return self._spike(result, center, deviation)

    def go_back(self, saved: Mapping[str, Any]) -> None:
        """Take the state that a checkpoint holds; the roll-backs of the run still count, with this one."""
        roll_backs = self._state.roll_backs + 1
        self._state = HealthState(**{**saved, "roll_backs": roll_backs})

    def _usual(self, loss: float) -> tuple[float, float | None]:
        """(median of the last losses, deviation from their trend).

        No deviation while they are too few, and none for a `loss` that isn't above the median.
        """
        losses = self._state.losses
        if len(losses) < self._section.spike_window:
            return math.inf, None
        center = median(losses)
        if loss <= center:
            return center, None
        # A falling loss is no noise: the line through the medians of both halves is taken off (Tukey's resistant line).
        half = len(losses) // 2
        slope = (median(losses[-half:]) - median(losses[:half])) / (len(losses) - half)
        level = [one - slope * place for place, one in enumerate(losses)]
        middle = median(level)
        spread = _NORMAL * median(abs(one - middle) for one in level)
        return center, max(spread, _SMALLEST_DEVIATION * abs(center))

    def _skipped(self, result: StepResult, scale: LossScale | None) -> Verdict:
        state, limit = self._state, self._section.max_nonfinite_steps
        cause: Cause = "gradient" if scale is None or not scale.can_fall else "loss-scale"
        if not math.isfinite(result.loss):
            cause = "loss"
        state.skipped += 1
        state.nonfinite += cause != "loss-scale"
        line = {"kind": "health", "event": "skipped", "step": result.step, "cause": cause}
        line |= {"in_a_row": state.nonfinite, "skipped": state.skipped}
        if scale is not None:
            line["loss_scale"] = scale.value
        if cause == "loss-scale":
            words = f"step {result.step} was skipped: fp16 overflow; the loss scale is {scale and scale.value:g} now"
            return Verdict(lines=(line,), words=(words,))
        words = f"step {result.step} was skipped: its {cause} isn't finite ({state.nonfinite} of {limit} in a row)"
        action: Literal["go-on", "stop"] = "stop" if state.nonfinite >= limit else "go-on"
        return Verdict(action, (line,), (words,))

    def why_stopped(self, result: StepResult, scale: LossScale | None) -> tuple[str, str, str]:
        """(name, reason, fix) of what has ended the run, after the verdict `stop` on its last step."""
        center, deviation = self._usual(result.loss)
        leapt = self._state.outliers > 0 or (
            deviation is not None and result.loss > center + self._section.spike_threshold * deviation
        )
        if leapt:
            reason = "the loss had leapt before: the run diverges"
            return "divergence", reason, "lower optimizer.lr, warm up longer, or set health.on_spike=roll-back"
        if math.isfinite(result.loss) and scale is not None:
            reason = f"gradients overflow fp16 at the smallest loss scale, {scale.value:g}, and the loss is as before"
            return "loss-scale-collapse", reason, "set precision.dtype=bf16, which has the range of fp32"
        return "non-finite", "no leap of the loss came before", "look at the samples and the module that are named"

    def _spike(self, result: StepResult, center: float, deviation: float) -> Verdict:
        state, section = self._state, self._section
        z = (result.loss - center) / deviation
        back = section.on_spike == "roll-back" and state.roll_backs < section.max_roll_backs
        line = {
            "kind": "health", "event": "spike", "step": result.step, "loss": result.loss, "median": center,
            "deviation": deviation, "z": z, "roll_back": back,
        }  # fmt: skip
        words = f"step {result.step}: the loss leapt to {result.loss:.4f}, {z:.1f} deviations above {center:.4f}"
        if section.on_spike == "roll-back" and not back:
            words += f"; there have been {state.roll_backs} roll-backs, so it is only noted"
        onset = result.step - section.spike_steps + 1
        return Verdict("roll-back" if back else "go-on", (line,), (words,), onset)
