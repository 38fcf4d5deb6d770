"""Recipe and plan -> model, data, optimizer and the DeepSpeed engine around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ds_train.config import RunConfig
from ds_train.data.build import DataBundle, load_data
from ds_train.engine.ranks import RankInfo
from ds_train.models.cpu_products import fp32_products_are_faster, use_fp32_products
from ds_train.models.load import build_model, load_model_config
from ds_train.models.packing import check_packing
from ds_train.models.tasks import TaskLoss
from ds_train.optim.build import build_optimizer
from ds_train.plan.make import RunPlan


@dataclass(frozen=True)
class Assembly:
    """All that the step loop works with. `engine` is DeepSpeed's, around `model`."""

    engine: Any
    model: PreTrainedModel
    task: TaskLoss
    data: DataBundle


def assemble(run: RunConfig, plan: RunPlan, info: RankInfo, tokenizer: Any, prepared: Path) -> Assembly:
    """Build everything on this rank. Collective: every rank calls it with the same recipe and plan.

    Raises:
        UserError: whatever the model, its config or the data refuse.
    """
    import deepspeed
    import torch

    if info.device == "cuda" and run.precision.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    data = load_data(
        run,
        folder=prepared,
        tokenizer=tokenizer,
        data_rank=plan.layout.coordinates(info.rank).data,
        data_ranks=plan.layout.data,
        micro_samples=plan.batch.micro_samples,
        eval_micro_samples=plan.batch.eval_micro_samples,
    )
    config = load_model_config(run, tokenizer)
    model = build_model(run, config, plan.deepspeed_json, plan.zero_stage)
    if fp32_products_are_faster(info.device, model.dtype):
        use_fp32_products(model)
    task = TaskLoss(model)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, run.optimizer), config=plan.deepspeed_json
    )
    if run.task.kind == "causal-lm" and run.data.packing:
        engine.eval()
        check_packing(model, config.get_text_config().vocab_size, config.model_type, engine.device)
        engine.train()
    if run.model.compile:
        for layer in decoder_layers(model):
            layer.compile()
    return Assembly(engine, model, task, data)


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The repeated blocks of the model: the longest list of modules in it."""
    import torch

    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])
