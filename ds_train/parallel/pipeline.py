"""A transformers model -> DeepSpeed's PipelineModule, without a copy of any of its code.

Every stage keeps the whole model as an outline and calls the model's own forward, so masks, rotary tables and the
head's arithmetic are transformers'. Modules that belong to other stages are replaced by `_Elsewhere`:

- one before this stage's layers passes on what it is given; the last of them hands over the hidden states that came
  from the previous stage instead, so whatever the model computed from embeddings until then doesn't matter;
- the first one after this stage's layers ends the forward pass with the hidden states that it is given.

Whether a family's code allows that is checked on a small look-alike before training (parallel/check.py).
Shapes: B samples of a micro-batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_train.models.layer_drop import LayerDropping
from ds_train.models.tasks import SAMPLE_IDS, TOKEN_IDS, Batch, TaskLoss, model_inputs, on_device, weighted
from ds_train.models.token_drop import TokenDropping
from ds_train.plan.families import FAMILIES
from ds_train.plan.topology import Layout

TRAVELLERS = ("position_ids", "attention_mask", "labels", SAMPLE_IDS, TOKEN_IDS)
"""Integer tensors that go from stage to stage with the hidden states.

Labels too, so that the last stage's forward pass gives the loss: DeepSpeed's hooks on what a forward pass returns must
be the first of the backward pass, since its 16-bit optimizer clears gradients there (bf16_optimizer.py:500).
"""


@dataclass(frozen=True)
class Cut:
    """Where a model can be cut: full names of the modules before its layers, of their list, and of those after."""

    before: tuple[str, ...]
    layers: str
    after: tuple[str, ...]


def find_cut(model: PreTrainedModel) -> Cut:
    """The cut of `model` (any device, meta too), from its pipeline plan or from the table of families.

    Raises:
        ValueError: there is neither, or parameters are left that the plan says nothing about.
    """
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    plan, family = model.config.base_model_pp_plan, FAMILIES.get(model.config.model_type)
    if plan:
        names = list(plan)
        lists = [name for name in names if isinstance(_find(model, prefix + name), nn.ModuleList)]
        if len(lists) != 1:
            raise ValueError("its pipeline plan names no single list of layers")
        place = names.index(lists[0])
        before, layers, after = names[:place], lists[0], names[place + 1 :]
    elif family is not None and family.before:
        before, layers, after = list(family.before), family.layers, list(family.after)
    else:
        raise ValueError("transformers has no pipeline plan for it")
    present = [prefix + name for name in (*before, *after) if _find(model, prefix + name) is not None]
    # What lies outside of the base model is its head.
    heads = [name for name, _ in model.named_children() if prefix and name + "." != prefix]
    cut = Cut(
        tuple(name for name in present if name.removeprefix(prefix) in before),
        prefix + layers,
        (*(name for name in present if name.removeprefix(prefix) in after), *heads),
    )
    known = (*cut.before, cut.layers, *cut.after)
    loose = [name for name, _ in model.named_parameters() if not any(_within(name, module) for module in known)]
    if loose:
        raise ValueError(f"its plan says nothing about {loose[0]}")
    return cut


def layer_costs(model: PreTrainedModel, cut: Cut, sequence_length: int) -> tuple[list[float], float]:
    """(cost of each layer, cost of what comes after them), in multiply-adds per token of the forward pass.

    Matrices count by their elements, experts by the share of them that a token visits, attention by its scores over
    half of `sequence_length`. An embedding is a lookup.
    """
    config = model.config.get_text_config()
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts = next((count for count in counts if count), 1)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    attention = sequence_length * config.hidden_size

    def cost(module: nn.Module) -> float:
        return sum(
            parameter.numel() * (share if ".experts." in f".{name}." else 1.0)
            for name, parameter in module.named_parameters()
            if parameter.dim() > 1
        )

    layers = [cost(layer) + attention for layer in _layers(model, cut)]
    return layers, sum(cost(model.get_submodule(name)) for name in cut.after)


def cut_to_stage(model: PreTrainedModel, cut: Cut, first: int, stop: int) -> None:
    """Leave in `model` what the stage of layers `first` to `stop` - 1 holds; the rest becomes `_Elsewhere`."""
    layers = _layers(model, cut)
    if first > 0:
        for name in cut.before:
            _replace(model, name)
    if stop < len(layers):
        for name in cut.after:
            _replace(model, name)
    family = FAMILIES.get(model.config.model_type)
    for index in range(len(layers)):
        if not first <= index < stop:
            layers[index] = _Elsewhere(layers[index], gives_tuple=family is not None and family.tuples)


class Beside(Protocol):
    """What a stage trains on besides what it hands to the next one."""

    def begin(self, batch: Batch) -> None:
        """The next forward pass is of this micro-batch."""

    def end(self) -> Tensor | None:
        """Its loss: a differentiable scalar."""


class Stage(nn.Module):
    """One stage: the model's outline, called with a tuple of tensors as DeepSpeed's pipeline wants it.

    (tokens or hidden states, then the travellers that the batch has) -> (hidden states, travellers). The last stage
    gives the summed loss of the micro-batch, or, where no gradient is asked for, what `TaskLoss.scores` gives.
    """

    def __init__(
        self, model: PreTrainedModel, cut: Cut | None = None, first: int = 0, stop: int = 0,
        vocabulary_group: Any = None,
    ) -> None:  # fmt: skip
        """`model` cut to layers `first` to `stop` - 1; without `cut`, the only stage of a whole model.

        `vocabulary_group`: the ranks that embedding and head are cut over; None where they are whole.
        """
        super().__init__()
        self.model = model
        layers: Any = [] if cut is None else _layers(model, cut)
        self.is_first, self.is_last = first == 0, stop == len(layers)
        self.travellers: tuple[str, ...] = ()
        """Names of the travellers, in their order; the batches decide."""
        # In a list, so that it isn't registered as a module twice.
        self._entrance = [] if self.is_first else [layers[first - 1]]
        for module in self._entrance:
            module.role = "entrance"
        if not self.is_last:
            layers[stop].role = "exit"
        self.task = TaskLoss(model, vocabulary_group) if self.is_last else None
        self.dropping: TokenDropping | None = None
        self.beside: Beside | None = None
        """What a stage before the last has a loss of its own of."""
        self.beside_weight, self.beside_sum = 1.0, torch.zeros((), dtype=torch.float64)
        """What that loss is multiplied by, as the last stage's is, and its sum over the micro-batches of a step."""

    def drop_tokens(self, seed: int, whole_layers: int) -> TokenDropping:
        """Let this stage's middle layers of the model drop tokens."""
        self.dropping = TokenDropping(self.model, seed, whole_layers, skip=(_Elsewhere,))
        return self.dropping

    def drop_layers(self) -> LayerDropping:
        """Let this stage's layers be left out."""
        return LayerDropping(self.model, skip=(_Elsewhere,))

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        batch = dict(zip(("input_ids", *self.travellers), inputs, strict=True))
        if self.dropping is None:
            return self._forward(batch, inputs)
        with self.dropping.on(batch):
            return self._forward(batch, inputs)

    def _forward(self, batch: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
        if self.task is not None:
            compute = self.task.train_loss if torch.is_grad_enabled() else self.task.scores
            return compute(self.call_with, batch)
        beside = self.beside if torch.is_grad_enabled() else None
        if beside is not None:
            beside.begin(batch)
        try:
            self.call_with(**model_inputs(batch))
        except _StageEnd as end:
            hidden_BTD, loss = end.hidden_BTD.contiguous(), None if beside is None else beside.end()
            if loss is not None:
                self.beside_sum += loss.detach()
                hidden_BTD = _WithLoss.apply(hidden_BTD, loss, self.beside_weight)
            return hidden_BTD, *inputs[1:]
        raise RuntimeError("the model's forward never reached the next stage's layers")

    def call_with(self, input_ids: Tensor, **others: Tensor) -> Any:
        """The model's own forward; `input_ids` are hidden states (B, T, D) where this isn't the first stage."""
        if self.is_first:
            return self.model(input_ids=input_ids, **others)
        (entrance,) = self._entrance
        entrance.arriving = input_ids
        try:
            return self.model(inputs_embeds=input_ids.detach(), **others)
        finally:
            entrance.arriving = None

    def shared_weight(self) -> nn.Parameter:
        """The end stages' copy of a weight that embedding and head share."""
        module = self.model.get_input_embeddings() if self.is_first else self.model.get_output_embeddings()
        return cast(nn.Parameter, module.weight)


class _WithLoss(torch.autograd.Function):
    """Hidden states as they are; when their gradient comes back, so does the loss's, which nothing else leads to."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return upstream[0], upstream[0].new_full((), ctx.weight, dtype=ctx.dtype), None


def stage_inputs(batch: Batch) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """(tensors that enter the first stage, names of those after the tokens)."""
    names = tuple(name for name in TRAVELLERS if name in batch)
    return (batch["input_ids"], *(batch[name] for name in names)), names


class Pipeline(PipelineModule):
    """DeepSpeed's pipeline over one `Stage` per rank along the pipe axis.

    DeepSpeed sees a pipeline of as many layers as stages. Weights that two stages share (tied embeddings) are
    announced to it here, since they lie inside of the stages.
    """

    def __init__(self, stage: Stage, layout: Layout, dynamic_shape: bool, tied: bool) -> None:
        """Collective over all ranks.

        Args:
            stage: this rank's.
            dynamic_shape: micro-batches of one step may differ in length.
            tied: embedding and head share their weight.
        """
        self._tied = tied
        topology = PipeModelDataParallelTopology(num_pp=layout.pipe, num_mp=layout.tensor, num_dp=layout.data)
        # DeepSpeed prints its layers on stdout, which say nothing here.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=[LayerSpec(_Layer, stage) for _ in range(layout.pipe)],
                topology=topology,
                loss_fn=self._loss,
                partition_method="uniform",
                dynamic_shape=dynamic_shape,
            )
        self._weight = 1.0
        self._sums = torch.zeros(3)
        """(loss, correct, labels) of the micro-batches of the last call; training fills the loss alone."""
        self._last_shape: tuple[torch.Size, tuple[str, ...]] | None = None
        self.carries_tokens = False
        """Whether training takes the tokens to the last stage."""

    @property
    def stage(self) -> Stage:
        """This rank's stage."""
        return self.forward_funcs[0].stage

    def train_step(self, engine: Any, batches: Sequence[Batch], weight: float) -> Tensor:
        """One optimizer step of `engine`, DeepSpeed's around this pipeline. Collective.

        Returns:
            Summed loss of the micro-batches, fp64; on stages other than the last, of what lies beside.
        """
        self._weight = weight
        # DeepSpeed divides the last stage's by the number of micro-batches.
        self.stage.beside_weight = weight / len(batches)
        if self.carries_tokens:
            batches = [{**batch, TOKEN_IDS: batch["input_ids"]} for batch in batches]
        self._prepare(engine, batches)
        self.stage.beside_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        engine.train_batch(_entries(batches, engine.device))
        # DeepSpeed keeps every step's time, two events of a device, until it prints them.
        engine.timers(TRAIN_BATCH_TIMER).reset()
        return self._sums[0] + self.stage.beside_sum

    def evaluate(self, engine: Any, batches: Sequence[Batch]) -> Tensor:
        """What `TaskLoss.scores` gives, summed over the micro-batches; zeros on stages other than the last."""
        self._prepare(engine, batches)
        entries = _entries(batches, engine.device)
        engine.eval_batch(entries, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
        return self._sums

    def _prepare(self, engine: Any, batches: Sequence[Batch]) -> None:
        self.stage.travellers = stage_inputs(batches[0])[1]
        shape = batches[0]["input_ids"].shape
        if (shape, self.stage.travellers) != self._last_shape:
            engine.reset_activation_shape()
        self._last_shape = shape, self.stage.travellers
        self._sums = torch.zeros(3, dtype=torch.float64, device=engine.device)

    def _loss(self, result: Tensor, _: Tensor) -> Tensor:
        """What DeepSpeed takes for the loss of a micro-batch, from what the last stage gave."""
        if not torch.is_grad_enabled():
            self._sums += result
            return result[0]
        self._sums[0] += result.detach()
        return weighted(result, self._weight)

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # Outside of no_grad, torch takes this broadcast for a part of the backward pass.
        super()._synchronize_tied_weights()

    def _index_tied_modules(self) -> dict[str, Any]:
        last = self.num_stages - 1
        comms: dict[str, Any] = {}
        if not self._tied or last == 0:
            return comms
        grid, tensor_ranks = self._grid, self._grid.get_slice_parallel_world_size()
        for data in range(grid.data_parallel_size):
            for tensor in range(tensor_ranks):
                place = {"data": data} | ({"model": tensor} if tensor_ranks > 1 else {})
                ranks = [grid.stage_to_global(stage_id=stage, **place) for stage in (0, last)]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    mine = self.stage.shared_weight()
                    holder = nn.Module()
                    holder.register_parameter("weight", mine)
                    comms["tied"] = {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": holder}
                    # Only the first stage's copy counts in the gradient norm.
                    mine.ds_pipe_replicated = self.global_rank != ranks[0]  # type: ignore[attr-defined]
        return comms

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        return [(comm["module"].weight, comm["group"]) for comm in self.tied_comms.values()]


def _entries(batches: Sequence[Batch], device: torch.device) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """(inputs of the first stage, what DeepSpeed hands to the loss) of each micro-batch, on `device`."""
    placed = (on_device(batch, device) for batch in batches)
    return ((stage_inputs(batch)[0], batch["labels"]) for batch in placed)


class _Layer(nn.Module):
    """What DeepSpeed takes for a layer: the stage under the name `stage`. A rank builds its own alone."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.stage(inputs)


class _StageEnd(Exception):
    """Carries the hidden states out of the model's forward where the next stage's layers begin."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


class _Elsewhere(nn.Module):
    """Stands for a module of another stage: the plain attributes of the original, and none of its parameters."""

    def __init__(self, original: nn.Module, gives_tuple: bool = False) -> None:
        super().__init__()
        self._gives_tuple = gives_tuple
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self._is_embedding = isinstance(original, nn.Embedding)
        if isinstance(original, nn.Embedding):
            self._width, self._dtype = original.embedding_dim, original.weight.dtype
        self.role = "pass"
        self.arriving: Tensor | None = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        given = arguments[0] if arguments else next(iter(options.values()))
        if self._is_embedding:
            # Thrown away at the entrance; only its shape is looked at.
            return torch.zeros(*given.shape, self._width, device=given.device, dtype=self._dtype)
        if self.role == "exit":
            raise _StageEnd(given)
        hidden_BTD = self.arriving if self.role == "entrance" else given
        return (hidden_BTD,) if self._gives_tuple else hidden_BTD


def is_elsewhere(module: nn.Module) -> bool:
    """Whether `module` stands for one of another stage."""
    return isinstance(module, _Elsewhere)


def _replace(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, _Elsewhere(getattr(owner, child)))


def _layers(model: nn.Module, cut: Cut) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(cut.layers))


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")
