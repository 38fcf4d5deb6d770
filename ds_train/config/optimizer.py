"""`optimizer`: the update rule and its constants."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_train.config.base import Section

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSection(Section):
    """One optimizer for all parameters; biases and norms are left out of weight decay by default."""

    kind: Literal["adamw", "adam", "adagrad", "sgd"] = "adamw"
    """`adamw` decouples weight decay (arXiv 1711.05101); `adam`, `adagrad` and `sgd` add it to the gradient."""

    kernel: Literal["auto", "fused", "torch"] = "auto"
    """`auto` updates with this project's fused kernels where the optimizer's states are on a CPU or a CUDA device and
    its compiler (g++, nvcc) or a built library is there, else with torch's; `fused` demands the kernels; `torch` leaves
    them out. `sgd` is always torch's."""

    lr: float = Field(default=3e-4, gt=0.0)
    """Peak learning rate; the schedule multiplies it."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator of Adam and Adagrad."""

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of `sgd`."""

    weight_decay: float = Field(default=0.1, ge=0.0)
    """Weight decay of the parameters that are decayed."""

    decay_all: bool = False
    """Decay biases, norms and other one-dimensional parameters too."""

    lr_factors: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Learning rate of some parameters, as a factor of everyone's: pattern of their full names (`*` is any text) to
    factor, the first pattern that matches counts. `{"*embed_tokens*": 0.5}`"""

    clip_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are scaled down to this global L2 norm; 0 never clips."""
