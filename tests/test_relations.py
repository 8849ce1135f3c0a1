"""The table of relations, and sentences with their relation contradicted."""

import json
import re

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.core.errors import UserError
from pc_clip.data.relations import RELATIONS, category, contradict, find_relation

CATEGORIES = {
    "Adjacency", "Directional", "Orientation", "Projective", "Proximity", "Topological", "Unallocated", "Size",
}  # fmt: skip


def sentence(relation: str) -> str:
    return f"The cat {'' if RELATIONS[relation].verb else 'is '}{relation} the dog."


def choices(relation: str) -> tuple[str, ...]:
    known = RELATIONS[relation]
    return known.opposites or (f"does not {known.verb}" if known.verb else f"not {relation}",)


def holds(text: str, relation: str) -> bool:
    """Whether a relation stands in a sentence, no longer one of the table covering it. Apart from the code tested."""
    longer = [r for r in RELATIONS if relation in r and r != relation]
    for name in sorted(longer, key=len, reverse=True):
        text = re.sub(rf"\b{name}\b", "~", text)
    return re.search(rf"(?<!\w){relation}(?!\w)", text) is not None


def test_a_relation_is_replaced_by_its_opposites_only():
    for relation, known in RELATIONS.items():
        assert known.category in CATEGORIES
        drawn = {contradict(sentence(relation), relation, seed) for seed in range(60)}
        start = "The cat " if known.verb else "The cat is "
        assert drawn == {f"{start}{choice} the dog." for choice in choices(relation)}
        assert not known.opposites or not any(holds(text, relation) for text in drawn)


def test_opposites_contradict_each_other_and_a_negated_relation_loses_its_not():
    for relation, known in RELATIONS.items():
        for opposite in known.opposites:
            back = RELATIONS[opposite].opposites
            assert back and not {*back} & {*known.opposites}, f"{relation}, {opposite}"
        if known.verb:
            assert contradict(f"The cat does not {known.verb} the dog.", relation) == sentence(relation)
        else:
            for no in ("is not", "isn't"):
                assert contradict(f"The cat {no} {relation} the dog.", relation) == sentence(relation)
    for one, other in {"near": "on", "next to": "touching", "in": "on", "left of": "above", "behind": "under"}.items():
        assert other not in RELATIONS[one].opposites and one not in RELATIONS[other].opposites  # merely different


def test_categories_are_vsrs():
    names = {"left of": "Projective", "on": "Topological", "far away from": "Proximity", "facing": "Orientation",
             "at the edge of": "Adjacency", "into": "Directional", "hugging": "other"}  # fmt: skip
    assert {relation: category(relation) for relation in names} == names


def test_a_sentence_is_contradicted_at_its_relation_and_nowhere_else():
    for text, relation, wanted in [
        ("The person with onions is on the button.", "on", "The person with onions is off the button."),
        ("The bird on top of the car is on the road.", "on", "The bird on top of the car is off the road."),
        ("THE CAT IS LEFT OF THE DOG", "left of", "THE CAT IS RIGHT OF THE DOG"),
        ("The cat is left  of it.", "Left of", "The cat is right of it."),
        ("Touching the dog is the cat.", "touching", "Not touching the dog is the cat."),
        ("Not touching the dog, it sleeps.", "touching", "Touching the dog, it sleeps."),
        ("The cat isn’t directly behind it.", "behind", "The cat is directly behind it."),
        ("The box doesn't contain a cat.", "contains", "The box contains a cat."),
        ("The cat is leaning on it.", "leaning on", "The cat is not leaning on it."),
        ("The cat is not leaning on it.", "on", "The cat is leaning on it."),
        ("The cat is on the mat, not in the box.", "on", "The cat is off the mat, not in the box."),
        ("The cat on the mat is on the bed.", "on", "The cat off the mat is off the bed."),
    ]:
        assert contradict(text, relation) == wanted


def test_a_sentence_that_cannot_be_contradicted_is_shown_in_the_error():
    for text, relation in [
        ("The person eats an onion.", "on"),  # not as a word of its own
        ("The bird is on top of the car.", "on"),  # a longer relation covers it
        ("The cat hugs the dog.", "hugs"),  # unknown, and not behind "is"
        ("No cat is on the mat.", "on"),  # both may be true
        ("The cat can't be in the box.", "in"),
    ]:
        with pytest.raises(UserError, match=re.escape(repr(text))):
            contradict(text, relation)


@given(
    st.lists(st.sampled_from(["person", "onion", "button", "inn", "Binoculars", "overall", "by-pass"]), max_size=4),
    st.lists(st.sampled_from(["person's", "downtown", "underwear", "lawn", "tattoo", "inside-out"]), max_size=4),
    st.sampled_from(sorted(RELATIONS)),
    st.integers(0, 3),
)
def test_words_around_the_relation_are_never_touched(before, after, relation, seed):
    first, last = " ".join(["The", *before, "is "]), " ".join([" the", *after, "dog."])
    text = contradict(first + relation + last, relation, seed)
    assert text.startswith(first) and text.endswith(last)
    assert text[len(first) : -len(last)] in choices(relation)


def test_the_opposite_depends_on_seed_and_sentence_alone():
    texts = [f"The cat is above the {thing}." for thing in ("dog", "bed", "car", "bus", "cup", "bowl", "cake", "tv")]
    forwards = [contradict(text, "above", 7) for text in texts]
    assert forwards == [contradict(text, "above", 7) for text in reversed(texts)][::-1]
    assert len({text.split()[3] for text in forwards}) > 1
    assert forwards != [contradict(text, "above", 8) for text in texts]


def test_the_relation_of_a_sentence_is_found():
    for text, relation in {
        "The cat is at the left side of the dog.": "at the left side of",
        "The cat in front of the house is on the mat.": "on",
        "A cat in a box in front of a house": "in front of",
        "The box does not contain the cat.": "contains",
        "THE CUBE IS LARGER THAN THE BALL": "larger than",
        "The man is about to eat a button.": None,
        "The cat is at the pizza.": "at",
        "The car in the street is red.": None,
        "The car in the street is near the bus.": "near",
        "In front of the house is a car.": "in front of",
        "A cat on a mat that is red": "on",
        "": None,
    }.items():
        assert find_relation(text) == relation, text


def test_every_sentence_of_vsr_is_contradicted_and_keeps_its_other_words():
    files = sorted((SHARED / "vsr").glob("*/*.jsonl"))
    if not files:
        pytest.skip(f"VSR's files are not at {SHARED / 'vsr'}")
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 16023
    for row in rows:
        text, relation = row["caption"], row["relation"]
        other = contradict(text, relation)
        place = re.search(rf"(?<!\w){re.escape(relation)}(?!\w)", text)
        assert other.startswith(text[: place.start()]) and other.endswith(text[place.end() :])
        assert other[place.start() : len(other) - len(text) + place.end()] in choices(relation)
        assert find_relation(text) == relation
