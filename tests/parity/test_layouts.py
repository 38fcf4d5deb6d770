"""Every layout gives the losses and gradient norms of a plain loop, for every family of the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from plain_loop import FAMILIES, MASKED, history_of, plain_loop, write_corpus, write_recipe, write_weights
from ranks import run_ranks

pytestmark = pytest.mark.parity


class Degrees(NamedTuple):
    """What a recipe says of its layout."""

    pipeline: int
    tensor: int
    sequence: int
    zero_stage: int

    @property
    def name(self) -> str:
        """For a run's folder."""
        return "p{}t{}s{}z{}".format(*self)


# Families whose two key-value heads can't be shared by more than two ranks, and one without torch's own attention.
FOUR_GROUPS = ("gpt_neox", "phi", "gpt2")
EAGER = ("gemma2",)

SAMPLE = {
    2: {
        "olmo2": Degrees(2, 1, 1, 0), "starcoder2": Degrees(1, 2, 1, 0), "gpt_neox": Degrees(1, 1, 2, 1),
        "qwen2": Degrees(1, 2, 1, 2),
    },
    4: {
        "gpt2": Degrees(4, 1, 1, 1), "qwen3": Degrees(1, 2, 1, 3),
        "phi": Degrees(1, 2, 2, 2), "mistral": Degrees(1, 1, 2, 3), "gemma2": Degrees(2, 1, 1, 1),
        "bert": Degrees(1, 2, 1, 1),
    },
    8: {"llama": Degrees(2, 2, 1, 1)},
}  # fmt: skip


def legal(ranks: int, family: str) -> Iterator[Degrees]:
    """Every layout of `ranks` ranks that the family can have; a pipeline always runs ZeRO-1."""
    for pipeline in (1, 2, 4):
        for tensor in (1, 2):
            for sequence in (1, 2):
                fits = ranks % (pipeline * tensor * sequence) == 0 and 1 in (pipeline, sequence)
                shared = sequence == 1 or (
                    family not in EAGER + MASKED and (tensor == 1 or family in FOUR_GROUPS)
                )  # fmt: skip
                if fits and shared and (pipeline == 1 or family not in MASKED):
                    for stage in (0, 1, 2, 3) if pipeline == 1 else (1,):
                        yield Degrees(pipeline, tensor, sequence, stage)


def check(folder: Path, ranks: int, wanted: list[tuple[str, Degrees]]) -> None:
    """Train each family in its layout, in one launch, and compare with a plain loop."""
    corpus = write_corpus(folder / "corpus")
    names: dict[str, str] = {}
    recipes: dict[str, Path] = {}
    references: dict[str, list[tuple[float, float]]] = {}
    for family, degrees in wanted:
        name = f"{family}-{degrees.name}"
        if family not in references:
            weights = write_weights(folder / family, family)
        recipes[name] = write_recipe(folder, name, corpus, weights, family, degrees._asdict())
        names[name] = family
        if family not in references:
            references[family] = plain_loop(recipes[name])
            assert references[family][0][0] > 1.1 * references[family][-1][0], f"{family} learns nothing to compare"
    run_ranks(ranks, ["tests/parity/train_many.py", *map(str, recipes.values())], timeout_s=3000).check()
    for name, family in names.items():
        np.testing.assert_allclose(history_of(folder, name), references[family], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("ranks", list(SAMPLE))
def test_a_sample_of_layouts_equals_a_plain_loop(ranks: int, tmp_path: Path) -> None:
    check(tmp_path, ranks, list(SAMPLE[ranks].items()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_layout_equals_a_plain_loop(ranks: int, family: str, tmp_path: Path) -> None:
    check(tmp_path, ranks, [(family, degrees) for degrees in legal(ranks, family)])
