"""A trained transformers folder made smaller on one process: rounded or thinned out, with samples or without."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import transformers
from torch import Tensor

from ds_train.compress.awq import round_layer
from ds_train.compress.calibration import LayerRun, layer_by_layer
from ds_train.compress.gptq import gptq
from ds_train.compress.packed import Packing, check_loads, save
from ds_train.compress.qat import linear_names
from ds_train.compress.sparsity import Pattern, Score, thin
from ds_train.config.quantize import QuantizeSection
from ds_train.errors import first_line, user_error

Method = Literal["rtn", "gptq", "awq"]


class Rounded(NamedTuple):
    """Bytes of the weights before and after, and linear layers whose inputs `awq` has scaled."""

    before: int
    after: int
    scaled: int


def quantize_folder(
    source: Path, folder: Path, section: QuantizeSection, method: Method, batches: Sequence[Mapping[str, Tensor]] = ()
) -> Rounded:
    """Write the model in `source` with rounded weights to `folder`.

    Args:
        batches: what the model is shown for other methods than `rtn`, without labels.

    Raises:
        UserError: no model can be loaded from there, or its layers can't be rounded so.
    """
    model = _load(source)
    packing = Packing.of(section, model)
    check_loads(section, model)
    scales: dict[str, Tensor] = {}
    scaled = 0

    def by_gptq(run: LayerRun) -> None:
        for name, products in run.products().items():
            weight = run.linear[name].weight
            values, scales[name] = gptq(weight, products, packing.grid)
            weight.copy_(values)

    def by_awq(run: LayerRun) -> None:
        nonlocal scaled
        own, folded = round_layer(run, packing.grid)
        scales.update(own)
        scaled += folded

    if method != "rtn":
        layer_by_layer(model, packing.names, batches, by_gptq if method == "gptq" else by_awq)
    model.config.quantization_config = packing.config(model)
    _write(model, packing.state(model.state_dict(), scales or None), source, folder)
    return Rounded(_bytes(source), _bytes(folder), scaled)


def thin_folder(
    source: Path, folder: Path, pattern: Pattern, score: Score, batches: Sequence[Mapping[str, Tensor]] = ()
) -> float:
    """Write the model in `source` with zeros in its blocks' linear weights to `folder`; the share of zeros there.

    Args:
        batches: what the model is shown for other scores than `magnitude`, without labels.

    Raises:
        UserError: no model can be loaded from there, or the pattern doesn't fit its layers.
    """
    model = _load(source)
    linear = {f"{name}.weight" for name in linear_names(model, pattern.group)}
    if score == "magnitude":
        for name, parameter in model.named_parameters():
            if name in linear:
                parameter.data = thin(parameter.data, None, pattern, score)
    else:

        def by_score(run: LayerRun) -> None:
            for name, products in run.products().items():
                weight = run.linear[name].weight
                weight.copy_(thin(weight, products, pattern, score))

        layer_by_layer(model, frozenset(name.removesuffix(".weight") for name in linear), batches, by_score)
    _write(model, model.state_dict(), source, folder)
    weights = [parameter for name, parameter in model.named_parameters() if name in linear]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def _write(model: Any, state: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """The model's config and weights, and all else that lies in `source`."""
    written = folder.with_name(folder.name + ".partial")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    save(model, state, written)
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (written / path.name).exists():
            shutil.copy(path, written / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)


_SOURCES = "give a run's folder, or a transformers folder"


def _load(source: Path) -> Any:
    if not source.is_dir():
        raise user_error("model", "there is no such folder", _SOURCES, str(source))
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are packed integers already")
        (name,) = config.architectures or ("",)
        kind: Any = getattr(transformers, name)
        return kind.from_pretrained(source, config=config, dtype="auto").eval()
    except (OSError, ValueError, AttributeError) as error:
        reason = f"no model can be loaded from there ({first_line(error)})"
        raise user_error("model", reason, _SOURCES, str(source)) from error


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
