"""How the layers of a model are dealt out to pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def balance(layer_costs: Sequence[float], last_cost: float, stages: int) -> list[int]:
    """Layers of each stage such that the most expensive stage is as cheap as can be; `last_cost` is the last one's own.

    Contiguous partition by dynamic programming; every stage gets at least one layer. Ties favour early stages.
    """
    count = len(layer_costs)
    sums = [0.0]
    for cost in layer_costs:
        sums.append(sums[-1] + cost)
    # worst[k][n]: the most expensive of the first k stages over the first n layers; split[k][n]: where stage k starts.
    worst = [[0.0 if n == 0 else float("inf") for n in range(count + 1)]]
    split: list[list[int]] = [[0] * (count + 1)]
    for stage in range(1, stages + 1):
        own = last_cost if stage == stages else 0.0
        row, starts = [float("inf")] * (count + 1), [0] * (count + 1)
        for stop in range(stage, count + 1):
            for start in range(stop - 1, stage - 2, -1):
                here = sums[stop] - sums[start] + own
                if here > row[stop]:
                    break
                value = max(worst[stage - 1][start], here)
                if value <= row[stop]:
                    row[stop], starts[stop] = value, start
        worst.append(row)
        split.append(starts)
    sizes, stop = [], count
    for stage in range(stages, 0, -1):
        start = split[stage][stop]
        sizes.append(stop - start)
        stop = start
    return sizes[::-1]


def stage_bounds(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first layer, one past the last) of each stage."""
    first = 0
    for size in sizes:
        yield first, first + size
        first += size
