"""A whole run on one rank: recipe, plan, data, model, steps, checkpoints, export."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig, dump, load
from ds_train.engine.ranks import RankInfo, meet, on_main_first, return_freed_memory, run_to_exit_code, versions
from ds_train.engine.stop import StopRequest
from ds_train.errors import STOPPED_CODE, Stopped, UserError, first_line, user_error
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.search import auto_fields, keep_choice
from ds_train.plan.topology import Cluster

if TYPE_CHECKING:
    from ds_train.checkpoint.native import Saved, TrainState
    from ds_train.engine.build import Assembly
    from ds_train.engine.loop import StepResult
    from ds_train.engine.prune import Pruning
    from ds_train.engine.watch import RunWatch
    from ds_train.engine.watchdog import Watchdog
    from ds_train.schedule.timeline import Timeline
    from ds_train.track.phases import StepClock
    from ds_train.track.tracker import Tracker


def run_job(recipe: str, overrides: Sequence[str]) -> int:
    """Train `recipe` on this rank of the launch; returns the exit code (0, or 2 for the user's error)."""
    return run_to_exit_code(lambda info: train(load(recipe, overrides), info))


def train(run: RunConfig, info: RankInfo, stop_after: int | None = None) -> None:
    """Train `run` on this rank of the launch, from the plan to the export. Collective.

    After step `stop_after` it ends as if it were the last, and its schedules are still those of the whole run.
    """
    cluster = Cluster(ranks=info.ranks, ranks_per_host=info.ranks_per_host, device=info.device)
    folder = Path(run.run_root).expanduser() / run.name
    if auto_fields(run):
        # Chosen once: ranks of other hosts may know other figures of their machines.
        meet(info)
        run = on_main_first(info, lambda: _settled(run, cluster, folder))
    plan = make_plan(run, cluster)
    after = after_cut(run, cluster)
    if info.is_main:
        for note in plan.notes:
            print(note, flush=True)
        if plan.predicted is not None:
            print(f"predicted: {plan.predicted.summary}", flush=True)
    if info.device == "cpu":
        return_freed_memory()
    # Below this line torch is imported; everything above answers in well under a second.
    meet(info)
    quiet_libraries()
    with StopRequest(run.faults.grace_seconds) as stop:
        _train(Placed(run, plan), after, info, folder, stop, stop_after)


def _train(
    before: Placed, after: Placed, info: RankInfo, folder: Path, stop: StopRequest, stop_after: int | None
) -> None:
    from ds_train.engine.contract import check_common, check_facts, check_parameters

    run, plan = before.run, before.plan
    check_common(run.model_dump(mode="json"), plan)
    on_main_first(info, lambda: _check_places(run, folder))
    prepared, tokenizer = _prepare_data(run, info)

    from ds_train.checkpoint import hf, native
    from ds_train.compress.cut import config_after
    from ds_train.data.prepare import read_manifest
    from ds_train.engine.build import assemble
    from ds_train.engine.watch import RunWatch
    from ds_train.engine.watchdog import Watchdog
    from ds_train.parallel.sequence import leave_sequence
    from ds_train.schedule.timeline import make_timeline
    from ds_train.track.phases import collectives_timed
    from ds_train.track.tracker import Tracker

    fingerprint = str(read_manifest(prepared)["content"])
    check_facts({"data": read_manifest(prepared)})
    resumed = _find_checkpoint(run, info, folder, fingerprint)
    # Only now: a run that is refused leaves the folder's records as they were.
    on_main_first(info, lambda: _write_records(folder, run, plan))
    state = native.read_state(resumed) if resumed is not None else None

    def build(pruning: Mapping[str, Any], clock: StepClock | None = None) -> Assembly:
        """Everything around the model, as it is after the cut where there was one."""
        if not pruning.get("cut"):
            return assemble(run, plan, info, tokenizer, prepared, after.plan.layout)
        smaller = partial(config_after, record=pruning)
        return assemble(after.run, after.plan, info, tokenizer, prepared, cut=smaller, clock=clock)

    pruned = state.pruning if state is not None else {}
    parts = build(pruned)
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    done = 0
    if resumed is not None and state is not None:
        native.load(parts.engine, parts.part, resumed)
        done = state.step
        _check_clock(timeline, state)
    place = after if pruned.get("cut") else before
    check_parameters(parts.part, place.plan.zero_stage == 3)
    wandb_id = state.wandb_id if state else None
    known = plan.to_dict() | {"versions": versions()}
    tracker = Tracker(run, known, folder, info.is_main, timeline.steps, done, wandb_id)
    exit_code = 1
    try:
        _note_start(run, parts, tracker, place.record, resumed, state)
        watch = RunWatch(run, info, parts, tracker, folder, timeline, state)
        session = Session(place, after, info, parts, build, tracker, folder, fingerprint, watch, stop)
        clock = parts.clock
        del parts  # a cut gives others
        session.prune(pruned)
        with Watchdog(run.faults, info, folder / "faults", session.note_fault) as watchdog:
            with collectives_timed(clock, info.device):
                session.train(done, watchdog, stop_after)
            if not stop.agreed:
                _note_noise_scale(run, folder, tracker, info)
                if run.checkpoint.export:
                    step = watch.use_best()
                    card = _model_card(run, session.plan, folder, step) if info.is_main else ""
                    parts = session.parts
                    hf.export(parts.part, tokenizer, folder / "export", card, packing=parts.packing)
                    tracker.keep(folder / "export", "export", step)
                    _push(run, folder / "export", tracker, info)
        # What follows is rank 0's alone: no attention may wait for the others.
        leave_sequence()
        if not stop.agreed:
            _log_sample(run, folder, tracker, info, timeline)
        exit_code = STOPPED_CODE if stop.agreed else 0
    finally:
        tracker.close(exit_code)
        leave_sequence()
    if stop.agreed:
        raise Stopped
    if info.is_main:
        _farewell(folder)


def _note_start(
    run: RunConfig, parts: Assembly, tracker: Tracker, layout: dict[str, Any], resumed: Path | None,
    state: TrainState | None,
) -> None:  # fmt: skip
    """Say what a run begins with, and what it goes on from."""
    tracker.note(f"optimizer kernel: {parts.kernel}")
    if parts.part.stage_layers:
        tracker.note(f"layers of the pipeline's stages: {', '.join(map(str, parts.part.stage_layers))}")
    if parts.data.packing_efficiency is not None:
        efficiency = parts.data.packing_efficiency
        tracker.note(f"{run.data.packing_by} packing: {efficiency:.2%} of the windows' tokens are text")
    if state is None:
        return
    ranks = parts.part.mesh.layout.ranks
    tracker.log({"kind": "resume", "step": state.step, "from": str(resumed), "ranks": ranks}, state.step)
    tracker.note(f"continuing {resumed} after step {state.step}")
    if state.layout != layout:
        tracker.note(f"its states were spread by {_words(state.layout)}, and are now by {_words(layout)}")
    for name, now in versions().items():
        before = state.versions.get(name, now)
        if before != now:
            tracker.note(f"it was made with {name} {before}, and goes on with {now}: last bits may differ")


@dataclass(frozen=True)
class Placed:
    """A recipe, and how its ranks share it."""

    run: RunConfig
    plan: RunPlan

    @property
    def record(self) -> dict[str, Any]:
        """How the run's states are spread over ranks, for people and for a word when it changes."""
        return _layout_record(self.run, self.plan)


def after_cut(run: RunConfig, cluster: Cluster) -> Placed:
    """The recipe from the cut on, where pruning changes its layout.

    Raises:
        UserError: with everything that is wrong with that layout.
    """
    parallel = run.compress.prune.parallel
    if parallel is None:
        return Placed(run, make_plan(run, cluster))
    later = run.model_copy(update={"parallel": parallel})
    try:
        return Placed(later, make_plan(later, cluster))
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
        start = None if self.watch.patience_ended else done
        while start is not None:
            if self.pruning is not None and start >= self.pruning.steps.cut:
                self._cut(start)
            start = self._train_from(start, watchdog, stop_after or self.watch.timeline.steps)
        if self.stop.agreed:
            self._save_and_stop(done)
        self._note_saves(self.saver.wait())

    def _train_from(self, done: int, watchdog: Watchdog | None, stop_after: int) -> int | None:
        """Train to the end; or to a step that is rolled back or followed by a cut: gives the one to go on from."""
        from ds_train.engine.loop import due, train_steps

        run, timeline = self.run, self.watch.timeline
        steps = train_steps(
            run, self.plan, self.info, self.parts, timeline, done,
            stop=self.stop, watchdog=watchdog, pruning=self.pruning,
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
        self._note_saves(self.saver.wait())
        cut = self.pruning.cut()
        before = parameters_of(self.parts.part)
        self.pruning.set_masks(1.0)
        masked = evaluate(self.run, self.parts, step)
        folder = self.folder / "cut"
        saver = native.Saver(folder, self.parts.engine, self.parts.part, keep_last=1)
        (saved,) = saver.save(self._state(step, self.watch.timeline.tokens_after(step)))
        if saved.error is not None:
            reason = f"its states could not be written for the cut: {saved.error}"
            raise user_error("run_root", reason, "make room there, and start the command again", str(folder))
        self.pruned, clock = {"removed": self.pruning.removed, **cut.record()}, self.parts.clock
        self.pruning = None
        self.parts.engine.destroy()
        # What holds the engine, before another one is built beside it.
        self.watch.let_go()
        del saver, self.saver, self.speed, self.parts
        gc.collect()
        parts = self.build(self.pruned, clock)
        native.load(parts.engine, parts.part, saved.path, cut)
        self._go_on_with(self.after, parts)
        on_main_first(self.info, lambda: shutil.rmtree(folder, ignore_errors=True))
        left, sizes = parameters_of(parts.part), cut.sizes | {"layers": len(cut.layers)}
        record = {"kind": "cut", "step": step, "parameters": left, "parameters_before": before, **sizes}
        words = ", ".join(f"{kind} {count}" for kind, count in sizes.items())
        note = f"cut after step {step}: {before:,} parameters, now {left:,} ({words})"
        found = evaluate(self.run, parts, step)
        if masked is not None and found is not None:
            record |= {"masked_loss": masked.loss, "loss": found.loss}
            note += f"; held-out loss {masked.loss:.4f} with these masked, {found.loss:.4f} without them"
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

        scores = evaluate(self.run, self.parts, result.step)
        if scores is None:
            return False
        better = self.watch.judge(scores)
        record = {"kind": "eval", **asdict(scores), "perplexity": scores.perplexity, "tokens": result.tokens}
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


def _note_noise_scale(run: RunConfig, folder: Path, tracker: Tracker, info: RankInfo) -> None:
    from ds_train.engine.noise import noise_scale
    from ds_train.track.metrics import read_metrics

    if run.track.noise_scale_every_steps is None or not info.is_main:
        return
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    scale = noise_scale(records)
    if scale is None:
        tracker.note("gradient noise scale: too few measurements, or micro-batches, to tell it from noise")
        return
    per_sample = sum(record["labels"] for record in records) / sum(record["samples"] for record in records)
    tracker.note(f"gradient noise scale: {scale:,.0f} labels, {scale / per_sample:,.1f} samples (arXiv 1812.06162)")


def _check_clock(timeline: Timeline, state: TrainState) -> None:
    """Where samples change their length, another length of the run would have taken other tokens until here."""
    expected = timeline.tokens_after(state.step)
    if expected != state.tokens:
        reason = f"the checkpoint has trained on {state.tokens:,} tokens, and with this length it would be {expected:,}"
        raise user_error("schedule", reason, "restore the run's length, or set another `name` to start anew")


def _settled(run: RunConfig, cluster: Cluster, folder: Path) -> RunConfig:
    """The recipe with every `auto` chosen: as before where its run goes on on as many ranks, else anew."""
    stored = folder / "recipe.yaml"
    if run.checkpoint.resume != "never" and stored.is_file() and (folder / "checkpoints").is_dir():
        before = load(stored)
        ranks = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["layout"]
        if math.prod(ranks.values()) == cluster.ranks:
            return keep_choice(run, before)
    return make_plan(run, cluster).run


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run, if it isn't there.

    Raises:
        UserError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise user_error(
            "run_root",
            f"the run folder can't be written: {error}",
            "choose a folder that you may write to",
            str(folder),
        ) from error


def _check_places(run: RunConfig, folder: Path) -> None:
    make_run_folder(folder)
    if run.checkpoint.push_to is not None:
        from huggingface_hub import get_token

        if get_token() is None:
            reason = "this machine has no token of the hub"
            fix = "set HF_TOKEN or run `hf auth login`, or leave it out"
            raise user_error("checkpoint.push_to", reason, fix, run.checkpoint.push_to)


def _model_card(run: RunConfig, plan: RunPlan, folder: Path, step: int) -> str:
    """The card of the model of step `step`."""
    from ds_train.checkpoint.hf import model_card
    from ds_train.track.metrics import read_metrics

    records = [record for record in read_metrics(folder / "metrics.jsonl") if record.get("step", 0) <= step]
    last = {kind: [record for record in records if record["kind"] == kind][-1:] for kind in ("train", "eval")}
    facts: dict[str, Any] = {}
    for record in last["train"]:
        facts |= {"steps": record["step"], "tokens": f"{record['tokens']:,}", "training loss": f"{record['loss']:.4f}"}
    for record in last["eval"]:
        facts |= {"held-out loss": f"{record['loss']:.4f}", "held-out accuracy": f"{record['accuracy']:.4f}"}
    facts |= {"task": run.task.kind, "layout": _words(_layout_record(run, plan))}
    facts |= versions()
    return model_card(run.name, facts, dump(run), run.model.path)


def _push(run: RunConfig, folder: Path, tracker: Tracker, info: RankInfo) -> None:
    """Upload the export; what the hub refuses is said, and the folder is still there."""
    from ds_train.checkpoint.hf import push

    repository = run.checkpoint.push_to
    if repository is None or not info.is_main:
        return
    try:
        tracker.note(f"uploaded: {push(folder, repository)}")
    except Exception as error:  # network, login, rights: the hub's library raises many kinds
        again = f"hf upload {repository} {folder}"
        tracker.note(f"the export could not be uploaded: {first_line(error)}; to try again: {again}")


def _write_records(folder: Path, run: RunConfig, plan: RunPlan) -> None:
    from ds_train.checkpoint.manifest import write_json, write_text

    write_text(folder / "recipe.yaml", dump(run))
    write_json(folder / "plan.json", plan.to_dict() | {"versions": versions()})
    write_json(folder / "deepspeed.json", plan.deepspeed_json)


def _prepare_data(run: RunConfig, info: RankInfo) -> tuple[Path, Any]:
    from ds_train.data.prepare import prepare, prepared_tokenizer

    prepared = on_main_first(info, lambda: prepare(run, progress=sys.stderr.isatty()))
    return prepared, prepared_tokenizer(prepared)


def _find_checkpoint(run: RunConfig, info: RankInfo, folder: Path, fingerprint: str) -> Path | None:
    from ds_train.checkpoint import native

    path = native.find(folder / "checkpoints", run.checkpoint.resume, lambda text: print(text, flush=True))
    if path is not None:
        recipe = run.model_dump(mode="json")
        on_main_first(info, lambda: native.check_resumable(native.read_state(path), recipe, fingerprint))
    return path


def _layout_record(run: RunConfig, plan: RunPlan) -> dict[str, Any]:
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


def _words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in layout.items() if value is not None)


def saves_in_background(run: RunConfig, device: str) -> bool:
    """What `checkpoint.asynchronous` means here."""
    asked = run.checkpoint.asynchronous
    if asked != "auto":
        return asked
    return device != "cpu" and "nvme" not in (run.parallel.offload_optimizer, run.parallel.offload_params)


def quiet_libraries() -> None:
    """Let libraries say only what a user can do something about."""
    import transformers

    # DeepSpeed calls a collective by its old name; the user can't do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _log_sample(run: RunConfig, folder: Path, tracker: Tracker, info: RankInfo, timeline: Timeline) -> None:
    """Let the exported model speak where the recipe asks for it."""
    prompt = run.track.sample_prompt
    if prompt is None or not (info.is_main and run.checkpoint.export and run.task.kind == "causal-lm"):
        return
    from ds_train.checkpoint.hf import generate_sample

    text = generate_sample(folder / "export", prompt, run.track.sample_tokens)
    record = {"kind": "sample", "step": timeline.steps, "prompt": prompt, "text": text.removeprefix(prompt)}
    tracker.log(record, timeline.steps)
    tracker.note(f"\nsample of the exported model:\n{text}\n")


def _farewell(folder: Path) -> None:
    """Say where everything lies."""
    places = {
        "metrics": folder / "metrics.jsonl",
        "recipe and plan": folder / "recipe.yaml",
        "checkpoints": folder / "checkpoints",
        "transformers model": folder / "export",
    }
    for what, path in places.items():
        if path.exists():
            print(f"{what + ':':20} {path.resolve()}")
    sys.stdout.flush()
