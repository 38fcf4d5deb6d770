"""A whole run on one rank: recipe, plan, data, model, steps, checkpoints, export."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig, dump, load
from ds_train.engine.alone import alone_in
from ds_train.engine.ranks import RankInfo, meet, on_main_first, run_to_exit_code, settle, versions
from ds_train.engine.session import Placed, Session, layout_record, placed
from ds_train.engine.stop import StopRequest
from ds_train.errors import STOPPED_CODE, Stopped, first_line, user_error
from ds_train.plan.after_cut import after_cut
from ds_train.plan.make import RunPlan, make_plan
from ds_train.plan.search import auto_fields, keep_choice
from ds_train.plan.topology import Cluster

if TYPE_CHECKING:
    from ds_train.checkpoint.native import TrainState
    from ds_train.engine.build import Assembly
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
    settle(info, run.parallel.bind_cores)
    if auto_fields(run):
        # Chosen once: ranks of other hosts may know other figures of their machines.
        meet(info)
        run = on_main_first(info, lambda: _settled(run, cluster, folder))
    before, after = placed(run, cluster)
    if info.is_main:
        for note in before.plan.notes:
            print(note, flush=True)
        if before.plan.predicted is not None:
            print(f"predicted: {before.plan.predicted.summary}", flush=True)
        smaller = after_cut(after.plan)
        if smaller is not None and smaller.predicted is not None:
            print(f"after the cut: {smaller.predicted.summary}", flush=True)
    # Below this line torch is imported; without `auto`, everything above answers in well under a second.
    meet(info)
    quiet_libraries()
    with StopRequest(run.faults.grace_seconds) as stop:
        _train(before, after, info, folder, stop, stop_after)


def _train(
    before: Placed, after: Placed, info: RankInfo, folder: Path, stop: StopRequest, stop_after: int | None
) -> None:
    from ds_train.engine.contract import check_common

    check_common(before.run.model_dump(mode="json"), before.plan)
    on_main_first(info, lambda: _check_places(before.run, folder))
    with alone_in(folder, info):
        _train_alone(before, after, info, folder, stop, stop_after)


def _train_alone(
    before: Placed, after: Placed, info: RankInfo, folder: Path, stop: StopRequest, stop_after: int | None
) -> None:
    from ds_train.engine.contract import check_facts, check_parameters

    run, plan = before.run, before.plan
    prepared, tokenizer = _prepare_data(run, info)

    from ds_train.checkpoint import hf, native
    from ds_train.compress.cut import config_after
    from ds_train.data.prepare import read_manifest
    from ds_train.engine.build import assemble
    from ds_train.engine.disk import clear_disk
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
    state = on_main_first(info, lambda: _taken_over(run, folder, resumed)) if resumed is not None else None

    def build(pruning: Mapping[str, Any], clock: StepClock | None = None) -> Assembly:
        """Everything around the model, as it is after the cut where there was one."""
        if not pruning.get("cut"):
            return assemble(run, plan, info, tokenizer, prepared, after.plan.layout, left=pruning.get("left"))
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
    exit_code, exported = 1, None
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
                    exported = watch.use_best()
                    card = _model_card(run, session.plan, folder, exported) if info.is_main else ""
                    parts = session.parts
                    hf.export(parts.part, tokenizer, folder / "export", card, packing=parts.packing)
                    tracker.keep(folder / "export", "export", exported)
                    _push(run, folder / "export", tracker, info)
        clear_disk(run, info)
        # What follows is rank 0's alone: no attention may wait for the others.
        leave_sequence()
        if exported is not None and info.is_main:
            _log_sample(run, folder, tracker, exported, watch.step)
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
    from ds_kernels.memory import memory_library

    from ds_train.checkpoint.same_run import said_changes

    tracker.note(f"optimizer kernel: {parts.kernel}")
    if parts.engine.device.type == "cpu" and isinstance(memory_library(), Exception):
        tracker.note(f"large freed blocks go back to the system: {first_line(memory_library())}")
    if parts.prunable is not None and parts.prunable.note is not None:
        tracker.note(parts.prunable.note)
    if parts.part.stage_layers:
        tracker.note(f"layers of the pipeline's stages: {', '.join(map(str, parts.part.stage_layers))}")
    if parts.data.packing_efficiency is not None:
        efficiency = parts.data.packing_efficiency
        tracker.note(f"{run.data.packing_by} packing: {efficiency:.2%} of the windows' tokens are text")
    if state is None:
        _note_drawn(run, parts, tracker)
        return
    ranks = parts.part.mesh.layout.ranks
    line = {"kind": "resume", "step": state.step, "tokens": state.tokens, "from": str(resumed), "ranks": ranks}
    tracker.log(line, state.step)
    tracker.note(f"continuing {resumed} after step {state.step}")
    if state.layout != layout:
        tracker.note(f"its states were spread by {_words(state.layout)}, and are now by {_words(layout)}")
    for change in said_changes(state.recipe, run.model_dump(mode="json")):
        tracker.note(change)
    for name, now in versions().items():
        before = state.versions.get(name, now)
        if before != now:
            tracker.note(f"it was made with {name} {before}, and goes on with {now}: last bits may differ")


def _note_drawn(run: RunConfig, parts: Assembly, tracker: Tracker) -> None:
    """Say what of a pretrained model begins at random. Collective: pipeline stages each know their own."""
    import torch.distributed as dist

    everyones: list[Any] = [None] * parts.part.mesh.layout.ranks
    dist.all_gather_object(everyones, getattr(parts.model, "drawn_modules", []))
    names = sorted({name for names in everyones for name in names})
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        tracker.note(f"{run.model.path} lacks weights of {', '.join(names[:4])}{more}: they begin at random")


def _note_noise_scale(run: RunConfig, folder: Path, tracker: Tracker, info: RankInfo) -> None:
    from ds_train.engine.noise import noise_scale, steps_of_this_model
    from ds_train.track.metrics import read_metrics

    if run.track.noise_scale_every_steps is None or not info.is_main:
        return
    records = steps_of_this_model(read_metrics(folder / "metrics.jsonl"))
    scale = noise_scale(records)
    if scale is None:
        tracker.note("gradient noise scale: too few measurements, or micro-batches, to tell it from noise")
        return
    per_sample = sum(record["labels"] for record in records) / sum(record["samples"] for record in records)
    tracker.note(f"gradient noise scale: {scale:,.0f} labels, {scale / per_sample:,.1f} samples (arXiv 1812.06162)")


def _check_clock(timeline: Timeline, state: TrainState) -> None:
    """Where samples change their length, another length of the run would have taken other tokens until here."""
    clocks = [("tokens", state.tokens, timeline.tokens_after(state.step))]
    if state.samples is not None:
        clocks.append(("samples", state.samples, timeline.samples_after(state.step)))
    for what, found, expected in clocks:
        if expected == found:
            continue
        reason = f"the checkpoint has trained on {found:,} {what}, and with this length it would be {expected:,}"
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
    facts |= {"task": run.task.kind, "layout": _words(layout_record(run, plan))}
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
    return prepared, prepared_tokenizer(prepared, run.model.trust_remote_code)


def _find_checkpoint(run: RunConfig, info: RankInfo, folder: Path, fingerprint: str) -> Path | None:
    from ds_train.checkpoint import native
    from ds_train.checkpoint.same_run import check_resumable

    path = native.find(folder / "checkpoints", run.checkpoint.resume, lambda text: print(text, flush=True))
    if path is not None:
        recipe = run.model_dump(mode="json")
        on_main_first(info, lambda: check_resumable(native.read_state(path), recipe, fingerprint))
    return path


def _taken_over(run: RunConfig, folder: Path, checkpoint: Path) -> TrainState:
    """The state of a checkpoint as this run goes on from it.

    Another run's best evaluation isn't this run's, whose folder doesn't hold its checkpoint, and its wandb run is its
    own. It is this run's in its folder, and elsewhere (written again by `ds-train reshard`, say) under its name.
    """
    from ds_train.checkpoint import native

    state = native.read_state(checkpoint)
    own = folder / "checkpoints"
    if checkpoint.resolve().parent == own.resolve():
        return state
    if state.recipe.get("name") != run.name:
        state = replace(state, wandb_id=None)
    return state if _holds_best(own, state.best) else replace(state, best={})


def _holds_best(checkpoints: Path, best: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of this best evaluation is there, and not one of another run's same step."""
    from ds_train.checkpoint import native

    if best.get("step") is None:
        return False
    try:
        found = native.read_state(native.of_step(checkpoints, best["step"])).best
    except (OSError, ValueError, TypeError):
        return False
    return (found.get("step"), found.get("value")) == (best["step"], best["value"])


def _words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in layout.items() if value is not None)


def quiet_libraries() -> None:
    """Let libraries say only what a user can do something about."""
    import transformers

    # DeepSpeed calls a collective by its old name; the user can't do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _log_sample(run: RunConfig, folder: Path, tracker: Tracker, exported: int, last: int) -> None:
    """Let the exported model, of step `exported`, speak where the recipe asks for it, after step `last`."""
    prompt = run.track.sample_prompt
    if prompt is None:
        return
    from ds_train.checkpoint.hf import generate_sample

    text = generate_sample(folder / "export", prompt, run.track.sample_tokens, run.model.trust_remote_code)
    # At the last step: wandb ignores what comes at an earlier one.
    tracker.log({"kind": "sample", "step": exported, "prompt": prompt, "text": text.removeprefix(prompt)}, last)
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
