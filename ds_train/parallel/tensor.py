"""Tensor parallelism: a transformers model's tensor plan -> DeepSpeed's AutoTP layers, in place.

Every sharded parameter carries a `Shard` in its attribute `tensor_shard`, from which the whole one is gathered again.
Shapes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from ds_kernels import global_norm
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ds_train.models.tasks import plain_head
from ds_train.models.tensor_plan import general_name

Group = Any

# Attributes by which attention modules reshape their heads.
_HEAD_COUNTS = (
    "num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "n_kv_heads",
    "embed_dim", "all_head_size", "split_size", "hidden_size", "inner_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter: `dim` is cut in `parts` pieces side by side, each cut evenly over the group."""

    dim: int
    parts: int = 1

    def cut(self, whole: Tensor, index: int, ranks: int) -> Tensor:
        """Part `index` of `ranks` of a whole tensor, as a copy."""
        pieces = [piece.chunk(ranks, self.dim)[index] for piece in whole.chunk(self.parts, self.dim)]
        return torch.cat(pieces, self.dim).contiguous()

    def join(self, shards: list[Tensor]) -> Tensor:
        """The whole tensor from every rank's part."""
        pieces = [shard.chunk(self.parts, self.dim) for shard in shards]
        return torch.cat([rank[part] for part in range(self.parts) for rank in pieces], self.dim)


def shard_model(model: PreTrainedModel, plan: dict[str, str], group: Group, vocabulary: bool) -> None:
    """Replace the planned modules of `model` by tensor-parallel ones. Collective over `group`.

    Args:
        plan: what `tensor_plan` gave. Modules that aren't here (another pipeline stage's) are passed over.
        vocabulary: cut embedding and head along the vocabulary (see `cuts_vocabulary`).
    """
    from deepspeed.module_inject import layers as autotp

    # Without it the backward pass is silently wrong.
    autotp.set_autotp_mode(training=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        style = plan.get(general_name(name))
        if style is None or module in (head, embedding) or not any(True for _ in module.parameters(recurse=False)):
            continue
        if style == "mla_kv_a_proj":
            _sum_rotary_gradients(module, model.config.get_text_config().qk_rope_head_dim, group)
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if style in ("replicate", "local_params"):
            continue
        if style == "replicated_with_grad_allreduce":
            for parameter in module.parameters():
                _sum_gradients(parameter, group)
            continue
        setattr(parent, name.rpartition(".")[2], _parallel(module, style, name, group))
        if style in ("colwise", "fused_colwise"):
            _divide_heads(parent, dist.get_world_size(group))
    _shard_bare_parameters(model, plan, group)
    if _drops(model.config):
        _separate_dropout(model, dist.get_rank(group))
    if vocabulary:
        _shard_vocabulary(model, group)


def cuts_vocabulary(model: PreTrainedModel, plan: dict[str, str], ranks: int) -> bool:
    """Whether embedding and head can be cut along the vocabulary: the loss is taken inside of a plain head."""
    head, embedding = plain_head(model), model.get_input_embeddings()
    if head is None or type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        return False
    names = [name for name, module in model.named_modules() if module is head]
    planned = any(plan.get(name) in ("colwise_gather_output", "colwise_rep") for name in names)
    return planned and embedding.num_embeddings % ranks == 0 and head.out_features == embedding.num_embeddings


def gather_whole(parameter: Tensor, group: Group) -> Tensor:
    """The whole parameter, from the shards of `group`; itself where it isn't sharded. Collective over `group`."""
    shard: Shard | None = getattr(parameter, "tensor_shard", None)
    if shard is None:
        return parameter.detach()
    local = parameter.detach().contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return shard.join(parts)


def gradient_norm(model: nn.Module, group: Group) -> float:
    """L2 norm of the gradient of the whole model: shards count on every rank of `group`, whole parameters once.

    `group` is None where nothing is sharded.
    """
    once = group is None or dist.get_rank(group) == 0
    gradients = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None and (once or hasattr(parameter, "tensor_shard"))
    ]
    norm = global_norm(gradients)
    if group is None:
        return norm
    square = torch.tensor(norm**2, dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(square, group=group)
    return float(square.sqrt())


class _ColumnConv1D(nn.Module):
    """GPT-2's `Conv1D` (weight (D_in, D_out)), cut along its outputs; `parts` matrices lie side by side."""

    def __init__(self, module: Conv1D, parts: int, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self._group = module.weight, module.bias, group
        _shard_parameter(self.weight, Shard(1, parts), group)
        _shard_parameter(self.bias, Shard(0, parts), group)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD.view_as(hidden_BTD)  # whatever else reads the original isn't sharded
        _sum_gradients(hidden_BTD, self._group)
        return hidden_BTD @ self.weight + self.bias


class _RowConv1D(nn.Module):
    """GPT-2's `Conv1D`, cut along its inputs; the bias is whole on every rank."""

    def __init__(self, module: Conv1D, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self._group = module.weight, module.bias, group
        _shard_parameter(self.weight, Shard(0), group)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        from deepspeed.module_inject.layers import RowParallel

        return RowParallel.apply(self._group, hidden_BTD @ self.weight, False) + self.bias


class _OwnRandomness:
    """Random numbers of this tensor rank alone, between `enter` and `leave`; outside all tensor ranks draw the same.

    The numbers follow from the shared generator, so a recomputed layer draws them again.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._shared: tuple[Tensor, Tensor] | None = None

    def forget(self, *_: Any) -> None:
        """Recomputation may stop between `enter` and `leave`, and brings the generators back itself."""
        self._shared = None

    def enter(self, module: nn.Module, *_: Any) -> None:
        if self._shared is not None or not module.training:
            return
        seed = int(torch.randint(2**62, ()))
        self._shared = torch.get_rng_state(), get_accelerator().get_rng_state()
        torch.manual_seed(seed + self._rank)

    def leave(self, *_: Any) -> None:
        if self._shared is None:
            return
        on_host, on_device = self._shared
        get_accelerator().set_rng_state(on_device)
        torch.set_rng_state(on_host)
        self._shared = None


def _drops(config: PreTrainedConfig) -> bool:
    """Whether the config asks for dropout of any kind."""
    keys = config.get_text_config().to_dict().items()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in keys)


def _separate_dropout(model: nn.Module, rank: int) -> None:
    """Each rank drops out its own heads and channels: between a layer cut along its outputs and one along its inputs.

    With the same numbers everywhere, head 0 of every rank would lose the same scores.
    """
    from deepspeed.module_inject import layers as autotp

    randomness = _OwnRandomness(rank)
    for module in model.modules():
        children = list(module.children())
        if any(_gives_shards(child) for child in children):
            module.register_forward_pre_hook(randomness.forget)
        if _gives_shards(module):
            module.register_forward_hook(randomness.enter)
        elif type(module) in (_RowConv1D, autotp.LinearAllreduce):
            module.register_forward_pre_hook(randomness.leave)


def _gives_shards(module: nn.Module) -> bool:
    from deepspeed.module_inject import layers as autotp

    return isinstance(module, _ColumnConv1D) or (type(module) is autotp.LinearLayer and not module.gather_output)


def _parallel(module: nn.Module, style: str, name: str, group: Group) -> Any:
    from deepspeed.module_inject import layers as autotp

    if isinstance(module, Conv1D):
        if style == "rowwise":
            return _RowConv1D(module, group)
        return _ColumnConv1D(module, 3 if style == "fused_colwise" else 1, group)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}, which can't be cut {style}")
    across = module.in_features if style.startswith("rowwise") else module.out_features
    if across % dist.get_world_size(group):
        raise ValueError(f"{dist.get_world_size(group)} tensor ranks don't divide the {across} features of {name}")
    if style == "rowwise":
        layer: Any = autotp.LinearAllreduce(module, group, name=name)
    elif style.startswith("rowwise"):
        layer = autotp.LinearAllreduceWithReplicatedInput(module, group, name=name)
    else:
        layer = autotp.LinearLayer(module, group, name=name, gather_output=style != "colwise")
    rowwise = style.startswith("rowwise")
    layer.weight.tensor_shard = Shard(1 if rowwise else 0)
    if layer.bias is not None and not rowwise:
        layer.bias.tensor_shard = Shard(0)
    return layer


def _shard_vocabulary(model: PreTrainedModel, group: Group) -> None:
    """Cut embedding and head, each where this rank has it; tied ones stay one parameter."""
    from deepspeed.module_inject import layers as autotp

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    parallel_head = None
    if isinstance(head, nn.Linear):
        tied = isinstance(embedding, nn.Embedding) and embedding.weight is head.weight
        parallel_head = autotp.VocabParallelLinear(head, group, name="lm_head")
        for parameter in parallel_head.parameters():
            parameter.tensor_shard = Shard(0)
        model.set_output_embeddings(parallel_head)
        if not tied:
            parallel_head = None
    if isinstance(embedding, nn.Embedding):
        layer = autotp.VocabParallelEmbedding(embedding, group, tied_vocab_parallel_linear=parallel_head)
        layer.weight.tensor_shard = Shard(0)
        model.set_input_embeddings(layer)


def _shard_bare_parameters(model: PreTrainedModel, plan: dict[str, str], group: Group) -> None:
    """Parameters that are planned by their own name, such as attention sinks: one entry per head, or gradients."""
    for name, parameter in model.named_parameters():
        style = plan.get(general_name(name))
        if style is None or getattr(parameter, "tensor_shard", None) is not None:
            continue
        if style == "replicated_with_grad_allreduce":
            _sum_gradients(parameter, group)
        elif style == "colwise":
            _shard_parameter(parameter, Shard(0), group)
        elif style not in ("replicate", "local_params"):
            raise ValueError(f"the parameter {name} can't be cut {style}")


def _shard_parameter(parameter: nn.Parameter, shard: Shard, group: Group) -> None:
    parameter.data = shard.cut(parameter.data, dist.get_rank(group), dist.get_world_size(group))
    parameter.tensor_shard = shard  # type: ignore[attr-defined]
    # By this DeepSpeed knows that every rank's part counts in the gradient norm (runtime/utils.py:138).
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _sum_gradients(tensor: Tensor, group: Group) -> None:
    """For what is whole on every rank but works on sharded activations: each rank sees only its part of the gradient.

    Not DeepSpeed's `ColumnParallel`: it sums a copy of a gradient that isn't contiguous (module_inject/layers.py:313).
    """

    def summed(gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    if tensor.requires_grad:
        tensor.register_hook(summed)


def _sum_rotary_gradients(module: nn.Module, rotary: int, group: Group) -> None:
    """The rotary part of a latent projection goes to every head, so its gradient is summed over the ranks."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        latent, keys = output.split([output.shape[-1] - rotary, rotary], dim=-1)
        keys = keys.contiguous()  # a tensor of its own: the hook isn't the other part's
        _sum_gradients(keys, group)
        return torch.cat([latent, keys], dim=-1)

    module.register_forward_hook(hook)


def _divide_heads(module: nn.Module, ranks: int) -> None:
    """Let a module whose outputs are sharded count the heads and widths that it has left, once."""
    if getattr(module, "tensor_ranks", 1) == ranks:
        return
    module.tensor_ranks = ranks  # type: ignore[assignment]
    for name in _HEAD_COUNTS:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value % ranks == 0:
            setattr(module, name, value // ranks)
