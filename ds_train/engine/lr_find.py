"""`ds-train lr-find`: the learning-rate range test on the recipe's own model, data, layout and step loop."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_train.config import RunConfig
from ds_train.engine.disk import clear_disk
from ds_train.engine.job import make_run_folder, quiet_libraries
from ds_train.engine.ranks import RankInfo, barrier, meet, on_main_first, settle
from ds_train.engine.stop import StopRequest
from ds_train.errors import user_error
from ds_train.plan.make import make_plan
from ds_train.plan.model_size import ModelSize, model_size
from ds_train.plan.topology import Cluster
from ds_train.plan.transformers_keys import attribute_map
from ds_train.schedule.range_test import Finding, UnstableError, find_learning_rate
from ds_train.schedule.timeline import make_timeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_train.engine.build import Assembly
    from ds_train.plan.make import RunPlan

_START = "start"


@dataclass(frozen=True)
class RangeTest:
    """How the test is run: the sweep's range and steps, steps of each run at a constant rate, and the safety factor."""

    lowest: float = 1e-6
    highest: float = 10.0
    sweep_steps: int = 100
    probe_steps: int = 50
    safety: float = 1.25
    proxy_width: int | None = None


def find(run: RunConfig, info: RankInfo, test: RangeTest) -> dict[str, Any]:
    """Find a learning rate for `run`; the record that is also written to RUN/lr-find.json and drawn in RUN/lr-find.png.

    Collective. The model starts from the recipe's weights for every part of the test, and nothing of it is kept.

    Raises:
        UserError: whatever a run of the recipe is refused for, or training that is unstable at the lowest rate.
        Stopped: a rank was told to stop.
    """
    started = time.perf_counter()
    tested, ratio = (run, 1.0) if test.proxy_width is None else proxy(run, test.proxy_width)
    cluster = Cluster(ranks=info.ranks, ranks_per_host=info.ranks_per_host, device=info.device)
    settle(info, run.parallel.bind_cores)
    meet(info)
    quiet_libraries()
    # A name of its own: the run itself may be swapping to the same disk.
    tested = tested.model_copy(update={"name": f"{run.name}.lr-find"})
    tested = on_main_first(info, lambda: make_plan(tested, cluster).run)
    plan = make_plan(tested, cluster)
    folder = Path(run.run_root).expanduser() / run.name
    with StopRequest(run.faults.grace_seconds) as stop:
        finding, tokenizer = _search(tested, plan, info, test, folder, stop)
    moved = {} if test.proxy_width is None else transfer(run, tokenizer, ratio)
    record = asdict(finding) | {
        "value": finding.value / ratio,
        "proxy": None if test.proxy_width is None else {"width": test.proxy_width, "ratio": ratio, **moved},
        "ranks": info.ranks,
        "seconds": time.perf_counter() - started,
    }
    if info.is_main:
        _write(folder, finding, record)
    barrier()
    clear_disk(tested, info)
    return record


def proxy(run: RunConfig, width: int) -> tuple[RunConfig, float]:
    """(the recipe with a model of hidden size `width` and heads of the same size, how much wider the recipe's is).

    Under Adam the learning rate of hidden matrices and of the head falls as 1 / width; that of embeddings and vectors
    stays (muP: arXiv 2203.03466, table 3).

    Raises:
        UserError: the model has weights, its sizes aren't known or don't divide, or the optimizer isn't Adam's.
    """
    if run.optimizer.kind not in ("adam", "adamw"):
        reason = "the learning rate's way from a narrow model to a wide one is known for Adam"
        raise user_error("--proxy-width", reason, "leave it out, or set optimizer.kind=adamw", width)
    size = model_size(run.model, run.task.kind)
    if run.model.arch is None or size is None or size.hidden_size is None or size.num_attention_heads is None:
        raise user_error("--proxy-width", "only a model from scratch, of known sizes, is made narrower", "", width)
    sizes = _narrow(size, width)
    renamed = attribute_map(run.model.arch)
    keys = dict(run.model.config) | {renamed.get(name, name): value for name, value in sizes.items()}
    model = run.model.model_copy(update={"config": keys})
    return run.model_copy(update={"model": model}), size.hidden_size / width


def _narrow(size: ModelSize, width: int) -> dict[str, int]:
    hidden, heads = size.hidden_size or 0, size.num_attention_heads or 0
    head = size.head_dim or hidden // heads
    shrunk = {"hidden_size": width}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(size, name)
        if value is not None:
            shrunk[name] = value * width // hidden
            if shrunk[name] < 1 or value * width % hidden:
                fix = f"a multiple of {math.lcm(head, hidden // math.gcd(hidden, value))} below {hidden}"
                raise user_error("--proxy-width", f"{name}={value} can't be made narrower as much", fix, width)
    return shrunk


def transfer(run: RunConfig, tokenizer: Any, ratio: float) -> dict[str, Any]:
    """The rule by which a proxy's rate goes to the recipe's model, and the `optimizer.lr_factors` that it takes."""
    from torch import nn

    from ds_train.models.load import load_model_config, outline

    model = outline(run, load_model_config(run, tokenizer))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.dim() < 2 or id(parameter) in tables)
    ]
    return {
        "rule": "matrices take the proxy's rate / ratio, the rest the proxy's own (arXiv 2203.03466, table 3)",
        "lr_factors": dict.fromkeys((re.sub(r"\.\d+\.", ".*.", name) for name in names), ratio),
    }


def _search(
    run: RunConfig, plan: RunPlan, info: RankInfo, test: RangeTest, folder: Path, stop: StopRequest
) -> tuple[Finding, PreTrainedTokenizerBase]:
    """What was found, and the tokenizer of the data."""
    from ds_train.data.prepare import prepare, prepared_tokenizer
    from ds_train.engine.build import assemble
    from ds_train.parallel.sequence import leave_sequence

    prepared = on_main_first(info, lambda: prepare(run))
    tokenizer = prepared_tokenizer(prepared, run.model.trust_remote_code)
    parts = assemble(run, plan, info, tokenizer, prepared)
    kept = folder / "lr-find.partial"
    try:
        on_main_first(info, lambda: _make(kept))
        parts.engine.save_checkpoint(str(kept), tag=_START, save_latest=False)
        barrier()
        trainer = _Trainer(run, plan, info, parts, kept, stop)
        finding = find_learning_rate(
            trainer,
            test.lowest,
            test.highest,
            test.sweep_steps,
            test.probe_steps,
            test.safety,
            run.optimizer.kind == "sgd",
        )
        return finding, tokenizer
    except UnstableError as error:
        raise user_error("optimizer", str(error), "check data and model; a loss that can't fall has no rate") from error
    finally:
        leave_sequence()
        if info.is_main:
            shutil.rmtree(kept, ignore_errors=True)


class _Trainer:
    """Trains the recipe's first steps from its first weights, at the rates that it is given."""

    def __init__(
        self, run: RunConfig, plan: RunPlan, info: RankInfo, parts: Assembly, kept: Path, stop: StopRequest
    ) -> None:
        self._run, self._plan, self._info, self._parts = run, plan, info, parts
        self._kept, self._stop = kept, stop

    def __call__(self, rates: Sequence[float]) -> Iterator[float]:
        from ds_train.engine.loop import train_steps

        # Also brings back the optimizer's states and the loss scale of their first step.
        self._parts.engine.load_checkpoint(str(self._kept), tag=_START, load_lr_scheduler_states=False)
        timeline = make_timeline(self._run, self._parts.data.samples_per_epoch)
        for result in train_steps(
            self._run, self._plan, self._info, self._parts, timeline, rates=rates, stop=self._stop
        ):
            yield result.loss
        self._stop.check("the test has found nothing yet; the same command begins it anew")


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    make_run_folder(folder)


def _write(folder: Path, finding: Finding, record: dict[str, Any]) -> None:
    from ds_train.checkpoint.manifest import write_json
    from ds_train.track.plot import new_figure, save_figure

    write_json(folder / "lr-find.json", record)
    figure = new_figure(1)
    (panel,) = figure.axes
    panel.plot(finding.rates, finding.losses, alpha=0.3, label="sweep")
    panel.plot(finding.rates, finding.smoothed, color="C0", label="sweep, smoothed")
    for stable, marker in ((True, "o"), (False, "x")):
        found = [probe for probe in finding.probes if probe.stable == stable and math.isfinite(probe.end)]
        label = f"end of a {'stable' if stable else 'unstable'} run"
        panel.plot([probe.rate for probe in found], [probe.end for probe in found], marker, label=label)
    panel.axvline(finding.value, color="C2", label=f"value {finding.value:.3g}")
    if finding.steepest is not None:
        panel.axvline(finding.steepest, color="C1", linestyle=":", label=f"steepest {finding.steepest:.3g}")
    top = max(finding.losses[0], *finding.smoothed[:1])
    panel.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(None, top * 1.3))
    panel.legend()
    save_figure(figure, folder / "lr-find.png")
