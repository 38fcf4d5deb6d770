"""Where the tests of faults have their recipes and runs, and how they start and strike them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ranks import Ended, run_ranks

STRUCK = Path(__file__).with_name("struck.py")

Act = dict[str, Any]


def act(rank: int, at: str, do: str = "SIGKILL", when: str = "before", call: int = 1, delay: float = 0.0) -> Act:
    """What strikes `rank` before, during (`delay` seconds later) or after call number `call` of the function `at`: a
    signal, `hang`, or `spoil` a weight of what the function gave."""
    return {"rank": rank, "at": at, "do": do, "when": when, "call": call, "delay": delay}


class Place:
    """A folder with a text and a token cache, where recipes and their runs lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text").mkdir()
        for number in range(70):
            (folder / "text" / f"{number:02d}.txt").write_text(f"{number} squared is {number**2}. " * (1 + number % 7))

    def recipe(self, name: str, steps: int, parallel: dict[str, Any], dtype: str = "fp32", **sections: Any) -> Path:
        """A recipe with all that must go on: dropout, packing, a curriculum, a learning rate that changes."""
        recipe: dict[str, Any] = {
            "name": name,
            "seed": 4,
            "run_root": str(self.folder / "runs"),
            "model": {"arch": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.2},
            "data": {
                "source": "text", "path": str(self.folder / "text"), "sequence_length": 32,
                "cache_dir": str(self.folder / "cache"),
            },
            "batch": {"global_samples": 8, "micro_samples": 2},
            "curriculum": {"kind": "linear", "start_length": 16, "fraction": 0.5},
            "parallel": parallel,
            "precision": {"dtype": dtype},
            "optimizer": {"lr": 1e-2},
            "schedule": {"steps": steps, "kind": "wsd"},
            "checkpoint": {"every_steps": 2, "keep_last": 3, "export": False},
            "track": {"peak_tflops": 1.0, "eval_every_steps": 3, "eval_samples": 6, "progress": False},
        }  # fmt: skip
        for key, section in sections.items():
            recipe[key] = {**recipe.get(key, {}), **section}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def train(
        self, recipe: Path, acts: Sequence[Act] = (), settle_s: float = 20, ordinary: bool = False,
        own_overrides: Mapping[int, list[str]] | None = None,
    ) -> Ended:  # fmt: skip
        """Train `recipe` by two ranks; after one has ended badly, the other gets `settle_s`.

        Args:
            ordinary: they ask for the modes of files, as root doesn't.
            own_overrides: overrides of single ranks.
        """
        launch = {
            "recipe": str(recipe), "acts": list(acts), "ordinary": ordinary, "own_overrides": dict(own_overrides or {}),
        }  # fmt: skip
        return run_ranks(2, [str(STRUCK), json.dumps(launch)], settle_s=settle_s)

    def run(self, name: str) -> Path:
        """The run's folder."""
        return self.folder / "runs" / name

    def records(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """Lines of the run's metrics."""
        lines = (self.run(name) / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if not kinds or record["kind"] in kinds]

    def history(self, name: str) -> list[tuple[Any, ...]]:
        """What two runs that are the same have written: each step and evaluation, to the last bit."""
        keys = ("kind", "step", "loss", "grad_norm", "lr", "tokens", "samples", "accuracy")
        return [tuple(record.get(key) for key in keys) for record in self.records(name, "train", "eval")]

    def steps(self, name: str) -> list[int]:
        """Steps of the run's checkpoints."""
        return sorted(int(path.name[5:]) for path in (self.run(name) / "checkpoints").glob("step-????????"))
