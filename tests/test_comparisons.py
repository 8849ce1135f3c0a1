"""The written comparisons of pc_clip/evals/comparisons name classes that exist, both ways, and say something."""

import re

import pytest
import yaml

from pc_clip import evals
from pc_clip.data.class_names import class_names
from pc_clip.data.registry import READERS, open_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.evals import comparative
from pc_clip.models.clip import open_clip
from pc_clip.write.cleaning import clean

QUESTIONS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in evals.COMPARISONS.glob("*.yaml")}
CONTEXT = 77  # tokens of CLIP's text tower, with the start and the end
FORM = re.compile(r"The first image shows (.+), while the second shows (.+)\.")


def test_every_set_with_class_names_has_comparisons_of_classes_that_exist(small_example):
    known = {"cifar10", "cifar100", "eurosat", "sun397", "cub", "flowers102", "food101", "awa2", "example"}
    assert known <= QUESTIONS.keys() <= READERS.keys()
    for name in QUESTIONS.keys() - {"example"}:
        assert list(QUESTIONS[name]) == ["class"]
        classes = set(class_names(name).display_names.values())
        for comparison in QUESTIONS[name]["class"]:
            named = {comparison["class_a"], comparison["class_b"]}
            assert named <= classes, comparison
            for each in named:  # no sentence says the name, or its plural
                plural = rf"(?<!\w){re.escape(each)}(?:e?s)?(?!\w)"
                assert not re.search(plural, comparison["text"], re.IGNORECASE), comparison
    path = evals.COMPARISONS / "example.yaml"
    assert comparative.read_comparisons(path, open_dataset("example", split="val")) == QUESTIONS["example"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_class_pair_is_compared_once_in_both_orders(name):
    """Of (b, a) the first half says what the second half says of (a, b): no fact is on the wrong side of one."""
    tokenizer = open_clip.SimpleTokenizer()
    for comparisons in QUESTIONS[name].values():
        text = {(c["class_a"], c["class_b"]): c["text"] for c in comparisons}
        assert len(text) == len(comparisons), "a pair occurs twice"
        for (a, b), sentence in text.items():
            assert a != b and (b, a) in text, f"{a} against {b} has no other direction"
            halves, other = FORM.fullmatch(sentence), FORM.fullmatch(text[b, a])
            assert halves and other and halves[1] != halves[2] and halves.groups() == other.groups()[::-1], sentence
            assert swap_roles(sentence) is not None and clean(sentence) == (sentence, "kept"), sentence
            assert len(tokenizer.encode(sentence)) + 2 <= CONTEXT, f"the text tower cuts {sentence}"
