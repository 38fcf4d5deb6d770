"""The pictures of docs/tracking.md: a run's report in Chromium, light, dark and on a phone.

    make train && python benchmarks/report_pictures.py runs/quickstart [RUN ...]

The first run is shown alone, light and on a phone; all of them together are shown dark.
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ds_train.track.report import page
from ds_train.track.runs import read_run

DOCS = Path(__file__).resolve().parents[1] / "docs" / "images"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
DARK, LIGHT = 0, 1
COLORS = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = [read_run(path) for path in parser.parse_args().runs]
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("error: there is no Chromium; apt-get install chromium", file=sys.stderr)
        return 2
    DOCS.mkdir(exist_ok=True)
    alone = page(runs[:1])
    phone = f'<body style="margin:0"><iframe style="width:390px;height:1500px;border:0" srcdoc="{html.escape(alone)}">'
    shoot(chromium, alone, "report-light", (1180, 1960), LIGHT)
    shoot(chromium, page(runs), "report-dark", (1180, 1500), DARK)
    shoot(chromium, phone, "report-phone", (500, 1500), LIGHT, crop=390)
    return 0


def shoot(chromium: str, text: str, name: str, size: tuple[int, int], scheme: int, crop: int | None = None) -> None:
    """Draw `text` in a window of `size` into docs/images, in few colours, as wide as `crop`."""
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        source.write_text(text, encoding="utf-8")
        window = f"--window-size={size[0]},{size[1]}"
        chosen = f"--blink-settings=preferredColorScheme={scheme}"
        profile = f"--user-data-dir={folder}/profile"
        command = [chromium, *FLAGS, window, chosen, profile, f"--screenshot={shot}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(shot).convert("RGB").crop((0, 0, crop or size[0], size[1]))
        picture.quantize(COLORS).save(DOCS / f"{name}.png", optimize=True)
    print(DOCS / f"{name}.png")


if __name__ == "__main__":
    raise SystemExit(main())
