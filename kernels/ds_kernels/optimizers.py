"""`FusedAdam`, `FusedAdamW` and `FusedAdagrad`: torch.optim's arguments, groups and state_dict; our kernels' step.

Parameters may be fp32, or bf16 or fp16 themselves; their gradients are of the same dtype or fp32. States are fp32 (bf16
by choice) and have torch's names, so state dicts are exchanged with torch.optim and DeepSpeed both ways.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_kernels.choice import library_of
from ds_kernels.cuda import CudaLibrary
from ds_kernels.library import DTYPES, TENSOR, Arguments, CpuLibrary, DeviceStep, Rates, Table
from ds_kernels.norm import fits

_ADAM, _ADAGRAD = 0, 1
_NO_DECAY, _L2, _DECOUPLED = 0, 1, 2


class _Fused(torch.optim.Optimizer):
    """What the three share: one call of the kernel per group and step count, over all of its tensors."""

    states: tuple[str, ...]
    rule: int

    def __init__(
        self, params: Any, defaults: dict[str, Any], state_dtype: torch.dtype, stochastic: bool, capturable: bool
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}: states are kept in float32 or bfloat16")
        for name, value in defaults.items():
            if name != "betas" and not isinstance(value, bool | Tensor) and value < 0:
                raise ValueError(f"{name}={value}: it can't be below 0")
        self._state_dtype, self._stochastic, self._capturable = state_dtype, stochastic, capturable
        self._tables: dict[int, tuple[list[Any], Table]] = {}
        self._device_arguments: dict[Tensor, Tensor] = {}
        self.grad_scale: float | Tensor = 1.0
        """Every gradient is multiplied by it in the pass of the update: 1 / loss scale, times a clip coefficient. With
        `capturable` it may be an fp32 scalar on the device."""
        self.skip: Tensor | None = None
        """With `capturable`, an int32 scalar on the device: where it isn't 0, a step changes and counts nothing."""
        self.copies: dict[Tensor, Tensor] = {}
        """16-bit tensors that get the updated values of fp32 parameters in the same pass."""
        super().__init__(params, defaults)
        self._check_libraries()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_state_dtype", "_stochastic", "_capturable", "grad_scale", "skip", "copies")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables, self._device_arguments = {}, {}
        for group in self.param_groups:
            # DeepSpeed's groups and older torch's lack some.
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if group.get("amsgrad") or not group.get("bias_correction", True):
                raise ValueError(f"{type(self).__name__}: the loaded states are of amsgrad or without bias correction")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but states stay of `state_dtype`: torch gives them the parameter's (optimizer.py, `_cast`)."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, parameter in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name in self.states:
                if name in (values := state_dict["state"].get(number, {})):
                    self.state[parameter][name] = self._as_state(values[name], parameter)
        self._place_counts()

    def _as_state(self, value: Tensor, parameter: Tensor) -> Tensor:
        form = torch.contiguous_format
        return value.to(parameter.device, self._state_dtype, copy=True, memory_format=form)

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
            self._initialize([parameter for parameter in parameters if not self.state[parameter]], group)
            if self._capturable and not all(
                _on_device(self.state[parameter]["step"], parameter) for parameter in parameters
            ):
                self._place_counts()
            (self._step_by_device if self._capturable else self._step_by_host)(parameters, group)
        return loss

    def _step_by_host(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        if self.skip is not None:
            raise ValueError(f"{type(self).__name__}: skip is for capturable=True, where the device counts the steps")
        together: dict[tuple[torch.device, int], list[Tensor]] = {}
        for parameter in parameters:
            together.setdefault((parameter.device, self._next_step(parameter)), []).append(parameter)
        rates, factor = self._rates(group), float(self.grad_scale)
        for (_, step), members in together.items():
            with self._table(members) as table:
                self._library(members[0]).update(table, rates, step, factor)

    def _next_step(self, parameter: Tensor) -> int:
        # A number, as DeepSpeed's optimizers need it, and torch's take it. torch's own may have been put here.
        step = int(self.state[parameter]["step"]) + 1
        self.state[parameter]["step"] = step
        return step

    def _step_by_device(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        together: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            together.setdefault(id(self.state[parameter]["step"]), []).append(parameter)
        for members in together.values():
            library, device = self._library(members[0]), members[0].device
            if not isinstance(library, CudaLibrary):
                raise ValueError(f"{type(self).__name__}: capturable=True is for parameters on a GPU, not on {device}")
            count = self._own_count(members, group)
            if count not in self._device_arguments:
                room = torch.empty(ctypes.sizeof(Arguments), dtype=torch.uint8, device=device)
                self._device_arguments[count] = room
            rates, lr, factor = self._rates(group), group["lr"], self.grad_scale
            if not isinstance(factor, Tensor):
                rates.sign *= factor
            given = (number if isinstance(number, Tensor) else None for number in (lr, factor, self.skip))
            step = DeviceStep(count, self._device_arguments[count], *given)
            with self._table(members) as table:
                library.update_by_device(table, rates, step)

    def _own_count(self, parameters: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The count of steps that they share, with none that has no gradient now."""
        count: Tensor = self.state[parameters[0]]["step"]
        sharing = sum(self.state[other]["step"] is count for other in group["params"] if other in self.state)
        if sharing > len(parameters):
            count = count.clone()
            for parameter in parameters:
                self.state[parameter]["step"] = count
        return count

    def _initialize(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        counts: dict[torch.device, Tensor] = {}
        for parameter in parameters:
            if not fits(parameter, parameter.device):
                raise ValueError(f"{type(self).__name__}: parameters are {', '.join(map(str, DTYPES))}")
            state, device = self.state[parameter], parameter.device
            if self._capturable:
                state["step"] = counts.setdefault(device, torch.zeros((), device=device))
            else:
                state["step"] = 0
            for name in self.states:
                state[name] = torch.full_like(
                    parameter, group.get("initial_accumulator_value", 0.0), dtype=self._state_dtype,
                    memory_format=torch.contiguous_format,
                )  # fmt: skip

    def _place_counts(self) -> None:
        """Loaded counts of steps: on the host, or shared on the device by those that have made as many."""
        for group in self.param_groups:
            shared: dict[Any, Tensor] = {}
            for parameter in (p for p in group["params"] if "step" in self.state.get(p, {})):
                count: Any = int(self.state[parameter]["step"])
                if self._capturable:
                    placed = torch.tensor(float(count), device=parameter.device)
                    count = shared.setdefault((parameter.device, count), placed)
                self.state[parameter]["step"] = count

    def _check_libraries(self) -> None:
        """Parameters may come from a GPU and be updated on the CPU, so one of the two is enough here."""
        missing = library_of(torch.device("cpu"))
        devices = {parameter.device for group in self.param_groups for parameter in group["params"]}
        if isinstance(missing, Exception) and all(isinstance(library_of(device), Exception) for device in devices):
            raise RuntimeError(f"{type(self).__name__}: there are no kernels: {missing}")

    def _library(self, parameter: Tensor) -> CpuLibrary | CudaLibrary:
        library = library_of(parameter.device)
        if isinstance(library, Exception):
            raise RuntimeError(f"{type(self).__name__}: there are no kernels for {parameter.device}: {library}")
        return library

    @contextmanager
    def _table(self, parameters: list[Tensor]) -> Iterator[Table]:
        """Records of parameters of one device; those that aren't contiguous are updated through copies of them."""
        stand_ins = {p: p.detach().contiguous() for p in parameters if not p.is_contiguous()}
        table = self._known_table(parameters, stand_ins)
        gradients = [self._gradient(parameter) for parameter in parameters]
        addresses = np.array([gradient.data_ptr() for gradient in gradients], np.uint64)
        types = np.array([DTYPES[gradient.dtype] for gradient in gradients], np.int32)
        if (table.records["g"] != addresses).any() or (table.records["g_type"] != types).any():
            table.records["g"], table.records["g_type"], table.uploaded = addresses, types, None
        yield table
        for parameter, stand_in in stand_ins.items():
            parameter.copy_(stand_in)

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if not fits(gradient, parameter.device):
            raise ValueError(f"{type(self).__name__}: a gradient is {gradient.dtype}, sparse or on another device")
        return gradient.contiguous()

    def _known_table(self, parameters: list[Tensor], stand_ins: dict[Tensor, Tensor]) -> Table:
        """The table without gradients, made again only when something has moved."""
        states = [self.state[parameter] for parameter in parameters]
        copies = [self.copies.get(parameter) for parameter in parameters]
        places = [
            (
                stand_ins.get(parameter, parameter).data_ptr(),
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
        made = np.zeros(len(parameters), TENSOR)
        made["p"], made["n"], made["copy"] = ([place[at] for place in places] for at in range(3))
        made["v"] = [place[-1] for place in places]
        if len(self.states) == 2:
            made["m"] = [place[3] for place in places]
        made["first"] = np.cumsum(made["n"]) - made["n"]
        made["p_type"] = [DTYPES[parameter.dtype] for parameter in parameters]
        made["state_type"] = [DTYPES[state[self.states[-1]].dtype] for state in states]
        made["copy_type"] = [0 if copy is None else DTYPES[copy.dtype] for copy in copies]
        table = Table(made, parameters[0].device)
        self._tables[key] = (places, table)
        return table

    def _rates(self, group: dict[str, Any]) -> Rates:
        lr, decay = group["lr"], group["weight_decay"]
        return Rates(
            lr=0.0 if self._capturable and isinstance(lr, Tensor) else float(lr),
            eps=group["eps"],
            weight_decay=decay,
            sign=-1.0 if group["maximize"] else 1.0,
            seed=torch.initial_seed() & 0xFFFFFFFFFFFFFFFF,
            rule=self.rule,
            decay_kind=_L2 if decay else _NO_DECAY,
            stochastic=self._stochastic,
        )


def _on_device(count: Any, parameter: Tensor) -> bool:
    return isinstance(count, Tensor) and count.device == parameter.device


class FusedAdam(_Fused):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient.

    Args:
        params, lr, betas, eps, weight_decay, maximize: torch.optim.Adam's.
        state_dtype: of the two moments.
        stochastic_rounding: bf16 parameters are rounded up or down with the probability of what is cut off, from
            torch.initial_seed(), the step and the element's number: the same on any number of threads.
        capturable: the counts of steps are on the GPU, and `lr`, `grad_scale` and `skip` may be; a step waits for
            nothing and may be captured in a CUDA graph.
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
        capturable: bool = False,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas}: each is at least 0 and below 1")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            # What DeepSpeed's optimizers ask of groups that they load.
            "bias_correction": True, "amsgrad": False,
        }  # fmt: skip
        super().__init__(params, defaults, state_dtype, stochastic_rounding, capturable)

    def _rates(self, group: dict[str, Any]) -> Rates:
        rates = super()._rates(group)
        rates.beta1, rates.beta2 = group["betas"]
        if self.decoupled and group["weight_decay"]:
            rates.decay_kind = _DECOUPLED
        return rates


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
        state_dtype, stochastic_rounding, capturable: `FusedAdam`'s.
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
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, state_dtype, stochastic_rounding, capturable)

    def _rates(self, group: dict[str, Any]) -> Rates:
        rates = super()._rates(group)
        rates.lr_decay = group["lr_decay"]
        return rates
