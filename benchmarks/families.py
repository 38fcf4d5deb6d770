"""Which causal-LM families of the installed transformers train in a pipeline, with tensor ranks, and with both.

Each family that has a pipeline or tensor plan, in transformers or in our table, is trained at tiny size for a few steps
through the whole product (weights from safetensors, real ranks) and compared with a plain PyTorch loop. The outcome is
docs/families.md. `python benchmarks/families.py FAMILY ...` tries these alone and renews their rows.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
PAGE = ROOT / "docs" / "families.md"

LAYOUTS = {
    "pipe 2": (2, {"pipeline": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "pipe 2 x tensor 2": (4, {"pipeline": 2, "tensor": 2}),
}
STEPS, GLOBAL, LENGTH, LR, CLIP = 3, 4, 32, 3e-3, 0.5
TOLERANCE = 1e-4
PATIENCE_S = 180.0
WORKS = "works"


@dataclass(frozen=True)
class Trial:
    """One family in one layout."""

    family: str
    layout: str
    recipe: Path


def families() -> list[str]:
    """Model types with a causal head and a plan of some kind."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from ds_train.plan.families import FAMILIES

    def planned(name: str) -> bool:
        # Its `get` knows only what has been loaded.
        config: Any = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401
        plans = ("base_model_pp_plan", "base_model_tp_plan")
        return config is not None and (name in FAMILIES or any(getattr(config, plan, None) for plan in plans))

    return sorted(filter(planned, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def make_trials(folder: Path, family: str) -> tuple[list[Trial], list[float]]:
    """Weights and recipes of a family, and the losses of the plain loop.

    Raises:
        Exception: the family can't be made small, or not be trained by a plain loop either.
    """
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_train.config import load
    from ds_train.errors import UserError
    from ds_train.models.look_alike import look_alike
    from ds_train.models.packing import check_packing

    config = look_alike(AutoConfig.for_model(family), 4)
    config.use_cache = False
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = folder / family / "weights"
    model.save_pretrained(weights)
    try:
        check_packing(model.eval(), config.get_text_config().vocab_size, family)
        packing = True
    except UserError:
        packing = False
    trials = []
    for layout, (_, parallel) in LAYOUTS.items():
        name = layout.replace(" ", "")
        recipe = {
            "name": name,
            "run_root": str(folder / family),
            "model": {"path": str(weights)},
            "data": {
                "source": "text", "path": str(folder / "text"), "tokenizer": "bytes", "sequence_length": LENGTH,
                "packing": packing, "validation_fraction": 0.0, "cache_dir": str(folder / "cache"),
            },
            "batch": {"global_samples": GLOBAL, "micro_samples": 1},
            "parallel": parallel,
            "precision": {"dtype": "fp32"},
            "optimizer": {"lr": LR, "clip_norm": CLIP, "weight_decay": 0.0},
            "schedule": {"steps": STEPS, "kind": "constant", "warmup_fraction": 0.0},
            "checkpoint": {"save_final": False, "export": False},
            "track": {"peak_tflops": 1.0, "progress": False},
        }  # fmt: skip
        path = folder / family / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        trials.append(Trial(family, layout, path))
    return trials, plain_losses(load(str(trials[0].recipe)))


def plain_losses(run: Any) -> list[float]:
    """Losses of a plain loop over the recipe's global batches, by torch and transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from ds_train.data.build import load_data
    from ds_train.data.prepare import prepare, prepared_tokenizer

    prepared = prepare(run, progress=False)
    data = load_data(
        run, folder=prepared, tokenizer=prepared_tokenizer(prepared), data_rank=0, data_ranks=1, micro_samples=1,
        eval_micro_samples=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batches = data.train.step(step)
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            wanted = batch.pop("labels").flatten()
            logits = model(**batch).logits.flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def verdict(trial: Trial, expected: list[float]) -> str:
    """`works` if the run's losses are the plain loop's; what differs otherwise."""
    metrics = trial.recipe.parent / trial.recipe.stem / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    for step, (loss, wanted) in enumerate(zip(losses, expected, strict=True), 1):
        if not math.isclose(loss, wanted, rel_tol=TOLERANCE):
            return f"WRONG LOSS: {loss:.6f} instead of {wanted:.6f} at step {step}"
    return WORKS


def worker(answers: Path, recipes: list[str]) -> int:
    """Train recipes one after the other on this rank; rank 0 writes a line per recipe: its name and a reason or ''."""
    from ds_train.config import load
    from ds_train.engine import job, ranks
    from ds_train.errors import UserError, first_line

    def body(info: ranks.RankInfo) -> None:
        for recipe in recipes:
            reason = ""
            try:
                job.train(load(recipe), info)
            except UserError as error:
                reason = error.problems[0].reason
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
            with answers.with_name(f"{answers.name}.{info.rank}").open("a") as file:
                file.write(json.dumps([recipe, reason]) + "\n")

    return ranks.run_to_exit_code(body)


def run_trials(folder: Path, ranks: int, trials: list[Trial]) -> dict[str, str]:
    """Reason by recipe, '' where it ran. Ranks that hang or die are replaced, and go on behind that trial."""
    from ranks import start_ranks, stop

    reasons: dict[str, str] = {}
    answers = folder / f"answers{ranks}"
    waiting = [str(trial.recipe) for trial in trials]
    while waiting:
        processes = start_ranks(ranks, [str(Path(__file__)), "--worker", str(answers), *waiting], logs=folder)
        try:
            seen, since = len(reasons), time.monotonic()
            while any(process.poll() is None for process in processes):
                time.sleep(0.2)
                reasons = read_answers(answers, ranks)
                if len(reasons) > seen:
                    seen, since = len(reasons), time.monotonic()
                if time.monotonic() - since > PATIENCE_S or any(process.poll() for process in processes):
                    break
        finally:
            stop(processes)
        reasons = read_answers(answers, ranks)
        waiting = [recipe for recipe in waiting if recipe not in reasons]
        if waiting:
            with answers.with_name(f"{answers.name}.0").open("a") as file:
                file.write(json.dumps([waiting.pop(0), "its ranks died or waited for one another"]) + "\n")
    return read_answers(answers, ranks)


def read_answers(answers: Path, ranks: int) -> dict[str, str]:
    """What the ranks have said of each recipe; of several reasons the first rank's."""
    found: dict[str, str] = {}
    for rank in reversed(range(ranks)):
        file = answers.with_name(f"{answers.name}.{rank}")
        lines = file.read_text().splitlines() if file.exists() else []
        said = dict(json.loads(line) for line in lines)
        found |= {recipe: reason for recipe, reason in said.items() if reason or rank == 0}
    return found


def read_page() -> dict[str, dict[str, str]]:
    """The outcome that the page shows; empty where there is none."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines if line.startswith("| ")]
    return {family: dict(zip(LAYOUTS, answers, strict=True)) for family, *answers in rows[1:]}


def write_page(outcome: dict[str, dict[str, str]]) -> None:
    """docs/families.md: the counts and a row per family."""
    from importlib.metadata import version

    counts = Counter(layout for row in outcome.values() for layout, answer in row.items() if answer == WORKS)
    versions = " and ".join(f"{name} {version(name)}" for name in ("transformers", "deepspeed"))
    lines = [
        "# Model families in pipelines and tensor parallelism",
        "",
        f"Written by `make families` with {versions}:",
        "every causal-LM family that has a pipeline or tensor plan, at tiny size, trained on CPU ranks and compared",
        f"with a plain PyTorch loop ({STEPS} steps, fp32, relative {TOLERANCE:g}). Where it doesn't work the row says",
        "why: refused before training, failed, or no small model of the family could be made to try.",
        "",
        "Works: " + ", ".join(f"{layout}: **{counts[layout]}** of {len(outcome)}" for layout in LAYOUTS) + ".",
        "",
        "| family | " + " | ".join(LAYOUTS) + " |",
        "|---|" + "---|" * len(LAYOUTS),
    ]  # fmt: skip
    for family, row in sorted(outcome.items()):
        cells = [re.sub(r"(?<!\\)\|", r"\|", row[layout].replace("\n", " ")) for layout in LAYOUTS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")


def main(wanted: list[str]) -> int:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcome: dict[str, dict[str, str]] = {}
    losses: dict[str, list[float]] = {}
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for number in range(30):
            (folder / "text" / f"{number}.txt").write_text(f"{number} squared is {number**2}. " * (1 + number % 4))
        for family in wanted or families():
            try:
                made, losses[family] = make_trials(folder, family)
                trials += made
                outcome[family] = {}
            except Exception as error:
                reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
                outcome[family] = dict.fromkeys(LAYOUTS, f"no small model of it trains: {reason}")
        for ranks in sorted({ranks for ranks, _ in LAYOUTS.values()}):
            here = [trial for trial in trials if LAYOUTS[trial.layout][0] == ranks]
            reasons = run_trials(folder, ranks, here)
            for trial in here:
                reason = reasons[str(trial.recipe)]
                outcome[trial.family][trial.layout] = reason or verdict(trial, losses[trial.family])
    for family, row in outcome.items():
        print(family, row, flush=True)
    write_page(read_page() | outcome if wanted else outcome)
    return int(any("WRONG" in answer for row in outcome.values() for answer in row.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
