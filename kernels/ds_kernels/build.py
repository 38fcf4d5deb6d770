"""Compile csrc/ once per host: keyed by sources, flags, compiler and instruction sets, locked, renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "DS_KERNELS_CACHE"
"""Environment variable with the folder that built libraries are kept in; ~/.cache/ds_kernels without it."""

_HEADERS = ("opt_math.h", "cpu_body.h")
# No contraction and no fast maths: the bits are those that opt_math.h says.
_FLAGS = (
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


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the text says which and why."""


def build_cpu_library() -> Path:
    """Path of the CPU library, built now if this host has none of these sources yet.

    Raises:
        BuildError: no compiler here, or it failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError(f"there is no {os.environ.get('CXX', 'g++')} here")
    isas = {isa: flags for isa, flags in ISAS.items() if isa == "plain" or platform.machine() == "x86_64"}
    folder = _cache() / _key(compiler, isas)
    library = folder / "libds_kernels_cpu.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(compiler, isas, library)
    return library


def _compile(compiler: str, isas: dict[str, tuple[str, ...]], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        scratch = Path(name)
        body, objects = SOURCES / "cpu_body.cpp", [scratch / "cpu.o"]
        commands = [[compiler, *_FLAGS, "-c", str(SOURCES / "cpu.cpp"), "-o", str(objects[0])]]
        for isa, flags in isas.items():
            objects.append(scratch / f"{isa}.o")
            commands.append([compiler, *_FLAGS, *flags, f"-DDSK_ISA={isa}", "-c", str(body), "-o", str(objects[-1])])
        _run_all(commands)
        made = scratch / library.name
        _run_all([[compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(made)]])
        made.rename(library)


def _run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(command)}\n{output.decode(errors='replace').strip()}")


def _cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/ds_kernels").expanduser()


def _key(compiler: str, isas: dict[str, tuple[str, ...]]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = [(SOURCES / name).read_bytes() for name in (*_HEADERS, "cpu.cpp", "cpu_body.cpp")]
    parts = [*sources, version, repr((_FLAGS, isas, platform.machine(), platform.libc_ver())).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
