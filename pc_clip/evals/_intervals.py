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


def of_pairs(values: np.ndarray, pairs: np.ndarray, seed: int, draws: int = DRAWS) -> tuple[float, float]:
    """The interval of a mean over pairs of images, by drawing images. values: [P], pairs: [P, 2] image numbers."""
    values = np.asarray(values, dtype=np.float64)
    images, places = np.unique(pairs, return_inverse=True)
    first, second = places.reshape(pairs.shape).T  # [P] each
    rng, found = np.random.default_rng(seed), np.empty(draws)
    for n in range(draws):
        times = rng.multinomial(len(images), np.full(len(images), 1 / len(images)))
        weight = times[first] * times[second]
        found[n] = (weight @ values) / weight.sum() if weight.any() else np.nan
    return _middle(found[~np.isnan(found)]) if not np.isnan(found).all() else (float("nan"), float("nan"))


def _middle(found: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
