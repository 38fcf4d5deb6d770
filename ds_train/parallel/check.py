"""Is a model cut right? Asked of a small look-alike before training: the cut one's loss and gradients are the whole's.

No family trains with a wrong loss: one whose code doesn't allow a cut is refused here, whatever its plan says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_train.config import RunConfig
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.families import look_alike
from ds_train.models.load import build_model, outline
from ds_train.models.loss import IGNORE_INDEX
from ds_train.models.tasks import Batch, TaskLoss
from ds_train.parallel.pipeline import Stage, balance, cut_to_stage, find_cut, stage_bounds, stage_inputs
from ds_train.parallel.tensor import Shard, cuts_vocabulary, shard_model, tensor_plan
from ds_train.plan.topology import Layout

_SAMPLES, _LENGTH, _LAYERS = 2, 12, 4
_TOLERANCE = 1e-4  # fp32; what is computed in another order differs by about 1e-6


def check_layout(run: RunConfig, config: PreTrainedConfig, layout: Layout, tensor_group: Any) -> None:
    """Compare a look-alike of the model in `layout` (pipe and tensor) with the whole one. Collective over tensor ranks.

    Raises:
        UserError: the family can't be cut so, with the reason.
    """
    key = "parallel.pipeline" if layout.pipe > 1 else "parallel.tensor"
    value = layout.pipe if layout.pipe > 1 else layout.tensor
    try:
        reason = difference(run, config, layout, tensor_group)
    except UserError:
        raise
    except Exception as error:  # the code of any family may refuse in its own way
        reason = first_line(error)
    if reason is not None:
        fix = "set it to 1; parallel.zero_stage=3 spreads any model over ranks"
        raise user_error(key, f"{config.model_type} can't be cut so: {reason}", fix, value)


def difference(run: RunConfig, config: PreTrainedConfig, layout: Layout, tensor_group: Any) -> str | None:
    """What differs between the whole look-alike and the cut one, in a phrase; None if loss and gradients are equal.

    Raises:
        Exception: whatever the family's code raises when it is cut.
    """
    model = run.model.model_copy(update={"path": None, "arch": config.model_type, "activation_checkpointing": False})
    precision = run.precision.model_copy(update={"dtype": "fp32"})
    run = run.model_copy(update={"model": model, "precision": precision})
    small = look_alike(config, max(_LAYERS, layout.pipe))
    small.use_cache = False
    if run.task.kind == "sequence-classification":
        small.num_labels = int(config.num_labels or 2)
    whole = build_model(run, small, {}, 0)
    batch = _batch(run, small)
    expected = TaskLoss(whole).train_loss(whole, batch)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    stages = _stages(run, small, layout, tensor_group)
    loss = _chain(stages, batch)
    if not bool(torch.isclose(loss, expected, rtol=_TOLERANCE)):
        return f"its loss would be {loss.item():.6g} instead of {expected.item():.6g}"
    loss.backward()
    return _different_gradient(whole, gradients, [stage.model for stage, _ in stages], tensor_group)


def _batch(run: RunConfig, config: PreTrainedConfig) -> Batch:
    """Two samples as the recipe's data makes them: packed documents, or padded ones."""
    draw = torch.Generator().manual_seed(11)
    vocabulary = int(config.get_text_config().vocab_size)
    tokens_BT = torch.randint(3, vocabulary, (_SAMPLES, _LENGTH), generator=draw)
    labels_BT = torch.randint(3, vocabulary, (_SAMPLES, _LENGTH), generator=draw)
    labels_BT[:, ::5] = IGNORE_INDEX
    if run.task.kind == "sequence-classification":
        labels_B = torch.randint(0, int(config.num_labels or 2), (_SAMPLES,), generator=draw)
        return {"input_ids": tokens_BT, "labels": labels_B, "attention_mask": torch.ones_like(tokens_BT)}
    if run.data.packing and run.task.kind == "causal-lm":
        positions_BT = torch.cat([torch.arange(5), torch.arange(_LENGTH - 5)]).expand(_SAMPLES, -1)
        return {"input_ids": tokens_BT, "labels": labels_BT, "position_ids": positions_BT.contiguous()}
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, -3:] = 0
    labels_BT[1, -3:] = IGNORE_INDEX
    return {"input_ids": tokens_BT, "labels": labels_BT, "attention_mask": mask_BT}


def _stages(
    run: RunConfig, config: PreTrainedConfig, layout: Layout, tensor_group: Any
) -> list[tuple[Stage, TaskLoss | None]]:
    """Every stage of the look-alike in this process, sharded over the tensor ranks."""
    sketch = outline(run, config)
    plan = tensor_plan(sketch) if layout.tensor > 1 else {}
    if layout.tensor > 1 and not plan:
        raise ValueError("there is no tensor plan for it")
    vocabulary = layout.tensor > 1 and cuts_vocabulary(sketch, plan, layout.tensor)
    cut = find_cut(sketch) if layout.pipe > 1 else None
    count = config.num_hidden_layers
    sizes = balance([1.0] * count, 0.0, layout.pipe)
    stages: list[tuple[Stage, TaskLoss | None]] = []
    for first, stop in stage_bounds(sizes):
        part = None if cut is None else partial(cut_to_stage, cut=cut, first=first, stop=stop)
        model = build_model(run, config, {}, 0, part)
        if layout.tensor > 1:
            shard_model(model, plan, tensor_group, vocabulary)
        stage = Stage(model) if cut is None else Stage(model, cut, first, stop)
        stages.append((stage, TaskLoss(model, tensor_group if vocabulary else None) if stage.is_last else None))
    if cut is not None and sketch.get_output_embeddings().weight is sketch.get_input_embeddings().weight:
        with torch.no_grad():
            stages[-1][0].shared_weight().copy_(stages[0][0].shared_weight())
    return stages


def _chain(stages: list[tuple[Stage, TaskLoss | None]], batch: Batch) -> Tensor:
    """The loss of the batch through all stages, differentiable to the first."""
    carried, names = stage_inputs(batch)
    for stage, task in stages:
        stage.travellers = names
        if task is not None:
            return stage.loss(task, carried, batch["labels"])
        carried = stage(carried)
    raise ValueError("there is no last stage")


def _different_gradient(
    whole: PreTrainedModel, gradients: dict[str, Tensor], parts: list[PreTrainedModel], group: Any
) -> str | None:
    found: dict[str, Tensor] = {}
    first_names = _first_names(whole)
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is None:
                continue
            name = first_names[name]
            shard: Shard | None = getattr(parameter, "tensor_shard", None)
            found[name] = found[name] + parameter.grad if name in found else parameter.grad
            if shard is not None and name in gradients and gradients[name].shape != parameter.grad.shape:
                gradients[name] = shard.cut(gradients[name], dist.get_rank(group), dist.get_world_size(group))
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, expected in gradients.items():
        if name not in found:
            if float(expected.abs().max()) > _TOLERANCE * scale:
                return f"{name} would get no gradient"
            continue
        if not torch.allclose(found[name], expected, rtol=1e-2, atol=_TOLERANCE * scale):
            return f"the gradient of {name} would differ"
    return None


def _first_names(model: nn.Module) -> dict[str, str]:
    """First name of every parameter by any of its names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
