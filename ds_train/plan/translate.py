"""What a DeepSpeed key that the plan writes is called in a recipe, with its value: for configurations that are pasted.

Translates what people's JSON says, that of Hugging Face's Trainer with its "auto" values too, into `key=value` words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_train.plan.deepspeed_json import OWNED

# DeepSpeed's own Adam is AdamW unless it is told otherwise (ops/adam/fused_adam.py, adam_w_mode).
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", "adagrad": "adagrad", "sgd": "sgd"}
_CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine", "OneCycle": "one-cycle"}
_DTYPES = {
    "float32": "fp32", "fp32": "fp32", "float": "fp32", "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16",
    "fp16": "fp16", "half": "fp16",
}  # fmt: skip
_DECIDED = frozenset({"managed_gradient_accumulation", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"})


def instead(path: str, value: Any) -> str:
    """What to do about the key at `path` of DeepSpeed's configuration, one of `OWNED`: the recipe keys that say it."""
    if path in _DECIDED or _says_auto(value):
        return f"leave it out; {OWNED[path]} {'decide' if ' and ' in OWNED[path] else 'decides'} it"
    if path in _SPECIAL:
        return _SPECIAL[path](value)
    known = " " not in OWNED[path] and isinstance(value, (bool, int, float, str))
    return _set({OWNED[path]: value}) if known else f"set {OWNED[path]} instead"


def _set(settings: Mapping[str, Any]) -> str:
    return f"set {' '.join(f'{key}={_written(value)}' for key, value in settings.items())} instead"


def _written(value: Any) -> str:
    """As an override on the command line writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e3:  # 5e8 elements
        return str(int(value))
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else f"{value}"


def _says_auto(value: Any) -> bool:
    """Whether it is "auto", or a section that says nothing else."""
    return value == "auto" or (isinstance(value, Mapping) and bool(value) and all(map(_says_auto, value.values())))


def _known(section: Any) -> dict[str, Any]:
    """Values of a section that aren't "auto"."""
    return {key: value for key, value in section.items() if value != "auto"} if isinstance(section, Mapping) else {}


def _optimizer(value: Any) -> str:
    section = _known(value)
    name, params = str(section.get("type", "")), _known(section.get("params"))
    kind = _OPTIMIZERS.get(name.lower())
    if kind is None:
        return "set optimizer.kind instead; it is one of adamw, adam, adagrad, sgd"
    if name.lower() == "adam" and params.get("adam_w_mode") is False:
        kind = "adam"
    keys = ("lr", "betas", "eps", "momentum", "weight_decay")
    return _set({"optimizer.kind": kind} | {f"optimizer.{key}": params[key] for key in keys if key in params})


def _scheduler(value: Any) -> str:
    section = _known(value)
    name, params = str(section.get("type", "")), _known(section.get("params"))
    if name == "LRRangeTest":
        return "leave it out; `ds-train lr-find` sweeps learning rates"
    if name not in _CURVES:
        return "set schedule.kind instead"
    warmup, total = params.get("warmup_num_steps"), params.get("total_num_steps")
    share = {"schedule.warmup_fraction": round(warmup / total, 6)} if warmup and total else {}
    peak = {"optimizer.lr": params["warmup_max_lr"]} if "warmup_max_lr" in params else {}
    return _set({"schedule.kind": _CURVES[name]} | share | peak)


def _enabled(dtype: str) -> Callable[[Any], str]:
    def words(value: Any) -> str:
        on = value is True or (isinstance(value, Mapping) and value.get("enabled") is True)
        return _set({"precision.dtype": dtype}) if on else "leave it out; precision.dtype decides it"

    return words


def _dtype(key: str) -> Callable[[Any], str]:
    def words(value: Any) -> str:
        name = value.get("dtype") if isinstance(value, Mapping) else value
        found = _DTYPES.get(str(name).removeprefix("torch."))
        return _set({key: found}) if found else f"set {key} instead"

    return words


def _loss_scale(value: Any) -> str:
    return _set({"precision.loss_scale": value or "dynamic"})


def _accumulation(value: Any) -> str:
    return f"set batch.global_samples to {value} x micro-batch x data ranks instead"


def _offload(key: str) -> Callable[[Any], str]:
    return lambda value: _set({key: "cpu"}) if value is True else "leave it out"


def _checkpointing(value: Any) -> str:
    return _set({"model.activation_checkpointing": True})


def _compile(value: Any) -> str:
    return _set({"model.compile": True}) if _known(value).get("deepcompile") is True else "leave it out"


def _tensor(value: Any) -> str:
    ranks = _known(value).get("autotp_size") or _known(_known(value).get("tp")).get("tp_size")
    return _set({"parallel.tensor": ranks}) if ranks else "set parallel.tensor instead"


def _wandb(value: Any) -> str:
    section = _known(value)
    if section.get("enabled") is not True:
        return "leave it out"
    names = {"project": "track.wandb_project", "team": "track.wandb_entity"}
    return _set({"track.wandb": "online"} | {names[key]: section[key] for key in names if section.get(key)})


_SPECIAL: dict[str, Callable[[Any], str]] = {
    "gradient_accumulation_steps": _accumulation,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "bf16.enabled": _enabled("bf16"),
    "bfloat16": _enabled("bf16"),
    "fp16.enabled": _enabled("fp16"),
    "fp16.auto_cast": lambda _: "leave it out; precision.dtype decides it",
    "fp16.loss_scale": _loss_scale,
    "torch_autocast": _dtype("precision.dtype"),
    "data_types.param_dtype": _dtype("precision.dtype"),
    "data_types.grad_accum_dtype": _dtype("precision.gradient_dtype"),
    "zero_optimization.cpu_offload": _offload("parallel.offload_optimizer"),
    "zero_optimization.cpu_offload_param": _offload("parallel.offload_params"),
    "activation_checkpointing": _checkpointing,
    "compile": _compile,
    "tensor_parallel": _tensor,
    "wandb": _wandb,
}
"""Keys whose value isn't the recipe's, letter for letter."""
