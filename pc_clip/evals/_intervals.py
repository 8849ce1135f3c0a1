"""Bootstrap 95 % intervals: how far a figure could have come out otherwise on other images of the same kind.

Pairs of images are not independent, because an image stands in many of them; so it is images that are
drawn again, and a pair counts as often as both its images were drawn together.
"""

from __future__ import annotations

import numpy as np

DRAWS = 1000


def of_mean(values: np.ndarray, seed: int, draws: int = DRAWS) -> tuple[float, float]:
    """The interval of a mean over independent items. values: [M], one figure an item."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)  # [draws, M]
    return _middle(weights @ values / len(values))


def of_pairs(
    values: np.ndarray, pairs: np.ndarray, seed: int, weight: np.ndarray | None = None, draws: int = DRAWS
) -> list[tuple[float, float]]:
    """The intervals of means over pairs of images, by drawing images.

    values: [P, K], K figures a pair; pairs: [P, 2] image numbers; weight: [P], how much a pair counts.
    Returns K intervals.
    """
    images, places = np.unique(pairs, return_inverse=True)
    first, second = places.reshape(pairs.shape).T  # [P] each
    weight = np.ones(len(pairs)) if weight is None else weight
    values = np.asarray(values, dtype=np.float64)
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        times = rng.multinomial(len(images), np.full(len(images), 1 / len(images)))
        counted = weight * times[first] * times[second]  # [P]
        if counted.any():
            found.append(counted @ values / counted.sum())
    return [_middle(of_one) for of_one in np.array(found).T]


def _middle(found: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
