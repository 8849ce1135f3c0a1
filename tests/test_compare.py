"""Variants against a baseline: differences of the same images, with the noise of images and of seeds in intervals."""

import numpy as np
import pandas as pd
import pytest

from pc_clip.core.errors import UserError
from pc_clip.report import compare as module
from pc_clip.report.compare import COLUMNS, compare, differences, holm
from pc_clip.report.study import Study, render, tabulate


def measured(variant: str, *seeds, dataset: str = "x/test", metric: str = "r1", **more) -> list[dict]:
    """One result a seed, with one number an image; a result without any for None."""
    items = [{} if numbers is None else {metric: list(numbers)} for numbers in seeds]
    common = {"dataset": dataset, "images": "one"} | more
    return [common | {"model": f"{variant}-seed{n}", "items": each} for n, each in enumerate(items)]


def table_of(*results: list[dict], against: str = "random") -> pd.DataFrame:
    return compare([r for of in results for r in of], against, ["base"], ["r1", "r5"])


def row(table: pd.DataFrame, variant: str):
    return table[table.variant == variant].iloc[0]


def test_what_all_images_gain_alike_has_no_noise_however_different_they_are():
    """Paired: unpaired intervals of these images would be 20 points wide."""
    hard = np.random.default_rng(0).uniform(0, 0.9, 400)
    table = table_of(measured("random", hard, hard), measured("a", hard + 0.1, hard + 0.1))
    assert list(table.columns) == COLUMNS
    a = row(table, "a")
    assert (a.difference, a.low, a.high) == (pytest.approx(0.1),) * 3
    assert (a.seeds, a.significant, len(table)) == (2, True, 1)  # not the baseline with itself


def test_nothing_is_significant_of_a_handful_of_images():
    zero, one = np.zeros(19), np.ones(19)
    table = table_of(measured("random", zero, zero), measured("a", one, one))
    assert row(table, "a").difference == 1 and not row(table, "a").significant


def test_an_interval_over_images_is_as_wide_as_arithmetic_says():
    """200 of 1000 images gained, 100 lost: mean 0.1, standard error sqrt(0.29 / 1000)."""
    gain, base = np.r_[np.ones(200), -np.ones(100), np.zeros(700)], np.full(1000, 0.5)
    a = row(table_of(measured("random", base), measured("a", base + gain)), "a")
    half = 1.96 * np.sqrt(0.29 / 1000)
    assert a.difference == pytest.approx(0.1)
    assert (a.low, a.high) == (pytest.approx(0.1 - half, abs=0.003), pytest.approx(0.1 + half, abs=0.003))


def test_spread_over_seeds_widens_the_interval():
    """No noise of images: seeds of both lie 0.1 off their mean, so the standard error is sqrt(2 * 0.02 / 2).

    It is known from few seeds, so the interval is Student's.
    """
    flat, student = np.full(50, 0.5), 4.303  # at the 2 degrees of freedom that two variants of two seeds have
    trained = measured("random", flat - 0.1, flat + 0.1) + measured("a", flat + 0.2, flat)
    a = row(table_of(trained), "a")
    assert a.difference == pytest.approx(0.1)
    assert a.high - a.low == pytest.approx(2 * student * np.sqrt(2 * 0.02 / 2), rel=0.1)
    a = row(table_of(measured("base", flat), trained, against="base"), "a")
    assert a.high - a.low == pytest.approx(2 * 0.1 * np.sqrt(2) * student / 1.96, rel=0.01)


def where_nothing_differs(variants: int, images: int, studies: int) -> tuple[float, float]:
    """The share of intervals without 0, and of studies with a variant that holds after the correction; 3 seeds each."""
    rng = np.random.default_rng(5)
    outside, families = [], []
    for n in range(studies):
        hard = rng.normal(size=images)
        items = {f"v{k}": np.stack([hard + rng.normal(0, 0.1) for _ in range(3)]) for k in range(variants)}
        items = {name: rows + rng.normal(0, 0.3, images) for name, rows in items.items()}
        _, low, high, p = differences(items, "v0", [], n)
        outside.append(((low > 0) | (high < 0)).mean())
        families.append(holm(p).any())
    return float(np.mean(outside)), float(np.mean(families))


@pytest.mark.slow
@pytest.mark.parametrize(("variants", "studies", "most"), [(21, 25, (0.1, 0.2)), (4, 400, (0.06, 0.05))])
def test_where_nothing_differs_about_one_in_twenty_intervals_says_so(monkeypatch, variants, studies, most):
    """Few variants as well: four of three seeds know the noise of training from 8 degrees of freedom alone."""
    monkeypatch.setattr(module, "DRAWS", 400)
    outside, families = where_nothing_differs(variants, 60, studies)
    assert 0.01 < outside < most[0]
    assert families <= most[1]


def test_holm_stops_at_the_first_that_fails():
    """0.011 <= 0.05/4; 0.016 <= 0.05/3; 0.03 > 0.05/2, so 0.04 fails with it though it is below 0.05."""
    assert holm(np.array([0.04, 0.011, 0.03, 0.016])).tolist() == [False, True, False, True]
    assert holm(np.array([0.02])).tolist() == [True]


def test_comparisons_are_by_data_set_and_metric():
    no, yes = np.zeros(40), np.ones(40)
    assert table_of(measured("random", no, no), measured("b", yes, None)).empty  # one of b's seeds has no numbers
    val = {"dataset": "x/val", "metric": "r5"}
    random = measured("random", no) + measured("random", no, **val)
    table = table_of(random, measured("b", None) + measured("b", yes, **val), measured("a", yes), measured("base", no))
    expected = [("b", "x/val", "r5", 1.0), ("a", "x/test", "r1", 1.0), ("base", "x/test", "r1", 0.0)]
    assert [(r.variant, r.dataset, r.metric, r.difference) for r in table.itertuples()] == expected


def test_the_text_marks_what_holds_and_shows_the_test_split_alone():
    items = measured("random", np.zeros(40)) + measured("a", np.ones(40))
    items += [result | {"dataset": "x/val"} for result in items]
    results = [r | {"evaluation": "retrieve", "metrics": {"r1": 0.25}, "n": 40} for r in items]
    study = Study("s", [], ["r1"], {"random": [], "a": []}, chosen_on=["x/val"], choose_by=["r1"], against="random")
    text = render(study, tabulate(study, results), table_of(items))
    compared = text[text.index("Less random, points") :]
    assert "one seed, so that the noise of training is left out" in compared
    assert "| a         | +100.0 [+100.0, +100.0] * |" in compared and "x/val" not in compared


def test_results_on_other_images_are_not_compared():
    five, six = [0.0] * 5, [0.0] * 6
    others = (measured("a", six), measured("a", five, six), measured("a", five, images="two"))
    for model, other in zip(("a-seed0", "a-seed1", "a-seed0"), others):
        with pytest.raises(UserError, match=rf"{model} and random-seed0 have r1 of different images of x/test \("):
            table_of(measured("random", five), other)
