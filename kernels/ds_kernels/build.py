"""Compile csrc/ once per host: keyed by sources, flags, compiler and target, locked, renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "DS_KERNELS_CACHE"
"""Environment variable with the folder that built libraries are kept in; ~/.cache/ds_kernels without it."""

WITHOUT_VARIABLE = "DS_KERNELS_WITHOUT"
"""Environment variable with names of libraries, by commas, that are to be left out: cpu, attention, memory, cuda."""

_CPU_BODIES = ("cpu_body.cpp", "cpu_layers.cpp")
_CPU_SOURCES = ("opt_math.h", "cpu_body.h", "cpu_layers.h", "cpu.cpp", *_CPU_BODIES)
# No contraction and no fast maths: the bits are those that opt_math.h says.
_CPU_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-unknown-pragmas",
)  # fmt: skip
# In the order of csrc/cpu.cpp's numbers.
ISAS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
}  # fmt: skip

_ATTENTION_SOURCE = "cpu_attention.cpp"
_ATTENTION_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-mavx512bf16", *ISAS["avx512"], "-shared",
)  # fmt: skip

_MEMORY_SOURCE = "cpu_memory.cpp"
_MEMORY_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")

_CUDA_SOURCES = ("opt_math.h", "kernels.cuh", "cuda.cu")
# The runtime is linked in: it loads on hosts without a driver, and torch may have another version of it.
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-ffp-contract=off", "-cudart", "static")


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the text's first line says which and why."""


def build_cpu_library() -> Path:
    """Path of the CPU library, built now if this host has none of these sources yet.

    Raises:
        BuildError: no compiler here, or it failed.
    """
    isas = {isa: flags for isa, flags in ISAS.items() if isa == "plain" or platform.machine() == "x86_64"}
    name = os.environ.get("CXX", "g++")
    key = _key(_CPU_SOURCES, (_CPU_FLAGS, isas))
    return _once(f"cpu-{key}", name, shutil.which(name), lambda compiler, made: _compile_cpu(compiler, isas, made))


def build_attention_library() -> Path:
    """Path of the attention of processors with AVX512_BF16; see `build_cpu_library`."""
    return _build_one("attention", _ATTENTION_SOURCE, _ATTENTION_FLAGS, ())


def build_memory_library() -> Path:
    """Path of the allocator for the torch that is installed, against whose headers it is built; see
    `build_cpu_library`."""
    torch = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    libraries = (f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10")
    return _build_one("memory", _MEMORY_SOURCE, (*_MEMORY_FLAGS, version("torch")), libraries)


def build_cuda_library(architecture: str) -> Path:
    """Path of the library for GPUs of `architecture` ("sm_90"), built now if this host has none of these sources yet.

    Raises:
        BuildError: no nvcc here, or it failed.
    """
    key = _key(_CUDA_SOURCES, CUDA_FLAGS)

    def compile_cuda(compiler: str, made: Path) -> None:
        command = [compiler, *CUDA_FLAGS, f"-arch={architecture}", "-shared", str(SOURCES / "cuda.cu")]
        _run_all([[*command, "-o", str(made)]])

    return _once(f"cuda-{architecture}-{key}", "nvcc", find_nvcc(), compile_cuda)


def _build_one(kind: str, source: str, flags: tuple[str, ...], libraries: tuple[str, ...]) -> Path:
    """The library of one file; what isn't an option among `flags` is part of its key alone."""
    name = os.environ.get("CXX", "g++")
    options = [flag for flag in flags if flag.startswith("-")]

    def compile_one(compiler: str, made: Path) -> None:
        _run_all([[compiler, *options, str(SOURCES / source), "-o", str(made), *libraries]])

    return _once(f"{kind}-{_key((source,), flags)}", name, shutil.which(name), compile_one)


def find_nvcc() -> str | None:
    """nvcc by CUDACXX, the PATH, CUDA_HOME or where CUDA is installed by default."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("CUDACXX", ""), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def _once(folder: str, name: str, compiler: str | None, compile_to: Callable[[str, Path], None]) -> Path:
    """The library of `folder` in the cache by this compiler; by any other where this one isn't there."""
    if folder.partition("-")[0] in os.environ.get(WITHOUT_VARIABLE, "").split(","):
        raise BuildError(f"{WITHOUT_VARIABLE} leaves it out")
    place = _cache() / folder
    if compiler is None:
        built = sorted(place.glob("*/library.so"))
        if built:
            return built[0]
        raise BuildError(f"there is no {name} here")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    library = place / hashlib.sha256(version).hexdigest()[:12] / "library.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / library.name
                compile_to(compiler, made)
                made.rename(library)
    return library


def _compile_cpu(compiler: str, isas: dict[str, tuple[str, ...]], made: Path) -> None:
    objects = [made.with_name("cpu.o")]
    commands = [[compiler, *_CPU_FLAGS, "-c", str(SOURCES / "cpu.cpp"), "-o", str(objects[0])]]
    for (isa, flags), body in product(isas.items(), _CPU_BODIES):
        objects.append(made.with_name(f"{isa}-{body}.o"))
        source = str(SOURCES / body)
        commands.append([compiler, *_CPU_FLAGS, *flags, f"-DDSK_ISA={isa}", "-c", source, "-o", str(objects[-1])])
    _run_all(commands)
    _run_all([[compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(made)]])


def _run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    outputs = [process.communicate()[0].decode(errors="replace").strip() for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            lines = output.splitlines() or [f"it ended with {process.returncode}"]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise BuildError(f"{Path(command[0]).name} failed: {reason}\n{' '.join(command)}\n{output}")


def _cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/ds_kernels").expanduser()


def _key(sources: tuple[str, ...], flags: object) -> str:
    parts = [(SOURCES / name).read_bytes() for name in sources]
    parts.append(repr((flags, platform.machine(), platform.libc_ver())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
