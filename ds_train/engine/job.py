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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig, dump, load
from ds_train.engine.ranks import RankInfo, meet, on_main_first, return_freed_memory, run_to_exit_code
from ds_train.errors import UserError, first_line, user_error
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.search import auto_fields, keep_choice
from ds_train.plan.topology import Cluster

if TYPE_CHECKING:
    from ds_train.checkpoint.native import Saved, TrainState
    from ds_train.engine.build import Assembly
    from ds_train.engine.loop import EvalResult, StepResult
    from ds_train.engine.prune import Pruning
    from ds_train.schedule.timeline import Timeline
    from ds_train.track.tracker import Tracker


def run_job(recipe: str, overrides: Sequence[str]) -> int:
    """Train `recipe` on this rank of the launch; returns the exit code (0, or 2 for the user's error)."""
    return run_to_exit_code(lambda info: train(load(recipe, overrides), info))


def train(run: RunConfig, info: RankInfo) -> None:
    """Train `run` on this rank of the launch, from the plan to the export. Collective."""
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
    on_main_first(info, lambda: _check_places(run, folder))
    prepared, tokenizer = _prepare_data(run, info)

    from ds_train.checkpoint import hf, native
    from ds_train.compress.cut import config_after
    from ds_train.data.prepare import read_manifest
    from ds_train.engine.build import assemble
    from ds_train.parallel.sequence import leave_sequence
    from ds_train.schedule.timeline import make_timeline
    from ds_train.track.tracker import Tracker

    fingerprint = str(read_manifest(prepared)["content"])
    resumed = _find_checkpoint(run, info, folder, fingerprint)
    # Only now: a run that is refused leaves the folder's records as they were.
    on_main_first(info, lambda: _write_records(folder, run, plan))
    state = native.read_state(resumed) if resumed is not None else None

    def build(pruning: Mapping[str, Any]) -> Assembly:
        """Everything around the model, as it is after the cut where there was one."""
        if not pruning.get("cut"):
            return assemble(run, plan, info, tokenizer, prepared, after.plan.layout)
        return assemble(after.run, after.plan, info, tokenizer, prepared, cut=partial(config_after, record=pruning))

    pruned = state.pruning if state is not None else {}
    parts = build(pruned)
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    done = 0
    if resumed is not None and state is not None:
        native.load(parts.engine, parts.part, resumed)
        done = state.step
        _check_clock(timeline, state)
    place = after if pruned.get("cut") else Placed(run, plan)
    wandb_id = state.wandb_id if state else None
    tracker = Tracker(run, plan.to_dict(), folder, info.is_main, timeline.steps, done, wandb_id)
    exit_code = 1
    try:
        tracker.note(f"optimizer kernel: {parts.kernel}")
        if parts.part.stage_layers:
            tracker.note(f"layers of the pipeline's stages: {', '.join(map(str, parts.part.stage_layers))}")
        if parts.data.packing_efficiency is not None:
            efficiency = parts.data.packing_efficiency
            tracker.note(f"{run.data.packing_by} packing: {efficiency:.2%} of the windows' tokens are text")
        if resumed is not None:
            tracker.note(f"continuing {resumed} after step {done}")
            if state is not None and state.layout != place.record:
                tracker.note(f"its states were spread by {_words(state.layout)}, and are now by {_words(place.record)}")
        session = _Session(place, after, info, parts, build, tracker, folder, fingerprint)
        del parts  # a cut gives others
        session.prune(pruned, timeline)
        session.train(done, timeline)
        _note_noise_scale(run, folder, tracker, info)
        if run.checkpoint.export:
            card = _model_card(run, session.place.plan, folder) if info.is_main else ""
            hf.export(session.parts.part, tokenizer, folder / "export", card)
            _push(run, folder / "export", tracker, info)
        exit_code = 0
    finally:
        tracker.close(exit_code)
        # What follows is rank 0's alone: no attention may wait for the others.
        leave_sequence()
    if info.is_main:
        _farewell(run, folder)


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


class _Session:
    """The steps of one run with what happens between them: metrics, evaluation, checkpoints."""

    def __init__(
        self,
        place: Placed,
        after: Placed,
        info: RankInfo,
        parts: Assembly,
        build: Callable[[Mapping[str, Any]], Assembly],
        tracker: Tracker,
        folder: Path,
        fingerprint: str,
    ) -> None:
        self.place, self.after, self.info, self.build, self.tracker = place, after, info, build, tracker
        self.folder, self.fingerprint = folder, fingerprint
        self.pruning: Pruning | None = None
        self.pruned: Mapping[str, Any] = {}
        """What has been cut."""
        self._take(parts)

    def _take(self, parts: Assembly) -> None:
        """Go on with this engine."""
        from ds_train.checkpoint.native import Saver

        run, section = self.place.run, self.place.run.checkpoint
        self.run, self.parts = run, parts
        self.rate = _Throughput(run, parts, self.info)
        self.saver = Saver(
            self.folder / "checkpoints",
            parts.engine,
            parts.part,
            section.keep_last,
            section.keep_every,
            in_background=saves_in_background(run, self.info.device),
        )

    def prune(self, state: Mapping[str, Any], timeline: Timeline) -> None:
        """Prune as the recipe says, from the state of a checkpoint on."""
        from ds_train.engine.prune import Pruning, steps_of

        if state.get("cut"):
            self.pruned = state
        elif self.parts.prunable is not None:
            steps = steps_of(self.run, timeline)
            self.pruning = Pruning(self.run, self.parts.prunable, self.parts.engine, self.parts.part, steps)
            self.pruning.load_state(state)

    def train(self, done: int, timeline: Timeline) -> None:
        """Steps `done` + 1 to the timeline's last, each followed by what is due after it."""
        if self.pruning is not None:
            cut_at = max(done, self.pruning.steps.cut)
            self._train(done, cut_at, timeline)
            self._cut(cut_at, timeline)
            done = cut_at
        self._train(done, timeline.steps, timeline)
        self._note_saves(self.saver.wait())

    def _train(self, done: int, stop: int, timeline: Timeline) -> None:
        from ds_train.engine.loop import due, evaluate, train_steps

        run = self.run
        steps = train_steps(run, self.place.plan, self.info, self.parts, timeline, done, None, stop, self.pruning)
        for result in steps:
            last = result.step == timeline.steps
            self.rate.add(result)
            if last or result.measured or due(run.track.log_every_steps, result.step):
                self.tracker.log(self._record(result), result.step)
            if last or due(run.track.eval_every_steps, result.step):
                self._log_evaluation(evaluate(run, self.parts, result.step), result.tokens)
            if (last and run.checkpoint.save_final) or due(run.checkpoint.every_steps, result.step):
                self._note_saves(self.saver.save(self._state(result.step, result.tokens)))
            self._note_saves(self.saver.ended())

    def _cut(self, step: int, timeline: Timeline) -> None:
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
        (saved,) = saver.save(self._state(step, timeline.tokens_after(step)))
        if saved.error is not None:
            reason = f"its states could not be written for the cut: {saved.error}"
            raise user_error("run_root", reason, "make room there, and start the command again", str(folder))
        self.pruned = {"removed": self.pruning.removed, **cut.record()}
        self.pruning = None
        self.parts.engine.destroy()
        # What holds the engine, before another one is built beside it.
        del saver, self.saver, self.rate, self.parts
        gc.collect()
        self.place = self.after
        parts = self.build(self.pruned)
        native.load(parts.engine, parts.part, saved.path, cut)
        self._take(parts)
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

    def _record(self, result: StepResult) -> dict[str, Any]:
        from ds_train.track.memory import memory

        record = asdict(result)
        measured = record.pop("measured")
        return {"kind": "train", **record, **measured, **self.rate.take(), **memory(self.info.device)}

    def _log_evaluation(self, scores: EvalResult | None, tokens: int) -> None:
        if scores is not None:
            record = {"kind": "eval", **asdict(scores), "perplexity": scores.perplexity, "tokens": tokens}
            self.tracker.log(record, scores.step)

    def _state(self, step: int, tokens: int) -> TrainState:
        """What a checkpoint holds besides tensors. Collective."""
        from ds_train.checkpoint.native import TrainState

        return TrainState(
            step=step,
            tokens=tokens,
            recipe=self.run.model_dump(mode="json"),
            layout=self.place.record,
            versions={name: version(name) for name in ("ds_train", "torch", "deepspeed", "transformers")},
            data_fingerprint=self.fingerprint,
            wandb_id=self.tracker.wandb_id,
            pruning=dict(self.pruned if self.pruning is None else self.pruning.state()),
        )

    def _note_saves(self, saves: Iterable[Saved]) -> None:
        for saved in saves:
            record = {"kind": "save", **asdict(saved), "path": str(saved.path)}
            self.tracker.log(record, saved.step)
            if saved.error is None:
                self.tracker.note(f"saved {saved.path}")
            else:
                self.tracker.note(f"step {saved.step} could not be saved: {saved.error}; older checkpoints are whole")


class _Throughput:
    """Tokens per second and MFU since the last metrics line."""

    def __init__(self, run: RunConfig, parts: Assembly, info: RankInfo) -> None:
        from ds_train.track.flops import flops_per_token
        from ds_train.track.peak import measure_peak_flops

        parameters = parts.part.matrix_parameters
        config = parts.model.config
        self._flops_per_token = cache(lambda length: flops_per_token(config, parameters, length))
        peak = run.track.peak_tflops
        rank_peak = measure_peak_flops(parts.model.dtype, parts.engine.device) if peak == "auto" else peak * 1e12
        self._peak_flops = rank_peak * info.ranks
        self._tokens, self._seconds, self._flops = 0, 0.0, 0.0

    def add(self, result: StepResult) -> None:
        self._tokens += result.real_tokens
        positions = result.real_tokens / result.patch
        self._flops += positions * self._flops_per_token(result.sequence_length // result.patch)
        self._seconds += result.seconds

    def take(self) -> dict[str, float]:
        from ds_train.track.flops import mfu

        seconds = self._seconds or math.inf
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "mfu": mfu(self._flops / seconds, self._peak_flops),
        }
        self._tokens, self._seconds, self._flops = 0, 0.0, 0.0
        return rates


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


def _model_card(run: RunConfig, plan: RunPlan, folder: Path) -> str:
    from ds_train.checkpoint.hf import model_card
    from ds_train.track.metrics import read_metrics

    records = read_metrics(folder / "metrics.jsonl")
    last = {kind: [record for record in records if record["kind"] == kind][-1:] for kind in ("train", "eval")}
    facts: dict[str, Any] = {}
    for record in last["train"]:
        facts |= {"steps": record["step"], "tokens": f"{record['tokens']:,}", "training loss": f"{record['loss']:.4f}"}
    for record in last["eval"]:
        facts |= {"held-out loss": f"{record['loss']:.4f}", "held-out accuracy": f"{record['accuracy']:.4f}"}
    facts |= {"task": run.task.kind, "layout": _words(_layout_record(run, plan))}
    facts |= {name: version(name) for name in ("ds_train", "deepspeed", "torch", "transformers")}
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
    write_json(folder / "plan.json", plan.to_dict())
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


def _farewell(run: RunConfig, folder: Path) -> None:
    """Say where everything lies; let the exported model speak where the recipe asks for a sample."""
    if run.checkpoint.export and run.task.kind == "causal-lm" and run.track.sample_prompt is not None:
        from ds_train.checkpoint.hf import generate_sample

        sample = generate_sample(folder / "export", run.track.sample_prompt, run.track.sample_tokens)
        print(f"\nsample of the exported model:\n{sample}\n")
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
