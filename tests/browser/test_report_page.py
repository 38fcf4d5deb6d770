"""The report in a real browser without a network: no script error, hover, dark and light, and a phone's width."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ds_train.track.report import page
from ds_train.track.runs import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
)  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => {
  const area = document.querySelector("#chart0 .area"), box = area.getBoundingClientRect();
  const at = {clientX: box.left + box.width / 2, clientY: box.top + 9, bubbles: true};
  area.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.querySelector(".tip");
  const found = {errors, tip: tip && tip.innerText, crosses: 0, wide: [], left: [], below: []};
  const held = tip && tip.getBoundingClientRect();
  found.beside = !held || held.left < 0 || held.right > document.documentElement.clientWidth;
  const crosses = [...document.querySelectorAll(".cross")];
  found.crosses = crosses.filter((cross) => getComputedStyle(cross).display === "block").length;
  area.dispatchEvent(new PointerEvent("pointerleave", at));
  found.gone = !document.querySelector(".tip");
  const width = document.documentElement.clientWidth, legend = document.querySelector(".legend");
  found.legend = legend ? legend.getBoundingClientRect().height / innerHeight : 0;
  document.querySelectorAll("main *").forEach((node) => {
    const beyond = node.getBoundingClientRect().right > width + 1;
    if (beyond && !node.closest(".wide")) found.wide.push(node.className || node.tagName);
  });
  document.querySelectorAll(".left, .below").forEach((axis) => {
    const boxes = [...axis.children].map((label) => label.getBoundingClientRect());
    const across = axis.className === "below";
    boxes.sort((a, b) => across ? a.left - b.left : a.top - b.top);
    boxes.slice(1).forEach((b, i) => {
      if (across ? b.left < boxes[i].right : b.top < boxes[i].bottom) found[axis.className].push(i);
    });
  });
  found.width = width;
  found.sent = performance.getEntriesByType("resource").length;
  (parent.document || document).body.setAttribute("data-found", JSON.stringify(found));
});
</script>"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    records = []
    for step in range(1, 2001):
        loss = 2.25 + 8.0 * 0.99**step + (3.0 if step == 700 else 0.0)
        record = {
            "kind": "train", "step": step, "tokens": 524288 * step, "loss": loss, "lr": 3e-4, "grad_norm": 0.4,
            "tokens_per_second": 1.62e6, "mfu": 0.41, "step_ms": 300.0, "data_ms": 5.0, "forward_ms": 80.0,
            "backward_ms": 160.0, "collectives_ms": 40.0, "optimizer_ms": 15.0, "memory_mb": 51200.0,
            "memory_peak_mb": 61440.0 + step / 10, "imbalance": 1.02,
        }  # fmt: skip
        records.append(record)
        if step % 500 == 0:
            records.append(
                {"kind": "save", "step": step, "path": "/a/rather/long/path/to/checkpoints/step-" + "0" * 40}
            )
            records.append({"kind": "eval", "step": step, "tokens": 524288 * step, "loss": loss, "accuracy": 0.4})
    records.append({"kind": "rollback", "step": 900, "to_step": 800, "reason": "loss not finite"})
    folder = tmp_path / "a-run-with-quite-a-long-name-for-a-phone"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = {"layout": {"pipe": 4, "data": 4, "sequence": 1, "tensor": 4}, "cluster": {"ranks_per_host": 8}}
    (folder / "plan.json").write_text(json.dumps(plan))
    return page([read_run(folder)])


def browse(folder: Path, content: str, *flags: str) -> str:
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(content)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def found_by(folder: Path, content: str, *flags: str) -> dict[str, object]:
    dom = browse(folder, content, "--dump-dom", *flags)
    return json.loads(html.unescape(dom.split('data-found="')[1].split('"')[0]))


def check(found: dict[str, object]) -> None:
    assert found["errors"] == []
    assert found["sent"] == 0
    tip = " ".join(str(found["tip"]).split())
    assert not found["beside"]
    assert "step 1000" in tip
    assert "a-run-with-quite-a-long-name-for-a-phone 2.25" in tip
    assert int(str(found["crosses"])) >= 8
    assert found["gone"]
    assert found["wide"] == []
    assert (found["left"], found["below"]) == ([], [])


def test_a_wide_screen(tmp_path: Path, text: str) -> None:
    check(found_by(tmp_path, text.replace("<head>", "<head>" + PROBE), "--window-size=1280,900"))


def on_a_phone(folder: Path, text: str) -> dict[str, object]:
    inner = html.escape(text.replace("<head>", "<head>" + PROBE))
    frame = f'<body><iframe style="width:360px;height:740px;border:0" srcdoc="{inner}"></iframe></body>'
    found = found_by(folder, frame, "--window-size=800,900")
    assert found["width"] == 360
    return found


def test_a_phone(tmp_path: Path, text: str) -> None:
    check(on_a_phone(tmp_path, text))


def test_many_runs_of_long_names_and_other_lengths_on_a_phone(tmp_path: Path) -> None:
    runs = []
    for place, name in enumerate(["x" * 200, *(f"a-run-with-a-long-name-of-seed-{seed}" for seed in range(11))]):
        folder = tmp_path / f"{place}"
        folder.mkdir()
        records = [{"kind": "train", "step": step, "tokens": step, "loss": 1.0} for step in range(1, 50 + 10 * place)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "recipe.yaml").write_text(f"name: {name}\n")
        runs.append(read_run(folder))
    found = on_a_phone(tmp_path, page(runs))
    tip = str(found["tip"])
    assert "step 80" in tip
    assert "seed-10" in tip
    assert "x" * 200 not in tip, "that run had ended by then"
    assert not found["beside"]
    assert found["wide"] == []
    assert float(str(found["legend"])) < 0.35, "it stays in sight, and leaves room for what it explains"


def test_light_and_dark(tmp_path: Path, text: str) -> None:
    corner = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        browse(
            tmp_path,
            text,
            f"--screenshot={shot}",
            "--window-size=800,600",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        corner[name] = sum(Image.open(shot).convert("RGB").getpixel((3, 3)))  # type: ignore[arg-type]
    assert corner["dark"] < 150
    assert corner["light"] > 700
