"""Captions and ones with a wrong change: which are preferred, under which names, and what comes out without looking."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from made_space import COLOUR, about
from PIL import Image

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Statement
from pc_clip.evals import compositional
from pc_clip.interface import run

TEXTS = {"red": COLOUR["red"], "blue": COLOUR["blue"], "any": [1.0, 1.0, 1.0], "none": [-1.0, -1.0, -1.0]}


def said(image: str, text: str, contradiction: str, kind: str = "mine", category: str = "") -> Statement:
    return Statement(image, text, contradiction, True, kind, category)


def test_sugar_crepe_is_scored_on_the_photographs_that_are_there():
    rows = {"0": {"filename": "red0.jpg", "caption": "red", "negative_caption": "blue"},
            "1": {"filename": "red1.jpg", "caption": "blue", "negative_caption": "red"},
            "2": {"filename": "absent.jpg", "caption": "red", "negative_caption": "blue"}}  # fmt: skip
    Path("sugar").mkdir()
    Path("sugar/swap_att.json").write_text(json.dumps(rows))
    Path("sugar/add_obj.json").write_text(json.dumps([rows["0"], rows["2"]]))
    config = EvaluateConfig(statements=["sugar"])
    result = compositional.evaluate(about([], TEXTS, images=["red0", "red1", "blue2"], config=config))
    assert result.n == 3
    assert result.details["absent"] == 2
    assert result.metrics == pytest.approx(
        {"sugarcrepe": 2 / 3, "sugarcrepe_add_obj": 1.0, "sugarcrepe_swap_att": 0.5, "sugarcrepe_blind_grey": 0.5,
         "sugarcrepe_blind_mean": 2 / 3, "sugarcrepe_blind": 2 / 3}
    )  # fmt: skip
    assert set(result.intervals) == set(result.metrics)
    assert result.details["sugarcrepe"]["kinds"]["swap_att"]["n"] == 2
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no file of statements at empty"):
        compositional.evaluate(about([], TEXTS, images=["red0"], config=EvaluateConfig(statements=["empty"])))
    some_false = [said("red0", "red", "blue"), Statement("red0", "blue", "red", False)]
    with pytest.raises(UserError, match="1 of 2 statements are false of their images; --mode relations is for"):
        compositional.evaluate(about(some_false, TEXTS))


def test_who_sees_is_right_and_who_does_not_is_half_right():
    statements = [said(f"{c}{i}", c, other) for i in range(12) for c, other in (("red", "blue"), ("blue", "red"))]
    result = compositional.evaluate(about(statements, TEXTS))
    assert result.metrics["compositional"] == result.metrics["compositional_mine"] == 1.0
    assert result.metrics["compositional_blind_grey"] == result.metrics["compositional_blind_mean"] == 0.5
    assert result.metrics["compositional_text_only"] <= 0.5
    assert result.details["compositional"]["beats_blind"] is True
    assert result.items["compositional"] == [1.0] * 24


def test_captions_that_sound_better_by_themselves_are_found_out(caplog):
    rng = np.random.default_rng(0)
    noise = {f"{what}{i}": rng.normal(size=3) for what in ("good", "bad") for i in range(60)}
    texts = {name: [*vector[:2], 1.5 if name.startswith("good") else -1.5] for name, vector in noise.items()}
    with caplog.at_level(logging.WARNING):
        result = compositional.evaluate(about([said(f"red{i}", f"good{i}", f"bad{i}") for i in range(60)], texts))
    assert result.metrics["compositional_text_only"] == 1.0
    assert result.metrics["compositional"] < 0.8  # a red picture sees the first number alone, which is noise
    assert result.details["compositional"]["beats_blind"] is False
    assert "compositional_text_only" in caplog.text


def test_families_have_names_of_their_own_and_aro_a_mean_over_relations():
    aro = [said("red0", "red", "blue", "on", "aro_relation")] * 3 + [
        said("red1", "blue", "red", "under", "aro_relation")
    ]
    pairs = [said("red0", "red", "blue", "old / white", "aro_attribution")] * 25
    pairs += [said("red0", "blue", "red", "wet / green", "aro_attribution")] * 24  # too few for ARO's mean
    result = compositional.evaluate(
        about([*aro, *pairs, said("red0", "red", "blue", "add_obj"), said("red0", "red", "blue")], TEXTS)
    )
    assert {n: v for n, v in result.metrics.items() if "blind" not in n} == pytest.approx({
        "aro_relation": 0.75, "aro_relation_on": 1.0, "aro_relation_under": 0.0, "aro_relation_macro": 0.5,
        "aro_attribution": 25 / 49, "aro_attribution_old_white": 1.0, "aro_attribution_wet_green": 0.0,
        "aro_attribution_macro": 1.0, "sugarcrepe": 1.0, "sugarcrepe_add_obj": 1.0, "compositional": 1.0,
        "compositional_mine": 1.0,
    })  # fmt: skip
    assert result.n == 55
    assert set(result.items) == {"aro_relation", "aro_attribution", "sugarcrepe", "compositional"}
    assert result.items["aro_relation"] == [1.5, 0.0]  # of 3 and 1 captions, 2 on average


def test_colliding_kind_names_are_merged_and_never_a_baselines():
    statements = [said("red0", "red", "blue", "left of"), said("red0", "blue", "red", "Left-of")]
    statements += [said("red0", "red", "blue", "blind grey")]
    result = compositional.evaluate(about(statements, TEXTS))
    assert result.metrics["compositional_left_of"] == 0.5
    assert result.metrics["compositional_blind_grey"] == 0.5  # a tie each time; the kind of that name is all right
    assert result.details["compositional"]["kinds"]["blind grey"]["compositional"] == 1.0


def test_aros_captions_are_of_the_box_and_not_of_the_whole_picture():
    """The picture is red on its left half and blue on its right."""
    picture = Image.new("RGB", (16, 8), "red")
    picture.paste((0, 0, 255), (8, 0, 16, 8))
    row = {"image_path": "two.jpg", "true_caption": "blue", "false_caption": "red", "relation_name": "on",
           "bbox_x": 8, "bbox_y": 0, "bbox_w": 8, "bbox_h": 8}  # fmt: skip
    Path("aro.json").write_text(json.dumps([row, row | {"bbox_x": 0, "true_caption": "red", "false_caption": "blue"}]))
    subject = about([], TEXTS, images=["two.jpg"], config=EvaluateConfig(statements=["aro.json"]))
    subject.data = dataclasses.replace(subject.data, load=lambda _: picture)
    result = compositional.evaluate(subject)
    assert result.metrics["aro_relation"] == 1.0
    assert result.details["aro_relation"]["photographs"] == 1


def test_of_two_images_the_one_that_the_text_fits_is_preferred():
    fits = Statement("red0", "red", "red", True, "ranked", "", "blue0")
    does_not = Statement("blue0", "red", "red", True, "ranked", "", "red0")
    result = compositional.evaluate(about([fits, fits, does_not], TEXTS, images=["red0", "blue0"]))
    assert result.metrics["compositional"] == pytest.approx(2 / 3)
    assert result.metrics["compositional_blind_grey"] == result.metrics["compositional_blind_mean"] == 0.5


def test_without_a_mode_the_file_decides(caplog):
    Path("pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save("pictures/0.png")
    row = {"image": "0.png", "caption": "a red thing", "negative_caption": "a blue thing"}
    Path("mine.jsonl").write_text(json.dumps(row))
    command = ["--dataset", "folder", "--root", "pictures", "--model.name", "example", "--statements", "mine.jsonl"]
    with caplog.at_level(logging.WARNING):
        run.main(command)
    (path,) = Path("results").rglob("*.json")
    assert path.name.startswith("compositional-")
    assert "relations is left out: all 1 statements are true" in caplog.text
