"""Mode choice: one of several captions."""

import json

import pandas as pd
import pytest
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import Choice, form_of, read_groups
from pc_clip.evals import EvalContext, choice, winoground

TEXTS = {"right": [1.0, 0.0], "up": [0.0, 1.0], "left": [-1.0, 0.0], "more up": [0.1, 1.0]}
ROWS = [  # image 0 to the right, 1 up
    {"image": "0", "captions": ["up", "right", "left"], "answer": 1, "group": "a"},  # right
    {"image": "1", "captions": ["up", "more up"], "answer": 0, "group": "a"},  # right
    {"image": "1", "captions": ["right", "left", "up"], "answer": 0, "group": "b"},  # wrong
    {"image": "0", "captions": ["up", "up"], "answer": 0},  # a tie is wrong
    {"image": "9", "captions": ["up", "left"], "answer": 0},  # its image is absent
]


def context_of(path, monkeypatch) -> EvalContext:
    clip = FakeClip(TEXTS, [[1.0, 0.0], [0.0, 1.0]])
    data = Dataset("made", "test", ["0", "1"], None, "f")
    monkeypatch.setattr(EvalContext, "on", lambda self, some: type("On", (), {"z": clip.z[[int(i) for i in some.ids]]}))
    monkeypatch.setattr(choice, "grey_image", lambda clip: clip.z[1])
    return EvalContext(clip, lambda: clip, data, EvaluateConfig(statements=[str(path)]))


def test_a_set_is_correct_where_all_its_rows_are(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    context = context_of(path, monkeypatch)
    assert choice.applies(context.data, context.config) is None and winoground.applies(context.data, context.config)
    result = choice.evaluate(context)
    assert result.metrics["choice"] == 0.5
    assert result.metrics["choice_set"] == 0.5
    assert result.metrics["choice_blind_grey"] == 0.25  # who always sees what is up
    assert result.details["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert (result.n, result.details["absent"], result.details["sets"]) == (4, 1, 2)
    path.write_text("".join(json.dumps(row | {"group": "a"}) + "\n" for row in ROWS))  # now a row of the set is absent
    result = choice.evaluate(context_of(path, monkeypatch))
    assert "choice_set" not in result.metrics and result.details["sets_left_out"] == 1


def test_the_layouts_of_whatsup_and_negbench_are_read(tmp_path):
    path = tmp_path / "controlled.json"
    path.write_text(json.dumps([{"image_path": "data/a.jpeg", "caption_options": ["a mug on it", "a mug under it"]}]))
    assert read_groups([path]) == [Choice("data/a.jpeg", ("a mug on it", "a mug under it"), 0, "", "controlled")]
    path = tmp_path / "mcq.csv"
    path.write_text("correct_answer,caption_0,caption_1,correct_answer_template,image_path\n1,a,b,hybrid,x.jpg\n")
    assert form_of([path]) is Choice
    assert read_groups([path]) == [Choice("x.jpg", ("a", "b"), 1, "", "hybrid")]
    pd.read_csv(path).assign(pixels=b"\xff").to_parquet(tmp_path / "mcq.parquet")
    assert read_groups([tmp_path / "mcq.parquet"]) == read_groups([path])


def test_rows_that_have_no_answer_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    for row, message in [
        ({"image": "0", "captions": ["a", "b"], "answer": 2}, "place of one of 2 captions, from 0; found '2'"),
        ({"image": "0", "captions": ["a"], "answer": 0}, "a list of two texts or more"),
        ({"image": "0", "captions": ["a", ""], "answer": 0}, "must be a text with a word"),
        ({"image": "0", "caption_0": "", "caption_1": "a", "correct_answer": 1}, "must be a text with a word"),
        ({"image": "0", "captions": "['a', 'b']", "answer": 1}, "captions must be a list in JSON"),
    ]:
        path.write_text(json.dumps([row]))
        with pytest.raises(UserError, match=message):
            read_groups([path])
