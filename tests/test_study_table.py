"""A study's table: means over seeds, intervals, data sets kept apart, and the choice made on validation alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.report.study_config import Study
from pc_clip.report.study_plot import MOST_BARS, plot
from pc_clip.report.study_table import best, read_results, render, render_choice, tabulate


def study(*variants: str, **more) -> Study:
    known = {"base": None} | {name: [] for name in variants}
    content = {"name": "small", "variants": known, "evaluations": [["--mode", "retrieve"]], "metrics": ["r1", "r5"]}
    return Study(**(content | more))


def put(label: str, dataset: str = "x/test", intervals: dict | None = None, **metrics: float) -> None:
    path = Path("results/small") / label / f"retrieve-{dataset.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"model": label, "evaluation": "retrieve", "dataset": dataset, "n": 4}
    path.write_text(json.dumps(head | {"metrics": metrics, "intervals": intervals or {}}))


def table_of(study: Study, *seeds: int):
    return tabulate(study, read_results(study, list(seeds)))


def test_mean_and_sample_deviation_over_seeds():
    put("base", r1=0.8, r5=0.5, other=1.0)
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        put(f"a-seed{seed}", r1=value, r5=0.9)
    found = table_of(study("a"), 0, 1, 2)
    row = found[(found.variant == "a") & (found.metric == "r1")].iloc[0]
    assert (row["mean"], row["std"], row.seeds) == (pytest.approx(0.8), pytest.approx(0.1), 3)
    assert set(found.metric) == {"r1", "r5"}
    assert found[found.variant == "base"]["std"].isna().all()
    assert "80.0 ± 10.0" in render(study("a"), found)


def test_an_interval_is_the_mean_of_the_seeds_own_and_empty_where_one_has_none():
    put("base", r1=0.8, r5=0.5)
    put("a-seed0", r1=0.5, r5=0.5, intervals={"r1": [0.4, 0.6], "r5": [0.4, 0.6]})
    put("a-seed1", r1=0.7, r5=0.5, intervals={"r1": [0.6, 0.9]})
    found = table_of(study("a"), 0, 1).set_index(["variant", "metric"])
    assert found.loc[("a", "r1"), ["low", "high"]].tolist() == pytest.approx([0.5, 0.75])
    assert found.loc[("a", "r5"), ["low", "high"]].isna().all()
    assert found.loc[("base", "r1"), ["low", "high"]].isna().all()
    whole = found.reset_index()
    assert "60.0 ± 14.1 [50.0, 75.0]" in render(study("a", intervals=True), whole)
    assert "[" not in render(study("a"), whole)


def test_a_figure_that_stands_twice_or_nowhere_is_an_error():
    put("base", r1=0.8)
    put("a-seed0", r1=0.8)
    Path("results/small/a-seed0/copy.json").write_bytes(Path("results/small/a-seed0/retrieve-x-test.json").read_bytes())
    with pytest.raises(UserError, match="a-seed0 holds r1 twice"):
        table_of(study("a"), 0)
    with pytest.raises(UserError, match="hold none of r9"):
        table_of(study(metrics=["r9"]), 0)


def two_data_sets() -> None:
    """b is better on validation, a on test; the baselines are best of all."""
    figures = {"base": (0.99, 0.1), "random-seed0": (0.9, 0.2), "a-seed0": (0.3, 0.7), "b-seed0": (0.5, 0.6)}
    for label, (val, test) in figures.items():
        put(label, "x/val", r1=val, r5=val)
        put(label, "x/test", r1=test, r5=test, intervals={"r1": [test - 0.01, test + 0.01]})


CHOICE = {"chosen_on": "x/val", "choose_by": ["r1", "r5"], "baselines": ["base", "random"]}


def test_two_data_sets_have_a_table_each():
    two_data_sets()
    plain = study("random", "a", "b")
    text = render(plain, table_of(plain, 0))
    assert text.count("| variant") == 2
    val, test = text.split("x/val")[1], text.split("x/val")[0]
    assert "30.0" in val and "70.0" not in val
    assert "70.0" in test and "30.0" not in test


def test_the_choice_is_made_on_validation_among_those_that_compete_and_told_on_test():
    two_data_sets()
    choosing = study("random", "a", "b", **CHOICE)
    found = table_of(choosing, 0)
    assert set(found.dataset) == {"x/val", "x/test"}  # the CSV has both
    assert best(choosing, found) == ("b", pytest.approx(0.5))
    assert "30.0" not in render(choosing, found)  # a's figure on validation
    text = render_choice(choosing, found)
    assert text.startswith("Best of 2 on x/val by the mean of r1 and r5: b (50.0).")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == ["base", "random", "b"]
    assert "60.0 [59.0, 61.0]" in text


def test_the_choice_goes_by_the_mean_of_its_metrics_and_the_first_of_equals():
    for label, r1, r5 in (("base", 0, 0), ("a-seed0", 0.5, 0.75), ("b-seed0", 0.75, 0.5), ("c-seed0", 1.0, 0.125)):
        put(label, "x/val", r1=r1, r5=r5)
    choosing = study("a", "b", "c", **(CHOICE | {"baselines": ["base"]}))
    assert best(choosing, table_of(choosing, 0)) == ("a", 0.625)


def test_a_choice_that_cannot_be_made_says_why():
    two_data_sets()
    put("a-seed0", "x/val", r1=0.3)
    choosing = study("random", "a", "b", **CHOICE)
    with pytest.raises(UserError, match="a has no r5 on x/val"):
        best(choosing, table_of(choosing, 0))
    elsewhere = study("random", "a", "b", **(CHOICE | {"chosen_on": "y/val"}))
    with pytest.raises(UserError, match="nothing was measured on y/val.*x/test, x/val"):
        best(elsewhere, table_of(elsewhere, 0))


def test_many_metrics_are_drawn_in_lines():
    metrics = [f"m{n}" for n in range(19)]
    put("base", "x/test", **dict.fromkeys(metrics, 0.5))
    put("a-seed0", "x/test", **dict.fromkeys(metrics, 3.5))  # no share, as CIDEr
    for n in (19, 7):
        few = study("a", metrics=metrics[:n])
        plot(few, table_of(few, 0), Path(f"pictures/{n}.png"))
    many, one = (Image.open(f"pictures/{n}.png") for n in (19, 7))
    assert many.height == 3 * one.height
    assert many.width == one.width  # seven, six and six


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_many_variants_are_drawn_as_rows_and_few_as_bars(seeds):
    values = {"g": ["x", "y"], "k": list(range(10))}
    grid = [{"variant": "{g}-{k}", "arguments": [], "values": values}]
    many = study("random", grid=grid, **CHOICE)
    assert len(many.variants) > MOST_BARS
    for n, (variant, seed) in enumerate(many.members(list(seeds))):
        for dataset in ("x/val", "x/test"):
            label = variant if seed is None else f"{variant}-seed{seed}"
            put(label, dataset, r1=0.0 if seed is None else 0.5 + n / 100, r5=0.9, intervals={"r5": [0.8, 0.95]})
    found = table_of(many, *seeds)
    plot(many, found, Path("pictures/many.png"))
    few = many.only(["x-[0-4]", "random"])
    plot(few, found[found.variant.isin(few.variants)], Path("pictures/few.png"))
    rows, bars = (Image.open(f"pictures/{name}.png") for name in ("many", "few"))
    assert bars.height == round(4.2 * 130)  # one line of bars
    assert rows.height > 1.1 * bars.height  # twenty rows
    for colour in ((31, 119, 180), (255, 127, 14)):  # a colour for x and one for y
        assert (np.asarray(rows.convert("RGB")) == colour).all(-1).sum() > 200
