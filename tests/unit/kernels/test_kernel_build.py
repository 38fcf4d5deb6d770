"""Libraries are built once, and what went wrong is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ds_kernels import build


def compiler(folder: Path, name: str, script: str) -> Path:
    """A program that is called like a compiler: the option after -o is its output."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('{name} 1.0'); sys.exit()\n{script}"
    )
    path.chmod(0o755)
    return path


WORKS = "open(sys.argv[sys.argv.index('-o') + 1], 'w').write(' '.join(sys.argv))"
FAILS = "print('a note'); print('x.cu(3): error: no such thing'); sys.exit(1)"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))


def test_a_library_is_built_once_for_each_gpu_and_used_where_the_compiler_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = compiler(tmp_path / "bin", "nvcc", WORKS)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    first = build.build_cuda_library("sm_90")
    assert "-arch=sm_90" in first.read_text()
    compiler(tmp_path / "bin", "nvcc", FAILS)
    assert build.build_cuda_library("sm_90") == first
    with pytest.raises(build.BuildError, match=r"^nvcc failed: x.cu\(3\): error: no such thing\n"):
        build.build_cuda_library("sm_80")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.build_cuda_library("sm_90") == first
    with pytest.raises(build.BuildError, match="there is no nvcc here"):
        build.build_cuda_library("sm_80")
    assert not list((tmp_path / "cache").glob("**/tmp*")), "something half made was left"


def test_without_a_compiler_the_cpu_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="there is no no-such-compiler here"):
        build.build_cpu_library()


def test_libraries_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(build.WITHOUT_VARIABLE, "cpu,memory")
    for library in (build.build_cpu_library, build.build_memory_library):
        with pytest.raises(build.BuildError, match="DS_KERNELS_WITHOUT leaves it out"):
            library()
    with pytest.raises(build.BuildError, match="there is no no-such-compiler here"):
        build.build_attention_library()


def test_nvcc_is_found_where_cuda_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = compiler(tmp_path / "bin", "nvcc", WORKS)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)
