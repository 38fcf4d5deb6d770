"""Trains recipes whose data has poison in it, and looks at what happens: `poisoned.py RECIPE [RECIPE ...]`.

A token of value 1 makes what its embedding gives NaN, one of value 2 that gradient; a label of value 3 makes the loss
of its micro-batch many times as large. In a run whose name begins with `broken`, the module `BROKEN` gives NaN in row 0
of every training micro-batch, on the last data rank.

Every rank writes RUN/fed-RANK.jsonl, the tokens that its embedding was given in training, a line per micro-batch; and
RUN/kept-RANK.jsonl, for each skipped step whether all that is updated is bit by bit what it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_train.checkpoint.fragments import fragments
from ds_train.config import load
from ds_train.engine import diagnosis, job, loop, ranks
from ds_train.errors import UserError
from ds_train.models.tasks import TaskLoss

NAN, NAN_GRADIENT, HUGE = 1, 2, 3
BROKEN = "model.layers.2.mlp.down_proj"
_folder = Path()
_plain_update, _plain_loss = loop.update, TaskLoss.train_loss


def main() -> int:
    def body(info: ranks.RankInfo) -> None:
        global _folder
        loop.update = diagnosis.update = _update
        TaskLoss.train_loss = _loss  # type: ignore[method-assign]
        torch.nn.modules.module.register_module_forward_hook(_poison)
        for recipe in sys.argv[1:]:
            run = load(recipe)
            _folder = Path(run.run_root) / run.name
            try:
                job.train(run, info)
            except UserError as error:
                print(f"ENDED {run.name}: {error}", flush=True)

    return ranks.run_to_exit_code(body)


def _update(parts: Any, batches: Any, *others: Any) -> Any:
    before = _updated(parts)
    modules, mesh, handle = dict(parts.model.named_modules()), parts.part.mesh, None
    if _folder.name.startswith("broken") and BROKEN in modules and mesh.place.data == mesh.layout.data - 1:
        handle = modules[BROKEN].register_forward_hook(_break, prepend=True)
    result = _plain_update(parts, batches, *others)
    if handle is not None:
        handle.remove()
    if not parts.engine.was_step_applied():
        same = all(torch.equal(old, new) for old, new in zip(before, _updated(parts), strict=True))
        _write("kept", same)
    return result


def _loss(task: TaskLoss, forward: Any, batch: Any) -> Tensor:
    loss = _plain_loss(task, forward, batch)
    return loss * 30.0 if (batch["labels"] == HUGE).any() else loss


def _updated(parts: Any) -> list[Tensor]:
    """Copies of the weights and states that this rank updates, as bits."""
    batches = fragments(parts.engine, parts.part)
    tensors = [tensor for batch in batches for item in batch for tensor in item.tensors.values()]
    return [tensor.clone().view(torch.uint8) for tensor in tensors]


def _break(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return torch.cat([output[:1] * torch.nan, output[1:]])


def _poison(module: nn.Module, inputs: Any, output: Any) -> Any:
    if "Embedding" not in type(module).__name__ or "Rotary" in type(module).__name__ or not torch.is_grad_enabled():
        return None
    (tokens,) = inputs
    _write("fed", tokens.tolist())
    factors = torch.ones_like(tokens, dtype=output.dtype)
    factors[tokens == NAN] = torch.nan
    output = output * factors[..., None]
    if output.requires_grad and (tokens == NAN_GRADIENT).any():
        output.register_hook(lambda gradient: gradient * torch.nan)
    return output


def _write(what: str, value: Any) -> None:
    with (_folder / f"{what}-{torch.distributed.get_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    sys.exit(main())
