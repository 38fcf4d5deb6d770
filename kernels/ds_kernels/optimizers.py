"""`FusedAdam`, `FusedAdamW` and `FusedAdagrad`: torch.optim's arguments, groups and state_dict; our kernels' step.

Parameters may be fp32, or bf16 or fp16 themselves; their gradients are of the same dtype or fp32. States are fp32 (bf16
by choice) and have torch's names, so state dicts are exchanged with torch.optim and DeepSpeed both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_kernels.library import DTYPES, TENSOR, Arguments, CpuLibrary, cpu_library
from ds_kernels.norm import fits

_ADAM, _ADAGRAD = 0, 1
_NO_DECAY, _L2, _DECOUPLED = 0, 1, 2


class _Fused(torch.optim.Optimizer):
    """What the three share: one call of the kernel per group and step count, over all of its tensors."""

    states: tuple[str, ...]
    rule: int

    def __init__(self, params: Any, defaults: dict[str, Any], state_dtype: torch.dtype, stochastic: bool) -> None:
        library = cpu_library()
        if not isinstance(library, CpuLibrary):
            raise RuntimeError(f"{type(self).__name__}: the kernels can't be built: {library}")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}: states are kept in float32 or bfloat16")
        for name, value in defaults.items():
            if name != "betas" and not isinstance(value, bool) and value < 0:
                raise ValueError(f"{name}={value}: it can't be below 0")
        self._library, self._state_dtype, self._stochastic = library, state_dtype, stochastic
        self._tables: dict[int, tuple[list[Any], np.ndarray]] = {}
        self.grad_scale = 1.0
        """Every gradient is multiplied by it in the pass of the update: 1 / loss scale, times a clip coefficient."""
        self.copies: dict[Tensor, Tensor] = {}
        """16-bit tensors that get the updated values of fp32 parameters in the same pass."""
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; what `closure` returns, if it is given.

        Raises:
            ValueError: a parameter or gradient of another device or dtype, or a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_step: dict[int, list[Tensor]] = {}
            for parameter in parameters:
                by_step.setdefault(self._next_step(parameter, group), []).append(parameter)
            for step, members in by_step.items():
                self._update(members, self._arguments(group, step))
        return loss

    def _next_step(self, parameter: Tensor, group: dict[str, Any]) -> int:
        state = self.state[parameter]
        if not state:
            self._initialize(parameter, state, group)
        # torch keeps a tensor, DeepSpeed a number; either is what a loaded state dict leaves here.
        step = int(state["step"]) + 1
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step
        return step

    def _initialize(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not fits(parameter):
            raise ValueError(f"{type(self).__name__}: parameters are {', '.join(map(str, DTYPES))} on the CPU")
        state["step"] = torch.tensor(0.0)
        for name in self.states:
            state[name] = torch.full_like(
                parameter, group.get("initial_accumulator_value", 0.0), dtype=self._state_dtype,
                memory_format=torch.contiguous_format,
            )  # fmt: skip

    def _update(self, parameters: list[Tensor], arguments: Arguments) -> None:
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.is_sparse or not fits(gradient):
                raise ValueError(f"{type(self).__name__}: a gradient is {gradient.dtype}, sparse or on another device")
            if not parameter.is_contiguous():
                return self._update_strided(parameters, arguments)
        gradients = [gradient.contiguous() for gradient in gradients]
        table = self._table(parameters)
        table["g"] = [gradient.data_ptr() for gradient in gradients]
        table["g_type"] = [DTYPES[gradient.dtype] for gradient in gradients]
        if self._stochastic:
            arguments.seed = arguments.seed + torch.initial_seed() & 0xFFFFFFFFFFFFFFFF
        self._library.step(table, arguments, torch.get_num_threads())
        return None

    def _update_strided(self, parameters: list[Tensor], arguments: Arguments) -> None:
        """Parameters that aren't contiguous are updated through copies of them."""
        for parameter in parameters:
            whole = parameter.detach().contiguous()
            stand_in = torch.nn.Parameter(whole, requires_grad=False)
            stand_in.grad = parameter.grad.contiguous()  # type: ignore[union-attr]
            self.state[stand_in] = self.state[parameter]
            try:
                self._update([stand_in], arguments)
            finally:
                del self.state[stand_in]
            parameter.copy_(whole)

    def _table(self, parameters: list[Tensor]) -> np.ndarray:
        """Records of the parameters, their states and copies, made again only when one of them has moved."""
        states = [self.state[parameter] for parameter in parameters]
        copies = [self.copies.get(parameter) for parameter in parameters]
        places = [
            (
                parameter.data_ptr(),
                parameter.numel(),  # a buffer may be used again for another size
                0 if copy is None else copy.data_ptr(),
                *(state[name].data_ptr() for name in self.states),
            )
            for parameter, state, copy in zip(parameters, states, copies, strict=True)
        ]
        key = id(parameters[0])
        known, table = self._tables.get(key, (None, None))
        if table is not None and known == places:
            return table
        table = np.zeros(len(parameters), TENSOR)
        table["p"], table["n"], table["copy"] = ([place[at] for place in places] for at in range(3))
        table["v"] = [place[-1] for place in places]
        if len(self.states) == 2:
            table["m"] = [place[3] for place in places]
        table["first"] = np.cumsum(table["n"]) - table["n"]
        table["p_type"] = [DTYPES[parameter.dtype] for parameter in parameters]
        table["state_type"] = [DTYPES[state[self.states[-1]].dtype] for state in states]
        table["copy_type"] = [0 if copy is None else DTYPES[copy.dtype] for copy in copies]
        self._tables[key] = (places, table)
        return table

    def _arguments(self, group: dict[str, Any], step: int) -> Arguments:
        sign = -1.0 if group["maximize"] else 1.0
        return Arguments(
            scale=sign * self.grad_scale, eps=group["eps"], rule=self.rule, stochastic=self._stochastic, seed=step
        )


class FusedAdam(_Fused):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient.

    Args:
        params, lr, betas, eps, weight_decay, maximize: torch.optim.Adam's.
        state_dtype: of the two moments.
        stochastic_rounding: bf16 parameters are rounded up or down with the probability of what is cut off, from
            torch.initial_seed(), the step and the element's number: the same on any number of threads.
    """

    states = ("exp_avg", "exp_avg_sq")
    rule = _ADAM
    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas}: each is at least 0 and below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, state_dtype, stochastic_rounding)

    def _arguments(self, group: dict[str, Any], step: int) -> Arguments:
        arguments = super()._arguments(group, step)
        lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
        arguments.beta1, arguments.rest1 = beta1, 1.0 - beta1
        arguments.beta2, arguments.rest2 = beta2, 1.0 - beta2
        arguments.inverse_root = 1.0 / math.sqrt(1.0 - beta2**step)
        arguments.rate = lr / (1.0 - beta1**step)
        arguments.decay_kind = _NO_DECAY if decay == 0 else _DECOUPLED if self.decoupled else _L2
        arguments.decay = -lr * decay if self.decoupled else decay
        return arguments


class FusedAdamW(FusedAdam):
    """AdamW (arXiv 1711.05101): `FusedAdam` with decoupled weight decay, 0.01 by default."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **others: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **others)


class FusedAdagrad(_Fused):
    """Adagrad (Duchi et al. 2011, jmlr v12 duchi11a).

    Not a subclass of torch.optim.Adagrad, which DeepSpeed's ZeRO replaces by torch's own (stage_1_and_2.py:946).

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: torch.optim.Adagrad's.
        state_dtype, stochastic_rounding: `FusedAdam`'s.
    """

    states = ("sum",)
    rule = _ADAGRAD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, state_dtype, stochastic_rounding)

    def _arguments(self, group: dict[str, Any], step: int) -> Arguments:
        arguments = super()._arguments(group, step)
        arguments.rate = float(group["lr"]) / (1.0 + (step - 1) * group["lr_decay"])
        arguments.decay_kind = _L2 if group["weight_decay"] else _NO_DECAY
        arguments.decay, arguments.inverse_root = group["weight_decay"], 1.0
        return arguments
