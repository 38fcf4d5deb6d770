"""The steps of one run on this rank with what happens between them: metrics, evaluation, checkpoints, the cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig
from ds_train.engine.ranks import RankInfo, on_main_first, versions
from ds_train.engine.stop import StopRequest
from ds_train.errors import UserError, user_error
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.topology import Cluster

if TYPE_CHECKING:
    from ds_train.checkpoint.native import Saved, TrainState
    from ds_train.engine.build import Assembly
    from ds_train.engine.loop import StepResult
    from ds_train.engine.prune import Pruning
    from ds_train.engine.watch import RunWatch
    from ds_train.engine.watchdog import Watchdog
    from ds_train.track.phases import StepClock
    from ds_train.track.tracker import Tracker


@dataclass(frozen=True)
class Placed:
    """A recipe, and how its ranks share it."""

    run: RunConfig
    plan: RunPlan

    @property
    def record(self) -> dict[str, Any]:
        """How the run's states are spread over ranks, for people and for a word when it changes."""
        return layout_record(self.run, self.plan)


def placed(run: RunConfig, cluster: Cluster) -> tuple[Placed, Placed]:
    """How a recipe is shared, and how from the cut on: the same, but where pruning changes its layout.

    Raises:
        UserError: with everything that is wrong with either layout.
    """
    before = Placed(run, make_plan(run, cluster))
    parallel = run.compress.prune.parallel
    if parallel is None:
        return before, before
    later = run.model_copy(update={"parallel": parallel})
    try:
        return before, Placed(later, make_plan(later, cluster))
    except UserError as error:
        raise UserError(
            replace(problem, key=f"compress.prune.{problem.key}") if problem.key.startswith("parallel.") else problem
            for problem in error.problems
        ) from None


class Session:
    """The steps of one run with what happens between them: metrics, evaluation, checkpoints."""

    def __init__(
        self,
        place: Placed,
        after: Placed,
        info: RankInfo,
        parts: Assembly,
        build: Callable[[Mapping[str, Any], StepClock | None], Assembly],
        tracker: Tracker,
        folder: Path,
        fingerprint: str,
        watch: RunWatch,
        stop: StopRequest,
    ) -> None:
        self.after, self.info, self.build, self.tracker = after, info, build, tracker
        self.folder, self.fingerprint, self.watch, self.stop = folder, fingerprint, watch, stop
        self._at: tuple[int, int] | None = None  # step and tokens
        self._saved_step = 0
        self.watchdog: Watchdog | None = None
        self.pruning: Pruning | None = None
        self.pruned: Mapping[str, Any] = {}
        """What has been cut."""
        self._go_on_with(place, parts)

    def _go_on_with(self, place: Placed, parts: Assembly) -> None:
        """Train with this engine."""
        from ds_train.checkpoint.native import Saver
        from ds_train.engine.speed import Speed

        self.run, self.plan, self.layout, self.parts = place.run, place.plan, place.record, parts
        self.watch.go_on_with(parts)
        self.speed = Speed(self.run, parts, self.info)
        section = self.run.checkpoint
        self.saver = Saver(
            self.folder / "checkpoints",
            parts.engine,
            parts.part,
            section.keep_last,
            section.keep_every,
            in_background=saves_in_background(self.run, self.info.device),
        )

    def prune(self, state: Mapping[str, Any]) -> None:
        """Prune as the recipe says, from the state of a checkpoint on."""
        from ds_train.engine.prune import Pruning, steps_of

        if state.get("cut"):
            self.pruned = state
        elif self.parts.prunable is not None:
            steps = steps_of(self.run, self.watch.timeline)
            self.pruning = Pruning(self.run, self.parts.prunable, self.parts.engine, self.parts.part, steps)
            self.pruning.load_state(state)

    def train(self, done: int, watchdog: Watchdog | None = None, stop_after: int | None = None) -> None:
        """Steps `done` + 1 to `stop_after`, or the timeline's last, each followed by what is due after it."""
        self.watchdog = watchdog
        start = None if self.watch.patience_ended else done
        while start is not None:
            if self.pruning is not None and start >= self.pruning.steps.cut:
                self._cut(start)
            start = self._train_from(start, stop_after or self.watch.timeline.steps)
        if self.stop.agreed:
            self._save_and_stop(done)
        self._note_saves(self.saver.close())

    def _train_from(self, done: int, stop_after: int) -> int | None:
        """Train to the end; or to a step that is rolled back or followed by a cut: gives the one to go on from."""
        from ds_train.engine.loop import due, train_steps

        run, timeline = self.run, self.watch.timeline
        steps = train_steps(
            run, self.plan, self.info, self.parts, timeline, done,
            stop=self.stop, watchdog=self.watchdog, pruning=self.pruning,
        )  # fmt: skip
        with closing(steps):
            for result in self._profiled(steps, done):
                self._at = result.step, result.tokens
                last = result.step == stop_after
                self.speed.add(result)
                if last or result.measured or due(run.track.log_every_steps, result.step):
                    self.tracker.log(self._record(result), result.step)
                back = self._see(result)
                if back is not None:
                    return back
                evaluated = last or due(run.track.eval_every_steps, result.step)
                better = evaluated and self._evaluate(result)
                if self.watch.patience_ended and not last:
                    last = True
                    self.watch.note_early_end()
                if better or (last and run.checkpoint.save_final) or due(run.checkpoint.every_steps, result.step):
                    self._save(result.step, result.tokens)
                self._note_saves(self.saver.ended())
                if last:
                    return None
        return None if self.pruning is None or self.stop.agreed else self.pruning.steps.cut

    def _cut(self, step: int) -> None:
        """Leave the chosen units behind after `step` steps, and go on with an engine around the smaller model."""
        from ds_train.checkpoint import native
        from ds_train.engine.loop import evaluate
        from ds_train.engine.prune import parameters_of

        assert self.pruning is not None
        if self.pruning.removed is None:
            self.pruning.choose()
        self._note_saves(self.saver.close())
        cut = self.pruning.cut()
        before = parameters_of(self.parts.part)
        self.pruning.set_masks(1.0)
        masked = evaluate(self.run, self.parts, step, self.watchdog)
        folder = self.folder / "cut"
        saver = native.Saver(folder, self.parts.engine, self.parts.part, keep_last=1)
        (saved,) = saver.save(self._state(step, self.watch.timeline.tokens_after(step)))
        if saved.error is not None:
            reason = f"its states could not be written for the cut: {saved.error}"
            raise user_error("run_root", reason, "make room there, and start the command again", str(folder))
        self.pruned, clock = {"removed": self.pruning.removed, **cut.record()}, self.parts.clock
        self.pruning = None
        # What holds the engine, which the next one takes the place of.
        self.watch.let_go()
        del saver, self.saver, self.speed, self.parts
        parts = self.build(self.pruned, clock)
        native.load(parts.engine, parts.part, saved.path, cut)
        self._go_on_with(self.after, parts)
        on_main_first(self.info, lambda: shutil.rmtree(folder, ignore_errors=True))
        left = parameters_of(parts.part)
        record: dict[str, Any] = {"kind": "cut", "step": step, "parameters": left, "parameters_before": before}
        record |= cut.left
        note = f"cut after step {step}: {before:,} parameters, now {left:,} ({cut.words})"
        found = evaluate(self.run, parts, step, self.watchdog)
        if masked is not None and found is not None:
            record |= {"masked_loss": masked.loss, "loss": found.loss}
            note += f"; held-out loss {masked.loss:.4f} with these masked, {found.loss:.4f} without them"
        # A run that goes on from the checkpoint of this very step may have cut before.
        if not _has_cut(self.folder, step):
            self.tracker.log(record, step)
        self.tracker.note(note)

    def _profiled(self, steps: Iterator[StepResult], done: int) -> Iterator[StepResult]:
        """`steps`, of which those that the recipe names are recorded."""
        if self.run.track.profile_steps is None:
            return steps
        from ds_train.engine.profile import profiled

        clock, note = self.parts.clock, self.tracker.note
        return profiled(steps, self.run, self.plan, self.info, clock, self.folder, done, note)

    def _see(self, result: StepResult) -> int | None:
        """See to what isn't as usual: the step to go on from after a roll-back."""
        verdict = self.watch.see(result)
        if verdict.action == "go-on":
            return None
        self._note_saves(self.saver.wait())
        if verdict.action == "stop":
            raise self.watch.diagnosed(result)
        back = self.watch.roll_back(verdict, self.saver)
        if back is not None:
            self._save(back, self.watch.timeline.tokens_after(back))
        return back

    def _save_and_stop(self, done: int) -> None:
        step, tokens = self._at or (done, 0)
        self.tracker.note(f"stopping after step {step}: {self.stop.reason or 'another rank was told to'}")
        if self._at is not None and self._saved_step != step:
            self._save(step, tokens)
        self._note_saves(self.saver.wait())
        self.tracker.log({"kind": "stop", "step": step, "reason": self.stop.reason}, step)

    def note_fault(self, verdict: str) -> None:
        """Leave a word on why the run is about to end; from any thread."""
        step = 0 if self._at is None else self._at[0]
        self.tracker.log({"kind": "fault", "step": step, "reason": verdict}, step)

    def _record(self, result: StepResult) -> dict[str, Any]:
        record = dict(vars(result))  # asdict would copy it deeply, at every step
        measured = record.pop("measured")
        return {"kind": "train", **record, **measured, **self.speed.take()}

    def _evaluate(self, result: StepResult) -> bool:
        """Score what is held out; whether it is better than ever before."""
        from ds_train.engine.continuations import continue_prompts
        from ds_train.engine.loop import evaluate

        scores = evaluate(self.run, self.parts, result.step, self.watchdog, self.parts.data.eval_sources)
        if scores is None:
            return False
        better = self.watch.judge(scores)
        record = {"kind": "eval", **scores.record(), "tokens": result.tokens}
        self.tracker.log(record | ({"best": better} if self.run.checkpoint.best else {}), result.step)
        for prompt, text in continue_prompts(self.run, self.parts):
            line = {"kind": "sample", "step": result.step, "tokens": result.tokens, "prompt": prompt, "text": text}
            self.tracker.log(line, result.step)
            self.tracker.note(f"step {result.step}: {prompt}{text}")
        return better

    def _save(self, step: int, tokens: int) -> None:
        self._saved_step = step
        self._at = step, tokens
        self._note_saves(self.saver.save(self._state(step, tokens)))

    def _state(self, step: int, tokens: int) -> TrainState:
        """What a checkpoint holds besides tensors. Collective."""
        from ds_train.checkpoint.native import TrainState

        return TrainState(
            step=step,
            tokens=tokens,
            samples=self.watch.timeline.samples_after(step),
            recipe=self.run.model_dump(mode="json"),
            layout=self.layout,
            versions=versions(),
            data_fingerprint=self.fingerprint,
            wandb_id=self.tracker.wandb_id,
            pruning=dict(self.pruned if self.pruning is None else self.pruning.state()),
            **self.watch.decided(),
        )

    def _note_saves(self, saves: Iterable[Saved]) -> None:
        for saved in saves:
            self.speed.add_save(saved.stall_seconds)
            record = {"kind": "save", **asdict(saved), "path": str(saved.path)}
            self.tracker.log(record, saved.step)
            if saved.error is None:
                self.tracker.note(f"saved {saved.path}")
                self.tracker.keep(saved.path, "checkpoint", saved.step)
            else:
                self.tracker.note(f"step {saved.step} could not be saved: {saved.error}; older checkpoints are whole")


def _has_cut(folder: Path, step: int) -> bool:
    from ds_train.track.metrics import read_metrics

    found = read_metrics(folder / "metrics.jsonl")
    return any(record.get("kind") == "cut" and record.get("step") == step for record in found)


def layout_record(run: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """How the run's states are spread over ranks, for people and for a word when it changes."""
    return {
        "ranks": plan.layout.ranks,
        "parallel.pipeline": plan.layout.pipe,
        "parallel.tensor": plan.layout.tensor,
        "parallel.sequence": plan.layout.sequence,
        "parallel.stage_layers": run.parallel.stage_layers,
        "parallel.zero_stage": plan.zero_stage,
        "parallel.offload_optimizer": "offload_optimizer" in plan.deepspeed_json["zero_optimization"],
    }


def saves_in_background(run: RunConfig, device: str) -> bool:
    """What `checkpoint.asynchronous` means here."""
    asked = run.checkpoint.asynchronous
    if asked != "auto":
        return asked
    return device != "cpu" and not run.parallel.on_disk
