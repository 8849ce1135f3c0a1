"""Compare the variants of a study with one of them on the same images: difference, interval, significance.

Two sources of chance are added. Images: both models see the same ones, so that each image's difference is averaged over
seeds, and images are drawn again (a paired bootstrap). Seeds: a mean of few seeds lies off, and three seeds of one
variant say next to nothing about their spread. Each seed's deviation from the mean of its variant is therefore pooled
over all trained variants, widened by sqrt(S / (S - 1)) because that mean was taken from the same S seeds, and by the
ratio of Student's t to the normal distribution because the spread is only estimated. S of them are drawn for each side.

This takes the noise of training to be alike in all variants. What a seed gets right or wrong by chance, image by
image, counts in both sources, which makes intervals rather too wide. With one seed the noise of training is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.metrics.intervals import FEWEST, redrawn_sums
from pc_clip.report.results import variant_of

COLUMNS = ["variant", "dataset", "metric", "difference", "low", "high", "seeds", "p", "significant"]
DRAWS = 10_000
LEVEL = 0.05


def compare(
    results: Sequence[dict[str, Any]], against: str, untrained: Collection[str], metrics: Collection[str], seed: int = 0
) -> pd.DataFrame:
    """One row a variant, data set and metric: COLUMNS, fractions.

    results: `model` is VARIANT or VARIANT-seedN. difference: mean over seeds of variant - against, over the images' own
    numbers. low, high: its 95 % interval. p: two-sided, at least 2 / DRAWS. significant: whether it holds after Holm's
    correction for all the variants compared on that data set by that metric, and there are FEWEST images or more.
    Variants without a number for each image, in any seed, are left out. Raises UserError when two were not measured on
    the same images.
    """
    rows = []
    questions = dict.fromkeys((r["dataset"], metric) for r in results for metric in r.get("items") or {})
    for dataset, metric in questions:
        items = _items(results, against, dataset, metric) if metric in metrics else {}
        others = [variant for variant in items if variant != against]
        if against in items and others:
            point, low, high, p = differences(items, against, untrained, seed)
            figures = zip(others, point, low, high, p, holm(p))
            enough = items[against].shape[1] >= FEWEST
            rows += [(v, dataset, metric, d, a, b, len(items[v]), q, h and enough) for v, d, a, b, q, h in figures]
    order = list(dict.fromkeys(variant_of(result["model"]) for result in results))
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("variant", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)


def differences(
    items: dict[str, np.ndarray], against: str, untrained: Collection[str], seed: int
) -> tuple[np.ndarray, ...]:
    """(difference, low, high, p), each [V], of all variants but `against`, in order. items: variant -> [S, N]."""
    others = [variant for variant in items if variant != against]
    off = np.stack([items[variant].mean(0) - items[against].mean(0) for variant in others], axis=1)  # [N, V]
    draws = redrawn_sums(off, np.arange(len(off)), seed, DRAWS) / len(off)  # [DRAWS, V]
    pool, rng = _deviations([rows for name, rows in items.items() if name not in untrained]), stream(seed, "seeds")
    noise = {name: np.zeros(DRAWS) for name in items}
    if len(pool):
        noise |= {v: rng.choice(pool, (DRAWS, len(rows))).mean(1) for v, rows in items.items() if v not in untrained}
    draws += np.stack([noise[variant] - noise[against] for variant in others], axis=1)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    tail = np.minimum((draws <= 0).sum(0), (draws >= 0).sum(0))
    return off.mean(0), low, high, np.minimum(1.0, 2 * (tail + 1) / (DRAWS + 1))


def holm(p: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Which hold when the chance that any one of them is false is kept at `level` (Holm 1979).  [V] -> [V] bool"""
    order = np.argsort(p, kind="stable")
    holds = np.empty(len(p), dtype=bool)
    holds[order] = np.logical_and.accumulate(p[order] <= level / np.arange(len(p), 0, -1))
    return holds


def _deviations(variants: list[np.ndarray]) -> np.ndarray:
    """How far each seed lies off its variant's mean, widened as said above.  V x [S, N] -> [*], none for one seed"""
    several = [rows.mean(1) for rows in variants if len(rows) > 1]
    freedom = sum(len(means) - 1 for means in several)
    wider = stats.t.ppf(1 - LEVEL / 2, freedom) / stats.norm.ppf(1 - LEVEL / 2) if freedom else 1.0
    spread = [(means - means.mean()) * np.sqrt(len(means) / (len(means) - 1)) for means in several]
    return wider * np.concatenate([np.empty(0), *spread])


def _items(results: Sequence[dict[str, Any]], against: str, dataset: str, metric: str) -> dict[str, np.ndarray]:
    """variant -> [S, N], a number a seed and image; without variants where a seed has none."""
    having = [r for r in results if r["dataset"] == dataset and metric in (r.get("items") or {})]
    seeds = Counter(variant_of(model) for model in {r["model"] for r in results})
    first = next((r for r in having if variant_of(r["model"]) == against), None)
    rows: dict[str, list[list[float]]] = {}
    for result in having if first else []:
        images, expected = ((r["images"], len(r["items"][metric])) for r in (result, first))
        if images != expected:
            raise UserError(
                f"{result['model']} and {first['model']} have {metric} of different images of {dataset} ({images}, "
                f"{expected}); delete the older results, and run again"
            )
        rows.setdefault(variant_of(result["model"]), []).append(result["items"][metric])
    return {
        variant: np.asarray(items, dtype=np.float64) for variant, items in rows.items() if len(items) == seeds[variant]
    }
