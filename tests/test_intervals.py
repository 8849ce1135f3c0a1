"""Intervals against what arithmetic says they must be near, and against repeating the whole experiment."""

import numpy as np
import pytest

from pc_clip.metrics import intervals


def test_the_interval_of_a_share_is_the_binomial_one():
    values = np.repeat([1.0, 0.0], [300, 100])
    low, high = intervals.of_mean(values, seed=0, draws=4000)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - error, abs=0.006) and high == pytest.approx(0.75 + error, abs=0.006)


def test_pairs_that_share_an_image_are_not_independent():
    """Half the pairs hang on one image that is always wrong: drawing pairs would hide how much that image matters."""
    others = np.arange(1, 41)
    hub = np.stack([np.zeros(40, dtype=int), others], axis=1)
    rest = np.stack([others, np.roll(others, 7)], axis=1)
    pairs, right = np.concatenate([hub, rest]), np.repeat([0.0, 1.0], 40)
    low, high = intervals.of_pairs(right[:, None], pairs)[0]
    naive_low, naive_high = intervals.of_mean(right, seed=0)
    assert high - low > 2 * (naive_high - naive_low)


def test_pairs_without_a_common_image_are_as_independent_as_anything():
    pairs = np.arange(2000).reshape(1000, 2)
    right = np.repeat([1.0, 0.0], [700, 300])
    (low, high), error = intervals.of_pairs(right[:, None], pairs)[0], 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert (low, high) == pytest.approx((0.7 - error, 0.7 + error), abs=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 worlds of 150 images, each easy or hard, and 1500 pairs that are right more often the easier both are."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        ease = rng.normal(0, 0.7, 150)
        pairs = rng.choice(150, (1500, 2))
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        right = (ease[pairs].sum(1) + rng.normal(0, 1, len(pairs)) > 0).astype(float)
        ((low, high),) = intervals.of_pairs(right[:, None], pairs)
        covered += low <= 0.5 <= high  # by symmetry the truth is one half
    assert 0.90 <= covered / 200 <= 0.99
