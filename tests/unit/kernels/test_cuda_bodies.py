"""The CUDA kernels without a GPU: their bodies on the CPU, bit-equal to the CPU build, and what nvcc makes of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ds_kernels import choose
from ds_kernels.build import SOURCES
from ds_kernels.library import DTYPES, TENSOR, Arguments, CpuLibrary, cpu_library
from torch import Tensor

pytestmark = pytest.mark.skipif(not choose().fused, reason=str(choose()))
CHUNK = 16384


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    # Undefined behaviour ends the process, and with it the test.
    flags = ["-std=c++17", "-O1", "-mfma", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-w"]
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("cuda_shim.cpp")
    command = ["g++", *flags, *checks, f"-I{SOURCES}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.shim_sum_of_squares.restype = ctypes.c_double
    return loaded


def records(tensors: list[dict[str, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """dsk_tensor records, and the number of chunks before each tensor."""
    made = np.zeros(len(tensors), TENSOR)
    for record, tensor in zip(made, tensors, strict=True):
        for name in ("p", "g", "m", "v", "copy"):
            record[name] = tensor[name].data_ptr() if name in tensor else 0
        record["n"] = tensor["g"].numel()
        for name, of in (("p_type", "p"), ("g_type", "g"), ("state_type", "v"), ("copy_type", "copy")):
            record[name] = DTYPES[tensor[of].dtype] if of in tensor else 0
    made["first"] = np.cumsum(made["n"]) - made["n"]
    chunks = np.concatenate([[0], np.cumsum((made["n"] + CHUNK - 1) // CHUNK)]).astype(np.int64)
    return made, chunks


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def tensors_of(sizes: list[int], dtypes: tuple[torch.dtype, torch.dtype, Any], offset: int) -> list[dict[str, Tensor]]:
    """A parameter, gradient, states and 16-bit copy of each size; `offset` elements off a 16-byte boundary."""
    p_type, g_type, copy_type = dtypes
    made = []
    for size in sizes:
        values = torch.randn(4, size + offset)
        values[1, offset : offset + 1] = float("inf") if size > 3 else 1.0
        tensor = {
            "p": values[0].to(p_type)[offset:], "g": values[1].to(g_type)[offset:],
            "m": values[2].clone()[offset:], "v": values[3].abs()[offset:],
        }  # fmt: skip
        if copy_type is not None:
            tensor["copy"] = torch.zeros(size + offset, dtype=copy_type)[offset:]
        made.append(tensor)
    return made


DTYPE_CASES = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float32, torch.float16, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float16, torch.float16, None),
]


@pytest.mark.parametrize("sizes", [[40_003], [5, 0, 16_384, 20_001]])
@pytest.mark.parametrize("dtypes", DTYPE_CASES)
@pytest.mark.parametrize("rule", ["adam", "adam-l2", "adamw", "adagrad", "adagrad-l2"])
def test_a_cuda_body_gives_the_bits_of_the_cpu_build(shim: Any, rule: str, dtypes: Any, sizes: list[int]) -> None:
    library = cpu_library()
    assert isinstance(library, CpuLibrary)
    arguments = Arguments(
        scale=0.7, beta1=0.9, rest1=0.1, beta2=0.95, rest2=0.05, inverse_root=1.3, eps=1e-8,
        decay=-1e-3 if rule == "adamw" else 0.1, rate=1e-2, rule=int(rule.startswith("adagrad")),
        decay_kind={"l2": 1, "adamw": 2}.get(rule.rpartition("-")[2], 0),
        stochastic=dtypes[0] == torch.bfloat16, seed=2**40 + 7,
    )  # fmt: skip
    for offset in (0, 1):
        mine = tensors_of(sizes, dtypes, offset)
        theirs = [{name: tensor.clone() for name, tensor in one.items()} for one in mine]
        listed, chunks = records(mine)
        shim.shim_step(address(listed), address(chunks), ctypes.c_int64(len(mine)), ctypes.byref(arguments), None, None)
        library.step(records(theirs)[0], arguments, 1)
        for one, other in zip(mine, theirs, strict=True):
            for name, tensor in one.items():
                assert torch.equal(tensor.nan_to_num(), other[name].nan_to_num()), (name, offset)


def test_arguments_may_lie_on_the_device_and_a_flag_turns_a_launch_off(shim: Any) -> None:
    (tensor,) = tensors_of([100], DTYPE_CASES[0], 0)
    before = tensor["p"].clone()
    listed, chunks = records([tensor])
    host = Arguments(rule=1, rate=1.0, scale=1.0, eps=1.0, inverse_root=1.0)
    device = Arguments(rule=1, rate=0.0, scale=1.0, eps=1.0, inverse_root=1.0)
    skip = ctypes.c_int32(1)
    arguments = (address(listed), address(chunks), ctypes.c_int64(1), ctypes.byref(host))
    shim.shim_step(*arguments, None, ctypes.byref(skip))
    shim.shim_step(*arguments, ctypes.byref(device), None)
    assert torch.equal(tensor["p"][1:], before[1:])  # the first has an infinite gradient
    shim.shim_step(*arguments, None, None)
    assert not torch.equal(tensor["p"][1:], before[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cuda_norm_gives_the_bits_of_the_cpu_build(shim: Any, dtype: torch.dtype) -> None:
    library = cpu_library()
    assert isinstance(library, CpuLibrary)
    tensors = [{"g": torch.randn(size).to(dtype)} for size in (1, 255, 0, 16_384, 50_001)]
    listed = np.zeros(len(tensors), TENSOR)
    listed["g"] = [tensor["g"].data_ptr() for tensor in tensors]
    listed["n"] = [tensor["g"].numel() for tensor in tensors]
    listed["g_type"] = DTYPES[dtype]
    chunks = np.concatenate([[0], np.cumsum((listed["n"] + CHUNK - 1) // CHUNK)]).astype(np.int64)
    flag = ctypes.c_int32(7)
    arguments = (address(listed), address(chunks), ctypes.c_int64(len(tensors)), ctypes.byref(flag))
    assert shim.shim_sum_of_squares(*arguments) == library.sum_of_squares(listed, 2)
    assert flag.value == 0
    tensors[1]["g"][3] = float("nan")
    shim.shim_sum_of_squares(*arguments)
    assert flag.value == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_spills_nothing_and_moves_16_bytes_at_a_time(architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    command += ["--keep", "--keep-dir", str(tmp_path)]
    made = subprocess.run([*command, str(SOURCES / "cuda.cu")], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", made.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", made.stderr)]
    assert len(registers) == 12, made.stderr  # five updates, each flat and over a list, and the norm's two
    assert max(registers) <= 64
    assert sum(spills) == 0, made.stderr
    assert "warning" not in made.stderr
    (ptx,) = tmp_path.glob("*.ptx")
    for entry in re.split(r"\.entry ", ptx.read_text())[1:]:
        if "dsk_flat" in entry.partition("(")[0]:
            assert re.search(r"ld\.(global\.)?v4", entry)
            assert re.search(r"st\.(global\.)?v4", entry)
