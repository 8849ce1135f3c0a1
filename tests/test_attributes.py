"""Attribute tasks: joined by the names of classes and attributes, never by where they stand."""

import numpy as np
import pytest
from made_space import FakeClip
from PIL import Image

from pc_clip.core.config.evaluate import DifferenceConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.registry import READERS
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, difference, rank

TASK = """dataset: zoo
attributes:
  size: {more: a larger animal, less: a smaller animal, high: a large animal, low: a small animal, %s}
"""
LISTS = "high_classes: [bear], low_classes: [mouse]"
GRADED = "graded: big, minus: small, gap: 1.5"


def zoo(classes=("bear", "cat", "mouse"), per_class=4) -> Dataset:
    """Images of a bear, a cat and a mouse in turn, whatever the order in which the classes are listed."""
    names = np.tile(["bear", "cat", "mouse"], per_class)
    target = np.array([classes.index(name) for name in names])
    graded = {"big": {"bear": 1.0, "cat": 0.0, "mouse": 0.0}, "small": {"bear": 0.0, "cat": 0.0, "mouse": 1.0}}
    question = Question("class", tuple(classes), np.arange(len(names)), target, graded=graded)
    ids = [f"{n}" for n in range(len(names))]
    return Dataset("zoo", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", questions=(question,))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "FOLDER", tmp_path / "tasks")
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


@pytest.mark.parametrize("defined", [LISTS, GRADED])
def test_class_attributes_are_joined_by_name_in_any_order(folder, defined):
    """Joined by position, as the reference's Flowers and AwA2 are, this fails."""
    (folder / "zoo_size.yaml").write_text(TASK % defined)
    for classes in (("bear", "cat", "mouse"), ("mouse", "bear", "cat"), ("cat", "mouse", "bear")):
        (actual,) = attributes.of(zoo(classes), EvaluateConfig())
        assert actual.name == actual.task == "zoo_size"
        clear = actual.value[:, None] - actual.value[None] > actual.gap
        names = np.tile(["bear", "cat", "mouse"], 4)
        assert {(names[i], names[j]) for i, j in zip(*np.nonzero(clear))} == {("bear", "mouse")}


def test_a_task_that_does_not_fit_or_is_unknown_says_why(folder):
    for n, (content, message) in enumerate([
        (TASK % "high_classes: [beer], low_classes: [mouse]", "size: 'beer' is not a class .*Did you mean 'bear'"),
        (TASK % "high_classes: [bear], low_classes: [bear]", "'bear' is named twice"),
        (TASK % "graded: bigg", "grades no 'bigg'. Did you mean 'big'"),
        (TASK % "high_classes: [bear]", "size lacks.*: low_classes$"),
        (TASK % "graded: big, colour: red", "has beside .*: colour$"),
        ("dataset: zoo\nattributes: {size: {graded: big}}", "size lacks.*: high, less, low, more$"),
        ("attributes: {}", "is not an attribute task"),
    ]):  # fmt: skip
        path = folder / f"zoo_{n}.yaml"
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            attributes.of(zoo(), EvaluateConfig())
        path.unlink()
    (folder / "zoo_size.yaml").write_text(TASK % LISTS)
    with pytest.raises(UserError, match="zoo has no task 'zoo_sice'. Did you mean 'zoo_size'"):
        attributes.of(zoo(), EvaluateConfig(tasks=["zoo_sice"]))


def subject_of(data: Dataset, **config) -> EvalContext:
    """Bears, cats and mice along one axis; true sentences point from the less to the more, told either way."""
    texts = {"a large animal": [1.0, 0.0], "a small animal": [-1.0, 0.0]}
    for wording in range(4):
        texts[contrast("a larger animal", "a smaller animal", wording)] = [1.0, 0.0]
        texts[contrast("a smaller animal", "a larger animal", wording)] = [-1.0, 0.0]
    z = np.tile([[1.0, 0.1], [0.5, 1.0], [-1.0, 0.1]], (4, 1))
    clip = FakeClip(texts | TOLD, z.tolist())
    context = EvalContext(
        clip, lambda: clip, data, EvaluateConfig(difference=DifferenceConfig(**({"n_pairs": 20, "draws": 2} | config)))
    )
    context.__dict__["z"] = context.__dict__["base_z"] = clip.z
    return context


TOLD = {
    "The first image shows a heavy animal, while the second shows a tiny one.": [1.0, 0.0],
    "The second image shows a heavy animal, while the first shows a tiny one.": [-1.0, 0.0],
    "This is a photo of a bear.": [1.0, 0.0],
    "This is a photo of a cat.": [0.0, 1.0],
    "This is a photo of a mouse.": [-1.0, 0.0],
}


def test_difference_and_ranking_of_a_task(folder):
    (folder / "zoo_size.yaml").write_text(TASK % LISTS)
    result = difference.evaluate(subject_of(zoo()))
    for name in ("difference", "two_way", "reversed", "caption_subtraction"):
        assert result.metrics[name] == result.metrics[f"{name}_zoo_size"] == 1.0
        assert result.intervals[name] == pytest.approx((1.0, 1.0))
    assert result.n == 40 and result.details["zoo_size"]["standard_error"]["difference"] == 0.0
    ranked = rank.evaluate(subject_of(zoo()))
    assert ranked.metrics["rank"] == ranked.metrics["rank_one_sentence"] == ranked.metrics["rank_by_subtraction"] == 1.0
    assert ranked.intervals["rank_zoo_size"] == ranked.intervals["rank"] == pytest.approx((1.0, 1.0))


def test_the_headline_is_the_mean_over_tasks_and_lies_in_its_interval(folder):
    """A task of two attributes counts as much as one of a single attribute; a wrong attribute lowers its task alone."""
    words = "more: a larger animal, less: a smaller animal, high: a large animal, low: a small animal"
    two = "high_classes: [bear], low_classes: [mouse]", "high_classes: [mouse], low_classes: [bear]"
    (folder / "zoo_size.yaml").write_text(TASK % LISTS)
    (folder / "zoo_both.yaml").write_text(
        f"dataset: zoo\nattributes: {{right: {{{words}, {two[0]}}}, wrong: {{{words}, {two[1]}}}}}"
    )
    for actual, name in (
        (rank.evaluate(subject_of(zoo())), "rank"),
        (difference.evaluate(subject_of(zoo())), "difference"),
    ):
        assert actual.metrics[f"{name}_zoo_size"] == 1.0 and actual.metrics[f"{name}_zoo_both"] == 0.5
        assert actual.metrics[name] == 0.75
        low, high = actual.intervals[name]
        assert low < 0.75 < high


def test_sentences_about_classes_are_asked_of_images_of_those_classes():
    (text, *_) = TOLD
    with open("told.jsonl", "w") as file:
        file.write(to_line(Difference("bear", "mouse", text)))
    result = difference.evaluate(subject_of(zoo(("mouse", "bear", "cat")), sentences="told.jsonl"))
    assert result.metrics == {"sign": 1.0, "two_way": 1.0, "mirrored": 1.0, "caption_subtraction": 1.0}
    assert result.n == 2 and result.details["classes"] == 2
    with open("told.jsonl", "w") as file:
        file.write(to_line(Difference("mouse", "bear", text)))
    result = difference.evaluate(subject_of(zoo(), sentences="told.jsonl"))
    assert (result.metrics["sign"], result.metrics["caption_subtraction"]) == (0.0, 1.0)


def test_no_pair_that_differs_is_said(folder):
    (folder / "zoo_size.yaml").write_text(TASK % "high_classes: [bear], low_classes: []")
    with pytest.raises(UserError, match="no two of the images differ in zoo_size"):
        difference.evaluate(subject_of(zoo()))


def test_the_tasks_of_the_house_are_well_formed():
    """Every file reads, and names a data set that has a reader."""
    for path in attributes.FOLDER.glob("*.yaml"):
        content = attributes.read_task(path)
        assert content["dataset"] in READERS
    assert attributes.tasks_of("awa2") == ["awa2", "awa2_size"]
