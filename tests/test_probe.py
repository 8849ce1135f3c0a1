"""The linear probe on embeddings whose classes lie where the test puts them."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from made_space import SeeingClip
from PIL import Image

from pc_clip import evals
from pc_clip.core.config.evaluate import EvaluateConfig, ProbeConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.registry import open_dataset
from pc_clip.evals import EvalContext, probe

CLASSES = ("a", "b", "c")


RIGHT = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
WRONG = {"a": [0, 1, 0], "b": [0, 0, 1], "c": [1, 0, 0]}


def split(name, target, strength=200, classes=CLASSES):
    """Images of class n are strong in colour n and have a little of the others."""
    target = np.array(target)
    rng = np.random.default_rng(len(target))
    colours = rng.integers(0, 40, (len(target), 3))
    colours[np.arange(len(target)), target] += strength
    question = Question("q", classes, np.arange(len(target)), target, ("{}",))
    return Dataset(
        "example", name, [f"{name}{n}" for n in range(len(target))],
        lambda n: Image.new("RGB", (4, 4), tuple(int(v) for v in colours[n])), f"{name}{len(target)}",
        questions=(question,),
    )  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """Evaluate on made-up splits in place of the example's."""

    def evaluate(texts, train, test, scale=100.0, **settings):
        clip, model = (
            SeeingClip(texts, scale),
            EvaluateConfig(probe=ProbeConfig(**{"shots": [1, 4], "draws": 3, **settings})),
        )
        monkeypatch.setattr(evals, "open_dataset", lambda *_, **__: train)
        result = probe.evaluate(EvalContext(clip, lambda: None, test, model))
        return SimpleNamespace(**vars(result), seen=clip.seen)

    return evaluate


TRAIN, TEST = [0, 1, 2] * 10, [0, 1, 2] * 8


def test_separable_classes_are_learnt_from_one_shot(run):
    """Sure and wrong prompts take the sum down with them; a model that is unsure of them leaves it to the probe."""
    right, wrong = (run(texts, split("train", TRAIN), split("test", TEST)) for texts in (RIGHT, WRONG))
    unsure = run(WRONG, split("train", TRAIN), split("test", TEST), scale=0.01)
    with_text = {"probe_1shot_with_text", "probe_4shot_with_text"}
    assert right.metrics == dict.fromkeys({"zeroshot", "probe_1shot", "probe_4shot", *with_text}, 1.0)
    assert right.n == 24 and right.details["standard_error"]["probe_1shot"] == 0.0
    assert right.intervals["probe_4shot"] == (1.0, 1.0)
    assert wrong.metrics["zeroshot"] == wrong.metrics["probe_1shot_with_text"] == 0.0
    assert wrong.metrics["probe_1shot"] == wrong.metrics["probe_4shot"] == 1.0
    assert unsure.metrics["probe_1shot_with_text"] == 1.0


def test_labels_that_mean_nothing_are_not_learnt(run):
    """Every image is alike up to noise, so accuracy is that of guessing."""
    actual = run(RIGHT, split("train", TRAIN, strength=0), split("test", [0, 1, 2] * 40, strength=0), draws=5)
    assert actual.metrics["probe_4shot"] == pytest.approx(1 / 3, abs=0.12)
    assert actual.details["standard_error"]["probe_4shot"] > 0


def test_more_shots_keep_the_fewer_ones_and_every_draw_is_another(run):
    question = split("train", TRAIN).questions[0]
    few, many = probe.draw_shots(question, 2, 3, seed=0), probe.draw_shots(question, 5, 3, seed=0)
    for a, b in zip(few, many):
        for n, (rows, more) in enumerate(zip(a, b)):
            assert rows.tolist() == more[:2].tolist()
            assert len(set(more.tolist())) == 5
            assert all(question.target[row] == n for row in more)
    assert many[0][0].tolist() != many[1][0].tolist()
    assert many[0][0].tolist() == probe.draw_shots(question, 5, 1, seed=0)[0][0].tolist()


def test_only_the_images_that_were_drawn_are_embedded(run):
    actual = run(RIGHT, split("train", [0, 1, 2] * 50), split("test", TEST), shots=[1, 2], draws=2)
    assert actual.seen <= len(TEST) + 2 * 2 * 3
    again = run(RIGHT, split("train", [0, 1, 2] * 50), split("test", TEST), shots=[1, 2], draws=2)
    assert again.seen == 0  # all from the cache


def test_small_classes_use_all_images_empty_ones_are_never_predicted(run):
    actual = run(RIGHT, split("train", [0] * 9 + [1] * 2), split("test", TEST))
    assert actual.details["questions"]["q"]["classes_with_fewer"] == {"1shot": 1, "4shot": 2}
    for name in ("probe_1shot", "probe_4shot", "probe_4shot_with_text"):
        assert actual.metrics[name] == pytest.approx(2 / 3)  # all of a and b, none of c


def test_c_is_chosen_where_there_are_enough_images():
    z, target = np.eye(3).repeat(4, 0), np.arange(3).repeat(4)
    assert probe.choose_c(z, target, 1, seed=0) == 10.0
    assert probe.choose_c(z, target, 4, seed=0) == max(probe.CS)  # without noise the loosest penalty is the best
    noise = np.random.default_rng(0).normal(size=(12, 3))
    assert probe.choose_c(noise / np.linalg.norm(noise, axis=1, keepdims=True), target, 4, seed=0) == min(probe.CS)
    assert probe.choose_c(z[:9], target[:9], 4, seed=0) == 10.0  # one class has a single image: no folds


def test_the_probe_needs_another_split_with_the_same_classes(run):
    train, test = split("train", TRAIN), split("test", TEST)
    assert probe.applies(train, EvaluateConfig()) is not None
    for learnt, reported, settings, message in (
        (split("train", TRAIN, classes=("x", "y", "z")), test, {}, "no labelled images of the classes"),
        (split("train", [1] * 9), test, {}, "no labelled images of the classes"),
        (train, test, {"shots": [0, 2]}, "shots is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(RIGHT, learnt, reported, **settings)


@pytest.mark.slow
def test_on_the_example_more_images_help_and_the_solver_always_converges(small_example, example_clip):
    subject = EvalContext(
        example_clip,
        lambda: None,
        open_dataset("example", split="test"),
        EvaluateConfig(probe=ProbeConfig(shots=[1, 8], draws=2)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = probe.evaluate(subject)
    assert result.metrics["probe_8shot"] > result.metrics["probe_1shot"] + 0.1
    assert result.details["questions"].keys() == {q.name for q in subject.data.questions}
    assert result.n == 80
