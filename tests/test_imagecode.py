"""Mode imagecode: a sentence picks one of several images."""

import json

import pytest
import torch
from conftest import SHARED
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import read_groups
from pc_clip.evals import EvalContext, imagecode

TEXTS = {"more to the left": [-1.0, 0.0], "the most upright": [0.0, 1.0], "right": [1.0, 0.0]}


def context_of(tmp_path, content, monkeypatch) -> EvalContext:
    path = tmp_path / "valid_data.json"
    path.write_text(json.dumps(content))
    z = torch.tensor([[0.99, 0.1], [0.9, 0.4], [0.95, 0.3], [1.0, 0.0], [0.0, 1.0]])
    clip = FakeClip(TEXTS, torch.nn.functional.normalize(z, dim=-1).tolist())
    names = [
        "open-images-1/img2.jpg",
        "open-images-1/img10.jpg",
        "open-images-1/img0.jpg",
        "MSR/img0.jpg",
        "MSR/img1.jpg",
    ]
    data = Dataset("made", "test", names, None, "f")
    rows = {name: n for n, name in enumerate(names)}
    on = lambda self, some: type("On", (), {"z": clip.z[[rows[name] for name in some.ids]]})  # noqa: E731
    monkeypatch.setattr(EvalContext, "on", on)
    return EvalContext(clip, lambda: clip, data, EvaluateConfig(statements=[str(path)]))


def test_a_sentence_picks_by_the_image_or_by_what_sets_it_apart(tmp_path, monkeypatch):
    content = {
        "open-images-1": {"10": "more to the left", "2": "right"},
        "MSR": {"1": "the most upright", "0": "the most upright"},
        "gone": {"3": "right"},
    }
    result = imagecode.evaluate(context_of(tmp_path, content, monkeypatch))
    assert result.metrics["plain"] == result.metrics["difference"] == 0.75
    assert (result.metrics["plain_static"], result.metrics["plain_video"]) == (1.0, 0.5)
    assert result.metrics["chance"] == pytest.approx((2 / 3 + 2 / 2) / 4)
    assert (result.n, result.details) == (4, {"sets": 2, "absent": 1})


def test_a_difference_is_from_the_mean_of_the_others():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    expected = torch.nn.functional.normalize(torch.tensor([[1.0, -2.0], [-0.5, -0.5], [-0.5, 2.5]]), dim=-1)
    torch.testing.assert_close(imagecode.from_the_others(z), expected)


def test_a_set_without_the_image_that_is_meant_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="set MSR has no image 7, which a sentence means"):
        imagecode.evaluate(context_of(tmp_path, {"MSR": {"7": "right"}}, monkeypatch))
    with pytest.raises(UserError, match="made/test has none of the 1 sets of images"):
        imagecode.evaluate(context_of(tmp_path, {"gone": {"7": "right"}}, monkeypatch))


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="ImageCoDe's file is not at hand")
def test_the_published_file_is_read_whole():
    picks = read_groups([SHARED / "benchmarks" / "imagecode" / "valid_data.json"])
    assert len(picks) == 2302 and all(0 <= pick.target < 10 for pick in picks)
    assert {pick.kind for pick in picks} == {"video", "static"}
