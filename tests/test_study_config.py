"""A study's YAML: grids become variants in a fixed order, and what is wrong is said in a line."""

from pathlib import Path

import pytest
import yaml

from pc_clip.core.errors import UserError
from pc_clip.report.study_config import Study

REST = {"name": "s", "evaluations": [["--mode", "retrieve"]], "metrics": ["t2i_r1", "i2t_r1"]}
GRID = {
    "variant": "{similarity}-k{k}",
    "arguments": ["--config", "x.yaml", "--k={k}", "--n", 3, "{similarity}", '{"a": 1}'],
    "values": {"similarity": ["text", "image"], "k": [2, 0.5]},
}


def study(**content) -> Study:
    """Through a file, as people write it."""
    Path("s.yaml").write_text(yaml.safe_dump(REST | {"grid": [GRID]} | content, sort_keys=False))
    return Study.read(Path("s.yaml"))


def test_a_grid_is_every_combination_after_the_variants_the_last_value_changing_fastest():
    found = study(variants={"base": None, "random": ["--config", "x.yaml"]})
    assert list(found.variants) == ["base", "random", "text-k2", "text-k0.5", "image-k2", "image-k0.5"]
    assert found.variants["image-k0.5"] == ["--config", "x.yaml", "--k=0.5", "--n", "3", "image", '{"a": 1}']
    assert found.groups["image-k2"] == "similarity image"
    assert "random" not in found.groups
    assert found.members([4, 7])[:4] == [("base", None), ("random", 4), ("random", 7), ("text-k2", 4)]


def test_two_grids_and_no_other_variants():
    second = {"variant": "q{q}", "arguments": ["{q}"], "values": {"q": [True]}}
    assert list(study(grid=[GRID, second]).variants)[-2:] == ["image-k0.5", "qTrue"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grid": [GRID | {"variant": "{similarity}-k{kk}"}]}, r"has no values for \{kk\}.*'k'"),
        ({"grid": [GRID | {"arguments": ["{x}"]}]}, r"has no values for \{x\}"),
        ({"grid": [GRID | {"variant": "{similarity}"}]}, "two variants of study s are called 'text'"),
        ({"variants": {"text-k2": None}}, "two variants of study s are called 'text-k2'"),
        ({"grid": [GRID | {"values": {"k": 2}}]}, "k of the grid .* is 2; it must be a list"),
        ({"grid": [GRID | {"values": {"k": []}}]}, "must be a list of values"),
        ({"grid": [GRID | {"values": {}}]}, "must name each placeholder"),
        ({"grid": [{"variant": "a"}]}, "is no study.*arguments"),
        ({"grid": []}, "study s has no variants"),
        ({"baselines": ["random"]}, "baselines of study s names 'random'"),
        ({"baselines": "text-k2"}, "must be a list"),
        ({"against": "text-k3"}, "against of study s names 'text-k3'.*text-k2"),
        ({"chosen_on": "example/val"}, "needs both `chosen_on` and `choose_by`"),
        ({"chosen_on": "example/val", "choose_by": ["t2i_r5"]}, "choose_by of study s names 't2i_r5'"),
        ({"colour": "red"}, "is no study.*colour"),
        ({"variants": {"b": ["{a}"], "a": []}}, "variant 'b' of study s names 'a'"),
        ({"variants": {"base": None, "b": ["{base}"]}}, "variant 'b' of study s names 'base'"),
    ],
)
def test_what_is_wrong_is_said(content, said):
    with pytest.raises(UserError, match=said):
        study(**content)


def test_variants_that_begin_with_the_run_of_another():
    found = study(variants={"base": None, "first": ["--x", "1"], "then": ["--model.start", "{first}"]}, grid=[])
    assert found.needs("then") == ["first"]
    assert found.arguments("then", lambda name: Path("runs") / name) == ["--model.start", "runs/first"]
    assert list(found.only(["then"]).variants) == ["first", "then"]


def test_the_run_of_a_variant_with_numbers_and_hyphens_in_its_name_is_begun_with_too():
    found = study(variants={"text-1e-06": [], "then": ["--model.start", "{text-1e-06}"]}, grid=[])
    assert found.needs("then") == ["text-1e-06"]
    assert found.arguments("then", lambda name: Path("runs") / name) == ["--model.start", "runs/text-1e-06"]


def test_only_keeps_what_matches_and_what_is_said_of_it():
    found = study(variants={"base": None, "random": []}, baselines=["base", "random"], against="random")
    few = found.only(["text-*", "base"])
    assert list(few.variants) == ["base", "text-k2", "text-k0.5"]
    assert (few.baselines, few.against, few.groups["text-k2"]) == (["base"], "", "similarity text")
    assert len(found.variants) == 6  # the study itself stays whole
