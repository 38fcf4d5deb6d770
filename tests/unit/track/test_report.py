"""Reports: every curve that records hold, spikes included, in one page that asks nothing of the network."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_train.errors import UserError
from ds_train.track.chart import Scale, axis_scale, linear_scale, log_scale, text_of, tick_texts
from ds_train.track.grid import rank_grid
from ds_train.track.plot import new_figure, save_figure
from ds_train.track.report import _draw, page, write_pngs, write_report
from ds_train.track.runs import Run, details, read_run, told_apart
from ds_train.track.series import best_axis, panels, phase_bands, phase_means, smooth, thin

PHASE_MS = {
    "data_ms": 1.0,
    "forward_ms": 20.0,
    "backward_ms": 40.0,
    "collectives_ms": 8.0,
    "optimizer_ms": 5.0,
    "other_ms": 1.0,
}


def train(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "train", "step": step, "tokens": 64 * step, "loss": 3.0 - step / 1000, "lr": 1e-3, "grad_norm": 0.7,
        "applied": True, "tokens_per_second": 1000.0, "mfu": 0.31, "step_ms": 75.0, "save_ms": 0.5,
        "memory_mb": 512.0, "memory_peak_mb": 600.0, "host_cpu_percent": [50.0], "time": 1000.0 + step, **PHASE_MS,
    }  # fmt: skip
    return record | changes


def write(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


class Checked(HTMLParser):
    """Fails where tags don't match; collects text, classes and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.classes: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "line", "br"):
            self.open.append(tag)
        for name, value in attrs:
            self.classes += (value or "").split() if name == "class" else []
            self.addresses += [value or ""] if name in ("src", "href", "action") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag("path", attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_metrics_alone_are_enough_and_a_damaged_last_line_is_left_out(tmp_path: Path) -> None:
    run = read_run(
        write(tmp_path / "lone", [train(step) for step in range(1, 30)], '{"kind": "train", "step": 30, "lo')
    )
    assert run.last["step"] == 29
    found = Checked(page([run]))
    for words in ("lone", "Training loss", "Learning rate", "Gradient norm", "Tokens per second", "MFU", "Memory"):
        assert words in found.text
    assert "Where a step's time goes" in found.text
    assert "collectives" in found.text
    assert "Held-out loss" not in found.text


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = page([read_run(write(tmp_path / "run", [train(1), train(2)]))])
    assert Checked(text).addresses == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", text)


def test_names_and_samples_are_text_and_no_markup(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "run",
        [train(1), {"kind": "sample", "step": 1, "prompt": "<b>", "text": "</script><script>alert(1)</script>"}],
    )
    (folder / "recipe.yaml").write_text("name: '<img src=x>'\n")
    text = page([read_run(folder)])
    assert "<img" not in text
    assert "<script>alert" not in text
    assert "</script><script>alert(1)" in Checked(text).text


def test_events_of_any_kind_are_shown(tmp_path: Path) -> None:
    records = [
        train(1), {"kind": "save", "step": 1, "path": "c/step-1", "error": None}, train(2, applied=False, loss="nan"),
        {"kind": "rollback", "step": 2, "to_step": 1, "reason": "loss not finite"}, train(3),
    ]  # fmt: skip
    run = read_run(write(tmp_path / "run", records))
    assert [event["kind"] for event in run.events] == ["save", "skipped update", "loss not finite", "rollback"]
    assert details(run.events[-1]) == "to step 1, reason loss not finite"
    found = Checked(page([run]))
    assert "to step 1, reason loss not finite" in found.text
    assert found.classes.count("event") >= 3


def test_what_a_line_of_health_tells_is_told_once(tmp_path: Path) -> None:
    skipped = {"kind": "health", "event": "skipped", "step": 2, "cause": "loss", "in_a_row": 1}
    back = {"kind": "health", "event": "roll-back", "step": 1, "spike_step": 3}
    run = read_run(write(tmp_path / "run", [train(1), train(2, applied=False, loss="nan"), skipped, back]))
    assert [event["kind"] for event in run.events] == ["skipped", "roll-back"]
    assert details(run.events[0]) == "cause loss, in a row 1"
    assert "roll-back, skipped" in Checked(page([run])).text, "the legend of the markers"


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / name, [train(1)]) for folder, name in (("a", "x"), ("b", "x"), ("b", "y"))]
    runs = told_apart([read_run(path) for path in paths], paths)
    assert [run.name for run in runs] == [str(paths[0]), str(paths[1]), "y"]


def test_a_spike_survives_a_hundred_thousand_points() -> None:
    rnd = random.Random(3)
    ys = np.array([rnd.gauss(2.0, 0.1) for _ in range(100_000)])
    places = sorted(rnd.sample(range(100_000), 5))
    ys[places] = [9.0, -3.0, 8.5, 9.5, -2.0]
    xs, kept = thin(np.arange(100_000.0), ys)
    assert len(xs) <= 1000
    assert list(np.diff(xs) > 0) == [True] * (len(xs) - 1)
    assert set(np.float64(places)) <= set(xs)
    assert all(ys[int(x)] == y for x, y in zip(xs, kept, strict=True))
    assert (xs[0], xs[-1]) == (0, 99_999)


def test_smoothing_is_a_mean_that_starts_at_the_first_value() -> None:
    assert smooth(np.full(1000, 4.0)) == pytest.approx(np.full(1000, 4.0))
    ys = np.array([1.0, 3.0, 2.0])
    weights = [0.8**2, 0.8, 1.0]
    assert smooth(ys)[2] == pytest.approx(np.average(ys, weights=weights))
    assert smooth(ys)[0] == 1.0


def test_the_fall_of_a_short_run_is_no_end(tmp_path: Path) -> None:
    def run(name: str, steps: int) -> Run:
        losses = (train(step, loss=2.0 + 8.0 * 0.99**step) for step in range(1, steps + 1))
        return read_run(write(tmp_path / name, list(losses)))

    found = {panel.title: panel for panel in panels([run("long", 4000), run("short", 250), run("half", 2000)], "step")}
    ends = found["Training loss after its fall"].curves
    assert [(curve.label, curve.xs[0]) for curve in ends] == [("long", 800), ("half", 800)]
    assert max(curve.ys.max() for curve in ends) < 2.1


def test_every_further_number_has_a_panel(tmp_path: Path) -> None:
    records = [train(step, sparsity=step / 10, note="text") for step in range(1, 5)]
    records.append({"kind": "eval", "step": 4, "tokens": 256, "loss": 2.0, "accuracy": 0.5, "loss/python": 1.5})
    titles = {panel.title for panel in panels([read_run(write(tmp_path / "run", records))], "step")}
    assert {"Sparsity", "Held-out loss", "Held-out accuracy", "Held-out loss: python"} <= titles
    assert not titles & {"Note", "Applied", "Time"}


def test_runs_of_other_batches_are_compared_by_tokens(tmp_path: Path) -> None:
    one = read_run(write(tmp_path / "one", [train(step) for step in (1, 2)]))
    other = read_run(write(tmp_path / "other", [train(step, tokens=128 * step) for step in (1, 2)]))
    assert best_axis([one]) == best_axis([one, one]) == "step"
    assert best_axis([one, other]) == "tokens"
    found = Checked(page([one, other]))
    assert found.text.count("tokens") > 5
    assert "2 runs" in found.text
    assert panels([one, other], "hours")[0].curves[1].xs == pytest.approx([0.0, 1 / 3600])


def test_the_breakdown_makes_up_the_step(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", [train(step, forward_ms=20.0 + step % 2) for step in range(1, 401)]))
    means = phase_means(run)
    assert sum(means.values()) == pytest.approx(75.0 + 0.5 + 0.5, abs=0.01)
    xs, bands = phase_bands(run, "step", buckets=40)
    assert len(xs) == 40
    assert bands["forward"] == pytest.approx([20.5] * 40)
    assert "pipeline" not in bands


def test_predicted_stands_beside_measured(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [train(step) for step in range(1, 30)])
    parts = {"products": 0.05, "memory": 0.0, "tensor": 0.0, "sequence": 0.0, "pipeline": 0.0, "data": 0.004}
    plan = {
        "predicted": {"device_bytes": 500 * 2**20, "step_seconds": 0.06, "hardware": "H100",
                      "step_parts": parts | {"update": 0.005, "offload": 0.0}},
        "layout": {"pipe": 1, "data": 2, "sequence": 1, "tensor": 1}, "zero_stage": 2,
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    text = Checked(page([read_run(folder)])).text
    for words in ("× 1.20", "500 MB", "600 MB", "× 1.25", "60 ms", "75 ms", "× 2.00", "with the figures of H100"):
        assert words in text


def test_the_grid_numbers_ranks_as_the_layout_does() -> None:
    html = rank_grid({"layout": {"pipe": 2, "data": 2, "sequence": 1, "tensor": 2}, "cluster": {"ranks_per_host": 4}})
    titles = re.findall(r'title="(rank [^"]*)"[^>]*>(\d+)<', html)
    assert [int(number) for _, number in titles] == list(range(8))
    assert titles[5][0] == "rank 5: stage 1, data 0, sequence 0, tensor 1, host 1"
    assert rank_grid({}) == ""
    assert "<i" not in rank_grid({"layout": {"pipe": 8, "data": 512, "sequence": 1, "tensor": 8}})


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.9, 11.2), (1e-6, 3e-4), (5.0, 5.0), (-3.0, 7.0), (0.0, 0.0), (0.4, 0.4 + 1e-12)]
)
def test_scales_hold_their_values_between_round_ticks(low: float, high: float) -> None:
    scale = linear_scale(low, high)
    assert scale.low <= low <= high <= scale.high
    assert 2 <= len(scale.ticks) <= 12
    assert all(0 <= scale(tick) <= 1 + 1e-9 for tick in scale.ticks)
    assert len({text_of(tick) for tick in scale.ticks}) == len(scale.ticks)


@pytest.mark.parametrize("high", [1, 2, 3, 4, 7, 12, 13, 30, 99, 130, 1000])
def test_an_axis_of_steps_has_whole_ones(high: int) -> None:
    ticks = axis_scale(0.0, float(high), whole=True).ticks
    assert all(tick == int(tick) for tick in ticks)
    assert 2 <= len(ticks) <= 6
    assert axis_scale(0.0, 1.0).ticks[1] == 0.2, "hours have parts"


def test_logarithmic_scale() -> None:
    scale = log_scale(0.03, 250.0)
    assert (scale.low, scale.high) == (0.01, 1000.0)
    assert scale(1.0) == pytest.approx(0.4)


def test_numbers_for_people() -> None:
    shown = [text_of(value) for value in (6.74e9, 1_620_000, 52_400, 1234, 0.5, 2e-5, math.nan)]
    assert shown == ["6.74B", "1.62M", "52.4k", "1234", "0.5", "2e-05", "–"]
    assert (text_of(2048, "MB"), text_of(0.41, "%"), text_of(1500, "ms")) == ("2 GB", "41 %", "1.5 s")


def test_thousands_are_written_out() -> None:
    shown = [text_of(1010, "MB"), text_of(1250 * 1024, "MB"), text_of(999.7, "ms"), text_of(3.2e6, "ms")]
    assert shown == ["1010 MB", "1250 GB", "1000 ms", "3200 s"]
    assert (text_of(999_900), text_of(9999.7), text_of(1e8)) == ("1000k", "10000", "100M")


@pytest.mark.parametrize(
    ("low", "high", "unit"),
    [(1.62e6, 1.623e6, ""), (52_400, 52_480, ""), (60.0, 60.02, "MB"), (300.1, 300.9, "ms"), (0.4101, 0.4104, "%")],
)
def test_neighbours_on_an_axis_have_other_labels(low: float, high: float, unit: Any) -> None:
    scale = linear_scale(low, high)
    if unit == "MB":  # as memory of gigabytes is drawn
        scale = Scale(scale.low * 1024, scale.high * 1024, ticks=tuple(tick * 1024 for tick in scale.ticks))
    texts = tick_texts(scale, unit)
    assert len(set(texts)) == len(texts)
    values = [float(re.sub("[^0-9.]", "", text)) for text in texts]
    assert np.diff(values) == pytest.approx([values[1] - values[0]] * (len(values) - 1)), "each is exact"
    assert not any("e" in text for text in texts)


def test_pictures(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", [train(step) for step in range(1, 20)]))
    paths = write_pngs([run], tmp_path / "png")
    assert {path.name for path in paths} >= {"training-loss.png", "memory.png", "mfu.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


@pytest.mark.filterwarnings("error")
def test_pictures_have_units_and_colours_that_are_theirs(tmp_path: Path) -> None:
    names = ["名前", "x" * 200, *map(str, range(10))]
    runs = [replace(read_run(write(tmp_path / "run", [train(step) for step in (1, 2, 3)])), name=one) for one in names]
    drawn = {}
    for panel in panels(runs, "step"):
        figure = new_figure(1)
        _draw(figure.axes[0], panel, "step")
        save_figure(figure, tmp_path / "picture.png")
        drawn[panel.title] = figure.axes[0]
        assert all(len(line) <= 34 for line in figure.axes[0].get_ylabel().splitlines())
        assert all(place == int(place) for place in figure.axes[0].get_xticks()), "there is no step 1.5"
    assert drawn["Memory"].get_ylabel().endswith("(MB)")
    assert drawn["Memory"].lines[0].get_ydata() == pytest.approx([600.0] * 3)
    assert drawn["Step time"].get_ylabel() == "ms"
    labels = [text.get_text() for text in drawn["Memory"].get_legend().get_texts()]
    assert labels[0] == "名前: memory peak"
    assert len(labels) == len(names), "the dashed line of a run has no entry of its own"
    assert max(map(len, labels)) == 60
    assert len({drawn["MFU"].lines[run].get_color() for run in range(12)}) == 12


def test_headlines(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [*(train(step) for step in range(1, 60)), train(60, loss="nan")])
    assert "not finite training loss" in Checked(page([read_run(folder)])).text
    (folder / "plan.json").write_text('{"layout": {"pipe": 1, "data": 1, "sequence": 1, "tensor": 1}}')
    assert "1 rank · 60 steps" in Checked(page([read_run(folder)])).text


def test_what_cannot_be_read_or_written_is_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no step has been written yet"):
        read_run(write(tmp_path / "run", [{"kind": "resume", "step": 0}]))
    run = read_run(write(tmp_path / "good", [train(1)]))
    with pytest.raises(UserError, match="--out="):
        write_report([run], tmp_path / "good" / "metrics.jsonl" / "page.html")


def test_no_record_is_too_odd(tmp_path: Path) -> None:
    rnd = random.Random(1)
    odd = [None, "nan", "inf", "-inf", "text", 0, -1, 1e300, -1e300, 1e-300, True, [1, 2], {}, {"a": 1}, "<b>"]
    for number in range(60):
        records = []
        for step in range(1, rnd.choice([2, 3, 20])):
            record = train(step, kind=rnd.choice(["train", "train", "eval", "save", "x", "sample"]))
            for key in rnd.sample(sorted(record), 6):
                record[key] = rnd.choice(odd) if key != "kind" else record[key]
            records.append(record)
        folder = write(tmp_path / str(number), [train(1), *records])
        (folder / "plan.json").write_text(rnd.choice(["{}", "[1", '{"layout": null}', "null"]))
        run = read_run(folder)
        Checked(page([run]))
        Checked(page([run, run], "hours"))
