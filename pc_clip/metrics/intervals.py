"""95 % intervals of figures, over the images of a data set.

Over independent items: a percentile bootstrap. Over items in groups, as several statements about one photograph: a
percentile bootstrap that draws groups, each with all its items. Over pairs of images: an image stands in many pairs,
so that pairs are not independent, and drawing images again counts each pair's own noise three times. Their interval
comes from the cluster-robust variance for dyads instead (Aronow, Samii and Assenova, Political Analysis 2015).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pc_clip.core.random import stream

DRAWS = 1000
FEWEST = 20  # images below which nothing is called significant: drawn again, so few cover 95 % far too seldom


def of_mean(values: np.ndarray, seed: int, draws: int = DRAWS) -> tuple[float, float]:
    """The bootstrap interval of a mean over independent items. values: [M], one figure an item."""
    values = np.asarray(values, dtype=np.float64)
    rng, share = stream(seed, "bootstrap"), np.full(len(values), 1 / len(values))
    means = [rng.multinomial(len(values), share) @ values / len(values) for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def redrawn_sums(values: np.ndarray, group: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Sums over groups drawn again with replacement, each with all its items.  [M, K], [M] -> [draws, K] float64

    All columns see the same draws, so that the difference of two of them is paired.
    """
    groups, place = np.unique(group, return_inverse=True)
    sums = _sums(np.asarray(values, dtype=np.float64), place.reshape(-1), len(groups))  # [G, K]
    rng, share = stream(seed, "bootstrap"), np.full(len(groups), 1 / len(groups))
    return np.stack([rng.multinomial(len(groups), share) @ sums for _ in range(draws)])


def redrawn_means(values: np.ndarray, group: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Means of columns over groups drawn again; NaN is not counted.  [M, K], [M] -> [draws, K], NaN for none drawn"""
    sums = redrawn_sums(np.column_stack([np.nan_to_num(values), ~np.isnan(values)]), group, seed, draws)
    total, count = np.split(sums, 2, axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def of_columns(
    columns: Mapping[str, np.ndarray], group: np.ndarray, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means of figures and their intervals, groups drawn again; NaN is not counted.  name -> [M] each, [M]"""
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)
    means = np.nanmean(values, axis=0).tolist()
    return dict(zip(columns, means)), dict(zip(columns, map(between, redrawn_means(values, group, seed).T)))


def of_ratios(hits: dict[str, np.ndarray], queries: dict[str, np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """The bootstrap intervals of sums of hits over sums of queries, items drawn again.  name -> [M] each"""
    columns = np.column_stack([*hits.values(), *queries.values()])
    hit, asked = np.split(redrawn_sums(columns, np.arange(len(columns)), seed), 2, axis=1)
    shares = np.divide(hit, asked, out=np.full_like(hit, np.nan), where=asked > 0)
    return {name: between(draws) for name, draws in zip(hits, shares.T)}


def standard_errors(by_draw: np.ndarray) -> list[float | None]:
    """Standard errors of means over draws. [draws, K] -> K, None for a single draw."""
    if len(by_draw) < 2:
        return [None] * by_draw.shape[1]
    return (by_draw.std(axis=0, ddof=1) / np.sqrt(len(by_draw))).tolist()


def between(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of redrawn figures, [draws]; NaN is not counted."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def of_pairs(values: np.ndarray, pairs: np.ndarray, weight: np.ndarray | None = None) -> list[tuple[float, float]]:
    """The intervals of K shares over pairs of images, each within [0, 1].

    values: [P, K], K figures a pair, NaN where a pair does not count; pairs: [P, 2] image numbers; weight: [P].
    The variance is the sum over images of (the summed deviations of its pairs)^2, less the same over pairs, which
    the first counts twice.
    """
    known = ~np.isnan(values)
    weight = known * (np.ones(len(pairs)) if weight is None else weight)[:, None]  # [P, K]
    values = np.where(known, values, 0.0)
    centre = (weight * values).sum(0) / weight.sum(0)  # [K]
    off = weight * (values - centre)  # [P, K]
    images, places = np.unique(pairs, return_inverse=True)
    places = np.sort(places.reshape(pairs.shape), axis=1)  # the same two images are one pair in either order
    dyads = np.unique(places[:, 0] * len(images) + places[:, 1], return_inverse=True)[1]
    of_image = _sums(off, places[:, 0], len(images)) + _sums(off, places[:, 1], len(images))
    of_dyad = (_sums(off, dyads, dyads.max() + 1) ** 2).sum(0)
    variance = np.maximum((of_image**2).sum(0) - of_dyad, of_dyad)
    half = 1.96 * np.sqrt(variance) / weight.sum(0)
    return [(max(0.0, float(c - h)), min(1.0, float(c + h))) for c, h in zip(centre, half)]


def _sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Sums of rows by group.  [P, K], [P] -> [groups, K]"""
    return np.stack([np.bincount(group, column, groups) for column in values.T], axis=1)
