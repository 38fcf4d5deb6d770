"""`ds-train prune`: score, cut and export in one go, without training."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig, dump
from ds_train.engine.job import make_run_folder, quiet_libraries
from ds_train.engine.ranks import RankInfo, barrier, meet, on_main_first, settle, versions
from ds_train.engine.session import placed
from ds_train.engine.stop import StopRequest
from ds_train.errors import UserError, user_error
from ds_train.plan.topology import Cluster, Layout
from ds_train.schedule.prune import PruneSteps
from ds_train.schedule.timeline import make_timeline

if TYPE_CHECKING:
    from ds_train.compress.cut import Cut
    from ds_train.engine.build import Assembly
    from ds_train.plan.make import RunPlan

_NOTHING_YET = "nothing has been cut or written; the same command begins anew"


@dataclass(frozen=True)
class Pruned:
    """What pruning at once has done. `sizes` is `Cut.words`; losses are held-out ones, None where nothing is."""

    folder: Path
    parameters_before: int
    parameters: int
    sizes: str
    loss_before: float | None
    loss: float | None
    note: str | None = None

    @property
    def summary(self) -> str:
        """In a line or two, for people."""
        line = f"{self.parameters_before:,} parameters, now {self.parameters:,} ({self.sizes})"
        if self.loss_before is not None and self.loss is not None:
            line += f"; held-out loss {self.loss_before:.4f}, now {self.loss:.4f}"
        return line if self.note is None else f"{self.note}\n{line}"


def prune_once(run: RunConfig, info: RankInfo, checkpoint: Path | None = None) -> Pruned:
    """Prune the recipe's model, or what a checkpoint holds of it, and write RUN/pruned. Collective.

    Raises:
        UserError: whatever a run of the recipe is refused for; it asks for nothing to go; the checkpoint has been cut.
        Stopped: a rank was told to stop before anything was written.
    """
    section = run.compress.prune
    if not section.kinds:
        fix = "give shares, such as compress.prune.ffn=0.5; `ds-train schema compress.prune` lists all"
        raise user_error("compress.prune", "it asks for nothing to go", fix)
    cluster = Cluster(ranks=info.ranks, ranks_per_host=info.ranks_per_host, device=info.device)
    planned = placed(run, cluster)[0].plan.run
    settle(info, run.parallel.bind_cores)
    meet(info)
    quiet_libraries()
    # Ranks of other hosts may know other figures of their machines, and choose otherwise where it says `auto`.
    run = on_main_first(info, lambda: planned)
    before, after = placed(run, cluster)
    folder = Path(run.run_root).expanduser() / run.name
    on_main_first(info, lambda: make_run_folder(folder))
    try:
        with StopRequest(run.faults.grace_seconds) as stop:
            return _prune(run, before.plan, after.plan.layout, info, checkpoint, folder, stop)
    finally:
        if info.is_main:
            with contextlib.suppress(OSError):
                folder.rmdir()  # empty where nothing came of it


def _prune(
    run: RunConfig, plan: RunPlan, later: Layout, info: RankInfo, checkpoint: Path | None, folder: Path,
    stop: StopRequest,
) -> Pruned:  # fmt: skip
    from ds_train.checkpoint import native, offline
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine.build import assemble
    from ds_train.engine.loop import evaluate, train_steps
    from ds_train.engine.prune import Pruning, parameters_of

    if checkpoint is None and run.model.path is None and info.is_main:
        print("the model's weights are random; --checkpoint prunes what a run of the recipe has trained", flush=True)
    if checkpoint is not None:
        on_main_first(info, lambda: offline.check(checkpoint))
        if native.read_state(checkpoint).pruning.get("cut"):
            raise user_error("--checkpoint", "its model has been cut already", "give an earlier one", str(checkpoint))
    prepared = on_main_first(info, lambda: prepare(run, progress=False))
    tokenizer = prepared_tokenizer(prepared, run.model.trust_remote_code)
    parts = assemble(run, plan, info, tokenizer, prepared, later)
    assert parts.prunable is not None
    if checkpoint is not None:
        try:
            native.load(parts.engine, parts.part, checkpoint)
        except UserError as error:
            reason, fix = error.problems[0].reason, "give one of the recipe's own model"
            raise user_error("--checkpoint", reason, fix, str(checkpoint)) from error
    timeline = make_timeline(run, parts.data.samples_per_epoch)
    before = evaluate(run, parts, 0)
    stop.check(_NOTHING_YET)
    steps = min(run.compress.prune.score_steps, timeline.steps)
    pruning = Pruning(run, parts.prunable, parts.engine, parts.part, PruneSteps(0, steps, steps))
    # At a rate of 0 nothing moves.
    for _ in train_steps(run, plan, info, parts, timeline, rates=[0.0] * steps, stop=stop, pruning=pruning):
        pass
    stop.check(_NOTHING_YET)
    pruning.choose()
    pruning.set_masks(1.0)
    after = evaluate(run, parts, 0)
    stop.check(_NOTHING_YET)
    cut = pruning.cut()
    parameters = _export(run, info, parts, cut, tokenizer, folder)
    return Pruned(
        folder / "pruned",
        parameters_of(parts.part),
        parameters,
        cut.words,
        before.loss if before is not None else None,
        after.loss if after is not None else None,
        parts.prunable.note,
    )


def _export(run: RunConfig, info: RankInfo, parts: Assembly, cut: Cut, tokenizer: Any, folder: Path) -> int:
    """Write what is left as a transformers folder, from a checkpoint that is gone afterwards; its parameters."""
    from ds_train.checkpoint import hf, native
    from ds_train.compress.cut import CutSource
    from ds_train.models.load import DTYPES, keep_generation_config, outline

    assert parts.prunable is not None
    place = folder / "cut"
    state = native.TrainState(0, 0, run.model_dump(mode="json"), {}, versions(), "")
    (saved,) = native.Saver(place, parts.engine, parts.part, keep_last=1).save(state)
    if saved.error is not None:
        raise user_error("run_root", f"nothing could be written there: {saved.error}", "make room", str(place))
    small = outline(run, cut.config(parts.prunable.config))
    keep_generation_config(run, small)
    if info.is_main:
        files = native.open_fragments(saved.path)
        try:
            facts = {"pruned to": cut.words, "task": run.task.kind, **versions()}
            card = hf.model_card(run.name, facts, dump(run), run.model.path)
            source = CutSource(cut, files)
            hf.export_fragments(source, small, tokenizer, folder / "pruned", card, DTYPES[run.precision.dtype])
        finally:
            files.close()
        shutil.rmtree(place, ignore_errors=True)
    barrier()
    return sum(parameter.numel() for parameter in small.parameters())
