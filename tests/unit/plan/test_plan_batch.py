"""Batch arithmetic and the grid of ranks."""

from __future__ import annotations

import itertools

import pytest

from ds_train.config.batch import BatchSection
from ds_train.errors import UserError
from ds_train.plan.batch import plan_batch
from ds_train.plan.topology import Layout


@pytest.mark.parametrize("global_samples", [1, 2, 7, 12, 30, 32, 33, 64, 97])
@pytest.mark.parametrize("data_ranks", [1, 2, 3, 4])
def test_auto_takes_the_largest_divisor_of_the_share_up_to_8(global_samples: int, data_ranks: int) -> None:
    section = BatchSection(global_samples=global_samples)
    if global_samples % data_ranks:
        with pytest.raises(UserError, match=f"not a multiple of data ranks = {data_ranks}"):
            plan_batch(section, data_ranks)
        return
    plan = plan_batch(section, data_ranks)
    assert plan.micro_samples * plan.accumulation * data_ranks == plan.global_samples == global_samples
    larger = range(plan.micro_samples + 1, 9)
    assert plan.micro_samples <= 8
    assert not any((global_samples // data_ranks) % size == 0 for size in larger)
    assert plan.eval_micro_samples == plan.micro_samples


@pytest.mark.parametrize(
    ("global_samples", "stages", "micro"), [(256, 2, 8), (64, 4, 4), (16, 2, 2), (8, 4, 1), (6, 2, 1)]
)
def test_auto_leaves_a_pipeline_four_micro_batches_a_stage(global_samples: int, stages: int, micro: int) -> None:
    assert plan_batch(BatchSection(global_samples=global_samples), 1, stages).micro_samples == micro


def test_given_sizes_are_taken() -> None:
    plan = plan_batch(BatchSection(global_samples=48, micro_samples=12, eval_micro_samples=5), 2)
    assert (plan.micro_samples, plan.eval_micro_samples, plan.accumulation) == (12, 5, 2)


@pytest.mark.parametrize(
    ("global_samples", "micro", "ranks", "message"),
    [
        (
            64,
            2,
            3,
            "batch.global_samples=64: not a multiple of micro_samples x data ranks = 2 x 3 = 6. Fix: nearest: 60, 66",
        ),
        (3, 2, 2, "batch.global_samples=3: not a multiple of micro_samples x data ranks = 2 x 2 = 4. Fix: nearest: 4."),
        (10, "auto", 4, "batch.global_samples=10: not a multiple of data ranks = 4. Fix: nearest: 8, 12."),
    ],
)
def test_uneven_batches_name_the_nearest(global_samples: int, micro: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_batch(BatchSection(global_samples=global_samples, micro_samples=micro), ranks)
    assert message in str(caught.value)


def test_ranks_differ_in_tensor_first_and_in_pipe_last() -> None:
    layout = Layout(pipe=2, data=3, sequence=1, tensor=2)
    grid = list(itertools.product(range(2), range(3), range(1), range(2)))
    assert layout.ranks == len(grid) == 12
    assert [tuple(layout.coordinates(rank)) for rank in range(12)] == grid
    for rank in (-1, 12):
        with pytest.raises(ValueError, match="outside"):
            layout.coordinates(rank)


def test_ranks_and_places_are_inverse() -> None:
    layout = Layout(pipe=2, data=3, sequence=2, tensor=2)
    assert [layout.rank(layout.coordinates(rank)) for rank in range(layout.ranks)] == list(range(24))
