"""Mode paraphrases: SugarCrepe++'s two captions against a wrong one."""

import json

import numpy as np
import pytest
from conftest import SHARED
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import read_groups
from pc_clip.evals import EvalContext, compositional, paraphrases

TEXTS = {"same": [1.0, 0.1], "alike": [1.0, 0.2], "far": [0.5, 0.9], "wrong": [0.1, 1.0]}


def context_of(tmp_path, rows, monkeypatch) -> EvalContext:
    path = tmp_path / "swap_obj.json"
    path.write_text(json.dumps([{"filename": f"{n}.jpg", **row} for n, row in rows]))
    clip = FakeClip(TEXTS, [[1.0, 0.0], [0.0, 1.0]])
    data = Dataset("made", "test", ["0", "1"], None, "f")
    context = EvalContext(clip, lambda: clip, data, EvaluateConfig(statements=[str(path)]))
    monkeypatch.setattr(paraphrases, "grey_image", lambda clip: clip.z[0])
    monkeypatch.setattr(EvalContext, "on", lambda self, some: type("On", (), {"z": clip.z[[int(i) for i in some.ids]]}))
    return context


def test_both_captions_have_to_be_nearer_than_the_wrong_one(tmp_path, monkeypatch):
    def row(caption, caption2, negative):
        return {"caption": caption, "caption2": caption2, "negative_caption": negative}

    rows = [
        (0, row("same", "alike", "wrong")),  # right, and the texts too
        (0, row("same", "wrong", "alike")),  # the paraphrase is farther than the wrong one, in image and text
        (1, row("wrong", "far", "same")),  # right; "far" is nearer to "wrong" than to "same"
        (7, row("same", "alike", "wrong")),  # its image is not there
    ]
    result = paraphrases.evaluate(context_of(tmp_path, rows, monkeypatch))
    assert result.metrics["i2t"] == result.metrics["text"] == result.metrics["i2t_swap_obj"] == pytest.approx(2 / 3)
    assert result.metrics["i2t_blind_grey"] == pytest.approx(1 / 3)  # the grey picture is image 0
    assert (result.n, result.details["absent"], result.details["photographs"]) == (3, 1, 2)


def test_other_files_and_other_modes_do_not_mix(tmp_path, monkeypatch):
    rows = [(0, {"caption": "same", "caption2": "alike", "negative_caption": "wrong"})]
    context = context_of(tmp_path, rows, monkeypatch)
    assert paraphrases.applies(context.data, context.config) is None
    assert "SugarCrepe" in compositional.applies(context.data, context.config)
    assert "SugarCrepe++" in paraphrases.applies(context.data, EvaluateConfig())
    context.data.ids[:] = ["5", "6"]
    with pytest.raises(UserError, match="of none of the 1 rows are the images in made/test"):
        paraphrases.evaluate(context)


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="SugarCrepe++'s files are not at hand")
def test_the_published_files_are_read_whole():
    triplets = read_groups([SHARED / "benchmarks" / "sugarcrepe_pp"])
    assert len(triplets) == 4757 and len(np.unique([triplet.kind for triplet in triplets])) == 5
