"""The example's relations: what is said is true or false of the scene as labelled, and says nothing by itself."""

import re
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.data.example_sets import example_relations
from pc_clip.data.registry import open_dataset
from pc_clip.example import relations, scenes

HOLDS = {
    "on the left": lambda a, _: a.x < 32,
    "on the right": lambda a, _: a.x > 32,
    "at the top": lambda a, _: a.y < 32,
    "at the bottom": lambda a, _: a.y > 32,
    "left of": lambda a, b: a.x < b.x and abs(a.x - b.x) > abs(a.y - b.y),
    "right of": lambda a, b: a.x > b.x and abs(a.x - b.x) > abs(a.y - b.y),
    "above": lambda a, b: a.y < b.y and abs(a.x - b.x) < abs(a.y - b.y),
    "below": lambda a, b: a.y > b.y and abs(a.x - b.x) < abs(a.y - b.y),
    "larger than": lambda a, b: a.radius > b.radius,
    "smaller than": lambda a, b: a.radius < b.radius,
    "larger than the other": lambda a, b: a.radius > b.radius,
    "smaller than the other": lambda a, b: a.radius < b.radius,
}


def meant(phrase: str, things: tuple[scenes.Thing, ...]) -> list[scenes.Thing]:
    """The things that a phrase like "a red circle", "a red object" or "a circle" could mean."""
    words = set(phrase.split()[1:]) - {"object"}
    return [thing for thing in things if words <= {thing.colour, thing.shape}]


@given(st.integers(0, 5000), st.sampled_from(["train", "val", "test"]))
def test_a_statement_is_true_exactly_where_the_scene_says_so(index, split):
    things = relations.scene(split, index).things
    for s in relations.statements(split, index):
        subject, other = re.split(f" {s.relation}(?: |$)", s.text)
        (a,) = meant(subject, things)  # one thing and no other
        b = next(thing for thing in things if thing is not a)
        assert not other or meant(other, things) == [b]
        assert HOLDS[s.relation](a, b) == s.true, s
        assert s.contradiction == s.text.replace(s.relation, relations.OPPOSITES[s.relation])


def test_who_does_not_look_is_right_half_the_time():
    """Neither the relation nor the things named say whether a statement is true."""
    sentences = example_relations("val", 1000).statements
    assert {s.category for s in sentences} == {"place", "position", "size"} and {s.kind for s in sentences} == set(
        HOLDS
    )
    for of in (lambda s: s.kind, lambda s: s.text.split()[1], lambda s: s.text.split()[-1]):
        for key, n in Counter(map(of, sentences)).items():
            true = np.mean([s.true for s in sentences if of(s) == key])
            assert abs(true - 0.5) < 4 * 0.5 / n**0.5, key


def test_the_same_scenes_every_time_and_none_in_two_splits(small_example):
    one, again = (open_dataset("example_relations", split="val") for _ in range(2))
    assert one.statements == again.statements and one.fingerprint == again.fingerprint
    assert np.array_equal(np.asarray(one.load(3)), np.asarray(again.load(3)))
    shown = {split: {relations.scene(split, n) for n in range(200)} for split in relations.SEEDS}
    assert not shown["train"] & shown["val"] and not shown["train"] & shown["test"]


def test_the_probes_questions_are_where_a_colour_is():
    questions = example_relations("val", 60).questions
    assert len(questions) == 2 * len(scenes.COLOURS)
    for question in questions:
        kind, *_, colour, _ = question.name.split()
        axis = {"side": "x", "height": "y"}[kind]
        things = [{t.colour: t for t in relations.scene("val", n).things} for n in range(60)]
        assert question.rows.tolist() == [n for n, by_colour in enumerate(things) if colour in by_colour]
        halves = [getattr(things[row][colour], axis) > scenes.SIDE / 2 for row in question.rows]
        assert question.target.tolist() == halves
