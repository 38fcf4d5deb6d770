"""Is a model cut right? Asked of a small look-alike before training: the cut one's loss and gradients are the whole's.

No family trains with a wrong loss: one whose code doesn't allow a cut is refused here, whatever its plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ds_train.config import RunConfig
from ds_train.data.batches import documents_mask
from ds_train.errors import UserError, first_line, user_error
from ds_train.models.layer_drop import LayerDropping
from ds_train.models.load import build_model, first_names, position_of_first, shares_embedding
from ds_train.models.look_alike import per_layer, small_run
from ds_train.models.loss import IGNORE_INDEX
from ds_train.models.packing import check_packing
from ds_train.models.tasks import Batch, TaskLoss
from ds_train.models.token_drop import TokenDropping, dropping_difference
from ds_train.parallel.build import build_stages, cannot_cut
from ds_train.parallel.mesh import Mesh
from ds_train.parallel.pipeline import Stage, stage_inputs
from ds_train.parallel.sequence import SequenceParallel, leave_sequence
from ds_train.parallel.tensor import Shard
from ds_train.plan.topology import Layout
from ds_train.schedule.layer_drop import LayerDraw

_SAMPLES, _LENGTH, _LAYERS = 2, 12, 4
_SEEDS = 8
_FLASH = ("flash_attention_2", "flash_attention_3")  # they compute in 16 bits only
_TOLERANCE = 1e-4  # fp32; what is computed in another order differs by about 1e-6


def check_layout(run: RunConfig, config: PreTrainedConfig, layout: Layout, mesh: Mesh, device: str) -> None:
    """Compare a look-alike of the model in `layout` with the whole one, on `device`. Collective over all ranks.

    Raises:
        UserError: the family can't be cut so, with the reason; the same on every rank.
    """
    refusal: UserError | None = None
    reason = None
    try:
        reason = difference(run, config, layout, mesh, device)
    except UserError as error:
        refusal = error
    except Exception as error:  # the code of any family may refuse in its own way
        reason = first_line(error) or type(error).__name__
    finally:
        leave_sequence()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (reason, refusal))
    for reason, refusal in found:
        if refusal is not None:
            raise refusal
        if reason is not None:
            raise cannot_cut(config, layout, reason)


def check_documents_apart(run: RunConfig, config: PreTrainedConfig, model: Any) -> None:
    """Ask a look-alike, in fp32 on the CPU, whether packed documents stay apart.

    `model` itself, in evaluation mode, is asked where none can be made, or attention needs a device.

    Raises:
        UserError: they don't.
    """
    asked, small = model, config
    if run.model.attention not in _FLASH:
        with contextlib.suppress(ValueError, UserError):
            small_run, small_config = _small(run, config, Layout(1, 1, 1, 1))
            asked, small = build_model(small_run, small_config, {}, 0).eval(), small_config
    check_packing(
        asked, small.get_text_config().vocab_size, config.model_type, asked.device,
        documents_mask if run.task.kind == "masked-lm" else None, position_of_first(small),
    )  # fmt: skip


def check_token_dropping(run: RunConfig, config: PreTrainedConfig) -> None:
    """Ask a look-alike, in fp32 on the CPU, whether a layer without some tokens is one that doesn't see them.

    Raises:
        UserError: it isn't, with the reason; no look-alike can be made.
    """

    def ask() -> str | None:
        small_run, small = _small(run, config, Layout(1, 1, 1, 1))
        model = build_model(small_run, small, {}, 0)
        dropping = TokenDropping(model, run.seed, 1)
        dropping.kept = _LENGTH // 2
        batch = _batch(run, small)
        if "position_ids" not in batch:
            later_BT = (torch.arange(_LENGTH) >= _LENGTH // 2).expand(_SAMPLES, -1)
            batch = dict(batch) | {"attention_mask": later_BT[:, None, :, None] == later_BT[:, None, None, :]}
        return dropping_difference(model, dropping, {key: batch[key] for key in batch if key != "labels"})

    _refuse_where("token_drop.kind", run.token_drop.kind, config, ask)


def check_layer_dropping(run: RunConfig, config: PreTrainedConfig) -> None:
    """Ask a look-alike whether a layer that is left out is one that isn't there.

    Raises:
        UserError: it isn't, with the reason; no look-alike can be made.
    """

    def ask() -> str | None:
        small_run, small = _small(run, config, Layout(1, 1, 1, 1))
        count, given = small.num_hidden_layers, small.to_dict()
        lists = {key: value[:-1] for key, value in per_layer(given, count).items()}
        shorter = build_model(small_run, type(small)(**(given | lists | {"num_hidden_layers": count - 1})), {}, 0)
        whole: Any = build_model(small_run, small, {}, 0)
        shorter.load_state_dict(whole.state_dict(), strict=False)
        dropping = LayerDropping(whole)
        batch = {key: value for key, value in _batch(run, small).items() if key != "labels"}
        with torch.no_grad():
            expected = shorter(**batch).logits
            for layer in range(count):  # of the others, that they run without it
                dropping.draw(LayerDraw(frozenset([layer]), (1.0,) * count))
                found = whole(**batch).logits
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        return None if same else "a layer that is left out isn't as one that isn't there"

    _refuse_where("layer_drop.kind", run.layer_drop.kind, config, ask)


def _refuse_where(key: str, value: str, config: PreTrainedConfig, ask: Callable[[], str | None]) -> None:
    """Refuse a recipe's key for what a look-alike says against it, or where none can be made or run."""
    try:
        reason = ask()
    except UserError:
        raise
    except Exception as error:  # the code of any family may refuse in its own way
        reason = first_line(error) or type(error).__name__
    if reason is not None:
        raise user_error(key, f"{config.model_type}: {reason}", "set none", value)


def difference(run: RunConfig, config: PreTrainedConfig, layout: Layout, mesh: Mesh, device: str = "cpu") -> str | None:
    """What differs between the whole look-alike and the cut one, in a phrase; None if loss and gradients are equal.

    Raises:
        Exception: whatever the family's code raises when it is cut.
    """
    if getattr(config, "layerdrop", 0.0):
        return "its layerdrop leaves out layers at random, other ones on other ranks; 0 turns it off"
    run, small = _small(run, config, layout)
    whole: Any = build_model(run, small, {}, 0)
    whole.to(device)
    batch = {key: value.to(device) for key, value in _batch(run, small).items()}
    task = TaskLoss(whole)
    if _is_random(task, whole, batch):
        return "its forward pass draws random numbers besides dropout, so a cut can't be proved right"
    expected = task.train_loss(whole, batch)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    stages = [stage.to(device) for stage in build_stages(run, small, layout, mesh.tensor)]
    if layout.pipe > 1 and shares_embedding(whole):
        with torch.no_grad():
            stages[-1].shared_weight().copy_(stages[0].shared_weight())
    loss = _chain(stages, SequenceParallel(mesh.sequence, whole).share(batch) if layout.sequence > 1 else batch)
    loss.backward()
    parts = [parameter for stage in stages for parameter in stage.parameters() if parameter.grad is not None]
    total = loss.detach()
    if layout.sequence > 1:
        for tensor in [total, *(parameter.grad for parameter in parts)]:
            dist.all_reduce(tensor, group=mesh.sequence)
    if not bool(torch.isclose(total, expected, rtol=_TOLERANCE)):
        return f"its loss would be {total.item():.6g} instead of {expected.item():.6g}"
    return _different_gradient(whole, gradients, [stage.model for stage in stages], mesh.tensor)


@torch.no_grad()
def _is_random(task: TaskLoss, model: Any, batch: Batch) -> bool:
    """Whether a training pass without dropout gives another loss under another seed (routers that sample)."""
    losses = []
    on_device = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(on_device, device_type=model.device.type):
        for seed in range(_SEEDS):
            torch.manual_seed(seed)
            losses.append(task.train_loss(model, batch))
    return any(not bool(torch.isclose(loss, losses[0], rtol=_TOLERANCE)) for loss in losses)


def _small(run: RunConfig, config: PreTrainedConfig, layout: Layout) -> tuple[RunConfig, PreTrainedConfig]:
    """Recipe and config of a look-alike in fp32 that `layout` can cut.

    Raises:
        ValueError: the family can't be made small.
    """
    return small_run(run, config, max(_LAYERS, layout.pipe), layout.tensor * layout.sequence)


def _batch(run: RunConfig, config: PreTrainedConfig) -> Batch:
    """Two samples as the recipe's data makes them: packed documents, or padded ones."""
    draw = torch.Generator().manual_seed(11)
    vocabulary = int(config.get_text_config().vocab_size)
    tokens_BT = torch.randint(3, vocabulary, (_SAMPLES, _LENGTH), generator=draw)
    labels_BT = torch.randint(3, vocabulary, (_SAMPLES, _LENGTH), generator=draw)
    labels_BT[:, ::5] = IGNORE_INDEX
    if run.data.rows_have_documents and run.task.kind == "causal-lm":
        positions_BT = torch.cat([torch.arange(5), torch.arange(_LENGTH - 5)]).expand(_SAMPLES, -1)
        return {"input_ids": tokens_BT, "labels": labels_BT, "position_ids": positions_BT.contiguous()}
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, -3:] = 0
    tokens_BT[1, -3:] = int(getattr(config, "pad_token_id", None) or 0)
    labels_BT[1, -3:] = IGNORE_INDEX
    if run.task.kind == "sequence-classification":
        labels_B = torch.randint(0, int(config.num_labels or 2), (_SAMPLES,), generator=draw)
        return {"input_ids": tokens_BT, "labels": labels_B, "attention_mask": mask_BT}
    return {"input_ids": tokens_BT, "labels": labels_BT, "attention_mask": mask_BT}


def _chain(stages: list[Stage], batch: Batch) -> Tensor:
    """The loss of the batch through all stages, differentiable to the first."""
    carried: Any
    carried, names = stage_inputs(batch)
    for stage in stages:
        stage.travellers = names
        carried = stage(carried)
    return carried


def _different_gradient(
    whole: PreTrainedModel, gradients: dict[str, Tensor], parts: list[PreTrainedModel], group: Any
) -> str | None:
    found: dict[str, Tensor] = {}
    names = first_names(whole)
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is None:
                continue
            name = names[name]
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
