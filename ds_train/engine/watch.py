"""Acts on what `health` and `best` decide: goes back to a checkpoint, says why a run ends, picks what is exported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_train.checkpoint import native
from ds_train.checkpoint.manifest import write_json
from ds_train.config import RunConfig
from ds_train.data.ledger import RECORD, data_record
from ds_train.engine.best import Best
from ds_train.engine.build import Assembly
from ds_train.engine.diagnosis import find_nonfinite, finding_record
from ds_train.engine.health import Health, LossScale, Verdict
from ds_train.engine.loop import EvalResult, StepResult
from ds_train.engine.ranks import RankInfo
from ds_train.errors import UserError, user_error
from ds_train.schedule.timeline import Skip, Timeline
from ds_train.track.tracker import Tracker


class RunWatch:
    """Watches over one run. `timeline` is the run's with what roll-backs have left out, `step` the last one seen."""

    def __init__(
        self, run: RunConfig, info: RankInfo, parts: Assembly, tracker: Tracker, folder: Path, timeline: Timeline,
        state: native.TrainState | None,
    ) -> None:  # fmt: skip
        """`folder` is the run's; `state` that of the checkpoint that the run goes on from."""
        self._run, self._info, self._parts, self._tracker, self._folder = run, info, parts, tracker, folder
        skips = tuple(Skip(**skip) for skip in state.skips) if state else ()
        self.timeline = Timeline(timeline.stretches, timeline.steps, timeline.total_tokens, skips)
        self.step = state.step if state else 0
        self._health = Health(run.health, state.health if state else None)
        self._best = Best(run.checkpoint, state.best if state else None)
        self._write_data()

    def go_on_with(self, parts: Assembly) -> None:
        """Watch over this engine."""
        self._parts = parts

    def let_go(self) -> None:
        """Hold no engine, until there is another one."""
        del self._parts

    def decided(self) -> dict[str, Any]:
        """What a checkpoint's state holds of it."""
        skips = [asdict(skip) for skip in self.timeline.skips]
        return {"skips": skips, "health": self._health.record(), "best": self._best.record()}

    def see(self, result: StepResult) -> Verdict:
        """Judge a step, and report what isn't as usual."""
        self.step = result.step
        verdict = self._health.see(result, loss_scale(self._parts.engine))
        for line in verdict.lines:
            self._tracker.log(line, result.step)
        for words in verdict.words:
            self._tracker.note(words)
        return verdict

    def roll_back(self, verdict: Verdict, saver: native.Saver) -> int | None:
        """Bring back the newest checkpoint before a spike, and leave out the samples from there to here. Collective.

        Returns:
            The step to go on from, which the caller saves again: a run that is started again then leaves out the same.
            None where there is no checkpoint.
        """
        (spike,) = verdict.lines
        path = native.newest_whole(self._folder / "checkpoints", self._tracker.note, before=verdict.onset)
        if path is None:
            self._tracker.note(f"there is no checkpoint before step {verdict.onset} to roll back to")
            return None
        native.load(self._parts.engine, self._parts.part, path)
        state = native.read_state(path)
        self.timeline, self.step = self.timeline.skipping(state.step, spike["step"]), state.step
        self._health.go_back(state.health)
        self._best = Best(self._run.checkpoint, state.best)
        windows = self.timeline.skips[-1].windows
        self._tracker.go_back(state.step)
        line = {**spike, "event": "roll-back", "step": state.step, "spike_step": spike["step"], "windows": windows}
        self._tracker.log(line, state.step)
        words = f"the {windows} windows of steps {state.step + 1} to {spike['step']} are left out"
        self._tracker.note(f"rolled back to step {state.step}; {words}")
        error = saver.forget_after(state.step)
        if error is not None:
            self._tracker.note(f"checkpoints after step {state.step} could not be removed: {error}")
        self._write_data()
        return state.step

    def diagnosed(self, result: StepResult) -> UserError:
        """What ends a run whose last verdict is `stop`. Collective."""
        name, reason, fix = self._health.why_stopped(result, loss_scale(self._parts.engine))
        finding = find_nonfinite(self._run, self._parts, self.timeline, result.step - 1)
        line = {"kind": "health", "event": "stopped", "step": result.step, "verdict": name}
        self._tracker.log(line | finding_record(finding), result.step)
        limit = self._run.health.max_nonfinite_steps
        where = f"first in {finding}" if finding else "done again, the last one was finite: suspect a device"
        text = f"{limit} steps in a row to step {result.step} had no finite loss or gradient; {reason}; {where}"
        return user_error("health.max_nonfinite_steps", text, fix, limit)

    def judge(self, scores: EvalResult) -> bool:
        """Whether an evaluation is better than all before."""
        return self._best.see(scores)

    @property
    def patience_ended(self) -> bool:
        """Whether as many evaluations in a row weren't better as the recipe waits for."""
        return self._best.patience_ended

    def note_early_end(self) -> None:
        """Report that the run ends here because its evaluations get no better."""
        patience, best = self._run.checkpoint.patience, self._best
        line = {"kind": "health", "event": "stopped-early", "step": self.step, "best_step": best.step}
        self._tracker.log(line | {"best": best.value}, self.step)
        self._tracker.note(f"the run ends: {patience} evaluations weren't better than the one of step {best.step}")

    def use_best(self) -> int:
        """Give the model the weights of the best evaluation, if there is one: the step that it has then. Collective."""
        if self._best.step is None or self._best.step == self.step:
            return self.step
        path = native.of_step(self._folder / "checkpoints", self._best.step)
        damage = native.damage_of(path)
        if damage is not None:
            self._tracker.note(f"the best checkpoint, {path.name}, can't be exported, the last one is: {damage}")
            return self.step
        native.load(self._parts.engine, self._parts.part, path)
        self._tracker.note(f"exported is step {self._best.step}, the best by {self._run.checkpoint.best}")
        return self._best.step

    def _write_data(self) -> None:
        if not self._info.is_main:
            return
        try:
            record = data_record(self._parts.data.folder, self.timeline.skips)
            write_json(self._folder / RECORD, record | {"steps": self.timeline.steps})
        except OSError as error:  # for people to ask later on: the run itself doesn't need it
            self._tracker.note(f"{self._folder / RECORD} can't be written: {error}; training goes on")


def loss_scale(engine: Any) -> LossScale | None:
    """The loss scale of DeepSpeed's engine after a step; None without fp16."""
    if not engine.fp16_enabled():
        return None
    scaler = engine.optimizer.loss_scaler
    return LossScale(float(scaler.cur_scale), scaler.dynamic and scaler.cur_scale > scaler.min_scale)
