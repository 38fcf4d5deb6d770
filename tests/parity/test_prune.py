"""A run that prunes cuts the same units in every layout, and goes on as the smaller model would with those states.

The oracle slices the last whole checkpoint by its own arithmetic, and trains on with torch and transformers alone.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ds_train.checkpoint import offline
from ds_train.checkpoint.native import open_fragments, read_state
from ds_train.config import load
from ds_train.data.build import load_data
from ds_train.data.prepare import prepare, prepared_tokenizer

pytestmark = pytest.mark.parity

STEPS, CUT, GLOBAL, LR = 17, 7, 8, 3e-3
LAYERS, HEADS, GROUPS, HEAD, HIDDEN, FFN = 4, 8, 4, 4, 32, 64
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank": (1, {"zero_stage": 0}),
    "zero0": (2, {"zero_stage": 0}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2-offload": (2, {"zero_stage": 2, "offload_optimizer": "cpu"}),
    "zero3": (2, {"zero_stage": 3}),
    "pipeline": (2, {"pipeline": 2, "zero_stage": 1}),
    "tensor": (2, {"tensor": 2, "zero_stage": 1}),
    "tensor-zero3": (4, {"tensor": 2, "zero_stage": 3}),
    "sequence": (2, {"sequence": 2, "zero_stage": 2}),
    "pipeline-tensor": (4, {"pipeline": 2, "tensor": 2, "zero_stage": 1}),
    "tensor-then-zero3": (2, {"tensor": 2, "zero_stage": 1}),
    "pipeline-tensor-then-tensor": (4, {"pipeline": 2, "tensor": 2, "zero_stage": 1}),
}
AFTER = {"tensor-then-zero3": {"zero_stage": 3}, "pipeline-tensor-then-tensor": {"tensor": 2, "zero_stage": 2}}
"""Layouts from the cut on, where they are others."""
SAMPLE = ("zero3", "pipeline", "tensor-then-zero3")
PRUNE = {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "layers": 1, "score_steps": 2, "start": 0.2, "end": 0.4}


def write_recipe(folder: Path, root: str, layout: str, prune: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "name": layout,
        "run_root": str(folder / root),
        "model": {
            "arch": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "tie_word_embeddings": True,
        },
        "data": {
            "source": "text", "path": str(folder / "text"), "sequence_length": 32, "cache_dir": str(folder / "cache"),
            "validation_fraction": 0.1,
        },
        "batch": {"global_samples": GLOBAL, "micro_samples": 2},
        "parallel": LAYOUTS[layout][1],
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": LR},
        "schedule": {"steps": STEPS, "kind": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"every_steps": CUT, "keep_last": 10},
        "track": {"peak_tflops": 1.0, "progress": False, "eval_samples": 6},
        "compress": {"prune": prune | ({"parallel": AFTER[layout]} if layout in AFTER else {})},
    }  # fmt: skip
    path = folder / f"{root}-{layout}.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def records(folder: Path, root: str, layout: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / root / layout / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path, root: str, layout: str) -> Tensor:
    found = records(folder, root, layout, "train")
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in found], dtype=torch.float64)


def checkpoint(folder: Path, root: str, layout: str, step: int) -> Path:
    return folder / root / layout / "checkpoints" / f"step-{step:08d}"


def train(folder: Path, root: str, layouts: tuple[str, ...], prune: dict[str, Any], **changes: Any) -> None:
    for ranks in sorted({LAYOUTS[layout][0] for layout in layouts}):
        here = [layout for layout in layouts if LAYOUTS[layout][0] == ranks]
        recipes = [str(write_recipe(folder, root, layout, prune, **changes)) for layout in here]
        ended = run_ranks(ranks, ["tests/parity/counted_cuts.py", *recipes], timeout_s=900).check()
        for line in "".join(ended.outputs).splitlines():
            if line.startswith("CUT "):
                check_nothing_left(json.loads(line.removeprefix("CUT ")))


def check_nothing_left(cut: dict[str, Any]) -> None:
    """The larger model's engine is gone, with its groups' sockets and threads."""
    before, after = cut["before"], cut["after"]
    assert before["engines"] == after["engines"] == 1, cut
    for what in ("groups", "threads", "files"):
        assert after[what] <= before[what], cut


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(70):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(f"{number} squared is {number**2}. " * (1 + number % 7))
    return tmp_path


def sliced(name: str, whole: Tensor, removed: dict[str, Any], layer: int) -> Tensor:
    """What is left of a parameter of layer `layer` (or of none) of a Llama, by its name alone."""

    def stay(count: int, gone: list[int], size: int = 1) -> Tensor:
        keep = [unit for unit in range(count) if unit not in set(gone)]
        return torch.tensor([unit * size + inside for unit in keep for inside in range(size)])

    width = stay(HIDDEN, removed["hidden"]["0"])
    heads, channels = removed["heads"][str(layer)], stay(FFN, removed["ffn"][str(layer)])
    if name == "q_proj":
        return whole[stay(GROUPS, heads, HEADS // GROUPS * HEAD)][:, width]
    if name in ("k_proj", "v_proj"):
        return whole[stay(GROUPS, heads, HEAD)][:, width]
    if name == "o_proj":
        return whole[width][:, stay(GROUPS, heads, HEADS // GROUPS * HEAD)]
    if name in ("gate_proj", "up_proj"):
        return whole[channels][:, width]
    if name == "down_proj":
        return whole[width][:, channels]
    return whole[width] if whole.dim() == 1 else whole[:, width]


class Oracle:
    """A Llama of the small size, with what a whole checkpoint and the units to remove make of it, in fp64."""

    def __init__(self, path: Path) -> None:
        state = read_state(path)
        removed, files = state.pruning["removed"], open_fragments(path)
        kept = [layer for layer in range(LAYERS) if layer not in removed["layers"]["0"]]
        vocabulary = files.shapes["model.embed_tokens.weight"].whole[0]
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=HEAD, tie_word_embeddings=True, use_cache=False,
            attn_implementation="eager",
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).double()
        decayed, free = ([p for p in self.model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parts = name.split(".")
                layer = kept[int(parts[2])] if parts[1] == "layers" else 0
                origin = ".".join([*parts[:2], str(layer), *parts[3:]]) if parts[1] == "layers" else name

                def left(kind: str, parts: Any = parts, layer: int = layer, origin: str = origin) -> Tensor:
                    return sliced(parts[-2], files.whole(origin, kind).double(), removed, layer)

                parameter.copy_(left("weight"))
                moments = {kind: left(kind) for kind in ("exp_avg", "exp_avg_sq")}
                step = torch.tensor(float(state.known["optimizer_step"]))
                self.optimizer.state[parameter] = {"step": step, **moments}

    def train(self, recipe: Path, first: int) -> Tensor:
        """(loss, gradient norm) of the steps from `first`, counted from 0, on."""
        run = load(str(recipe))
        prepared = prepare(run, progress=False)
        data = load_data(
            run, folder=prepared, tokenizer=prepared_tokenizer(prepared), data_rank=0, data_ranks=1,
            micro_samples=GLOBAL, eval_micro_samples=1,
        )  # fmt: skip
        history = []
        for step in range(first, STEPS):
            (batch,) = data.train.step(step)
            logits = self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.optimizer.clip_norm)
            self.optimizer.step()
            history.append([loss.item(), norm.item()])
        return torch.tensor(history, dtype=torch.float64)


def check_against_oracle(folder: Path, layout: str) -> None:
    oracle = Oracle(checkpoint(folder, "runs", layout, CUT))
    expected = oracle.train(folder / f"runs-{layout}.yaml", CUT)
    torch.testing.assert_close(losses(folder, "runs", layout)[CUT:], expected, rtol=1e-5, atol=0)
    files = open_fragments(checkpoint(folder, "runs", layout, STEPS))
    for name, parameter in oracle.model.named_parameters():
        for kind, value in {"weight": parameter.detach(), **oracle.optimizer.state[parameter]}.items():
            if kind != "step":
                found = files.whole(name, kind).double()
                scale = float(value.abs().max())
                torch.testing.assert_close(found, value, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")
    exported = AutoModelForCausalLM.from_pretrained(folder / "runs" / layout / "export", attn_implementation="eager")
    tokens = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        found, expected = (model.double()(input_ids=tokens).logits for model in (exported, oracle.model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    offline.export(checkpoint(folder, "runs", layout, STEPS), folder / f"{layout}-offline", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(folder / f"{layout}-offline").state_dict()
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, again[name].double()), name
        if name in files.shapes:
            assert torch.equal(weight, files.whole(name).double()), name


def check_alike(folder: Path, layouts: tuple[str, ...]) -> None:
    """All cut the same units, and have the same losses; masked and cut they score alike."""
    first, *others = layouts
    (cut,) = records(folder, "runs", first, "cut")
    assert {key: cut[key] for key in PRUNE.keys() & cut.keys()} == {"heads": 2, "ffn": 32, "hidden": 24, "layers": 3}
    for layout in layouts:
        (cut,) = records(folder, "runs", layout, "cut")
        assert cut["step"] == CUT
        assert math.isclose(cut["masked_loss"], cut["loss"], rel_tol=1e-6), layout
    chosen = read_state(checkpoint(folder, "runs", first, CUT)).pruning["removed"]
    for layout in others:
        assert read_state(checkpoint(folder, "runs", layout, CUT)).pruning["removed"] == chosen, layout
        assert read_state(checkpoint(folder, "runs", layout, STEPS)).pruning["removed"] == chosen, layout
        torch.testing.assert_close(
            losses(folder, "runs", layout), losses(folder, "runs", first), rtol=1e-5, atol=0, msg=lambda m: f"{m}"
        )


def check(folder: Path, layouts: tuple[str, ...], **prune: Any) -> None:
    train(folder, "runs", layouts, PRUNE | prune)
    check_alike(folder, layouts)
    check_against_oracle(folder, layouts[0])


def test_a_sample_of_layouts_cuts_the_same_and_goes_on_as_the_small_model(folder: Path) -> None:
    check(folder, SAMPLE)


def test_gates_are_learned_alike_on_shards_of_data_and_of_heads(folder: Path) -> None:
    check(folder, ("zero3", "tensor"), score="gates", score_steps=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("score", ["taylor", "fisher", "activation", "wanda", "magnitude", "gates"])
def test_every_layout_cuts_the_same_by_every_score(folder: Path, score: str) -> None:
    check(folder, tuple(LAYOUTS), score=score)
    for layout in LAYOUTS:
        check_against_oracle(folder, layout)


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3": ({"head_dim": 8}, {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "layers": 1}),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 8}, {"heads": 0.5, "ffn": 0.5, "layers": 1}),
    "gpt_neox": ({}, {"heads": 0.5, "hidden": 0.5, "ffn": 0.5, "layers": 1}),
    "gpt2": ({}, {"heads": 0.5, "hidden": 0.5, "ffn": 0.5, "layers": 1}),
    "bert": ({}, {"heads": 0.5, "hidden": 0.5, "ffn": 0.5, "layers": 1}),
    "mixtral": ({"num_local_experts": 4}, {"heads": 0.5, "experts": 0.5, "hidden": 0.25, "layers": 1}),
}  # fmt: skip
_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "score"), [*((family, "taylor") for family in FAMILIES), ("bert", "gates"), ("mixtral", "gates")]
)
def test_every_family_cuts_the_same_in_every_layout(folder: Path, family: str, score: str) -> None:
    own, prune = FAMILIES[family]
    known = AutoConfig.for_model(family)
    sizes = {known.attribute_map.get(key, key): value for key, value in _SIZES.items()}
    sizes = {key: value for key, value in sizes.items() if key in known.to_dict()}
    plain = [key for key, value in known.to_dict().items() if isinstance(value, float) and "drop" in key]
    layouts = tuple(layout for layout in LAYOUTS if layout != "sequence" and (family != "bert" or "pipe" not in layout))
    train(
        folder, "runs", layouts, prune | {"start": 0.3, "end": 0.6, "score_steps": 2, "score": score},
        model={"arch": family} | sizes | own | dict.fromkeys(plain, 0.0), schedule={"steps": 6},
        task={"kind": "masked-lm" if family == "bert" else "causal-lm"},
    )  # fmt: skip
    chosen = None
    for layout in layouts:
        (cut,) = records(folder, "runs", layout, "cut")
        assert math.isclose(cut["masked_loss"], cut["loss"], rel_tol=1e-6), layout
        removed = read_state(checkpoint(folder, "runs", layout, 6)).pruning["removed"]
        assert removed == (chosen or removed), layout
        chosen = removed
        found = losses(folder, "runs", layout)
        torch.testing.assert_close(found, losses(folder, "runs", "one-rank"), rtol=1e-5, atol=0)


@pytest.mark.exhaustive
def test_pruning_at_once_cuts_the_same_on_any_ranks(folder: Path) -> None:
    found = {}
    for layout in ("one-rank", "zero3", "tensor", "pipeline"):
        recipe = write_recipe(folder, "once", layout, PRUNE)
        ended = run_ranks(LAYOUTS[layout][0], ["-m", "ds_train.cli", "prune", str(recipe)]).check()
        assert "(heads 2, ffn 32, hidden 24, layers 3)" in ended.outputs[0]
        exported = AutoModelForCausalLM.from_pretrained(folder / "once" / layout / "pruned")
        assert exported.config.num_hidden_layers == 3
        found[layout] = exported.state_dict()
    # A checkpoint of another model is refused, and no empty folder stays.
    train(folder, "trained", ("one-rank",), PRUNE)
    trained = ["--checkpoint", str(checkpoint(folder, "trained", "one-rank", CUT))]
    wider = [str(write_recipe(folder, "wider", "one-rank", PRUNE)), "model.intermediate_size=96", *trained]
    refused = run_ranks(1, ["-m", "ds_train.cli", "prune", *wider])
    assert "error: --checkpoint=" in refused.outputs[0]
    assert not (folder / "wider" / "one-rank").exists()
    # Nothing runs after the cut, so that what is left need not be shared by the ranks that score.
    few = [str(write_recipe(folder, "few", "tensor", {"heads": 0.75})), "compress.prune.parallel.tensor=1", *trained]
    ended = run_ranks(2, ["-m", "ds_train.cli", "prune", *few]).check()
    assert "(heads 1, layers 4)" in ended.outputs[0]
    for layout, weights in found.items():
        assert all(torch.equal(weights[name], found["one-rank"][name]) for name in weights), layout


BROKEN = (2, 5, CUT, 9)
"""Steps after which a run is broken: while scores are summed, while units close, before the cut, after it."""


def check_resume(folder: Path, layout: str, prune: dict[str, Any] = PRUNE, broken: tuple[int, ...] = BROKEN) -> None:
    often = {"every_steps": 1, "keep_last": 20, "export": True}
    train(folder, "whole", (layout,), prune, checkpoint=often)
    expected = losses(folder, "whole", layout)
    ranks, recipes = LAYOUTS[layout][0], []
    for step in broken:
        target = folder / f"broken-{step}" / layout
        source = checkpoint(folder, "whole", layout, step)
        shutil.copytree(source, target / "checkpoints" / source.name)
        shutil.copy(folder / "whole" / layout / "metrics.jsonl", target)
        recipes.append(str(write_recipe(folder, f"broken-{step}", layout, prune, checkpoint=often)))
    run_ranks(ranks, ["tests/parity/train_many.py", *recipes], timeout_s=900).check()
    weights = AutoModelForCausalLM.from_pretrained(folder / "whole" / layout / "export").state_dict()
    for step in broken:
        assert torch.equal(losses(folder, f"broken-{step}", layout), expected), step
        assert len(records(folder, f"broken-{step}", layout, "cut")) == 1, step
        again = AutoModelForCausalLM.from_pretrained(folder / f"broken-{step}" / layout / "export").state_dict()
        assert all(torch.equal(again[name], weights[name]) for name in weights), step


def test_a_run_broken_while_units_close_and_at_the_cut_prunes_to_the_same(folder: Path) -> None:
    check_resume(folder, "zero3", broken=(5, CUT))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_broken_anywhere_prunes_to_the_same(folder: Path, layout: str) -> None:
    check_resume(folder, layout)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["one-rank", "zero1", "zero3", "tensor", "pipeline", "sequence"])
def test_gates_broken_while_they_are_learned_go_on_to_the_same(folder: Path, layout: str) -> None:
    check_resume(folder, layout, PRUNE | {"score": "gates", "score_steps": 3})


_EACH = {
    "arch": "gemma3n_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "sliding_window": 8,
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("score", ["taylor", "gates"])
def test_layers_that_compete_or_have_their_own_share_keep_different_sizes(folder: Path, score: str) -> None:
    layouts = ("one-rank", "zero1", "zero2-offload", "zero3")
    timing = {"start": 0.3, "end": 0.6, "score_steps": 2, "score": score}
    whole: dict[str, Any] = {"model": _EACH, "schedule": {"steps": 6}}
    train(folder, "shares", layouts, {"ffn": [0.5, 0.0, 0.75, 0.25], "budget": "per-layer"} | timing, **whole)
    train(folder, "global", layouts, {"ffn": 0.5, "budget": "global", "multiple": 1} | timing, **whole)
    for root in ("shares", "global"):
        first = read_state(checkpoint(folder, root, "one-rank", 6)).pruning
        for layout in layouts:
            (cut,) = records(folder, root, layout, "cut")
            assert math.isclose(cut["masked_loss"], cut["loss"], rel_tol=1e-6), layout
            assert read_state(checkpoint(folder, root, layout, 6)).pruning["removed"] == first["removed"], layout
            torch.testing.assert_close(
                losses(folder, root, layout), losses(folder, root, "one-rank"), rtol=1e-5, atol=0
            )
            exported = AutoModelForCausalLM.from_pretrained(folder / root / layout / "export")
            sizes = [layer.mlp.gate_proj.out_features for layer in exported.model.layers]
            assert exported.config.intermediate_size == sizes == cut["ffn"]
        offline.export(checkpoint(folder, root, "zero3", 6), folder / f"{root}-offline", torch.float32)
        again = AutoModelForCausalLM.from_pretrained(folder / f"{root}-offline").state_dict()
        exported = AutoModelForCausalLM.from_pretrained(folder / root / "zero3" / "export").state_dict()
        assert all(torch.equal(again[name], weight) for name, weight in exported.items())
    assert records(folder, "shares", "zero3", "cut")[0]["ffn"] == [32, 64, 16, 48]
    assert sum(records(folder, "global", "zero3", "cut")[0]["ffn"]) == 4 * 32


@pytest.mark.exhaustive
def test_a_time_that_is_asked_for_is_measured_once(folder: Path) -> None:
    model = {
        "arch": "llama", "hidden_size": HIDDEN, "intermediate_size": 1024, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    }  # fmt: skip
    prune = {"ffn": 0.5, "latency": 0.7, "latency_samples": 32} | {"start": 0.2, "end": 0.4, "score_steps": 2}
    often = {"every_steps": 1, "keep_last": 20}
    recipe = write_recipe(folder, "whole", "zero3", prune, model=model, checkpoint=often)
    told = run_ranks(2, ["tests/parity/train_many.py", str(recipe)], timeout_s=900).check()
    assert "forward pass: " in told.outputs[0]
    (cut,) = records(folder, "whole", "zero3", "cut")
    assert 0 < cut["ffn"] < 1024
    for step in (1, 5):
        source = checkpoint(folder, "whole", "zero3", step)
        assert read_state(source).pruning["left"] == {"ffn": cut["ffn"]}
        root = f"broken-{step}"
        shutil.copytree(source, folder / root / "zero3" / "checkpoints" / source.name)
        recipe = write_recipe(folder, root, "zero3", prune, model=model, checkpoint=often)
        again = run_ranks(2, ["tests/parity/train_many.py", str(recipe)], timeout_s=900).check()
        assert "forward pass: " not in again.outputs[0]
        assert torch.equal(losses(folder, root, "zero3"), losses(folder, "whole", "zero3")[step:])
    once = run_ranks(
        1, ["-m", "ds_train.cli", "prune", str(write_recipe(folder, "once", "one-rank", prune, model=model))]
    )
    assert "forward pass: " in once.check().outputs[0]


@pytest.mark.exhaustive
def test_what_is_left_of_a_pretrained_model_generates_as_it_did(folder: Path) -> None:
    train(folder, "first", ("one-rank",), PRUNE)
    model = folder / "first" / "one-rank" / "export"
    GenerationConfig(do_sample=True, temperature=0.7, top_k=7, eos_token_id=[2, 5]).save_pretrained(model)
    text = {"source": "text", "path": str(folder / "text"), "cache_dir": str(folder / "cache"), "tokenizer": "model"}
    more: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": text | {"sequence_length": 32},
        "schedule": {"steps": 4},
    }
    prune = {"ffn": 0.5, "start": 0.3, "end": 0.5, "score_steps": 1}
    train(folder, "again", ("one-rank",), prune, **more)
    recipe = write_recipe(folder, "once", "one-rank", prune, **more)
    run_ranks(1, ["-m", "ds_train.cli", "prune", str(recipe)]).check()
    offline.export(checkpoint(folder, "again", "one-rank", 4), folder / "offline", torch.float32)
    for place in (
        folder / "again" / "one-rank" / "export",
        folder / "offline",
        folder / "once" / "one-rank" / "pruned",
    ):
        found = GenerationConfig.from_pretrained(place)
        assert (found.temperature, found.top_k, found.eos_token_id) == (0.7, 7, [2, 5]), place
        assert AutoConfig.from_pretrained(place).intermediate_size == 16


@pytest.mark.exhaustive
def test_a_teacher_goes_on_beside_the_labels_after_the_cut(folder: Path) -> None:
    train(folder, "plain", ("one-rank",), PRUNE)
    teacher = {"teacher": str(folder / "plain" / "one-rank" / "export"), "logits": "forward-kl", "temperature": 2.0}
    layouts = ("one-rank", "zero3", "pipeline", "tensor")
    train(folder, "taught", layouts, PRUNE, compress={"prune": PRUNE, "distill": teacher})
    expected = losses(folder, "taught", "one-rank")
    for layout in layouts[1:]:
        torch.testing.assert_close(losses(folder, "taught", layout), expected, rtol=1e-5, atol=0.0, msg=layout)
        assert records(folder, "taught", layout, "cut")[0].items() >= {"step": CUT, "layers": 3}.items(), layout
    labels_alone = losses(folder, "plain", "one-rank")
    assert ((expected - labels_alone)[:, 0].abs() > 0.01).all(), "each step's loss is also the teacher's"
