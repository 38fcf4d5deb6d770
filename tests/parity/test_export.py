"""A model that came from a transformers folder leaves as one, bit by bit, from any layout and from any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from plain_loop import write_corpus, write_recipe, write_weights
from ranks import Ended, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_train.checkpoint import native
from ds_train.checkpoint.manifest import damage

pytestmark = pytest.mark.parity

CASES = {
    "llama-zero3": ("llama", {"zero_stage": 3}),
    "gpt2-pipeline": ("gpt2", {"pipeline": 2}),
    "gpt_neox-tensor": ("gpt_neox", {"tensor": 2}),
    # Its files have a matrix for each expert, the model one for all.
    "mixtral-zero2": ("mixtral", {"zero_stage": 2}),
    "mixtral-tensor": ("mixtral", {"tensor": 2, "zero_stage": 1}),
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), "no weight is written twice"
        found |= tensors
    return found


def same(folder: Path, original: Path) -> None:
    """The files hold the same bits under the same names, and transformers computes the same."""
    expected, found = weights_of(original), weights_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    tokens = torch.arange(60).view(2, 30) * 7 % 300
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (folder, original))
    assert torch.equal(one, other)


def command(*words: str) -> Ended:
    return run_ranks(1, ["-m", "ds_train.cli", *words])


def test_what_came_in_goes_out(tmp_path: Path) -> None:
    corpus, recipes = write_corpus(tmp_path / "corpus"), []
    for name, (family, parallel) in CASES.items():
        if not (tmp_path / family).exists():
            write_weights(tmp_path / family, family)
        recipes.append(str(write_recipe(tmp_path, name, corpus, tmp_path / family, family, parallel)))
    run_ranks(2, ["tests/parity/round_trip.py", *recipes], timeout_s=400).check()
    for name, (family, _) in CASES.items():
        folder = tmp_path / "runs" / name / "export"
        same(folder, tmp_path / family)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(weights_of(tmp_path / family))
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights_of(folder).values())
        assert ModelCard.load(folder / "README.md").data.library_name == "transformers"
        assert AutoTokenizer.from_pretrained(folder).decode([104, 105]) == "hi"

    checkpoint = tmp_path / "runs" / "mixtral-tensor" / "checkpoints" / "step-00000000"
    moved = tmp_path / "moved"
    command("reshard", str(checkpoint), str(moved), "--file-gb", "0.001").check()
    assert damage(moved) is None
    one, other = native.open_fragments(checkpoint), native.open_fragments(moved)
    assert all(torch.equal(one.whole(name), other.whole(name)) for name in one.shapes)
    command("export", str(moved), str(tmp_path / "offline"), "--dtype", "fp32").check()
    same(tmp_path / "offline", tmp_path / "mixtral")

    (moved / "state.json").unlink()
    refused = command("export", str(moved), str(tmp_path / "nowhere"))
    assert refused.codes == [2]
    assert "state.json is missing" in refused.outputs[0]
    assert not (tmp_path / "nowhere").exists()
