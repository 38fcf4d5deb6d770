"""The only step loop: one `StepResult` per optimizer step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_train.config import RunConfig
from ds_train.data.batches import count_labels
from ds_train.data.build import DataBundle
from ds_train.data.eval_sources import EvalSource
from ds_train.engine.build import Assembly
from ds_train.engine.noise import MicroGradients
from ds_train.engine.prune import Pruning
from ds_train.engine.ranks import RankInfo, all_sum, seed_generators
from ds_train.engine.stop import StopRequest
from ds_train.engine.watchdog import Watchdog
from ds_train.models.tasks import Batch, on_device, weighted
from ds_train.optim.build import set_learning_rate
from ds_train.optim.unused import without_gradient
from ds_train.plan.make import RunPlan
from ds_train.schedule.distill import teacher_share
from ds_train.schedule.layer_drop import draw_layers
from ds_train.schedule.learning_rate import learning_rate_factor
from ds_train.schedule.seeds import fold_seed
from ds_train.schedule.timeline import StepShape, Timeline
from ds_train.schedule.token_drop import kept_tokens


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    `step` counts from 1; `tokens` are the positions consumed up to here (samples x sequence length), the clock of
    every schedule; `samples`, `sequence_length` and `patch` are this step's; `real_tokens` leaves padding out. `loss`
    is the mean over the labels of the global batch, in nats. `grad_norm` is the L2 norm of the whole gradient before
    clipping. `applied` is False where the update was skipped: a loss or gradient that isn't finite. `seconds` include
    the wait for the step's data. `measured` is what only some steps are asked for, by name.
    """

    step: int
    tokens: int
    samples: int
    sequence_length: int
    patch: int
    real_tokens: int
    labels: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    seconds: float
    measured: dict[str, float]


@dataclass(frozen=True)
class EvalResult:
    """Held-out scores after `step` steps: loss in nats per label, accuracy of the most likely label.

    `sources` are the losses of `track.eval_sources` by name; NaN where the samples have no label of one.
    """

    step: int
    loss: float
    accuracy: float
    labels: int
    seconds: float
    sources: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def record(self) -> dict[str, Any]:
        """What a metrics line says of it."""
        own = {key: value for key, value in vars(self).items() if key != "sources"}
        return own | {"perplexity": self.perplexity} | {f"loss_{name}": loss for name, loss in self.sources.items()}


def train_steps(
    run: RunConfig,
    plan: RunPlan,
    info: RankInfo,
    parts: Assembly,
    timeline: Timeline,
    first: int = 0,
    rates: Sequence[float] | None = None,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
    pruning: Pruning | None = None,
) -> Generator[StepResult, None, None]:
    """Train steps `first` (counted from 0) to the timeline's last, yielding after each. Collective.

    `rates` are the learning rates of all steps from 0, and there are as many steps; without them the recipe's schedule
    says them. Where `stop` of any rank is requested, all ranks end after the same step; `watchdog` times each.
    `pruning` is of this engine, and looks on: its cut ends the steps too.
    """
    end = timeline.steps if rates is None else len(rates)
    if pruning is not None:
        end = min(end, pruning.steps.cut)
    place = plan.layout.coordinates(info.rank)
    steps = parts.data.train.steps(lambda: timeline.shapes(first, end), run.data.workers)
    for number in itertools.count(first + 1):
        started = time.perf_counter()
        parts.clock.start()
        with parts.clock("data"), waiting(watchdog, number, parts.data, "train"):
            entry = next(steps, None)
        if entry is None:
            parts.clock.stop()
            return
        shape, batches = entry
        step = shape.step
        if rates is None:
            lr = run.optimizer.lr * learning_rate_factor(run.schedule, shape.after, timeline.total_tokens)
        else:
            lr = rates[step]
        set_learning_rate(parts.engine.optimizer, lr)
        if pruning is not None:
            pruning.before_step(shape, timeline)
        if watchdog is not None:
            watchdog.begin(step + 1, (shape.length, shape.patch), shape.samples * shape.length)
        labels, real_tokens, weight = begin_step(run, parts, timeline, shape, batches, stop)
        if stop is not None and stop.agreed:
            parts.clock.stop()
            if pruning is not None:
                pruning.forget_step()
            if watchdog is not None:
                watchdog.end(whole=False)
            return
        measured: dict[str, float] = {}
        if due(run.track.noise_scale_every_steps, step + 1):
            with MicroGradients(parts) as gradients:
                loss_sum, norm = update(parts, batches, weight, gradients)
            measured = gradients.scale(norm, labels) if math.isfinite(norm) else {}
        else:
            loss_sum, norm = update(parts, batches, weight)
        loss = float(all_sum(loss_sum * (place.tensor == 0))) / max(1, labels)
        parts.clock.stop()
        result = StepResult(
            step=step + 1,
            tokens=shape.after,
            samples=shape.samples,
            sequence_length=shape.length,
            patch=shape.patch,
            real_tokens=real_tokens,
            labels=labels,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            applied=parts.engine.was_step_applied(),
            seconds=time.perf_counter() - started,
            measured=measured,
        )
        if watchdog is not None:
            watchdog.end()
        yield result


def evaluate(
    run: RunConfig, parts: Assembly, step: int, watchdog: Watchdog | None = None, sources: Sequence[EvalSource] = ()
) -> EvalResult | None:
    """Score the first `track.eval_samples` held-out samples; None where no label is held out. Collective.

    `watchdog` times the wait for each. Each of `sources` is scored by itself too.
    """
    held_out = parts.data.validation
    if held_out is None:
        return None
    started = time.perf_counter()

    def scored(source: EvalSource | None) -> list[float]:
        samples = held_out.eval(run.track.eval_samples, source)
        totals = _scores(parts, _waited(samples, parts.data, step, watchdog))
        return all_sum(totals * (parts.part.mesh.place.tensor == 0)).tolist()

    loss, correct, labels = scored(None)
    if labels == 0:
        return None
    sums = {source.name: scored(source) for source in sources}
    losses = {name: loss / count if count else math.nan for name, (loss, _, count) in sums.items()}
    seconds = time.perf_counter() - started
    return EvalResult(step, loss / labels, correct / labels, int(labels), seconds, losses)


def begin_step(
    run: RunConfig, parts: Assembly, timeline: Timeline, shape: StepShape, batches: Sequence[Batch],
    stop: StopRequest | None = None,
) -> tuple[int, int, float]:  # fmt: skip
    """Set what a step depends on besides weights and samples, and agree whether to `stop` instead. Collective.

    Returns:
        Labels and tokens that aren't padding, of the global batch, and what summed losses are multiplied by.
    """
    mesh = parts.part.mesh
    place, layout = mesh.place, mesh.layout
    if parts.part.dropping is not None:
        parts.part.dropping.kept = kept_tokens(run.token_drop, shape.length, shape.before, timeline.total_tokens)
    if parts.part.layer_drop is not None:
        layers = parts.part.layer_drop
        layers.draw(draw_layers(run.layer_drop, layers.count, run.seed, shape.before, timeline.total_tokens))
        without_gradient(parts.engine, layers.unused)
    if parts.distilling is not None:
        parts.distilling.alpha = teacher_share(run.compress.distill, shape.before, timeline.total_tokens)
    if parts.rounding is not None:
        parts.rounding.on = shape.before >= run.compress.quantize.start * timeline.total_tokens
    # Dropout draws from a seed of its own at every step and rank, so there is no generator state to save. Ranks that
    # share a layer's matrices draw the same.
    seat = f"{place.pipe}/{place.data}/{place.sequence}"
    seed_generators(fold_seed(run.seed, "step", shape.step, seat), parts.engine.device)
    # Of ranks that work on the same samples one counts them.
    own = [0, 0, int(stop is not None and stop.requested)]
    if place.pipe == place.sequence == place.tensor == 0:
        own[:2] = count_labels(batches), sum(_real_tokens(batch, run.data.pads_rows) for batch in batches)
    labels, real_tokens, stopping = all_sum(torch.tensor(own, device=parts.engine.device)).tolist()
    if stop is not None:
        stop.agreed = stopping > 0
    # DeepSpeed averages over accumulation and replicas; the loss is a mean over the global batch's labels.
    replicas = parts.engine.gradient_accumulation_steps() * layout.data * layout.sequence
    return labels, real_tokens, replicas / max(1, labels)


def update(
    parts: Assembly, batches: Sequence[Batch], weight: float, gradients: MicroGradients | None = None
) -> tuple[Tensor, float]:
    """One optimizer step: (summed loss of this rank's labels, norm of the whole gradient)."""
    engine, part, clock = parts.engine, parts.part, parts.clock
    if part.pipeline is not None:
        loss_sum = part.pipeline.train_step(engine, batches, weight)
        return loss_sum, float(engine.get_global_grad_norm() or 0.0)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in batches:
        with clock("data"):
            own = _own(batch, parts)
        with clock("forward"), nullcontext() if part.dropping is None else part.dropping.on(own):
            loss = part.loss.train_loss(engine, own)
        with clock("backward"):
            engine.backward(weighted(loss, weight))
        if gradients is not None:
            gradients.end_of_micro_batch(batch, weight)
        loss_sum += loss.detach()
        with clock("optimizer"):
            engine.step()
    return loss_sum, float(engine.get_global_grad_norm() or 0.0)


def _scores(parts: Assembly, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    """(loss, correct, labels) of this rank's share of the micro-batches, summed: (3,) fp64."""
    engine, part = parts.engine, parts.part
    if part.pipeline is not None:
        return part.pipeline.evaluate(engine, list(batches))
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for batch in batches:
        totals += part.loss.scores(engine, _own(batch, parts))
    engine.train()
    return totals


@contextmanager
def waiting(watchdog: Watchdog | None, step: int, data: DataBundle, split: str) -> Iterator[None]:
    """Let `watchdog` time the wait for samples of step `step` inside of the block."""
    if watchdog is None:
        yield
        return
    watchdog.begin_wait(step, data.folder / f"{split}.tokens")
    yield
    watchdog.end()


def _waited(
    batches: Iterator[dict[str, Tensor]], data: DataBundle, step: int, watchdog: Watchdog | None
) -> Iterator[dict[str, Tensor]]:
    """`batches`, the wait for each of which is timed."""
    while True:
        with waiting(watchdog, step, data, "validation"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def due(every: int | None, step: int) -> bool:
    """Whether something done every `every` steps is done after step `step`; None is never."""
    return every is not None and step % every == 0


def _real_tokens(batch: Mapping[str, Tensor], pads_rows: bool) -> int:
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    if not pads_rows:
        return batch["input_ids"].numel()
    # Padding of a row of documents has position 0, as the row's first token has, and no position 1 behind it.
    positions_BT = batch["position_ids"] - batch["position_ids"][:, :1]
    alone_BT = (positions_BT == 0) & (torch.nn.functional.pad(positions_BT[:, 1:], (0, 1)) == 0)
    return int((~alone_BT).sum())


def _own(batch: Batch, parts: Assembly) -> dict[str, Tensor]:
    """What this rank works on of a micro-batch of its data rank, on its device."""
    placed = on_device(batch, parts.engine.device)
    return placed if parts.part.sequence is None else parts.part.sequence.share(placed)
