"""Where the first non-finite value of a step appeared: the step is done again, with an eye on every module.

Done again it is skipped again, so it works in every layout: no rank needs to know what another one holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from ds_train.config import RunConfig
from ds_train.data.ledger import Portion
from ds_train.engine.build import Assembly
from ds_train.engine.loop import begin_step, update
from ds_train.parallel.pipeline import is_elsewhere
from ds_train.schedule.timeline import Timeline

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """The first non-finite value that a rank met in a step.

    `tensor` says which of the module's it is: its output, its own parameter, or a gradient. `from_finite` where what
    went into the module was finite. `rows` are the samples of the micro-batch that have such values, where the tensor
    tells; `documents` are theirs, or all of the micro-batch. `of_teacher` where the module is one of the teacher's.
    """

    phase: Literal["forward", "backward"]
    module: str
    module_class: str
    tensor: str
    from_finite: bool
    micro_batch: int
    rows: tuple[int, ...] = ()
    rank: int = 0
    stage: int = 0
    documents: tuple[Portion, ...] = field(default=(), repr=False)
    of_teacher: bool = False

    def __str__(self) -> str:
        names = [f"{part.source} (tokens {part.start} to {part.stop - 1})" for part in self.documents[:_SHOWN]]
        more = len(self.documents) - _SHOWN
        rest = f" and {more} more" if more > 0 else ""
        whose = "the teacher's " if self.of_teacher else ""
        place = f"{whose}{self.module} ({self.module_class}), {self.tensor}, in the {self.phase} pass"
        where = f"micro-batch {self.micro_batch} on rank {self.rank}"
        return f"{place} of {where}, samples of {', '.join(names)}{rest}"


def find_nonfinite(run: RunConfig, parts: Assembly, timeline: Timeline, step: int) -> Finding | None:
    """The first non-finite value of step `step` (from 0), which was skipped; None if it doesn't come again. Collective.

    The same on every rank.
    """
    shape = timeline.at(step)
    batches = parts.data.train.take(shape)
    _, _, weight = begin_step(run, parts, timeline, shape, batches)
    theirs = NonfiniteHooks(parts.teacher) if parts.teacher is not None else None
    with NonfiniteHooks(parts.model) as hooks, theirs or nullcontext():
        update(parts, batches, weight)
    own = hooks.found
    if theirs is not None and theirs.found is not None:
        own = replace(theirs.found, of_teacher=True)
    if own is not None:
        slots = parts.data.train.slots(shape)[own.micro_batch]
        # In one row of many samples it isn't known which.
        rows = [] if run.data.padding_free else list(own.rows)
        documents = parts.data.train.portions(slots[rows] if rows else slots, shape)
        own = replace(own, rank=dist.get_rank(), stage=parts.part.mesh.place.pipe, documents=tuple(documents))
    everyones: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return min((found for found in everyones if found is not None), key=_order, default=None)


def finding_record(finding: Finding | None) -> dict[str, Any]:
    """What metrics.jsonl has of it."""
    return {} if finding is None else asdict(finding)


def _order(finding: Finding) -> tuple[Any, ...]:
    """Where a value comes from goes before where it went: stages pass it on forwards, and gradients backwards."""
    forward = finding.phase == "forward"
    stage = finding.stage if forward else -finding.stage
    return not forward, not finding.of_teacher, not finding.from_finite, stage, finding.micro_batch, finding.rank


class NonfiniteHooks:
    """Looks at what every module of `model` gives, forwards and backwards; `found` is the first non-finite value."""

    def __init__(self, model: nn.Module) -> None:
        self.found: Finding | None = None
        self._model, self._micro_batch, self._rows = model, -1, 0
        self._handles: list[Any] = []
        self._compiled: dict[nn.Module, Any] = {}
        self._broken: dict[nn.Module, str] = {}
        self._gradient: Tensor | None = None

    def __enter__(self) -> NonfiniteHooks:
        for name, module in self._model.named_modules():
            if is_elsewhere(module):
                continue
            if getattr(module, "_compiled_call_impl", None) is not None:  # a compiled module calls no hooks
                self._compiled[module], module._compiled_call_impl = module._compiled_call_impl, None
            before, after = self._before(name), self._after(name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._backward(name, -1, "of its parameter")))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module, call in self._compiled.items():
            module._compiled_call_impl = call

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            if module is self._model:
                self._micro_batch += 1
                self._rows = next((len(tensor) for tensor in _tensors((arguments, options))), 0)
            # Here, since ZeRO-3 has them no longer when the module has ended.
            broken = [key for key, value in module.named_parameters(recurse=False) if not _finite(value)]
            self._broken[module] = broken[0] if broken else ""
            for tensor in _floats((arguments, options)):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward(name, self._micro_batch, "of its input"))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, options: Mapping[str, Any], output: Any) -> None:
            if self.found is not None:
                return
            bad = next((tensor for tensor in _floats(output) if not _finite(tensor)), None)
            if bad is None:
                return
            # Masks may be infinite.
            inputs = {key: value for key, value in options.items() if "mask" not in key}
            fine = all(_finite(tensor) for tensor in _floats((arguments, inputs)))
            broken = self._broken[module]
            tensor = f"its parameter {broken}" if broken else "its output"
            rows = self._bad_rows(bad)
            self.found = Finding("forward", name, type(module).__name__, tensor, fine, self._micro_batch, rows)

        return hook

    def _backward(self, name: str, micro_batch: int, of: str) -> Any:
        def hook(gradient: Tensor) -> None:
            # Of modules that one tensor goes into, the innermost is the last to be told.
            again = self._gradient is not None and gradient is self._gradient
            if (self.found is None or again) and not _finite(gradient):
                self._gradient = gradient
                owner = name.rpartition(".")[0] if of == "of its parameter" else name
                tensor = f"the gradient {of}" + (f" {name.rpartition('.')[2]}" if owner != name else "")
                kind = type(self._model.get_submodule(owner)).__name__
                where = self._micro_batch if micro_batch < 0 else micro_batch
                rows = () if micro_batch < 0 else self._bad_rows(gradient)
                self.found = Finding("backward", owner, kind, tensor, True, where, rows)

        return hook

    def _bad_rows(self, tensor: Tensor) -> tuple[int, ...]:
        if tensor.dim() < 2 or tensor.shape[0] != self._rows:
            return ()
        bad = ~tensor.detach().isfinite().flatten(1).all(1)
        return tuple(bad.nonzero().flatten().tolist())


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _floats(value: Any) -> Iterator[Tensor]:
    return (tensor for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
