"""The written comparisons of pc_clip/evals/comparisons name classes that exist, both ways, and say something."""

import re
from pathlib import Path

import pytest
import yaml

from pc_clip.data.class_text import class_names
from pc_clip.data.registry import READERS, open_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.evals import comparative
from pc_clip.models.clip import open_clip
from pc_clip.write.cleaning import clean

FILES = sorted(comparative.FOLDER.glob("*.yaml"))
CONTEXT = 77  # tokens of CLIP's text tower, with the start and the end
FORM = re.compile(r"The first image shows (.+), while the second shows (.+)\.")

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
of_classes = pytest.mark.parametrize("path", [f for f in FILES if f.stem != "example"], ids=lambda path: path.stem)


def questions(path: Path) -> dict[str, list[dict[str, str]]]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def comparisons(path: Path) -> list[dict[str, str]]:
    return [comparison for of_one in questions(path).values() for comparison in of_one]


def halves(text: str) -> tuple[str, str]:
    """What is said of the first image, and of the second."""
    found = FORM.fullmatch(text)
    assert found, text
    return found.groups()


def says(text: str, name: str) -> bool:
    """Whether a class name, or its plural, is among the words of a text."""
    return re.search(rf"(?<!\w){re.escape(name)}(?:e?s)?(?!\w)", text, re.IGNORECASE) is not None


def test_every_set_with_class_names_has_comparisons():
    known = {"cifar10", "cifar100", "eurosat", "sun397", "cub", "flowers102", "food101", "awa2", "example"}
    assert known <= {path.stem for path in FILES} <= READERS.keys()


@of_classes
def test_the_only_question_is_the_class_and_its_classes_exist(path):
    assert list(questions(path)) == ["class"]
    said = set(class_names(path.stem).said.values())
    for comparison in comparisons(path):
        assert {comparison["class_a"], comparison["class_b"]} <= said


def test_the_questions_and_classes_of_the_example_exist(small_example):
    path = comparative.FOLDER / "example.yaml"
    assert comparative.read_comparisons(path, open_dataset("example", split="val")) == questions(path)


@every_file
def test_each_pair_is_told_once_from_either_end(path):
    """Of (b, a) the first half says what the second half says of (a, b): no fact is on the wrong side of one."""
    for name, of_one in questions(path).items():
        text = {(c["class_a"], c["class_b"]): c["text"] for c in of_one}
        assert len(text) == len(of_one), f"a pair of {name} occurs twice"
        for a, b in text:
            assert a != b
            assert (b, a) in text, f"{a} against {b} has no other direction"
            first, second = halves(text[a, b])
            assert first != second
            assert halves(text[b, a]) == (second, first)


@every_file
def test_the_sentences_are_as_training_takes_them(path):
    for text in {c["text"] for c in comparisons(path)}:
        assert swap_roles(text) is not None, text
        assert clean(text) == (text, "kept")


@of_classes
def test_no_sentence_says_the_name_of_its_classes(path):
    for comparison in comparisons(path):
        for name in (comparison["class_a"], comparison["class_b"]):
            assert not says(comparison["text"], name), comparison


@every_file
def test_no_sentence_is_cut_by_the_text_tower(path):
    tokenizer = open_clip.SimpleTokenizer()
    for text in {c["text"] for c in comparisons(path)}:
        assert len(tokenizer.encode(text)) + 2 <= CONTEXT, text
