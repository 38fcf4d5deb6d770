"""The fused optimizers against float64 formulas, torch.optim, and themselves on other instruction sets."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from ds_kernels import FusedAdagrad, FusedAdam, FusedAdamW, choose, global_norm
from ds_kernels.build import ISAS
from ds_kernels.library import CpuLibrary, cpu_library, records
from torch import Tensor

pytestmark = pytest.mark.skipif(not choose().fused, reason=str(choose()))

SIZES = {"empty": [0], "one": [1], "seven": [7], "odd": [1023], "page": [4096], "uneven": list(range(1, 301))}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (FusedAdam, {}),
    "adam-l2": (FusedAdam, {"weight_decay": 0.1}),
    "adamw": (FusedAdamW, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
    "adamw-maximize": (FusedAdamW, {"weight_decay": 0.1, "maximize": True}),
    "adagrad": (FusedAdagrad, {}),
    "adagrad-l2": (FusedAdagrad, {"weight_decay": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}
LR = 1e-2


class Exact:
    """The textbook's update in float64, from the constants that the kernel gets: fp32 betas, and 1 - beta of those."""

    def __init__(self, kind: str, values: list[Tensor]) -> None:
        self.kind, options = kind, KINDS[kind][1]
        self.p = [value.double() for value in values]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.full_like(p, options.get("initial_accumulator_value", 0.0)) for p in self.p]
        self.options, self.t = options, 0

    def step(self, gradients: list[Tensor], scale: float = 1.0) -> None:
        self.t += 1
        decay = self.options.get("weight_decay", 0.0)
        beta1, beta2 = self.options.get("betas", (0.9, 0.999))
        for p, g, m, v in zip(self.p, gradients, self.m, self.v, strict=True):
            g = g.double() * scale * (-1 if self.options.get("maximize") else 1)
            if self.kind.startswith("adamw"):
                p.mul_(1 - LR * decay)
            else:
                g = g + decay * p
            if self.kind.startswith("adagrad"):
                v.add_(g**2)
                p.sub_(LR / (1 + (self.t - 1) * self.options.get("lr_decay", 0.0)) * g / (v.sqrt() + 1e-10))
                continue
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g**2)
            p.sub_(LR * (m / (1 - beta1**self.t)) / ((v / (1 - beta2**self.t)).sqrt() + 1e-8))


def make(kind: str, parameters: list[Tensor], **more: Any) -> Any:
    cls, options = KINDS[kind]
    return cls(parameters, lr=LR, **options, **more)


def parameters_of(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_follow_float64(kind: str, sizes: str) -> None:
    parameters = parameters_of(SIZES[sizes])
    optimizer, exact = make(kind, parameters), Exact(kind, [p.detach() for p in parameters])
    optimizer.grad_scale = 0.37
    for _ in range(50):
        gradients = [torch.randn_like(p) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        exact.step(gradients, scale=0.37)
    if sum(SIZES[sizes]) == 0:
        return
    mine, theirs = torch.cat([p.detach() for p in parameters]).double(), torch.cat(exact.p)
    name = "sum" if kind.startswith("adagrad") else "exp_avg_sq"
    v = torch.cat([optimizer.state[p][name] for p in parameters]).double()
    assert ((v - torch.cat(exact.v)).abs() / torch.cat(exact.v)).max() <= 5e-6
    # Each step rounds a parameter once, by at most half of its last place: 2^-24 of it. Over many that averages out.
    off = (mine - theirs).abs()
    assert off.max() <= 50 * 2**-24 * (theirs.abs().max() + 50 * LR)
    assert len(off) < 1000 or off.mean() <= 3e-7


def with_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad_dtype = None  # torch otherwise wants the parameter's
    parameter.grad = gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adam-l2", "adamw", "adagrad"])
def test_16_bit_gradients_and_copies_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    master = torch.nn.Parameter(torch.randn(1023))
    plain = copy.deepcopy(master)
    optimizer, reference = make(kind, [master]), make(kind, [plain])
    optimizer.copies[master] = torch.empty(1023, dtype=dtype)
    for _ in range(5):
        gradient = torch.randn(1023).to(dtype)
        with_gradient(master, gradient)
        plain.grad = gradient.float()
        optimizer.step()
        reference.step()
        assert torch.equal(master, plain)
        assert torch.equal(optimizer.copies[master], plain.detach().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad"])
def test_16_bit_parameters_are_updated_in_fp32_and_rounded_to_nearest(kind: str, dtype: torch.dtype) -> None:
    small = torch.nn.Parameter(torch.randn(777).to(dtype))
    wide = torch.nn.Parameter(small.detach().float())
    optimizer, reference = make(kind, [small]), make(kind, [wide])
    for _ in range(5):
        gradient = torch.randn(777).to(dtype)
        small.grad, wide.grad = gradient, gradient.float()
        wide.data.copy_(small.detach().float())
        optimizer.step()
        reference.step()
        assert torch.equal(small, wide.detach().to(dtype))


def test_all_16_bit_values_are_converted_as_torch_does() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype)
        # A step of zero gradients and no decay writes every value back as it was.
        master = torch.nn.Parameter(values.float() * (1 + 2**-12) if dtype == torch.bfloat16 else values.float())
        master.grad = torch.zeros_like(master)
        optimizer = FusedAdam([master], lr=0.0)
        optimizer.copies[master] = torch.empty(len(every), dtype=dtype)
        optimizer.step()
        expected = master.detach().to(dtype)
        assert torch.equal(optimizer.copies[master].nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(optimizer.copies[master].isnan(), expected.isnan())
        back = torch.nn.Parameter(values.clone())
        back.grad = torch.zeros_like(back)
        FusedAdagrad([back], lr=0.0).step()
        assert torch.equal(back.nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad"])
def test_an_infinite_parameter_stays_and_a_nan_gradient_reaches_its_own_element_only(kind: str) -> None:
    options = {} if kind != "adamw" else {"weight_decay": 0.0}
    parameter = torch.nn.Parameter(torch.tensor([math.inf, 1.0, 2.0, -math.inf]))
    parameter.grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    KINDS[kind][0]([parameter], lr=LR, **options).step()
    assert parameter[0] == math.inf
    assert parameter[3] == -math.inf
    assert parameter[1].isnan()
    assert parameter[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_instruction_sets_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    library = cpu_library()
    assert isinstance(library, CpuLibrary)
    sizes = [1, 40_007, 0, 16, 100_001]
    start = parameters_of(sizes, dtype)
    gradients = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(3)]
    results = []
    threads_before, isa_before = torch.get_num_threads(), library.isa
    try:
        for isa in range(isa_before + 1):
            for threads in (1, 2, 3):
                library.isa = isa
                torch.set_num_threads(threads)
                parameters = [torch.nn.Parameter(p.detach().clone()) for p in start]
                optimizer = make(kind, parameters, stochastic_rounding=dtype == torch.bfloat16)
                for step in gradients:
                    for parameter, gradient in zip(parameters, step, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                states = [optimizer.state[p][name] for p in parameters for name in optimizer.states]
                norm = library.sum_of_squares(records(gradients[0]), threads)
                results.append((list(ISAS)[isa], threads, norm, [*(p.detach() for p in parameters), *states]))
    finally:
        torch.set_num_threads(threads_before)
        library.isa = isa_before
    for isa_name, threads, norm, tensors in results[1:]:
        assert norm == results[0][2], (isa_name, threads)
        assert all(map(torch.equal, tensors, results[0][3])), (isa_name, threads)


def test_views_that_are_unaligned_or_not_contiguous_are_updated_where_they_are() -> None:
    base, grid = torch.randn(1001), torch.randn(30, 40)
    views = [torch.nn.Parameter(base[3:1000]), torch.nn.Parameter(grid.t()), torch.nn.Parameter(grid[:0])]
    copies = [torch.nn.Parameter(view.detach().clone(memory_format=torch.contiguous_format)) for view in views]
    for view, other in zip(views, copies, strict=True):
        view.grad = torch.randn_like(view)
        other.grad = view.grad.clone()
    mine, reference = FusedAdamW(views), FusedAdamW(copies)
    for _ in range(3):
        mine.step()
        reference.step()
    for view, other in zip(views, copies, strict=True):
        assert torch.equal(view, other)
    assert torch.equal(base[3:1000], copies[0].detach())
    assert torch.equal(grid, copies[1].detach().t())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW), (FusedAdagrad, torch.optim.Adagrad)],
)
def test_state_dicts_are_exchanged_with_torch_both_ways(ours: Any, theirs: Any) -> None:
    torch.manual_seed(1)
    first, second = parameters_of([5, 300]), []
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    optimizers = [ours(first, lr=LR, weight_decay=0.1), theirs(second, lr=LR, weight_decay=0.1)]
    for turn in range(6):
        for a, b in zip(first, second, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        if turn == 2:  # each goes on with the other's state
            saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            optimizers = [ours(first, lr=1.0), theirs(second, lr=1.0)]
            for optimizer, state in zip(optimizers, reversed(saved), strict=True):
                optimizer.load_state_dict(state)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_right_on_average_and_reproducible() -> None:
    # lr 1 and beta 0: the step is the sign of the gradient times lr; 2^-10 is a quarter of bf16's step at 1.
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        parameter = torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
        parameter.grad = torch.full_like(parameter, -1.0)
        FusedAdam([parameter], lr=2**-9, betas=(0.0, 0.0), stochastic_rounding=True).step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
    assert set(results[0].float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert results[0].float().mean().item() == pytest.approx(1 + 2**-9, abs=5e-5)


def test_bf16_states_follow_fp32_ones() -> None:
    first = parameters_of([2000])
    second = [torch.nn.Parameter(first[0].detach().clone())]
    small, wide = FusedAdamW(first, lr=LR, state_dtype=torch.bfloat16), FusedAdamW(second, lr=LR)
    for _ in range(10):
        first[0].grad = second[0].grad = torch.randn(2000)
        small.step()
        wide.step()
    assert small.state[first[0]]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_float64s(dtype: torch.dtype) -> None:
    tensors = [torch.randn(size).to(dtype) for size in (0, 1, 17, 16_384, 16_385, 300_001)]
    exact = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    assert global_norm(tensors) == pytest.approx(exact, rel=1e-13)
    assert global_norm([]) == 0.0
    assert math.isnan(global_norm([*tensors, torch.tensor([math.nan])]))
    assert math.isinf(global_norm([*tensors, torch.tensor([math.inf])]))
    large = torch.full((1000,), 3e38)  # whose squares overflow fp32
    assert global_norm([large]) == pytest.approx(3e38 * math.sqrt(1000), rel=1e-6)


def test_what_they_do_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="betas"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="lr=-1"):
        FusedAdagrad([torch.nn.Parameter(torch.ones(1))], lr=-1)
    wide = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    wide.grad = torch.ones_like(wide)
    with pytest.raises(ValueError, match="float32"):
        FusedAdamW([wide]).step()


def test_memory_that_is_used_again_for_another_size_is_updated_in_that_size() -> None:
    """ZeRO's swapped sub-groups come into the same buffers, some of them shorter."""
    buffers = {name: torch.randn(100) for name in ("p", "exp_avg", "exp_avg_sq")}
    buffers["exp_avg_sq"].abs_()
    optimizer = FusedAdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    (group,) = optimizer.param_groups
    for size in (10, 100, 40):
        parameter = torch.nn.Parameter(buffers["p"][:size])
        parameter.grad = torch.randn(size)
        optimizer.state[parameter] = {"step": 3} | {name: buffers[name][:size] for name in optimizer.states}
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        group["params"] = [parameter]
        optimizer.step()
        for name, buffer in buffers.items():
            assert (buffer[:size] != before[name][:size]).all(), (name, size)
            assert torch.equal(buffer[size:], before[name][size:]), (name, size)


def take(optimizer: Any, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_saved_and_loaded_goes_on_with_the_same_bits(
    dtype: torch.dtype, states: torch.dtype, how: str
) -> None:
    parameters = [torch.nn.Parameter(torch.randn(40, 30).t().to(dtype)), *parameters_of([7], dtype)]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(4)]
    options = {"lr": LR, "state_dtype": states, "stochastic_rounding": True}
    first = FusedAdamW(parameters, **options)
    for step in gradients[:2]:
        take(first, parameters, step)
    if how == "state_dict":
        others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        second = FusedAdamW(others, **options)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
    else:
        second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
        others = second.param_groups[0]["params"]
    for step in gradients[2:]:
        take(first, parameters, step)
        take(second, others, step)
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)
        assert second.state[other]["exp_avg"].dtype == states
        assert torch.equal(first.state[one]["exp_avg_sq"], second.state[other]["exp_avg_sq"])


class TheirAdam:
    """DeepSpeed's compiled cpu_adam, as far as its Python asks for it: it notes what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def create_adam(self, *_: Any) -> None: ...

    def destroy_adam(self, *_: Any) -> None: ...

    def adam_update(self, _: int, step: int, *given: Any) -> None:
        assert isinstance(step, int), "pybind takes a size_t"
        self.given.append((step, *given))


@pytest.fixture
def their_adam(monkeypatch: pytest.MonkeyPatch) -> TheirAdam:
    from deepspeed.ops.adam import cpu_adam

    stand_in = TheirAdam()
    monkeypatch.setattr(cpu_adam.CPUAdamBuilder, "load", lambda _: stand_in)
    return stand_in


def test_state_dicts_are_exchanged_with_deepspeeds_cpu_adam_both_ways(their_adam: TheirAdam) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameters = parameters_of([30, 5])
    mine = FusedAdamW(parameters, lr=LR, weight_decay=0.1, betas=(0.8, 0.9))
    for _ in range(2):
        take(mine, parameters, [torch.randn_like(p) for p in parameters])
    theirs = DeepSpeedCPUAdam(parameters, lr=1.0)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    take(theirs, parameters, [torch.randn_like(p) for p in parameters])
    for parameter, (step, lr, beta1, beta2, eps, decay, correct, p, g, m, v) in zip(
        parameters, their_adam.given, strict=True
    ):
        assert (step, lr, beta1, beta2, eps, decay, correct) == (3, LR, 0.8, 0.9, 1e-8, 0.1, True)
        assert p.data_ptr() == parameter.data_ptr()
        assert torch.equal(m, mine.state[parameter]["exp_avg"])
        assert torch.equal(v, mine.state[parameter]["exp_avg_sq"])
        assert torch.equal(g, parameter.grad)
    back = FusedAdamW(parameters, lr=1.0)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert back.param_groups[0]["betas"] == (0.8, 0.9)
    uninterrupted = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    mine.param_groups[0]["params"] = uninterrupted
    for parameter, other in zip(parameters, uninterrupted, strict=True):
        mine.state[other] = mine.state.pop(parameter) | {"step": 3}
    gradients = [torch.randn_like(p) for p in parameters]
    take(back, parameters, gradients)
    take(mine, uninterrupted, gradients)
    assert all(map(torch.equal, parameters, uninterrupted))


def test_states_of_another_rule_are_not_loaded(their_adam: TheirAdam) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameters = parameters_of([3])
    for theirs in (
        DeepSpeedCPUAdam(parameters, bias_correction=False),
        torch.optim.AdamW(parameters, amsgrad=True),
    ):
        with pytest.raises(ValueError, match="amsgrad or without bias correction"):
            FusedAdamW(parameters).load_state_dict(theirs.state_dict())
