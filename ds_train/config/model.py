"""`model`: which transformers model is trained, from weights or from scratch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ds_train.config.base import Place, Section
from ds_train.config.batch import Auto


class ModelSection(Section):
    """The model: `path` loads weights (hub id or local folder), `arch` builds one from scratch.

    Keys that are not listed here are keys of the model's own transformers config
    (`hidden_size`, `num_hidden_layers`, `rope_parameters` ...). They are checked against that config class.
    """

    path: Place | None = None
    """Hub id or local folder of a pretrained model. Exactly one of `path` and `arch` is given."""

    revision: str | None = None
    """Branch, tag or commit on the hub. `null` takes the default branch."""

    arch: str | None = None
    """transformers `model_type` (llama, qwen3, bert ...) of a model that starts from random weights."""

    keep_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Layers of the pretrained model that stay, from 0 and rising; the others are left out before training. Left out,
    all stay."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation. `auto` takes sdpa where the family has it, else what transformers chooses; in bf16 on
    CPUs that have AVX512_BF16 and no AMX, causal sdpa goes by tiles of ds_kernels. `sdpa` is torch's own everywhere."""

    trust_remote_code: bool = False
    """Run modelling code that comes with a hub model. Only for authors that you trust."""

    activation_checkpointing: bool | Auto = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time. `auto` lets the
    planner decide."""

    lean_activations: bool = True
    """Norms and gated feed-forwards of Llama's form keep only their inputs for the backward pass and work out the rest
    again: less memory for activations, in about the same time (docs/performance.md). Not with
    `activation_checkpointing` or `compile`, which do as much themselves."""

    liger: bool = False
    """Norms, gated feed-forwards and rotary positions of Llama's and Gemma's form by the Triton kernels of
    liger-kernel, on CUDA (`pip install liger-kernel`). They take the place of `lean_activations` where they compute,
    and keep as little."""

    compile: bool = False
    """Compile the decoder layers with torch.compile. The first step waits for the compiler, and on CPUs it doesn't pay
    (docs/performance.md)."""

    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of the transformers config. May be written here or directly under `model`."""

    @model_validator(mode="before")
    @classmethod
    def _gather_config_keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        own = {key: value for key, value in raw.items() if key in cls.model_fields}
        extra = {key: value for key, value in raw.items() if key not in cls.model_fields}
        if extra and isinstance(own.get("config", {}), dict):
            both = [key for key, value in extra.items() if own.get("config", {}).get(key, value) != value]
            if both:
                raise ValueError(f"{both[0]} is given twice: {extra[both[0]]} here, {own['config'][both[0]]} in config")
            own["config"] = {**own.get("config", {}), **extra}
        return own

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.arch is None):
            given = "none" if self.path is None else "both"
            raise ValueError(f"exactly one of path and arch says which model is trained; given: {given}")
        kept = self.keep_layers
        if kept is not None and (self.path is None or kept != sorted(set(kept))):
            raise ValueError("keep_layers are numbers of the layers of `path`, each once and rising")
        return self
