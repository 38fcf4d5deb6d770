"""Every rule has a recipe that breaks it, and sound recipes break none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from plan_recipes import recipe

from ds_train.config import dump, load, parse
from ds_train.errors import UserError
from ds_train.plan.facts import Facts
from ds_train.plan.make import make_plan
from ds_train.plan.rules import RULES, check, model, reports, states
from ds_train.plan.topology import Cluster, Device

ROOT = Path(__file__).resolve().parents[3]
BERT = {"model.arch": "bert", "model.num_key_value_heads": None}
CLASSIFIER = {"task.kind": "sequence-classification", "data.source": "tsv", "data.path": "x.tsv"}


@dataclass(frozen=True)
class Broken:
    """A recipe that breaks `rule`, whose message has the words `says`, and the rules `also`, and no other."""

    rule: str
    changes: dict[str, Any]
    says: str
    also: tuple[str, ...] = ()
    ranks: int = 4
    ranks_per_host: int | None = None
    device: Device = "cuda"


STAGE3 = {"parallel.zero_stage": 3}
CURRICULUM = {"curriculum.kind": "linear"}
DROPPING = {"token_drop.kind": "random-ltd"}
LAYER_DROP = {"layer_drop.kind": "progressive"}
ROLL_BACK = {"health.on_spike": "roll-back", "checkpoint.every_steps": 10}
TAUGHT = {"compress.distill.logits": "forward-kl", "compress.distill.teacher": "some/hub-id"}
CACHED = TAUGHT | {"compress.distill.cache_top": 8}
HIDDEN = {"compress.distill.teacher": "some/hub-id", "compress.distill.hidden": 0.5}
RELATED = TAUGHT | {"compress.distill.relations": 1.0}
BYTES = {"data.tokenizer": "bytes", "model.vocab_size": 300}
TEACHER = str(Path(__file__).with_name("taught"))
SHORT_TEACHER = str(Path(__file__).with_name("teacher"))
FLASH = {"model.attention": "flash_attention_2", "batch.micro_samples": 1}
PRUNE = {"compress.prune.ffn": 0.5}
GEMMA3N = {"model.arch": "gemma3n_text"}
PER_LAYER = {"compress.prune.ffn": [0.5] * 8, "compress.prune.budget": "per-layer"}
CASES = [
    Broken(
        "prune-sizes", {"compress.prune.heads": 0.25, "parallel.tensor": 2},
        "compress.prune.heads=0.25: the 3 heads of 4 that stay can't be shared by 2 ranks. Fix: 0.5 leaves 2",
    ),
    Broken("prune-sizes", {"compress.prune.layers": 8}, "compress.prune.layers=8: none of the 8 layers would be left"),
    Broken(
        "prune-sizes", {"compress.prune.layers": 6, "compress.prune.parallel": {"pipeline": 4}},
        "the 2 layers that stay are fewer than the 4 pipeline stages. Fix: prune at most 4",
    ),
    Broken("prune-sizes", {"compress.prune.heads": 0.1}, "all of the 4 heads would stay"),
    Broken(
        "prune-tied", {"model": {"arch": "gpt2", "n_embd": 512, "n_head": 8}, "compress.prune.heads": 0.5},
        "compress.prune.hidden=0.0: a gpt2 config ties the size of a head to their number and the hidden size, and "
        "compress.prune.heads=0.5. Fix: give both the same share",
    ),
    Broken("prune-end", PRUNE | {"compress.prune.start": 0.6}, "it is before compress.prune.start=0.6"),
    Broken(
        "prune-budget", PRUNE | {"compress.prune.budget": "global"},
        "compress.prune.budget=global: a llama config has one feed-forward size for all layers. Fix: set it to uniform",
    ),
    Broken(
        "prune-budget", {"compress.prune.ffn": {0: 0.5}, "compress.prune.budget": "per-layer"}, "one feed-forward size",
    ),
    Broken("prune-budget-unread", {"compress.prune.heads": 0.5, "compress.prune.budget": "global"}, "none go"),
    Broken("prune-shares", {"compress.prune.ffn": [0.5] * 8}, "set compress.prune.budget=per-layer"),
    Broken("prune-share", GEMMA3N | PRUNE | {"compress.prune.budget": "per-layer"}, "a share for each layer"),
    Broken(
        "prune-shares-layers", GEMMA3N | PER_LAYER | {"compress.prune.ffn": [0.5, 0.25]}, "2 shares for 8 layers",
    ),
    Broken("prune-shares-layers", GEMMA3N | PER_LAYER | {"compress.prune.ffn": {8: 0.5}}, "from 0 to 7"),
    Broken("prune-shares-fewer", GEMMA3N | PER_LAYER | {"compress.prune.layers": 2}, "a run of their own"),
    Broken("prune-unread", {"compress.prune.score": "gates"}, "nothing is asked to go"),
    Broken("prune-target", {"compress.prune.layers": 1, "compress.prune.parameters": 9}, "nothing says what goes"),
    Broken("prune-target", {"compress.prune.latency": 0.5}, "compress.prune.latency=0.5: nothing says what goes"),
    Broken(
        "prune-targets", PRUNE | {"compress.prune.parameters": 9, "compress.prune.latency": 0.5},
        "compress.prune.latency=0.5: shares are scaled to compress.prune.parameters already. Fix: leave one",
    ),
    Broken(
        "prune-multiple-unread", {"compress.prune.heads": 0.5, "compress.prune.multiple": 16}, "prune.ffn or hidden",
    ),
    Broken("prune-score-unread", {"compress.prune.layers": 2, "compress.prune.score": "fisher"}, "are chosen by what"),
    Broken(
        "prune-steps-unread", PRUNE | {"compress.prune.score": "magnitude", "compress.prune.score_steps": 4},
        "looks at the weights alone",
    ),
    Broken("prune-shape-unread", PRUNE | {"compress.prune.start": 0.5, "compress.prune.shape": "linear"}, "at once"),
    Broken("prune-latency-unread", PRUNE | {"compress.prune.latency_samples": 4}, "no time is asked for"),
    Broken(
        "prune-latency-length", PRUNE | {"compress.prune.latency_ms": 5.0, "compress.prune.latency_length": 2048},
        "compress.prune.latency_length=2048: the model takes samples of 1024 tokens",
    ),
    Broken("prune-compile", PRUNE | {"model.compile": True}, "set model.compile=false"),
    Broken(
        "prune-stages", {"compress.prune.layers": 1, "parallel.pipeline": 2, "parallel.stage_layers": [4, 4]},
        "compress.prune.parallel.stage_layers",
    ),
    Broken(
        "prune-rates", {"compress.prune.layers": 1, "optimizer.lr_factors": {"*layers.3*": 2.0}},
        "write * for the number",
    ),
    Broken("prune-layout-auto", PRUNE | {"compress.prune.parallel": {"tensor": "auto"}}, "as numbers"),
    Broken("prune-roll-back", PRUNE | {"health.on_spike": "roll-back", "checkpoint.every_steps": 1},
           "set health.on_spike=note"),
    Broken("prune-compared-layers", PRUNE | TAUGHT | {"compress.distill.hidden": 0.5}, "distill.logits goes with"),
    Broken("prune-quantize", PRUNE | {"compress.quantize.weights": "int8"}, "round what it exports"),
    Broken("prune-zeros", PRUNE | {"compress.keep_zeros": True}, "train what it exports", ("keep-zeros-start",)),
    Broken("keep-zeros-start", {"compress.keep_zeros": True}, "no zeros to keep"),
    Broken(
        "prune-nvme", STAGE3 | PRUNE | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp"},
        "offload to cpu",
    ),
    Broken("prune-secondary", STAGE3 | PRUNE | {"parallel.secondary_partition": 2}, "secondary_partition=1"),
    Broken(
        "prune-token-drop", DROPPING | {"compress.prune.layers": 4, "token_drop.whole_layers": 2},
        "of the 4 layers after the cut none",
    ),
    Broken(
        "best-nvme",
        STAGE3
        | {
            "checkpoint.best": "loss", "track.eval_every_steps": 1, "parallel.offload_optimizer": "nvme",
            "parallel.nvme_path": "/tmp",
        },
        "offload to cpu",
    ),
    Broken(
        "prune-keep-layers",
        PRUNE | {"model": {"path": str(Path(SHORT_TEACHER).with_name("taught")), "keep_layers": [0]}},
        "prune what it exports",
    ),
    Broken("prune-best", PRUNE | {"checkpoint.best": "loss", "track.eval_every_steps": 1}, "may lie before the cut"),
    Broken(
        "best-data",
        {"checkpoint.best": "loss", "data.validation_fraction": 0.0, "track.eval_every_steps": None},
        "nothing is held out to evaluate on", ("best-evaluations",),
    ),
    Broken(
        "best-evaluations", {"checkpoint.best": "loss", "track.eval_every_steps": None}, "set track.eval_every_steps",
    ),
    Broken(
        "best-score",
        {"checkpoint.best": "loss_wiki", "track.eval_every_steps": 1, "track.eval_sources": {"code": "*.py"}},
        "one of loss, perplexity, accuracy, loss_code",
    ),
    Broken("patience-best", {"checkpoint.patience": 3}, "set checkpoint.best=loss"),
    Broken(
        "eval-prompts-task", BERT | {"task.kind": "masked-lm", "track.eval_prompts": ["a"], "data.sequence_length": 64},
        "only causal language models",
    ),
    Broken(
        "eval-prompts-data",
        {"track.eval_prompts": ["a"], "data.validation_fraction": 0.0, "track.eval_every_steps": None},
        "there are no evaluations",
    ),
    Broken("eval-prompts-layout", {"track.eval_prompts": ["a"], "parallel.tensor": 2}, "use data ranks"),
    Broken(
        "roll-back-saves", ROLL_BACK | {"checkpoint.every_steps": None}, "set checkpoint.every_steps",
    ),
    Broken(
        "roll-back-kept",
        ROLL_BACK | {"health.spike_steps": 30, "checkpoint.keep_last": 2},
        "raise checkpoint.keep_last to 4",
    ),
    Broken(
        "roll-back-nvme",
        STAGE3 | ROLL_BACK | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp"},
        "set health.on_spike=note",
    ),
    Broken("tensorboard", {"track.also": ["csv", "tensorboard"]}, "pip install tensorboard"),
    Broken("wandb-unread", {"track.wandb_artifacts": "all"}, "wandb is off"),
    Broken("wandb-unread", {"track.wandb_project": "ours"}, "set track.wandb=online or offline"),
    Broken(
        "artifacts-unread", {"track.wandb": "offline", "track.wandb_artifacts": "export", "checkpoint.export": False},
        "nothing is exported",
    ),
    Broken("profile-unread", {"track.profile_ranks": [1]}, "no step is recorded"),
    Broken("sample-unread", {"track.sample_tokens": 8}, "no text is continued"),
    Broken("evaluation-unread", {"data.validation_fraction": 0.0, "track.eval_samples": 8}, "nothing is held out"),
    Broken(
        "evaluation-unread", {"data.validation_fraction": 0.0, "batch.eval_micro_samples": 8}, "leave it out, or",
    ),
    Broken(
        "held-out-unread",
        {"data.source": "text", "data.path": "a", "data.validation_path": "b", "data.validation_fraction": 0.1},
        "data.validation_path says what is held out",
    ),
    Broken("keep-every-unread", {"checkpoint.keep_every": 10}, "set checkpoint.every_steps"),
    Broken("spikes-unread", {"health.on_spike": "ignore", "health.spike_steps": 3}, "spikes are ignored"),
    Broken("roll-backs-unread", {"health.max_roll_backs": 1}, "set health.on_spike=roll-back"),
    Broken("profile-steps", {"track.profile_steps": [5, 4]}, "write [5,7]"),
    Broken("profile-ranks", {"track.profile_steps": [1, 1], "track.profile_ranks": [0, 4]}, "ranks 0 to 3"),
    Broken("ranks", {"parallel.ranks": 8}, "parallel.ranks=8: the recipe is made for 8 ranks and 4 were started"),
    Broken("layout-divides", {"parallel.tensor": 4}, "doesn't divide the 6 ranks", ranks=6),
    Broken(
        "pipeline-task", BERT | {"task.kind": "masked-lm", "parallel.pipeline": 2, "data.sequence_length": 64},
        "masked-lm aren't cut into stages",
    ),
    Broken("pipeline-plan", {"model": {"arch": "mamba"}, "parallel.pipeline": 2}, "how models of family mamba are cut"),
    Broken("tensor-plan", {"model": {"arch": "mamba"}, "parallel.tensor": 2}, "zero_stage=3 spreads any model"),
    Broken("pipeline-sequence", {"parallel.pipeline": 2, "parallel.sequence": 2}, "set parallel.sequence=1"),
    Broken("cut-compile", {"parallel.tensor": 2, "model.compile": True}, "set model.compile=false"),
    Broken("pipeline-zero", {"parallel.pipeline": 2, "parallel.zero_stage": 2}, "zero_stage=1"),
    Broken("pipeline-overlap", {"parallel.pipeline": 2, "parallel.overlap_communication": True}, "set auto or false"),
    Broken("pipeline-layers", {"parallel.pipeline": 4, "model.num_hidden_layers": 2}, "at most 2"),
    Broken("stage-layers-pipeline", {"parallel.stage_layers": [8]}, "leave it out, or set parallel.pipeline"),
    Broken("stage-layers-count", {"parallel.pipeline": 2, "parallel.stage_layers": [2, 2, 4]}, "write 2 numbers"),
    Broken("stage-layers-sum", {"parallel.pipeline": 2, "parallel.stage_layers": [1, 1]}, "add up to that"),
    Broken(
        "pipeline-tied", {"parallel.pipeline": 2, "model.tie_word_embeddings": True, "precision.dtype": "fp16"},
        "tied weights diverge",
    ),
    Broken("tensor-sizes", {"parallel.tensor": 8}, "divide num_key_value_heads=4. Fix: one of 1, 2, 4", ranks=8),
    Broken("tensor-offload", STAGE3 | {"parallel.tensor": 2, "parallel.offload_params": "cpu"}, "offload_params=none"),
    Broken(
        "tensor-secondary", STAGE3 | {"parallel.tensor": 2, "parallel.secondary_partition": 2},
        "set parallel.secondary_partition=1, or parallel.tensor=1",
    ),
    Broken(
        "tensor-quantized-gradients", STAGE3 | {"parallel.tensor": 2, "parallel.quantized_gradients": True},
        "set parallel.quantized_gradients=false, or parallel.tensor=1",
    ),
    Broken(
        "attention-flash-packing", {"model.attention": "flash_attention_2", "precision.dtype": "bf16"},
        "attends across documents",
    ),
    Broken(
        "cut-flash",
        {"model.attention": "flash_attention_2", "precision.dtype": "bf16", "parallel.tensor": 2,
         "batch.micro_samples": 1},
        "set model.attention=sdpa",
    ),
    Broken(
        "sequence-task", BERT | {"task.kind": "masked-lm", "parallel.sequence": 2, "data.sequence_length": 64},
        "masked-lm aren't shared",
    ),
    Broken("sequence-attention", {"parallel.sequence": 2, "model.attention": "eager"}, "set model.attention=sdpa"),
    Broken("sequence-heads", {"parallel.sequence": 16}, "one of 1, 2, 4", ranks=16),
    Broken(
        "sequence-heads", {"parallel.sequence": 4, "parallel.tensor": 2}, "tensor x sequence one of 1, 2, 4", ranks=8
    ),
    Broken("sequence-length", {"parallel.sequence": 4, "data.sequence_length": 510}, "nearest: 512"),
    Broken("offload-stage", {"parallel.zero_stage": 0, "parallel.offload_optimizer": "cpu"}, "zero_stage=1 or more"),
    Broken(
        "offload-nvme-stage", {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp"},
        "parallel.offload_optimizer=nvme: only stage 3",
    ),
    Broken("offload-params-stage", {"parallel.offload_params": "cpu", "parallel.zero_stage": 2}, "ignores it"),
    Broken("nvme-path", STAGE3 | {"parallel.offload_params": "nvme", "parallel.nvme_path": "/no/such"}, "=/no/such"),
    Broken("nvme-path", STAGE3 | {"parallel.offload_optimizer": "nvme"}, "parallel.nvme_path: nvme offload needs"),
    Broken(
        "nvme-device", STAGE3 | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp"}, "hpu",
        device="hpu",
    ),
    Broken(
        "nvme-optimizer",
        STAGE3 | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp", "optimizer.kind": "sgd"},
        "optimizer.kind=sgd",
    ),
    Broken("quantized-weights-stage", {"parallel.quantized_weights": True}, "zero_stage=3"),
    Broken("quantized-gradients-stage", {"parallel.quantized_gradients": True, "parallel.zero_stage": 2}, "ignores"),
    Broken("quantized-weights-device", STAGE3 | {"parallel.quantized_weights": True}, "for cpu", device="cpu"),
    Broken("quantized-gradients-device", STAGE3 | {"parallel.quantized_gradients": True}, "for xpu", device="xpu"),
    Broken("secondary-stage", {"parallel.secondary_partition": 2}, "stage 3"),
    Broken("secondary-divides", STAGE3 | {"parallel.secondary_partition": 3}, "one of 1, 2, 4"),
    Broken("bucket", {"parallel.bucket_elements": 1001}, "auto, or 1002"),
    Broken("fp16-cpu", {"precision.dtype": "fp16"}, "set precision.dtype=bf16", device="cpu"),
    Broken("gradient-dtype", {"precision.gradient_dtype": "fp16"}, "gradients of a bf16 model"),
    Broken("gradient-dtype", {"precision.gradient_dtype": "bf16", "precision.dtype": "fp32"}, "=fp32"),
    Broken("loss-scale-unread", {"precision.loss_scale": 128.0}, "precision.dtype=fp16"),
    Broken("loss-scale-unread", {"precision.initial_loss_scale_power": 12}, "only fp16 scales its loss"),
    Broken(
        "loss-scale-fixed",
        {"precision.dtype": "fp16", "precision.loss_scale": 64.0, "precision.initial_loss_scale_power": 12},
        "precision.initial_loss_scale_power=12: precision.loss_scale=64 is a fixed scale",
    ),
    Broken("adagrad-groups", {"optimizer.kind": "adagrad"}, "optimizer.weight_decay=0"),
    Broken("kernel-kind", {"optimizer.kernel": "fused", "optimizer.kind": "sgd"}, "kernel=auto", device="cpu"),
    Broken("kernel-device", {"optimizer.kernel": "fused"}, "parallel.offload_optimizer=cpu", device="xpu"),
    Broken(
        "wsd-overlap", {"schedule.kind": "wsd", "schedule.decay_fraction": 0.8, "schedule.warmup_fraction": 0.3},
        "at most 0.7",
    ),
    Broken(
        "schedule-overlap", {"schedule.cooldown_fraction": 0.8, "schedule.warmup_fraction": 0.3},
        "it is longer than the run. Fix: at most 0.7",
    ),
    Broken(
        "inverse-sqrt-warmup", {"schedule.kind": "inverse-sqrt", "schedule.warmup_fraction": 0.0},
        "falls from the end of warm-up",
    ),
    Broken("packing-by", {"data.packing": False, "data.packing_by": "best-fit"}, "samples are padded, not packed"),
    Broken("padding-free-packing", {"data.padding_free": True}, "set data.packing=false"),
    Broken(
        "padding-free-task", CLASSIFIER | {"data.padding_free": True, "data.packing": False}, "one text a row",
    ),
    Broken("curriculum-task", CLASSIFIER | CURRICULUM, "another label"),
    Broken("curriculum-repack", CURRICULUM | {"data.packing": False}, "how=truncate"),
    Broken(
        "curriculum-length", CURRICULUM | {"curriculum.start_length": 60},
        "curriculum.start_length=60: samples can't have that length beside data.sequence_length=512",
    ),
    Broken(
        "curriculum-length",
        {"curriculum.kind": "discrete", "curriculum.lengths": [64, 512], "curriculum.until": [0.1, 0.2]},
        "curriculum.lengths[1]=512",
    ),
    Broken("curriculum-length", CURRICULUM | {"data.sequence_length": 8}, "set curriculum.kind=none: there is no"),
    Broken("curriculum-steps", CURRICULUM | {"curriculum.keep_tokens": False}, "set schedule.tokens=163840"),
    Broken("curriculum-flash", CURRICULUM | FLASH | {"precision.dtype": "bf16"}, "keep_tokens=false"),
    Broken("token-drop-packing", DROPPING | {"data.packing": False}, "drop other tokens in another layout"),
    Broken("token-drop-sequence", DROPPING | {"parallel.sequence": 2}, "unequal numbers of tokens"),
    Broken("token-drop-compile", DROPPING | {"model.compile": True}, "for every number of tokens"),
    Broken("token-drop-attention", DROPPING | {"model.attention": "flex_attention"}, "set model.attention=sdpa"),
    Broken("token-drop-layers", DROPPING | {"token_drop.whole_layers": 4}, "at most 3"),
    Broken("patch-task", BERT | {"task.kind": "masked-lm", "patch.size": 4}, "as causal language models do"),
    Broken("patch-packing", {"patch.size": 4, "data.packing_by": "best-fit"}, "without padding"),
    Broken("patch-divides", {"patch.size": 3}, "data.sequence_length=512 isn't a multiple of it"),
    Broken("patch-alone", {"patch.size": 4, "token_drop.kind": "random-ltd"}, "in one way"),
    Broken("model-packed", {"model": {"path": str(Path(SHORT_TEACHER).with_name("packed"))}}, "full weights"),
    Broken(
        "keep-layers", {"model": {"path": str(Path(SHORT_TEACHER).with_name("taught")), "keep_layers": [0, 2]}},
        "numbers from 0 to 1",
    ),
    Broken("curriculum-kind-unread", {"curriculum.start_length": 32}, "curriculum.kind=none doesn't read it"),
    Broken(
        "curriculum-kind-unread", {"curriculum.kind": "linear", "curriculum.root": 3.0},
        "curriculum.root=3.0: curriculum.kind=linear doesn't read it",
    ),
    Broken("patch-unread", {"patch.fraction": 0.5}, "positions hold one token"),
    Broken("token-drop-unread", {"token_drop.start_keep": 0.3}, "no token is dropped"),
    Broken("layer-drop-unread", {"layer_drop.keep": 0.7}, "layer_drop.keep=0.7: no layer is left out"),
    Broken("layer-drop-tokens", LAYER_DROP | DROPPING, "set token_drop.kind=none, or"),
    Broken("layer-drop-compile", LAYER_DROP | {"model.compile": True}, "another graph"),
    Broken("layer-drop-compared", LAYER_DROP | TAUGHT | {"compress.distill.hidden": 1.0}, "logits goes with it"),
    Broken("layer-drop-prune", LAYER_DROP | PRUNE, "score too little"),
    Broken(
        "distill-logits-unread", HIDDEN | {"compress.distill.temperature": 2.0},
        "compress.distill.temperature=2.0: the teacher's logits aren't learned",
    ),
    Broken("distill-logits-unread", HIDDEN | {"compress.distill.alpha_end": 0.1}, "logits=forward-kl"),
    Broken("distill-hidden-unread", TAUGHT | {"compress.distill.hidden_layers": [[0, 0]]}, "hidden states aren't"),
    Broken("distill-relations-unread", TAUGHT | {"compress.distill.relation_kinds": ["value"]}, "attention isn't"),
    Broken(
        "distill-heads-unread",
        RELATED | {"compress.distill.relation_kinds": ["attention"], "compress.distill.relation_heads": 2},
        "by the models' own heads",
    ),
    Broken("distill-unread", {"compress.distill.teacher": "x"}, "nothing reads it"),
    Broken("distill-start", {"compress.distill.logits": "js"}, "has no start"),
    Broken("distill-missing", TAUGHT | {"compress.distill.teacher": "/nowhere"}, "no config.json"),
    Broken("distill-teacher", TAUGHT | {"compress.distill.teacher": SHORT_TEACHER}, "takes 8 tokens"),
    Broken(
        "distill-packed", TAUGHT | {"compress.distill.teacher": str(Path(SHORT_TEACHER).with_name("packed"))},
        "packed integers", also=("distill-teacher",),  # of another vocabulary
    ),
    Broken("distill-patch", TAUGHT | {"patch.size": 4}, "set patch.size=1"),
    Broken("distill-cache-logits", CACHED | {"compress.distill.hidden": 1.0}, "only logits"),
    Broken("distill-cache-samples", CACHED | CURRICULUM, "cache_top=0"),
    Broken(
        "distill-cache-hosts", CACHED | {"data.cache_dir": "/tmp/cache"}, "each host's own disk", ranks=4,
        ranks_per_host=2,
    ),
    Broken("distill-cache-sequence", CACHED | {"parallel.sequence": 2}, "whole samples"),
    Broken("distill-cache-logits", CACHED | {"compress.distill.relations": 1.0}, "relations=0"),
    Broken(
        "distill-compared-recomputed",
        TAUGHT | {"compress.distill.hidden": 1.0, "model.activation_checkpointing": True},
        "activation_checkpointing=false",
    ),
    Broken(
        "distill-compared-rows",
        TAUGHT | {"compress.distill.hidden": 1.0, "data.packing": False, "data.padding_free": True}, "share a row",
    ),
    Broken("distill-compared-compile", RELATED | {"model.compile": True}, "compress.distill.relations=1.0: layers"),
    Broken(
        "distill-compared-scale",
        RELATED | {"parallel.pipeline": 2, "precision.dtype": "fp16", "model.tie_word_embeddings": False},
        "set precision.dtype=bf16",
    ),
    Broken("distill-relations-sequence", RELATED | {"parallel.sequence": 2}, "set parallel.sequence=1"),
    Broken("distill-relations-dropped", RELATED | DROPPING, "set token_drop.kind=none"),
    Broken(
        "distill-relations-kinds",
        RELATED | BYTES
        | {"compress.distill.relation_kinds": ["attention", "value"], "compress.distill.teacher": TEACHER},
        "the model has 8 heads, the teacher 32",
    ),
    Broken(
        "distill-relations-heads",
        RELATED | BYTES | {"compress.distill.relation_heads": 24, "compress.distill.teacher": TEACHER},
        "=24: the query states of the model are 512 wide, which 24 heads don't divide. Fix: one of 1, 2, 4, 8, 16, 32",
    ),
    Broken(
        "distill-relations-heads",
        RELATED | BYTES | {
            "compress.distill.relation_heads": 1, "compress.distill.teacher": TEACHER, "parallel.tensor": 2,
            "compress.distill.relation_kinds": ["value"],
        },
        "2 tensor ranks don't share 1 heads evenly. Fix: one of 2, 4",
    ),
    Broken(
        "distill-revision",
        {
            "model": {"path": "some/hub-id", "keep_layers": [0], "revision": "v1"}, "compress.distill.logits": "js",
            "data.tokenizer": "model",
        },
        "the folder of that revision",
    ),
    Broken(
        "quantize-best",
        {
            "compress.quantize.weights": "int8", "compress.quantize.start": 0.5, "checkpoint.best": "loss",
            "track.eval_every_steps": 1,
        },
        "of weights that aren't the rounded ones",
    ),
    Broken(
        "quantize-roll-back",
        ROLL_BACK | {"compress.quantize.weights": "int8", "compress.quantize.start": 0.5}, "health.on_spike=note",
    ),
    Broken("quantize-unread", {"compress.quantize.group": 64}, "nothing reads it"),
    Broken(
        "quantize-activations", {"compress.quantize.weights": "int4", "compress.quantize.activations": "int8"},
        "weights=int8 and group=0",
    ),
    Broken(
        "quantize-group",
        {"compress.quantize.weights": "int4", "compress.quantize.group": 512, "parallel.tensor": 2},
        "have 768 inputs, which it doesn't divide",
    ),
    Broken("quantize-experts", {"model.arch": "mixtral", "compress.quantize.weights": "int8"}, "aren't linear layers"),
    Broken("quantize-compile", {"model.compile": True, "compress.quantize.weights": "int8"}, "compile=false"),
    Broken("push-export", {"checkpoint.export": False, "checkpoint.push_to": "a/b"}, "checkpoint.export=true"),
    Broken(
        "save-nvme",
        STAGE3
        | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp", "checkpoint.asynchronous": True},
        "checkpoint.asynchronous=auto",
    ),
    Broken("noise-scale-layout", {"track.noise_scale_every_steps": 2, "parallel.pipeline": 2}, "data and tensor ranks"),
    Broken(
        "noise-scale-fp16", {"track.noise_scale_every_steps": 2, "precision.dtype": "fp16"}, "precision.dtype=bf16",
    ),
    Broken("schedule-kind-unread", {"schedule.cycles": 3}, "or set schedule.kind=cosine-restarts"),
    Broken("schedule-kind-unread", {"schedule.kind": "step", "schedule.final_ratio": 0.0}, "kind=step doesn't read it"),
    Broken("cycles-unread", {"schedule.kind": "cosine-restarts", "schedule.cycle_peak": 0.5}, "cycles above 1"),
    Broken("warmup-unread", {"schedule.warmup_fraction": 0.0, "schedule.initial_ratio": 0.1}, "there is no warm-up"),
    Broken(
        "optimizer-kind-unread", {"optimizer.kind": "sgd", "optimizer.betas": [0.9, 0.999]},
        "optimizer.betas=[0.9, 0.999]: optimizer.kind=sgd doesn't read it. Fix: leave it out, or",
    ),
    Broken("optimizer-kind-unread", {"optimizer.momentum": 0.8}, "or set optimizer.kind=sgd"),
    Broken("decay-unread", {"optimizer.weight_decay": 0.0, "optimizer.decay_all": True}, "decays nothing"),
    Broken(
        "buckets-unread",
        {"parallel.zero_stage": 0, "precision.dtype": "fp32", "parallel.bucket_elements": 1000},
        "parallel.bucket_elements=1000: stage 0",
    ),
    Broken(
        "overlap-unread",
        {"parallel.zero_stage": 0, "precision.dtype": "fp32", "parallel.overlap_communication": True},
        "stage 0 reduces gradients after the last backward pass",
    ),
    Broken("nvme-unread", {"parallel.nvme_path": "/tmp"}, "parallel.nvme_path=/tmp: nothing is offloaded to a disk"),
    Broken("revision-unread", {"model.revision": "v1"}, "only models of the hub have revisions"),
    Broken("revision-unread", {"model": {"path": TEACHER, "revision": "v1"}}, "give a hub id in model.path"),
    Broken("remote-code-unread", {"model.trust_remote_code": True}, "a model from scratch"),
    Broken("task-kind-unread", {"task.num_labels": 3}, "or set task.kind=sequence-classification"),
    Broken("task-kind-unread", {"task.mask_fraction": 0.3}, "or set task.kind=masked-lm"),
    Broken("data-source-unread", {"data.text_column": "body"}, "data.source=stdlib doesn't read it"),
    Broken(
        "multiple-unread", CURRICULUM | {"curriculum.multiple": 16},
        "lengths are divisors of data.sequence_length with curriculum.how=repack",
    ),
    Broken(
        "multiple-unread", CURRICULUM | {"curriculum.multiple": 16, "curriculum.how": "truncate"},
        "with curriculum.keep_tokens=true",
    ),
    Broken("cooldown-unread", {"schedule.cooldown_ratio": 0.1}, "there is no cool-down"),
    Broken(
        "lr-factors",
        {"optimizer.kind": "adagrad", "optimizer.weight_decay": 0.0, "optimizer.lr_factors": {"*embed*": 0.1}},
        "with one group",
    ),
    Broken("sample-task", BERT | {"task.kind": "masked-lm", "track.sample_prompt": "x"}, "leave it out"),
    Broken("sample-export", {"checkpoint.export": False, "track.sample_prompt": "x"}, "checkpoint.export=true"),
    Broken("eval-data", {"track.eval_every_steps": 5, "data.validation_fraction": 0}, "data.validation_fraction above"),
    Broken("arch", {"model.arch": "lama", "model.max_position_embeddings": None}, "did you mean llama?"),
    Broken("weights", {"model": {"path": "./no-such-folder"}, "data.tokenizer": "model"}, "no config.json"),
    Broken("head", {"task.kind": "masked-lm"}, "llama can learn causal-lm or sequence-classification"),
    Broken("head", BERT | {"model.arch": "vit"}, "another family", ("model-key",)),
    Broken("model-key", {"model.hidden_sze": 512}, "model.hidden_sze=512: the transformers config of llama has no"),
    Broken("model-key", {"model.n_layer": 4}, "did you mean `model.num_hidden_layers`?"),
    Broken("model-key", {"model": {"arch": "bloom", "intermediate_size": 8}}, "takes the keys of transformers' Bloom"),
    Broken("model-key-elsewhere", {"model.dtype": "bfloat16"}, "set precision.dtype"),
    Broken("model-key-elsewhere", CLASSIFIER | {"model.num_labels": 3}, "set task.num_labels"),
    Broken(
        "rope-keys", {"model": {"path": TEACHER, "rope_theta": 5e5}, "data.tokenizer": "bytes"},
        "model.rope_theta=500000.0: it is an older spelling",
    ),
    Broken("special-tokens", {"model.eos_token_id": 7}, "tokenizer's special tokens"),
    Broken(
        "router-loss", {"model": {"arch": "mixtral", "output_router_logits": True}},
        "model.output_router_logits=true: the routers' auxiliary loss",
    ),
    Broken("model-count", {"model.num_hidden_layers": 0}, "above 0"),
    Broken("model-count", {"model.hidden_size": "512"}, "whole number"),
    Broken("heads", {"model.num_attention_heads": 12}, "hidden size 512"),
    Broken("head-groups", {"model.num_key_value_heads": 3}, "one of 1, 2, 4, 8"),
    # The family's default of 32 key-value heads stays where the recipe only shrinks the heads.
    Broken("head-groups", {"model.arch": "qwen3", "model.num_key_value_heads": None}, "model.num_key_value_heads=32"),
    Broken("positions", {"data.sequence_length": 2048}, "at most 1024, or raise model.max_position_embeddings"),
    Broken("vocabulary", {"model.vocab_size": 100}, "model.vocab_size=100: vocabulary mismatch: the tokenizer has 259"),
    Broken("vocabulary", {"model.vocab_size": 300, "data.train_vocabulary": 400}, "set model.vocab_size=400"),
    Broken("attention-flash-device", {**FLASH}, "sdpa", device="cpu"),
    Broken("attention-flash-dtype", {**FLASH, "precision.dtype": "fp32"}, "16 bits"),
    Broken("liger-device", {"model.liger": True}, "for CUDA devices", device="cpu"),
    Broken("liger-package", {"model.liger": True}, "pip install liger-kernel"),
    Broken(
        "liger-compile", {"model.liger": True, "model.compile": True}, "model.liger=false", ("liger-package",), ranks=1
    ),
    Broken("attention-flex-device", {"model.attention": "flex_attention"}, "no backward", device="cpu"),
    Broken(
        "attention-family", {"model": {"arch": "bloom"}, **FLASH}, "model.attention=auto"
    ),
    Broken(
        "checkpointing-family",
        {"model": {"arch": "ctrl", "activation_checkpointing": True}, "data.sequence_length": 64}, "ctrl",
    ),
    Broken("classification-source", {"task.kind": "sequence-classification"}, "tsv, jsonl, parquet or hub"),
    Broken("path-missing", {"data.source": "text"}, "give a file, folder or glob"),
    Broken("path-missing", {"data.source": "hub"}, "hub id"),
    Broken("path-stdlib", {"data.path": "corpus"}, "set data.source to text"),
    Broken("streaming", {"data.streaming": True}, "data.streaming=false"),
    Broken("subset", {"data.subset": "wikitext-2"}, "data.source=hub"),
    Broken("split", {"data.split": "test"}, "data.source=hub"),
    Broken("validation-split", {"data.validation_split": "validation"}, "set data.validation_path"),
    Broken("validation-path", {"data.validation_path": "held-out"}, "data.validation_fraction"),
    Broken("tokenizer-missing", {"data.tokenizer": "./no/such", "model.vocab_size": 300}, "there is no such folder"),
    Broken("tokenizer-model", {"data.tokenizer": "model"}, "from scratch"),
    Broken("tokenizer-trained", {"data.tokenizer": "gpt2", "data.train_vocabulary": 400}, "leave out data.tokenizer"),
    Broken("tokenizer-pretrained", {"model": {"path": "some/model"}}, "set data.tokenizer=model"),
    Broken("raw-stage", {"deepspeed.zero_optimization.stage3_max_live_parameters": 5}, "ignores it at stage 1"),
    Broken("raw-stage", {"deepspeed.zero_optimization.sub_group_size": 5}, "or raise parallel.zero_stage"),
    Broken("raw-stage", STAGE3 | {"deepspeed.zero_optimization.round_robin_gradients": True}, "at stage 3. Fix: leave"),
    Broken(
        "raw-disk",
        {"parallel.offload_optimizer": "cpu", "deepspeed.zero_optimization.offload_optimizer.buffer_count": 5},
        "only nvme offload reads it",
    ),
    Broken("raw-offload", STAGE3 | {"deepspeed.zero_optimization.offload_param.buffer_count": 6}, "nothing is offload"),
    Broken("raw-section", {"deepspeed.aio.block_size": 4096}, "deepspeed.aio"),
    Broken("raw-section", {"deepspeed.fp16.hysteresis": 4}, "deepspeed.fp16"),
    Broken("raw-communication", {"deepspeed.communication_data_type": "float32"}, "fp32, fp16 or bf16"),
    Broken("raw-communication", {"deepspeed.communication_data_type": 32}, "fp32, fp16 or bf16"),
    Broken("raw-communication-fp16", {"deepspeed.communication_data_type": "FP16"}, "gradients below 6e-8"),
    Broken(
        "raw-gds",
        STAGE3 | {"parallel.offload_params": "nvme", "parallel.nvme_path": "/tmp", "deepspeed.aio.use_gds": True},
        "CUDA", device="npu",
    ),
    Broken("raw-quantized", {"deepspeed.zero_optimization.zero_quantized_nontrainable_weights": True}, "stage 3"),
]  # fmt: skip

CLEAN = [
    # Off in so many words, as an override says it, while the recipe keeps how it is when it is on.
    (
        {
            "curriculum.kind": "none", "curriculum.lengths": [16], "curriculum.until": [0.5],
            "token_drop.kind": "none", "token_drop.start_keep": 0.4, "layer_drop.kind": "none", "layer_drop.keep": 0.3,
            "patch.size": 1, "patch.fraction": 0.4, "track.wandb": "off", "track.wandb_project": "ours",
            "compress.distill.logits": "none", "compress.distill.temperature": 2.0,
            "compress.quantize.weights": "none", "compress.quantize.group": 64,
            "compress.prune.ffn": 0.0, "compress.prune.start": 0.2,
        },
        1, "cpu",
    ),
    ({}, 1, "cpu"),
    ({"parallel.zero_stage": 0, "precision.dtype": "fp32", "parallel.overlap_communication": False}, 4, "cpu"),
    ({"precision.dtype": "fp16", "precision.loss_scale": 64.0, "precision.gradient_dtype": "fp16"}, 4, "cuda"),
    (
        STAGE3
        | {"parallel.quantized_weights": True, "parallel.quantized_gradients": True, "parallel.secondary_partition": 4},
        8, "cuda",
    ),
    (
        STAGE3 | {"parallel.offload_optimizer": "nvme", "parallel.nvme_path": "/tmp", "deepspeed.aio.block_size": 4096},
        2, "cuda",
    ),
    ({**FLASH, "model.activation_checkpointing": True}, 4, "cuda"),
    (CLASSIFIER, 2, "cpu"),
    (BERT | {"task.kind": "masked-lm"}, 2, "cpu"),
    (GEMMA3N | PER_LAYER, 2, "cpu"),
    (GEMMA3N | {"compress.prune.ffn": {7: 0.5}, "compress.prune.budget": "per-layer"}, 2, "cpu"),
    (GEMMA3N | PRUNE | {"compress.prune.budget": "global", "compress.prune.layers": 2}, 2, "cpu"),
    ({"model": {"path": "some/model"}, "data.tokenizer": "model"}, 2, "cpu"),
    (
        {"data.source": "hub", "data.path": "a/b", "data.subset": "c", "data.streaming": True, "data.split": "x",
         "data.validation_split": "d"},
        2, "cpu",
    ),
    ({"track.wandb": "off", "track.wandb_project": "ours", "track.wandb_artifacts": "all"}, 2, "cpu"),
    ({"track.tags": ["a"], "data.source": "text", "data.path": "a", "data.validation_path": "b",
      "data.validation_fraction": 0.0, "track.eval_samples": 8}, 2, "cpu"),
    ({"compress.prune.layers": 2, "compress.prune.score_steps": 4}, 2, "cpu"),
    (TAUGHT | {"compress.distill.alpha": 0.9, "compress.distill.temperature": 4.0, "model.trust_remote_code": True},
     2, "cpu"),
    ({"curriculum.kind": "linear", "curriculum.multiple": 16, "curriculum.how": "truncate", "schedule.tokens": 10**6,
      "curriculum.keep_tokens": False, "schedule.steps": None}, 2, "cpu"),
    ({"model.rope_theta": 5e5, "model.hidden_act": "gelu", "schedule.kind": "wsd", "optimizer.kind": "sgd"}, 2, "cpu"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same processor on every machine that runs these tests: one without fp16."""
    monkeypatch.setattr(states, "processor_has_fp16", lambda: False)


def broken_rules(facts: Facts) -> set[str]:
    return {rule.name for rule in RULES if rule.check(facts)}


@pytest.fixture(autouse=True)
def _nothing_optional_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for rules in (reports, model):
        monkeypatch.setattr(rules, "find_spec", lambda name: None)


@pytest.mark.parametrize("case", CASES, ids=[f"{index}-{case.rule}" for index, case in enumerate(CASES)])
def test_a_recipe_breaks_its_rule_and_no_other(case: Broken) -> None:
    run = recipe(case.changes)
    facts = Facts(run, Cluster(case.ranks, case.ranks_per_host or case.ranks, case.device))
    assert broken_rules(facts) == {case.rule, *case.also}
    problems = next(rule for rule in RULES if rule.name == case.rule).check(facts)
    assert case.says in "\n".join(map(str, problems))
    # What a user reads: the key, a reason and a way out.
    assert all(problem.key and problem.reason and problem.fix for problem in problems)
    with pytest.raises(UserError) as caught:
        make_plan(run, facts.cluster)
    assert all(str(problem) in str(caught.value) for problem in problems)


def test_every_rule_has_a_recipe_that_breaks_it() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    assert set(names) == {case.rule for case in CASES}


@pytest.mark.parametrize(("changes", "ranks", "device"), CLEAN)
def test_sound_recipes_break_nothing(changes: dict[str, Any], ranks: int, device: Device) -> None:
    cluster = Cluster(ranks, ranks, device)
    assert check(Facts(recipe(changes), cluster)) == []
    make_plan(recipe(changes), cluster)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_planned_as_written_and_as_stored_with_a_run(path: Path) -> None:
    run, cluster = load(path), Cluster(2, 2, "cpu")
    offload = yaml.safe_load(path.read_text()).get("parallel", {}).get("nvme_path")
    assert offload is None, "a shipped recipe names no folder that a machine may lack"
    assert make_plan(parse(dump(run)), cluster) == make_plan(run, cluster)


def test_all_problems_come_at_once() -> None:
    run = recipe({"parallel.quantized_weights": True, "model.hidden_sze": 1, "batch.global_samples": 7,
                  "deepspeed.zero_optimization.stage": 2})  # fmt: skip
    with pytest.raises(UserError) as caught:
        make_plan(run, Cluster(2, 2, "cuda"))
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {
        "parallel.quantized_weights", "model.hidden_sze", "batch.global_samples", "deepspeed.zero_optimization.stage"
    }  # fmt: skip


def test_an_imagined_cluster_is_not_looked_up_on_this_machine() -> None:
    offload = {"parallel.offload_params": "nvme", "parallel.nvme_path": "/fast/disk"}
    run = recipe(STAGE3 | offload | {"precision.dtype": "fp16"})
    assert broken_rules(Facts(run, Cluster(64, 8, "cuda"))) == {"nvme-path"}
    assert broken_rules(Facts(run, Cluster(64, 8, "cuda", here=False))) == set()
    assert broken_rules(Facts(run, Cluster(64, 8, "cpu", here=False))) == set()


def test_pretrained_weights_keep_their_tokenizer_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 300, "num_key_value_heads": 32}')
    cluster, model = Cluster(1, 1, "cpu"), {"model": {"path": str(tmp_path)}}
    assert broken_rules(Facts(recipe(model), cluster)) == set()  # there is no tokenizer beside the weights
    (tmp_path / "tokenizer.json").write_text("{}")
    assert broken_rules(Facts(recipe(model), cluster)) == {"tokenizer-pretrained"}
    assert broken_rules(Facts(recipe(model | {"data.tokenizer": "bytes"}), cluster)) == set()


def test_positions_of_roberta_start_after_the_padding_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1, "vocab_size": 300}'
    )
    changes = {"model": {"path": str(tmp_path)}, "task.kind": "masked-lm", "data.tokenizer": "model"}
    cluster = Cluster(1, 1, "cpu")
    assert broken_rules(Facts(recipe(changes | {"data.sequence_length": 512}), cluster)) == set()
    assert broken_rules(Facts(recipe(changes | {"data.sequence_length": 513}), cluster)) == {"positions"}
