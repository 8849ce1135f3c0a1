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
    "Adjacency",
    "Directional",
    "Orientation",
    "Projective",
    "Proximity",
    "Topological",
    "Unallocated",
    "Size",
}
VSR = SHARED / "vsr"
WITH_VERB = {name for name, relation in RELATIONS.items() if relation.verb}


def vsr_rows() -> list[dict]:
    files = sorted(VSR.glob("*/*.jsonl"))
    if not files:
        pytest.skip(f"VSR's files are not at {VSR}")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def sentence(relation: str) -> str:
    return f"The cat {'' if relation in WITH_VERB else 'is '}{relation} the dog."


def drawn(relation: str) -> set[str]:
    return {contradict(sentence(relation), relation, seed) for seed in range(60)}


def holds(text: str, relation: str) -> bool:
    """Whether a relation stands in a sentence, no longer one of the table covering it. Apart from the code tested."""
    longer = [r for r in RELATIONS if relation in r and r != relation]
    for name in sorted(longer, key=len, reverse=True):
        text = re.sub(rf"\b{name}\b", "~", text)
    return re.search(rf"(?<!\w){relation}(?!\w)", text) is not None


# -- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_replaced_by_each_of_its_opposites_and_by_nothing_else(relation):
    known = RELATIONS[relation]
    assert known.category in CATEGORIES
    if known.opposites:
        assert drawn(relation) == {f"The cat is {opposite} the dog." for opposite in known.opposites}
        assert not any(holds(text, relation) for text in drawn(relation))
    elif known.verb:
        assert drawn(relation) == {f"The cat does not {known.verb} the dog."}
    else:
        assert drawn(relation) == {f"The cat is not {relation} the dog."}


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_opposite_of_an_opposite_does_not_contradict_the_relation(relation):
    for opposite in RELATIONS[relation].opposites:
        back = RELATIONS[opposite].opposites
        assert back, f"{opposite} has no opposite, not even one like {relation}"
        assert not {*back} & {*RELATIONS[relation].opposites}


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_negated_relation_loses_its_not(relation):
    known = RELATIONS[relation]
    negated = f"The cat does not {known.verb} the dog." if known.verb else f"The cat is not {relation} the dog."
    assert contradict(negated, relation) == sentence(relation)
    if not known.verb:
        assert contradict(f"The cat isn't {relation} the dog.", relation) == sentence(relation)


@pytest.mark.parametrize("relation", ["above", "far from", "inside", "left of", "on", "touching", "contains", "facing"])
def test_contradicted_twice_it_does_not_deny_the_relation(relation):
    for once in drawn(relation):
        found = find_relation(once)
        assert contradict(once, found) not in drawn(relation)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left of", "right of"),
        ("at the left side of", "at the right side of"),
        ("in front of", "behind"),
        ("facing", "facing away from"),
        ("larger than", "smaller than"),
        ("parallel to", "perpendicular to"),
        ("with", "without"),
        ("off", "on"),
    ],
)
def test_antonyms_go_both_ways(one, other):
    assert contradict(sentence(one), one) == sentence(other)
    assert contradict(sentence(other), other) == sentence(one)


def test_words_of_two_points_of_view_are_no_opposites():
    """Who sits at the back of a bus that is seen from behind is in front of it for who looks."""
    assert drawn("at the back of") == {"The cat is at the front of the dog."}
    assert drawn("at the front of") == {"The cat is at the back of the dog."}


def test_what_is_merely_different_is_no_opposite():
    for one, other in [
        ("near", "on"),
        ("next to", "touching"),
        ("in", "on"),
        ("left of", "above"),
        ("behind", "under"),
    ]:
        assert other not in RELATIONS[one].opposites
        assert one not in RELATIONS[other].opposites


@pytest.mark.parametrize(
    ("relation", "name"),
    [("left of", "Projective"), ("on", "Topological"), ("far away from", "Proximity"), ("facing", "Orientation"),
     ("at the edge of", "Adjacency"), ("into", "Directional"), ("enclosed by", "Unallocated"), ("hugging", "other")],
)  # fmt: skip
def test_categories_are_vsrs(relation, name):
    assert category(relation) == name


# -- the place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "relation", "wanted"),
    [
        ("The person with onions is on the button.", "on", "The person with onions is off the button."),
        ("The bird on top of the car is on the road.", "on", "The bird on top of the car is off the road."),
        ("On the mat is a cat.", "on", "Off the mat is a cat."),
        ("THE CAT IS LEFT OF THE DOG", "left of", "THE CAT IS RIGHT OF THE DOG"),
        ("The cat is Left Of the dog.", "left of", "The cat is Right of the dog."),
        ("The cat is to the left of it.", "left of", "The cat is to the right of it."),
        ("The cat is left  of it.", "Left of", "The cat is right of it."),
        ("Touching the dog is the cat.", "touching", "Not touching the dog is the cat."),
        ("Not touching the dog, it sleeps.", "touching", "Touching the dog, it sleeps."),
        ("The cat isn’t directly behind it.", "behind", "The cat is directly behind it."),
        ("The box doesn't contain a cat.", "contains", "The box contains a cat."),
        ("The cat is not leaning on it.", "leaning on", "The cat is leaning on it."),
        ("The cat is leaning on it.", "leaning on", "The cat is not leaning on it."),
        ("The cat is not leaning on it.", "on", "The cat is leaning on it."),
        ("The cat isn't really placed on it.", "on", "The cat is really placed on it."),
        ("The cat is on the mat, not in the box.", "on", "The cat is off the mat, not in the box."),
        ("The cat on the mat is on the bed.", "on", "The cat off the mat is off the bed."),
        ("A built-in oven is inside it.", "inside", "A built-in oven is outside it."),
    ],
)
def test_a_sentence_is_contradicted_at_its_relation_and_nowhere_else(text, relation, wanted):
    assert contradict(text, relation) == wanted


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("The person eats an onion.", "on"),
        ("The bird is on top of the car.", "on"),
        ("The cat is at the left side of it.", "left of"),
        ("A built-in oven.", "in"),
        ("The cat sleeps.", ""),
        ("The cat sleeps.", "hugging"),
        ("The cat hugs the dog.", "hugs"),
        ("No cat is on the mat.", "on"),
        ("There is no cat on the mat.", "on"),
        ("The cat does not sit on the mat.", "on"),
        ("The cat can't be in the box.", "in"),
        ("The cat is never on the mat.", "on"),
    ],
)
def test_a_sentence_that_cannot_be_contradicted_is_shown_in_the_error(text, relation):
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
    found = contradict(first + relation + last, relation, seed)
    assert found.startswith(first)
    assert found.endswith(last)
    known = RELATIONS[relation]
    choices = known.opposites or (f"does not {known.verb}" if known.verb else f"not {relation}",)
    assert found[len(first) : -len(last)] in choices


def test_the_opposite_depends_on_seed_and_sentence_alone():
    texts = [f"The cat is above the {thing}." for thing in ("dog", "bed", "car", "bus", "cup", "bowl", "cake", "tv")]
    forwards = [contradict(text, "above", 7) for text in texts]
    assert forwards == [contradict(text, "above", 7) for text in reversed(texts)][::-1]
    assert len({text.split()[3] for text in forwards}) > 1
    assert forwards != [contradict(text, "above", 8) for text in texts]


# -- which relation a sentence is about --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("The cat is at the left side of the dog.", "at the left side of"),
        ("The cat in front of the house is on the mat.", "on"),
        ("A cat in a box in front of a house", "in front of"),
        ("The cat is not touching the dog.", "touching"),
        ("The box does not contain the cat.", "contains"),
        ("THE CUBE IS LARGER THAN THE BALL", "larger than"),
        ("The man is about to eat a button.", None),
        ("The cat is at the pizza.", "at"),
        ("A person eats onions.", None),
        ("The car in the street is red.", None),
        ("The car in the street is near the bus.", "near"),
        ("In front of the house is a car.", "in front of"),
        ("There is a cat on the mat.", "on"),
        ("A cat on a mat that is red", "on"),
        ("The box contains a cat that is asleep, and is red.", "contains"),
        ("", None),
    ],
)
def test_the_relation_of_a_sentence_is_found(text, relation):
    assert find_relation(text) == relation


# -- VSR itself --------------------------------------------------------------------------------------------


def test_every_relation_of_vsr_is_in_the_table():
    assert {row["relation"] for row in vsr_rows()} <= set(RELATIONS)


def test_every_sentence_of_vsr_is_contradicted_and_keeps_its_other_words():
    rows = vsr_rows()
    assert len(rows) == 16023
    for row in rows:
        text, relation = row["caption"], row["relation"]
        found = contradict(text, relation)
        place = re.search(rf"(?<!\w){re.escape(relation)}(?!\w)", text)
        assert found != text
        assert found.startswith(text[: place.start()])
        assert found.endswith(text[place.end() :])
        middle = found[place.start() : len(found) - len(text) + place.end()]
        known = RELATIONS[relation]
        assert middle in (known.opposites or (f"does not {known.verb}" if known.verb else f"not {relation}",))
        if known.opposites:
            assert not holds(found, relation)
        assert find_relation(text) == relation
