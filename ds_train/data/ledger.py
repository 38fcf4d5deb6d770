"""Which documents a step trained on: a function of the recipe, the prepared data and the step, on any later day.

RUN/data.json says which prepared data a run reads, and what its roll-backs have left out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ds_train.config import RunConfig, load
from ds_train.data.order import Order
from ds_train.data.prepare import MANIFEST, read_manifest
from ds_train.data.samples import MaskedSamples, Samples
from ds_train.errors import user_error
from ds_train.schedule.timeline import Skip, StepShape, make_timeline

RECORD = "data.json"


@dataclass(frozen=True)
class Portion:
    """A part of a document in a sample: tokens `start` to `stop` - 1 of it.

    `sample` counts along the run. `source` is a file, `file:line` or `id:row`; `sha256` is `TokenFile.sha256`.
    """

    sample: int
    document: int
    source: str
    start: int
    stop: int
    sha256: str


def portions_of(samples: Samples | MaskedSamples, order: Order, shape: StepShape, slot: int) -> Iterator[Portion]:
    """What sample number `slot` of the run is made of, in order; it is one of a step of that shape."""
    place, part = divmod(int(slot), shape.parts)
    first, file, passed = part * shape.length, samples.file, 0
    for document, low, high in samples.documents_of(int(order.index(place))):
        start = low + max(0, first - passed)
        stop = min(high, low + first + shape.length - passed)
        passed += high - low
        if start < stop:
            yield Portion(int(slot), document, file.source(document), start, stop, file.sha256(document))


def data_record(folder: Path, skips: Sequence[Skip]) -> dict[str, Any]:
    """What RUN/data.json holds. `folder` is the prepared data."""
    content = read_manifest(folder)["content"]
    return {"prepared": str(folder.resolve()), "content": content, "skips": [asdict(skip) for skip in skips]}


def explain_step(run_folder: Path, step: int, rollbacks: int | None = None) -> dict[str, Any]:
    """What step `step` of a run, counted from 1, trained on: clock, shape, and a `Portion` of each document.

    Args:
        rollbacks: as the run was after so many roll-backs; None is after all of them.

    Raises:
        UserError: no run in that folder, a step that it doesn't have, or prepared data that is gone or has changed.
    """
    from ds_train.data.build import open_samples

    record = _record(run_folder)
    run = load(run_folder / "recipe.yaml")
    samples = open_samples(run, _prepared(run, record), "train")
    if samples is None:
        raise user_error(str(run_folder), "its prepared data has no training tokens")
    timeline = make_timeline(run, len(samples))
    if not 1 <= step <= timeline.steps:
        raise user_error("step", "the run has no such step", f"1 to {timeline.steps}", step)
    skips = tuple(Skip(**skip) for skip in record["skips"])
    shape = replace(timeline, skips=skips if rollbacks is None else skips[:rollbacks]).at(step - 1)
    order = Order(len(samples), run.seed)
    slots = range(shape.first, shape.first + shape.samples)
    portions = [portion for slot in slots for portion in portions_of(samples, order, shape, slot)]
    return {
        "step": step,
        "tokens_before": shape.before,
        "tokens_after": shape.after,
        "samples": shape.samples,
        "sequence_length": shape.length,
        "patch": shape.patch,
        "epoch": shape.first // shape.parts // len(samples),
        "documents": [asdict(portion) for portion in portions],
    }


def _record(run_folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = f"{run_folder / RECORD} is missing or damaged"
        raise user_error("RUN", reason, "give the folder of a run: run_root/name", str(run_folder)) from error


def _prepared(run: RunConfig, record: dict[str, Any]) -> Path:
    """The run's prepared data: where it was, or wherever its cache has the same tokens now."""
    cache = Path(run.data.cache_dir).expanduser()
    for folder in [Path(record["prepared"]), *sorted(path.parent for path in cache.glob(f"*/{MANIFEST}"))]:
        if (folder / MANIFEST).is_file() and read_manifest(folder)["content"] == record["content"]:
            return folder
    reason = f"the run's prepared data is neither in {record['prepared']} nor in another folder of the cache"
    raise user_error("data.cache_dir", reason, "restore it, or the source files and run `ds-train prepare`", str(cache))
