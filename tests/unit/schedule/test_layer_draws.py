"""Layers of a step against the paper's formulas, and how often each of them runs."""

from __future__ import annotations

import math

import pytest

from ds_train.config.layer_drop import LayerDropSection
from ds_train.schedule.layer_drop import draw_layers, kept_share

SECTION = LayerDropSection(kind="progressive", keep=0.4, rate=20.0)


def test_theta_falls_as_in_the_paper() -> None:
    steps = 1000
    for step in (0, 1, 50, 700, 1000):
        # Equation 6 with gamma per step.
        expected = (1 - 0.4) * math.exp(-(20.0 / steps) * step) + 0.4
        assert kept_share(SECTION, step * 64, steps * 64) == pytest.approx(expected)
    assert kept_share(LayerDropSection(), 5, 10) == 1.0


def test_deeper_layers_go_more_often_and_none_at_the_start() -> None:
    first = draw_layers(SECTION, 6, 3, 0, 10**6)
    assert first.dropped == frozenset()
    assert first.kept == (1.0,) * 6
    late = 10**6
    counts = [0] * 6
    draws = 4000
    for place in range(draws):
        draw = draw_layers(SECTION, 6, 3, late + place, late)
        for layer in draw.dropped:
            counts[layer] += 1
    expected = [(layer + 1) / 6 * (1 - 0.4) for layer in range(6)]
    for layer, (count, share) in enumerate(zip(counts, expected, strict=True)):
        assert draw.kept[layer] == pytest.approx(1 - share, abs=1e-6)
        # Five standard deviations of a binomial.
        assert abs(count / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)


def test_draws_are_their_own_for_each_seed_step_and_layer() -> None:
    draws = [draw_layers(SECTION, 40, seed, tokens, 1).dropped for seed in (1, 2) for tokens in (64, 128)]
    assert len(set(draws)) == 4
    assert draw_layers(SECTION, 40, 1, 64, 1).dropped == draws[0]
