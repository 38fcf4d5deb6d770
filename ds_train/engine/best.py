"""Which evaluation is the best one so far, and when there have been enough that weren't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_train.config.checkpoint import CheckpointSection

if TYPE_CHECKING:
    from ds_train.engine.loop import EvalResult


class Best:
    """The best evaluation by `checkpoint.best`: `step` and `value` are None until there is one."""

    def __init__(self, section: CheckpointSection, saved: Mapping[str, Any] | None = None) -> None:
        """`saved` is what `record` gave when the checkpoint was saved that the run goes on from."""
        self._section, saved = section, saved or {}
        # By another score, or by none before, the choice begins anew.
        known = saved if saved.get("by") == section.best else {}
        self.step: int | None = known.get("step")
        self.value: float | None = known.get("value")
        self._worse: int = known.get("worse", 0)

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"by": self._section.best, "step": self.step, "value": self.value, "worse": self._worse}

    def see(self, scores: EvalResult) -> bool:
        """Whether this evaluation is better than all before; False where nobody asks. One that isn't a number isn't."""
        if self._section.best is None:
            return False
        value = float(scores.record()[self._section.best])
        sign = 1.0 if self._section.best == "accuracy" else -1.0
        if value != value or (self.value is not None and sign * value <= sign * self.value):
            self._worse += 1
            return False
        self.step, self.value, self._worse = scores.step, value, 0
        return True

    @property
    def patience_ended(self) -> bool:
        """Whether as many evaluations in a row weren't better as the recipe waits for."""
        return self._section.patience is not None and self._worse >= self._section.patience
