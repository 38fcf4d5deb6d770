"""`export`, `reshard`, `quantize`, `sparsify`: a trained model written again, by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_train.cli.options import refuse_beside
from ds_train.errors import user_error
from ds_train.plan.facts import model_folder

Checkpoint = Annotated[Path, typer.Argument(help="RUN/checkpoints/step-*, of any layout.")]

_SAMPLES = 128

Written = Annotated[
    Path, typer.Argument(help="Folder that transformers will load. An older model there is replaced, nothing else.")
]


def export(
    checkpoint: Checkpoint,
    folder: Written,
    dtype: Annotated[str, typer.Option(help="Number format of the weights: fp32, bf16, fp16.")] = "bf16",
) -> None:
    """Write a checkpoint as a transformers folder, from its fp32 weights, without starting its run."""
    formats = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if dtype not in formats:
        raise user_error("--dtype", "no such number format", "one of fp32, bf16, fp16", dtype)
    import torch

    _check_replaced(folder, checkpoint)
    from ds_train.checkpoint import offline
    from ds_train.engine.job import quiet_libraries

    quiet_libraries()
    offline.export(checkpoint, folder, getattr(torch, formats[dtype]))
    print(folder.resolve())


def reshard(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.")],
    file_gb: Annotated[float, typer.Option(min=0.001, help="Size of its files.")] = 5.0,
) -> None:
    """Write a checkpoint again in few files of whole parameters, verified. A run resumes from either on any layout."""
    from ds_train.checkpoint import offline

    offline.rewrite(checkpoint, folder, int(file_gb * 1e9))
    print(f"{folder.resolve()}: continue it with checkpoint.resume={folder}")


def quantize(
    source: Annotated[Path, typer.Argument(help="A run's folder with its export, or a transformers folder.")],
    folder: Written,
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4 or 8.")] = 8,
    group: Annotated[int, typer.Option(min=0, help="Inputs that share a scale; 0 is one scale a row.")] = 0,
    method: Annotated[str, typer.Option(help="rtn (to nearest), gptq or awq (with samples).")] = "rtn",
    recipe: Annotated[Path | None, typer.Option(help="Recipe of the samples; if left out, the run's own.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples that are looked at; if left out, 128.")] = None,
) -> None:
    """Round a trained model's linear layers to few bits, packed as compressed-tensors. One CPU process."""
    if bits not in (4, 8):
        raise user_error("--bits", "no such number of bits", "4 or 8", bits)
    if method not in ("rtn", "gptq", "awq"):
        raise user_error("--method", "no such method", "rtn, gptq or awq", method)
    if method == "rtn":
        refuse_beside("--method=rtn", {"--recipe": recipe, "--samples": samples}, "looks at no samples")
    _check_replaced(folder, source)
    from ds_train.checkpoint import offline
    from ds_train.engine.job import quiet_libraries

    quiet_libraries()
    done = offline.quantize(source, folder, bits, group, method, recipe, samples or _SAMPLES)  # type: ignore[arg-type]
    scaled = f"; the inputs of {done.scaled} linear layers are scaled" if method == "awq" else ""
    print(f"{folder.resolve()}: {done.after / 1e6:,.2f} MB of weights, {done.before / 1e6:,.2f} MB before{scaled}")


def sparsify(
    source: Annotated[Path, typer.Argument(help="A run's folder with its export, or a transformers folder.")],
    folder: Written,
    pattern: Annotated[str, typer.Option(help="Zeros of a row: 2:4 (two in four neighbours), or a share.")] = "2:4",
    method: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt (both with samples).")] = "wanda",
    recipe: Annotated[Path | None, typer.Option(help="Recipe of the samples; if left out, the run's own.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples that are looked at; if left out, 128.")] = None,
) -> None:
    """Set weights of a trained model's linear layers to zero; compress.keep_zeros trains it so. One CPU process."""
    if method not in ("magnitude", "wanda", "sparsegpt"):
        raise user_error("--method", "no such method", "magnitude, wanda or sparsegpt", method)
    if method == "magnitude":
        refuse_beside("--method=magnitude", {"--recipe": recipe, "--samples": samples}, "looks at no samples")
    from ds_train.checkpoint import offline
    from ds_train.compress.sparsity import Pattern
    from ds_train.engine.job import quiet_libraries

    zeros, colon, group = pattern.partition(":")
    try:
        chosen = Pattern(int(zeros) / int(group), int(group)) if colon else Pattern(float(zeros))
    except (ValueError, ZeroDivisionError):
        chosen = Pattern(1.0)
    if not 0 < chosen.share < 1:
        raise user_error("--pattern", "not a share of a row", "such as 2:4 or 0.5", pattern)
    _check_replaced(folder, source)
    quiet_libraries()
    share = offline.sparsify(source, folder, chosen, method, recipe, samples or _SAMPLES)  # type: ignore[arg-type]
    print(f"{folder.resolve()}: {share:.1%} of the blocks' linear weights are zero")


def _check_replaced(folder: Path, source: Path) -> None:
    """Refuse to replace anything but an older model, or what it would be made from."""
    if not folder.exists():
        return
    here, origin = folder.resolve(), model_folder(source.resolve())
    if here == origin or here in origin.parents:
        raise user_error("folder", f"{source} is read from there", "give another folder", folder)
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if inside and ("config.json" not in inside or "recipe.yaml" in inside):
        raise user_error("folder", "what is there is no model, and would be deleted", "give another folder", folder)
