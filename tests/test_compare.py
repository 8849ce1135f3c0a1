"""Variants against a baseline: differences of the same images, with the noise of images and of seeds in intervals."""

import numpy as np
import pytest

from pc_clip.core.errors import UserError
from pc_clip.report import study_compare
from pc_clip.report.study_compare import COLUMNS, compare, differences, holm, render_comparison
from pc_clip.report.study_config import Study
from pc_clip.report.study_table import Measured

METRICS = ["r1", "r5"]


def study(*variants: str, **more) -> Study:
    known = {"base": None} | {name: [] for name in variants}
    content = {"name": "s", "variants": known, "evaluations": [[]], "metrics": METRICS, "against": "random"}
    return Study(**(content | more))


def measured(variant: str, *seeds, dataset: str = "x/test", metric: str = "r1") -> list[Measured]:
    """One result a seed, with one number an image; a result without any for None."""
    numbers = [{} if items is None else {metric: list(items)} for items in seeds]
    results = [{"dataset": dataset, "metrics": {}, "items": items} for items in numbers]
    return [Measured(variant, n, [result]) for n, result in enumerate(results)]


def row(table, variant: str, metric: str = "r1"):
    return table[(table.variant == variant) & (table.metric == metric)].iloc[0]


def test_what_all_images_gain_alike_has_no_noise_however_different_they_are():
    """Paired: unpaired intervals of these images would be 20 points wide."""
    hard = np.random.default_rng(0).uniform(0, 0.9, 400)
    found = compare(study("random", "a"), measured("random", hard, hard) + measured("a", hard + 0.1, hard + 0.1))
    assert list(found.columns) == COLUMNS
    a = row(found, "a")
    assert (a.difference, a.low, a.high) == (pytest.approx(0.1),) * 3
    assert (a.seeds, a.significant) == (2, True)
    assert list(found.variant) == ["a"]  # not the baseline with itself; nothing of base, which has no items


def test_an_interval_over_images_is_as_wide_as_arithmetic_says():
    """200 of 1000 images gained, 100 lost: mean 0.1, standard error sqrt(0.29 / 1000)."""
    gain = np.r_[np.ones(200), -np.ones(100), np.zeros(700)]
    base = np.full(1000, 0.5)
    found = row(compare(study("random", "a"), measured("random", base) + measured("a", base + gain)), "a")
    half = 1.96 * np.sqrt(0.29 / 1000)
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1 - half, abs=0.003), pytest.approx(0.1 + half, abs=0.003))


def test_seeds_that_differ_widen_the_interval_and_the_model_as_it_was_has_none():
    """No noise of images: seeds of both lie 0.1 off their mean, so the standard error is sqrt(2 * 0.02 / 2).

    It is known from few seeds, so the interval is Student's.
    """
    flat = np.full(50, 0.5)
    items = measured("random", flat - 0.1, flat + 0.1) + measured("a", flat + 0.2, flat)
    a = row(compare(study("random", "a"), items), "a")
    assert a.difference == pytest.approx(0.1)
    student = 4.303  # at the 2 degrees of freedom that two variants of two seeds have
    assert a.high - a.low == pytest.approx(2 * student * np.sqrt(2 * 0.02 / 2), rel=0.1)
    from_start = compare(study("random", "a", against="base"), measured("base", flat) + items)
    assert row(from_start, "a").high - row(from_start, "a").low == pytest.approx(
        2 * 0.1 * np.sqrt(2) * student / 1.96, rel=0.01
    )
    base = row(compare(study("random", "a"), measured("base", flat) + items), "base")
    assert base.seeds == 1
    assert base.high - base.low == pytest.approx(row(from_start, "random").high - row(from_start, "random").low)


def test_one_seed_leaves_the_noise_of_training_out_and_says_so():
    table = compare(study("random", "a"), measured("random", [0.0, 1.0] * 9) + measured("a", [1.0, 1.0] * 9))
    assert "one seed, so that the noise of training is left out" in render_comparison(study("random", "a"), table)


def where_nothing_differs(variants: int, images: int, studies: int) -> tuple[float, float]:
    """The share of intervals without 0, and of studies with a variant that holds after the correction; 3 seeds each."""
    rng = np.random.default_rng(5)
    outside, families = [], []
    for _ in range(studies):
        hard = rng.normal(size=images)
        items = {f"v{n}": np.stack([hard + rng.normal(0, 0.1) for _ in range(3)]) for n in range(variants)}
        items = {name: rows + rng.normal(0, 0.3, images) for name, rows in items.items()}
        _, low, high, p = differences(items, "v0", dict.fromkeys(items, True), rng)
        outside.append(((low > 0) | (high < 0)).mean())
        families.append(holm(p).any())
    return float(np.mean(outside)), float(np.mean(families))


def test_where_nothing_differs_about_one_in_twenty_intervals_says_so_and_hardly_any_after_correction(monkeypatch):
    monkeypatch.setattr(study_compare, "DRAWS", 800)
    outside, families = where_nothing_differs(variants=21, images=200, studies=25)
    assert 0.01 < outside < 0.1
    assert families <= 0.2


def test_few_variants_say_no_more_than_they_know(monkeypatch):
    """Four of three seeds know the noise of training from 8 degrees of freedom; taken as known it makes 8 % differ."""
    monkeypatch.setattr(study_compare, "DRAWS", 800)
    outside, families = where_nothing_differs(variants=4, images=200, studies=800)
    assert 0.01 < outside < 0.065
    assert families <= 0.06


def test_holm_stops_at_the_first_that_fails():
    """0.011 <= 0.05/4; 0.016 <= 0.05/3; 0.03 > 0.05/2, so 0.04 fails with it though it is below 0.05."""
    assert holm(np.array([0.04, 0.011, 0.03, 0.016])).tolist() == [False, True, False, True]
    assert holm(np.array([0.02])).tolist() == [True]


def test_each_data_set_and_metric_is_compared_by_itself_and_what_has_no_items_is_left_out():
    no, yes = np.zeros(40), np.ones(40)
    partly = measured("random", no, no) + measured("b", yes, None)
    assert compare(study("random", "b"), partly).empty  # one of b's seeds has no numbers
    split = [
        Measured("random", 0, [{"dataset": "x/test", "items": {"r1": no}}, {"dataset": "x/val", "items": {"r5": no}}])
    ]
    split += [Measured("b", 0, [{"dataset": "x/test", "items": None}, {"dataset": "x/val", "items": {"r5": yes}}])]
    split += measured("a", yes)
    chosen = study("random", "a", "b", chosen_on="x/val", choose_by=["r5"])
    table = compare(chosen, split)
    assert [(r.variant, r.dataset, r.metric, r.difference) for r in table.itertuples()] == [
        ("a", "x/test", "r1", 1.0),
        ("b", "x/val", "r5", 1.0),
    ]
    text = render_comparison(chosen, table)
    assert "x/test" in text and "x/val" not in text
    assert "| a       | +100.0 [+100.0, +100.0] * |" in text


def test_the_text_counts_what_stands_out_and_what_would_by_chance():
    rng = np.random.default_rng(0)
    base = np.full(300, 0.5)
    items = measured("base", base - 0.2) + measured("random", base)
    items += (
        measured("up", base + 0.3) + measured("down", base - 0.3) + measured("same", base + rng.normal(0, 0.1, 300))
    )
    compared = study("random", "up", "down", "same", baselines=["base", "random"])
    text = render_comparison(compared, compare(compared, items))
    assert (
        "- r1: of 3 intervals 1 lie above 0 and 1 below; if nothing differed, about 0.2 would by chance on average;"
        in text
    )
    assert "they come together" in text
    assert "after the correction 1 are better, 1 worse." in text
    assert text.count("\n| base ") == 1  # shown, but it is none of those that compete


def test_results_on_other_images_are_not_compared():
    with pytest.raises(UserError, match="a and random have r1 of different numbers of images of x/test"):
        compare(study("random", "a"), measured("random", [0.0] * 5) + measured("a", [0.0] * 6))
    with pytest.raises(UserError, match="seeds of a have r1 of different numbers"):
        compare(study("random", "a"), measured("random", [0.0] * 5) + measured("a", [0.0] * 6, [0.0] * 5))


def test_as_many_images_that_are_others_are_not_compared():
    def seen(variant: str, *fingerprints: str | None) -> list[Measured]:
        found = measured(variant, *[[0.0] * 5] * len(fingerprints))
        for each, images in zip(found, fingerprints):
            each.results[0].update({} if images is None else {"images": images})
        return found

    compared = study("random", "a")
    with pytest.raises(UserError, match=r"a-seed1 and random-seed0 have r1 of different images of x/test \(two, one\)"):
        compare(compared, seen("a", "one", "two") + seen("random", "one", "one"))
    with pytest.raises(UserError, match="random-seed1 and random-seed0 have r1 of different images"):
        compare(compared, seen("random", "one", "two") + seen("a", None, None))
    assert len(compare(compared, seen("random", "one", None) + seen("a", None, "one"))) == 1  # older ones do not say
    both = seen("random", "one") + seen("a", "one")
    for each in both:  # another data set has other images
        each.results.append({"dataset": "x/val", "metrics": {}, "items": {"r1": [1.0] * 9}, "images": "two"})
    assert list(compare(compared, both).dataset) == ["x/test", "x/val"]
