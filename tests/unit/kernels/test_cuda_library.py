"""The CUDA library from Python, bit-equal to the CPU build: on the CPU, launchers and bodies included, and on a GPU.

Those on a GPU are `make gpu-test`'s.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ds_kernels.choice
import pytest
import torch
from cuda_on_cpu import Shim, build_shim
from ds_kernels import FusedAdagrad, FusedAdam, FusedAdamW, choose, global_norm, norm_and_flag
from ds_kernels.build import CUDA_FLAGS, SOURCES
from ds_kernels.cuda import CudaError, CudaLibrary, compare_with_cpu
from ds_kernels.library import Rates, Table, cpu_library
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not choose().fused, reason=str(choose()))

KINDS: dict[str, Any] = {
    "adam": (FusedAdam, {}),
    "adam-l2": (FusedAdam, {"weight_decay": 0.1, "maximize": True}),
    "adamw": (FusedAdamW, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
    "adagrad": (FusedAdagrad, {}),
    "adagrad-l2": (FusedAdagrad, {"weight_decay": 0.1, "lr_decay": 0.01}),
}
DTYPES = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float32, torch.float16, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float16, torch.float16, None),
]
LISTS = {"one": [40_003], "some": [5, 0, 16_384, 20_001]}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(build_shim(tmp_path_factory.mktemp("shim")), "cuda-shim")


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


class Twins:
    """The same parameters twice: updated by the CPU build, and by the CUDA library, on a GPU or on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shim: Shim | None) -> None:
        self.devices = ["cpu", "cpu" if shim else "cuda"]
        self.parameters: list[list[Tensor]] = [[], []]
        self._libraries, self._monkeypatch = [cpu_library(), shim or cpu_library()], monkeypatch

    def of(self, values: list[Tensor]) -> Twins:
        self.parameters = [[nn.Parameter(p.detach().clone().to(device)) for p in values] for device in self.devices]
        return self

    def each(self) -> Any:
        """(0, parameters) with the CPU build in force, then (1, parameters) with the CUDA library."""
        for which, library in enumerate(self._libraries):
            self._monkeypatch.setattr(ds_kernels.choice, "cpu_library", lambda library=library: library)
            yield which, self.parameters[which]

    def give(self, gradients: list[Tensor]) -> None:
        for parameters in self.parameters:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad_dtype = None  # torch otherwise wants the parameter's
                parameter.grad = gradient.to(parameter.device, copy=True)

    def check(self, optimizers: list[Any]) -> None:
        tensors = []
        for parameters, optimizer in zip(self.parameters, optimizers, strict=True):
            states = [optimizer.state[p][name] for p in parameters for name in optimizer.states]
            tensors.append([*(p.detach() for p in parameters), *states, *optimizer.copies.values()])
        for mine, other in zip(*tensors, strict=True):
            assert torch.equal(mine.nan_to_num(7.0), other.cpu().nan_to_num(7.0))


@pytest.fixture(params=["shim", pytest.param("gpu", marks=ON_A_GPU)])
def twins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Twins:
    if request.param == "gpu":
        assert choose("cuda").fused, str(choose("cuda"))
        return Twins(monkeypatch, None)
    return Twins(monkeypatch, request.getfixturevalue("shim"))


def some_gradients(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(size).to(dtype) for size in sizes]
    for gradient in made:
        gradient[: len(gradient) // 100] = float("inf")
    return made


@pytest.mark.parametrize("sizes", LISTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_have_the_bits_of_the_cpu_build(twins: Twins, kind: str, dtypes: Any, sizes: str) -> None:
    p_type, g_type, copy_type = dtypes
    cls, options = KINDS[kind]
    twins.of([torch.randn(size).to(p_type) for size in LISTS[sizes]])
    optimizers = []
    for _, parameters in twins.each():
        optimizers.append(cls(parameters, lr=1e-2, stochastic_rounding=p_type == torch.bfloat16, **options))
        optimizers[-1].grad_scale = 0.37
        if copy_type is not None:
            optimizers[-1].copies = {p: torch.zeros_like(p, dtype=copy_type) for p in parameters}
    for _ in range(2):
        twins.give(some_gradients(LISTS[sizes], g_type))
        for which, _ in twins.each():
            optimizers[which].step()
    twins.check(optimizers)


def test_groups_views_and_parameters_without_a_gradient(twins: Twins) -> None:
    """Off the 16-byte grid, not contiguous, of other rates, counts of steps that differ."""
    twins.of([torch.randn(40_003) for _ in range(4)])
    optimizers = []
    for which, bases in twins.each():
        views = [nn.Parameter(bases[0].data[3:]), nn.Parameter(bases[1].data[:40_000].view(200, 200).t())]
        twins.parameters[which] = [*views, *bases[2:]]
        groups = [{"params": views, "lr": 1e-3}, {"params": bases[2:], "weight_decay": 0.0, "betas": (0.8, 0.9)}]
        optimizers.append(FusedAdamW(groups, lr=1e-2, state_dtype=torch.bfloat16))
    for step in range(3):
        twins.give([torch.randn_like(p) for p in twins.parameters[0]])
        for which, parameters in twins.each():
            if step == 1:
                parameters[3].grad = None
            optimizers[which].step()
    twins.check(optimizers)
    assert [int(optimizers[1].state[p]["step"]) for p in twins.parameters[1]] == [3, 3, 3, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_waits_for_nothing(twins: Twins, kind: str) -> None:
    """Counts, learning rate, factor and the flag that turns a step off are read where they lie."""
    cls, options = KINDS[kind]
    twins.of([torch.randn(size) for size in (7, 20_000, 33)])
    lr, factor = (torch.tensor(value, device=twins.devices[1]) for value in (2**-7, 1.0))
    skip = torch.tensor(0, dtype=torch.int32, device=twins.devices[1])
    optimizers = []
    for which, parameters in twins.each():
        optimizers.append(cls(parameters, lr=lr if which else 2**-7, capturable=bool(which), **options))
    optimizers[1].grad_scale, optimizers[1].skip = factor, skip
    for step in range(5):
        scale, skipped = 0.5**step, step == 2
        twins.give([torch.randn_like(p) for p in twins.parameters[0]])
        for which, parameters in twins.each():
            if step == 3:
                parameters[1].grad = None
            if which:
                lr.fill_(2**-7 * (step + 1))
                factor.fill_(scale)
                skip.fill_(skipped)
                optimizers[1].step()
            elif not skipped:
                optimizers[0].param_groups[0]["lr"] = 2**-7 * (step + 1)
                optimizers[0].grad_scale = scale
                optimizers[0].step()
    twins.check(optimizers)
    counts = [optimizers[1].state[p]["step"] for p in twins.parameters[1]]
    assert [float(count) for count in counts] == [4.0, 3.0, 4.0]
    assert counts[0] is counts[2]


def test_a_step_that_is_being_captured_uploads_nothing(monkeypatch: pytest.MonkeyPatch, shim: Shim) -> None:
    """A graph may not point to a table that is freed."""
    twins = Twins(monkeypatch, shim).of([torch.randn(size) for size in (7, 20_000)])
    twins.give([torch.randn(size) for size in (7, 20_000)])
    optimizers = []
    monkeypatch.setattr(shim, "capturing", True)
    monkeypatch.setattr(shim, "uploads", 0)
    for which, parameters in twins.each():
        optimizers.append(FusedAdam(parameters, lr=2**-7, capturable=bool(which)))
        optimizers[-1].step()
    twins.check(optimizers)
    assert shim.uploads == 0


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ON_A_GPU) for kind in KINDS])
def test_a_captured_step_is_replayed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    cls, options = KINDS[kind]
    twins = Twins(monkeypatch, None).of([torch.randn(size) for size in (7, 20_000)])
    gradients = [[torch.randn(size) for size in (7, 20_000)] for _ in range(4)]
    twins.give(gradients[0])
    optimizers = [cls(twins.parameters[at], lr=2**-7, capturable=bool(at), **options) for at in (0, 1)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for number, step in enumerate(gradients):
        for parameters in twins.parameters:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        optimizers[0].step()
        stream.wait_stream(torch.cuda.current_stream())
        if number < 2:
            with torch.cuda.stream(stream):
                optimizers[1].step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if number == 2:
                with torch.cuda.graph(graph):
                    optimizers[1].step()
            graph.replay()
    twins.check(optimizers)


def test_counts_on_the_device_come_from_any_state_dict(twins: Twins) -> None:
    twins.of([torch.randn(50), torch.randn(20)])
    theirs = torch.optim.AdamW(twins.parameters[0], lr=2**-7)
    twins.give([torch.randn(50), torch.randn(20)])
    theirs.step()
    (_, parameters) = list(twins.each())[1]
    ours = FusedAdamW(parameters, lr=2**-7, capturable=True)
    with torch.no_grad():
        for mine, other in zip(parameters, twins.parameters[0], strict=True):
            mine.copy_(other)
    ours.load_state_dict(theirs.state_dict())
    twins.give([torch.randn(50), torch.randn(20)])
    theirs.step()
    ours.step()
    again = FusedAdamW(parameters, lr=1.0)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    for mine, other in zip(parameters, twins.parameters[0], strict=True):
        torch.testing.assert_close(mine.cpu(), other)
        assert float(ours.state[mine]["step"]) == float(again.state[mine]["step"]) == 2.0


def test_what_only_a_gpu_can_do_is_refused_on_the_cpu() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match="capturable"):
        FusedAdam([parameter], capturable=True).step()
    optimizer = FusedAdam([parameter])
    optimizer.skip = torch.zeros((), dtype=torch.int32)
    with pytest.raises(ValueError, match="skip"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_has_the_bits_of_the_cpu_build(twins: Twins, dtype: torch.dtype) -> None:
    most = 4_300_001 if dtype == torch.float32 else 70_001  # more than 256 blocks
    tensors = [torch.randn(size).to(dtype) for size in (1, 255, 0, 16_384, most)]
    twins.of(tensors)
    found = [norm_and_flag(parameters) for _, parameters in twins.each()]
    exact = float(torch.cat(tensors).double().square().sum().sqrt())
    assert float(found[0][0]) == float(found[1][0]) == pytest.approx(exact, rel=1e-13)
    assert int(found[0][1]) == int(found[1][1]) == 0
    tensors = [*tensors[:2], torch.tensor([1.0, float("nan")], dtype=dtype)]
    twins.of(tensors)
    for _, parameters in twins.each():
        norm, flag = norm_and_flag(parameters)
        assert norm.isnan()
        assert flag.dtype == torch.int32
        assert int(flag) == 1


def test_the_norm_of_a_graph_that_is_being_captured_uses_no_table(monkeypatch: pytest.MonkeyPatch, shim: Shim) -> None:
    tensors = [torch.randn(300), torch.randn(5)]
    expected = global_norm(tensors)
    monkeypatch.setattr(ds_kernels.choice, "cpu_library", lambda: shim)
    monkeypatch.setattr(shim, "capturing", True)
    monkeypatch.setattr(shim, "uploads", 0)
    assert global_norm(tensors) == pytest.approx(expected, rel=1e-13)
    assert shim.uploads == 0


def test_a_device_that_gives_other_bits_is_not_used(shim: Shim) -> None:
    compare_with_cpu(shim, torch.device("cpu"))

    class Wrong(Shim):
        def update(self, table: Table, rates: Rates, step: int, factor: float) -> None:
            super().update(table, rates, step, factor * (1 + 1e-6))

    wrong = Wrong.__new__(Wrong)
    wrong.__dict__ = shim.__dict__
    with pytest.raises(CudaError, match="differs"):
        compare_with_cpu(wrong, torch.device("cpu"))
    with pytest.raises(CudaError, match="invalid device"):
        shim._use(1)


def test_a_host_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    choice = choose("cuda")
    assert (choice.name, choice.fused) == ("torch-fused", False)
    assert "no CUDA device" in choice.reason
    assert choose("npu").name == "torch-foreach"
    assert "npu" in choose("npu").reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_spills_nothing_and_moves_16_bytes_at_a_time(architecture: str, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    command = ["nvcc", *CUDA_FLAGS, f"-arch={architecture}", "-shared", "-Xptxas", "-v", "-o", str(library)]
    command += ["--keep", "--keep-dir", str(tmp_path)]
    made = subprocess.run([*command, str(SOURCES / "cuda.cu")], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", made.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", made.stderr)]
    assert len(registers) == 13, made.stderr  # five updates, each flat and over a list, the norm's two, the arguments
    assert max(registers) <= 64
    assert sum(spills) == 0, made.stderr
    assert "warning" not in made.stderr
    (ptx,) = tmp_path.glob("*.ptx")
    for entry in re.split(r"\.entry ", ptx.read_text())[1:]:
        if "dsk_flat" in entry.partition("(")[0]:
            assert re.search(r"ld\.(global\.)?v4", entry)
            assert re.search(r"st\.(global\.)?v4", entry)
    if torch.cuda.is_available():
        return
    # Without a driver it still loads, and says what is missing.
    with pytest.raises(CudaError, match=r"driver|device"):
        CudaLibrary(library, architecture)
