"""Each variant of a study against one of them, on the same images: how much better, and could that be chance?

Two sources of chance are drawn again, and added. Images: both models see the same ones, so the difference of each
image is averaged over seeds first, and then images are drawn (a paired bootstrap); what is easy or hard for both
cancels. Seeds: S of them are drawn for the variant and S for its baseline, for how far a mean of so few lies off. Three
seeds of one variant say next to nothing about their own spread, so they are drawn from the seeds of all trained
variants: each one's deviation from the mean of its variant, widened by sqrt(S / (S - 1)) because that mean was taken
from the same seeds.

A spread that is known from few seeds is known badly, so the deviations are also widened by how much wider Student's t
is than the normal distribution, at the degrees of freedom that all trained variants give together.

That is crude. It takes the noise of training to be alike in all variants. What one seed gets right or wrong by chance,
image by image, is counted in both, which makes intervals rather too wide. With one seed the noise of training is not
known, and the intervals leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.report.study_config import Study, label
from pc_clip.report.study_table import Measured, aligned

COLUMNS = ["variant", "dataset", "metric", "difference", "low", "high", "seeds", "p", "significant"]
DRAWS = 10_000
LEVEL = 0.05
_BLOCK = 250  # draws at once: [250, 10,000 images] float64 are 20 MB


def compare(study: Study, measured: Sequence[Measured], seed: int = 0) -> pd.DataFrame:
    """One row a variant, data set and metric: COLUMNS, fractions.

    difference: mean over seeds of variant - baseline, over the images' own numbers; low, high: its 95 % interval; p:
    two-sided, no smaller than 2 / DRAWS. significant: whether it holds after Holm's correction for all the variants
    that are compared on that data set by that metric. What has no number for each image is left out.
    Raises UserError when two were not measured on the same images.
    """
    rows = []
    _check_same_images(study, measured)
    for (dataset, metric), items in _items(study, measured).items():
        if study.against not in items or len(items) < 2:
            continue
        _check_as_many(study.against, items, dataset, metric)
        trained = {variant: study.variants[variant] is not None for variant in items}
        point, low, high, p = differences(items, study.against, trained, stream(seed, "bootstrap"))
        others = [variant for variant in items if variant != study.against]
        figures = zip(others, point, low, high, p, holm(p))
        rows += [(v, dataset, metric, d, a, b, len(items[v]), q, kept) for v, d, a, b, q, kept in figures]
    found = pd.DataFrame(rows, columns=COLUMNS)
    place = {variant: n for n, variant in enumerate(study.variants)}
    return found.sort_values("variant", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def differences(
    items: dict[str, np.ndarray], against: str, trained: dict[str, bool], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(difference, low, high, p), each [V], of all variants but `against`, in order. items: variant -> [S, N]."""
    base = items[against].mean(0)
    others = [variant for variant in items if variant != against]
    off = np.stack([items[variant].mean(0) - base for variant in others], axis=1)  # [N, V]
    draws = _mean_over_drawn_images(off, rng)  # [DRAWS, V]
    pool = _deviations([items[variant] for variant in items if trained[variant]])
    if len(pool):
        noise = {v: rng.choice(pool, (DRAWS, len(items[v]))).mean(1) if trained[v] else 0.0 for v in items}
        draws += np.stack([noise[v] - noise[against] + np.zeros(DRAWS) for v in others], axis=1)
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    tail = np.minimum((draws <= 0).sum(0), (draws >= 0).sum(0))
    return off.mean(0), low, high, np.minimum(1.0, 2 * (tail + 1) / (DRAWS + 1))


def holm(p: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Which hold when the chance that any one of them is false is kept at `level` (Holm 1979).  [V] -> [V] bool"""
    order = np.argsort(p, kind="stable")
    kept = np.empty(len(p), dtype=bool)
    kept[order] = np.logical_and.accumulate(p[order] <= level / np.arange(len(p), 0, -1))
    return kept


def render_comparison(study: Study, comparison: pd.DataFrame) -> str:
    """What came of it, as Markdown: how many stand out and how many would by chance, then all differences."""
    dataset_names = list(dict.fromkeys(comparison.dataset))
    shown = [name for name in dataset_names if name != study.chosen_on] or dataset_names
    if not shown:
        return f"Nothing to compare with {study.against}: the results have no number for each image."
    parts = [
        f"Less {study.against}, points, with 95 % intervals over the same images{_seeds(comparison)}. * holds after "
        f"Holm's correction for all comparisons of its column."
    ]
    for name in shown:
        table = comparison[comparison.dataset == name]
        competing = table[table.variant.isin(study.competitors)].groupby("metric", sort=False)
        parts += [name, "\n".join(_counted(metric, block) for metric, block in competing), _markdown(study, table)]
    return "\n\n".join(filter(None, parts))


def _counted(metric: str, block: pd.DataFrame) -> str:
    above, below, kept = (block.low > 0).sum(), (block.high < 0).sum(), block[block.significant]
    better, worse = (kept.difference > 0).sum(), (kept.difference < 0).sum()
    return (
        f"- {metric}: of {len(block)} intervals {above} lie above 0 and {below} below; if nothing differed, about "
        f"{LEVEL * len(block):.1f} would by chance on average; they come together, since all are compared with the "
        f"same runs. Trust the *: after the correction {better} are better, {worse} worse."
    )


def _seeds(comparison: pd.DataFrame) -> str:
    most = comparison.seeds.max()
    return f" and {most} seeds" if most > 1 else "; one seed, so that the noise of training is left out"


def _markdown(study: Study, table: pd.DataFrame) -> str:
    cells = {
        (row.variant, row.metric): f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
        + (" *" if row.significant else "")
        for row in table.itertuples()
    }
    metrics = [metric for metric in study.metrics if metric in set(table.metric)]
    rows = [[v, *(cells.get((v, m), "") for m in metrics)] for v in dict.fromkeys(table.variant)]
    return aligned([["variant", *metrics], *rows])


def _items(study: Study, measured: Sequence[Measured]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(dataset, metric) -> variant -> [S, N], one number a seed and image; without variants where a seed has none."""
    lists: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    seeds: dict[str, int] = {}
    for variant, _, results in measured:
        seeds[variant] = seeds.get(variant, 0) + 1
        for result in results:
            for metric in study.metrics:
                if (numbers := (result.get("items") or {}).get(metric)) is not None:
                    of_metric = lists.setdefault((result["dataset"], metric), {})
                    of_metric.setdefault(variant, []).append(np.asarray(numbers, dtype=np.float64))
    for (dataset, metric), found in lists.items():
        for variant, rows in found.items():
            if len({len(row) for row in rows}) > 1:
                raise UserError(_unlike(f"seeds of {variant}", dataset, metric))
    return {
        key: {variant: np.stack(rows) for variant, rows in found.items() if len(rows) == seeds[variant]}
        for key, found in lists.items()
    }


def _check_same_images(study: Study, measured: Sequence[Measured]) -> None:
    """By the data set's fingerprint, where the results know it: as many images may still be others."""
    known: dict[tuple[str, str], tuple[str, str]] = {}  # (dataset, metric) -> whose, fingerprint; the baseline's first
    for variant, seed, results in sorted(measured, key=lambda each: each.variant != study.against):
        for result in results:
            dataset, images = result["dataset"], result.get("images")
            for metric in (m for m in study.metrics if images and m in (result.get("items") or {})):
                who, theirs = known.setdefault((dataset, metric), (label(variant, seed), images))
                if theirs != images:
                    raise UserError(
                        f"{label(variant, seed)} and {who} have {metric} of different images of {dataset} ({images}, "
                        f"{theirs}); delete the older results, and run again"
                    )


def _check_as_many(against: str, items: dict[str, np.ndarray], dataset: str, metric: str) -> None:
    for variant, rows in items.items():
        if rows.shape[1] != items[against].shape[1]:
            raise UserError(_unlike(f"{variant} and {against}", dataset, metric))


def _unlike(who: str, dataset: str, metric: str) -> str:
    return f"{who} have {metric} of different numbers of images of {dataset}; delete the older results, and run again"


def _mean_over_drawn_images(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means over images drawn again with replacement, the same ones for all columns.  [N, V] -> [DRAWS, V]"""
    n, found = len(values), []
    for start in range(0, DRAWS, _BLOCK):
        rows = min(_BLOCK, DRAWS - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        found.append(counts.astype(np.float64) @ values / n)
    return np.concatenate(found)


def _deviations(variants: Sequence[np.ndarray]) -> np.ndarray:
    """How far each seed lies off the mean of its variant, as wide as the spread of seeds is.  V x [S, N] -> [sum S]

    Wider still by the ratio of Student's t to the normal distribution, because the spread is only estimated. Empty
    where no variant has two seeds.
    """
    found, freedom = [np.empty(0)], sum(len(rows) - 1 for rows in variants)
    for rows in variants:
        seeds = len(rows)
        if seeds > 1:
            means = rows.mean(1)
            found.append((means - means.mean()) * np.sqrt(seeds / (seeds - 1)))
    wider = stats.t.ppf(1 - LEVEL / 2, freedom) / stats.norm.ppf(1 - LEVEL / 2) if freedom else 1.0
    return wider * np.concatenate(found)
