"""Mode winoground: two captions against two images."""

import json

import numpy as np
import pytest
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import form_of, read_groups
from pc_clip.evals import EvalContext, compositional, paraphrases, winoground

TEXTS = {"right": [1.0, 0.0], "up": [0.0, 1.0], "both": [1.0, 1.0], "more right": [0.9, 0.1]}


@pytest.fixture
def context(tmp_path, monkeypatch) -> EvalContext:
    """Images 0 to the right, 1 up, 2 between the two."""
    rows = [
        ("0", "1", "right", "up", "Object"),  # text and image
        ("1", "0", "right", "up", "Object"),  # neither
        ("2", "0", "both", "more right", "Relation"),  # text: 2 is nearer to both; image: both is nearest to 2, too
        ("0", "2", "more right", "right", "Relation"),  # text: 0 is nearer to right than to more right
        ("0", "9", "right", "up", "Relation"),  # an image is absent
    ]
    names = ("image_0", "image_1", "caption_0", "caption_1", "tag")
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    clip = FakeClip(TEXTS, [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    data = Dataset("made", "test", ["0", "1", "2"], None, "f")
    monkeypatch.setattr(EvalContext, "on", lambda self, some: type("On", (), {"z": clip.z[[int(i) for i in some.ids]]}))
    return EvalContext(clip, lambda: clip, data, EvaluateConfig(statements=[str(path)]))


def test_the_scores_are_those_of_the_paper(context, monkeypatch):
    monkeypatch.setattr(winoground, "ENOUGH", 2)
    result = winoground.evaluate(context)
    assert [result.metrics[name] for name in ("text", "image", "group")] == [0.5, 0.5, 0.5]
    assert [result.metrics[f"{name}_object"] for name in ("text", "image", "group")] == [0.5, 0.5, 0.5]
    assert (result.n, result.details["absent"]) == (4, 1)
    assert result.details["chance"]["group"] == pytest.approx(1 / 6)


def test_random_embeddings_score_at_chance(context):
    rng = np.random.default_rng(0)
    cosines = rng.normal(size=(20000, 2, 2))
    own, text_other, image_other = cosines[:, [0, 1], [0, 1]], cosines[:, [0, 1], [1, 0]], cosines[:, [1, 0], [0, 1]]
    text, image = (own > text_other).all(1), (own > image_other).all(1)
    for share, name in ((text.mean(), "text"), (image.mean(), "image"), ((text & image).mean(), "group")):
        assert share == pytest.approx(winoground.CHANCE[name], abs=0.01)


def test_other_modes_ignore_such_files_and_bad_rows_are_refused(context, tmp_path):
    assert winoground.applies(context.data, context.config) is None
    for mode in (compositional, paraphrases):
        assert mode.applies(context.data, context.config)
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"image_0": "0", "image_1": "1", "caption_0": "a", "caption_1": "b"}\n{"image_0": "0"}\n')
    assert form_of([path]) is not None
    with pytest.raises(UserError, match="mixed.jsonl line 2"):
        read_groups([path])
