"""The Python API: every example of its docstrings runs and gives what stands there."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pc_clip
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.interface import api
from pc_clip.interface import model as model_in_hand
from pc_clip.write import generate

RED, BLUE = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))


@pytest.mark.slow
def test_examples_in_docstrings(small_example, monkeypatch):
    small = GenerateConfig(name="example", split="train", n_images=100, n_pairs=200)
    monkeypatch.setattr(generate, "of_example", lambda name: small)
    known = {"pc_clip": pc_clip, "Image": Image, "red": RED, "blue": BLUE}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    finder = doctest.DocTestFinder()
    tests = [test for module in (api, model_in_hand) for test in finder.find(module, extraglobs=known) if test.examples]
    assert len(tests) == 10  # every public function and method
    for test in tests:
        assert runner.run(test).failed == 0, test.name


def test_a_folder_and_its_paths_are_embedded_alike(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, image in (("a.png", RED), ("b.png", BLUE)):
        image.save(tmp_path / "mine" / name)
    model = pc_clip.load("example")
    one_by_one = model.embed_images(sorted((tmp_path / "mine").glob("*.png")))
    assert torch.allclose(model.embed_images(tmp_path / "mine"), one_by_one, atol=1e-6)
    assert model.rank(tmp_path / "mine", "a red object", "a blue object").image.tolist() == ["a.png", "b.png"]


def test_pictures_of_16_bits_are_one_whether_opened_or_named():
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save("deep.png")
    model = pc_clip.load("example")
    assert torch.equal(model.embed_images([Image.open("deep.png")]), model.embed_images(["deep.png"]))


def test_numbers_of_numpy_and_paths_are_settings():
    assert api._flags(None, {"a": np.int64(3), "b": [Path("x"), Path("y")]}) == ["--a", "3", "--b", '["x", "y"]']


def test_paths_and_single_captions_are_taken_as_they_are():
    written = pc_clip.write_differences({"a.jpg": "a dog", "b.jpg": ["two cats"]}, name="pets", out=Path("mine"))
    assert len(written) and all("dog" in text and "cats" in text for text in written.text)
    for name in ("before", "after"):
        Path(name).mkdir()
        RED.save(f"{name}/a.png")
    with pytest.raises(UserError, match="cannot write: it has no caption decoder"):
        pc_clip.load("example").caption("before", Path("after"))


def test_a_text_is_a_text_and_not_its_letters():
    model = pc_clip.load("example")
    assert torch.equal(model.embed_texts("a red object"), model.embed_texts(["a red object"]))
    assert model.difference([RED], [BLUE], "a red object").shape == (1, 1)


def test_comparisons_move_the_prompts_they_speak_of():
    model = pc_clip.load("example")
    comparisons = [{"class_a": "red", "class_b": "blue", "text": "the first is warmer"}]
    plain = model.zeroshot([RED, BLUE], ["red", "blue"])
    known = model.zeroshot([RED, BLUE], ["red", "blue"], comparisons)
    assert np.allclose(plain.sum(axis=1), 1)
    assert not np.allclose(plain, known)
    assert np.allclose(plain, model.zeroshot([RED, BLUE], ["red", "blue"], comparisons, alpha=1.0), atol=1e-6)


UNKNOWN = {"class_a": "rde", "class_b": "blue", "text": "the first is warmer"}


def test_what_does_not_fit_is_said_as_on_the_command_line():
    with pytest.raises(UserError, match="no setting train.step. Did you mean 'train.steps'"):
        pc_clip.finetune(train={"step": 3})
    with pytest.raises(UserError, match="1 first images and 2 second ones"):
        pc_clip.load("example").difference([RED], [RED, BLUE], ["a"])
    with pytest.raises(UserError, match="mode is 'everything'"):
        pc_clip.evaluate(modes=["everything"])
    example = pc_clip.load("example")
    for asked, message in [
        ({"classes": "red"}, "a list of two names or more, found 'red'"),
        (
            {"classes": ["red", "blue"], "templates": "a {} object", "comparisons": [UNKNOWN]},
            "name 'rde', which is none",
        ),
        ({"classes": ["red", "blue"], "templates": ["an object"]}, "prompts with {} for the class"),
    ]:
        with pytest.raises(UserError, match=message):
            example.zeroshot([RED, BLUE], **asked)
    with pytest.raises(AttributeError, match="no attribute 'training'"):
        pc_clip.training  # noqa: B018
