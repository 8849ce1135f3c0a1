"""The example: scenes follow from their seed, stay in the picture, and captions are true of them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_clip.example import scenes, world
from pc_clip.example.captions import OPENINGS, PLACES, caption, noun_phrase, parse, relation
from pc_clip.example.scenes import SIDE, SIZES, Scene, Thing

MANY = settings(deadline=None, max_examples=150)
seeds = st.integers(0, 2**32 - 1)


def scene_of(seed):
    return scenes.sample(np.random.default_rng(seed))


def one(shape="circle", colour="red", texture="plain", x=32.0, y=32.0, size="large"):
    return Scene((Thing(shape, colour, texture, size, x, y, SIZES[size]),), "grey", 125)


def ink(scene):
    """Where a picture differs from its background.  -> [64, 64] bool"""
    return (np.asarray(scenes.draw(scene)).astype(int) != scene.level).any(-1)


# -- scenes --------------------------------------------------------------------------------------------


@MANY
@given(seeds)
def test_a_scene_and_its_picture_follow_from_the_seed(seed):
    scene = scene_of(seed)
    assert scene == scene_of(seed)
    first, second = scenes.draw(scene), scenes.draw(scene_of(seed))
    assert first == second and first.size == (SIDE, SIDE) and first.mode == "RGB"


@MANY
@given(seeds)
def test_things_stay_inside_the_picture_and_apart(seed):
    scene = scene_of(seed)
    assert 1 <= len(scene.things) <= 3
    for thing in scene.things:
        assert all(thing.radius <= value <= SIDE - thing.radius for value in (thing.x, thing.y))
    for a, b in itertools.combinations(scene.things, 2):
        assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius


@MANY
@given(seeds)
def test_a_thing_is_drawn_where_it_is_and_as_large_as_it_is(seed):
    for thing in scene_of(seed).things:
        rows, columns = np.nonzero(ink(Scene((thing,), "grey", 125)))
        for found, centre in ((columns, thing.x), (rows, thing.y)):
            assert centre - 1.1 * thing.radius - 1.5 <= found.min() <= found.max() <= centre + 1.1 * thing.radius + 0.5
        extent = max(np.ptp(columns), np.ptp(rows)) + 1
        cut = 2 if min(thing.x, thing.y) < thing.radius + 2 or max(thing.x, thing.y) > SIDE - thing.radius - 2 else 0
        assert 1.7 * thing.radius - 1 - cut < extent < 2.2 * thing.radius + 2.5


@MANY
@given(seeds)
def test_the_background_is_grey_and_of_its_own_range(seed):
    scene = scene_of(seed)
    empty = ~ink(scene)
    assert empty.mean() > 0.2
    assert min(scenes.BACKGROUNDS, key=lambda name: abs(scenes.BACKGROUNDS[name] - scene.level)) == scene.background


def test_every_shape_colour_texture_and_size_looks_different():
    looks = itertools.product(scenes.SHAPES, scenes.COLOURS, scenes.TEXTURES, SIZES)
    drawn = {scenes.draw(one(shape, colour, texture, size=size)).tobytes() for shape, colour, texture, size in looks}
    assert len(drawn) == 8 * 8 * 3 * 3


def test_shapes_differ_by_more_than_their_edges():
    drawn = {shape: ink(one(shape)) for shape in scenes.SHAPES}
    for a, b in itertools.combinations(drawn, 2):
        assert (drawn[a] ^ drawn[b]).sum() > 0.08 * (drawn[a] | drawn[b]).sum(), (a, b)


def test_an_unknown_shape_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'blob'.*circle"):
        scenes.draw(one("blob"))


def test_every_value_of_every_attribute_occurs_about_as_often():
    shown = [scene_of(seed) for seed in range(1500)]
    for values, of in (
        (scenes.SHAPES, lambda s: s.things[0].shape),
        (scenes.COLOURS, lambda s: s.things[0].colour),
        (scenes.TEXTURES, lambda s: s.things[0].texture),
        (SIZES, lambda s: s.things[0].size),
        (scenes.BACKGROUNDS, lambda s: s.background),
        (scenes.COUNTS, lambda s: len(s.things)),
    ):
        shares = [sum(of(scene) == value for scene in shown) / len(shown) for value in values]
        assert all(0.7 / len(values) < share < 1.3 / len(values) for share in shares), shares


@pytest.mark.parametrize(
    "x, y, position",
    [(10, 32, "left"), (54, 32, "right"), (32, 10, "top"), (32, 54, "bottom"), (32, 32, "middle"), (35, 29, "middle")],
)
def test_the_only_thing_has_a_position(x, y, position):
    assert one(x=x, y=y, size="small").position == position


@pytest.mark.parametrize("x, y", [(10, 10), (54, 11), (12, 54)])
def test_a_thing_in_a_corner_or_among_others_has_none(x, y):
    scene = one(x=x, y=y, size="small")
    assert scene.position is None
    assert dataclasses.replace(scene, things=one(x=10).things + one(x=50).things).position is None


# -- captions ------------------------------------------------------------------------------------------


def truths(scene):
    """All that may be said for certain of a scene, slowly and without a grammar."""
    found = {"count": len(scene.things), "background": scene.background}
    for kind in ("size", "texture", "colour", "shape"):
        values = {getattr(thing, kind) for thing in scene.things}
        if len(values) == 1:
            found[kind] = values.pop()
    if len(scene.things) == 1:
        dx, dy = scene.things[0].x - 32, scene.things[0].y - 32
        places = {
            "in the middle": max(abs(dx), abs(dy)) < 5,
            "on the left": dx < -4 and -dx > abs(dy),
            "on the right": dx > 4 and dx > abs(dy),
            "at the top": dy < -4 and -dy > abs(dx),
            "at the bottom": dy > 4 and dy > abs(dx),
        }
        found["position"] = next((place for place, holds in places.items() if holds), None)
    return found


@settings(deadline=None, max_examples=300)
@given(seeds, seeds)
def test_what_a_caption_says_is_true_of_its_scene(seed, wording):
    scene = scene_of(seed)
    text = caption(scene, np.random.default_rng(wording))
    facts = parse(text)
    assert "count" in facts, text
    assert facts.items() <= truths(scene).items(), text


@settings(deadline=None, max_examples=300)
@given(seeds, seeds)
def test_relations_in_a_caption_agree_with_the_coordinates(seed, wording):
    things = (scene_of(seed).things + scene_of(seed + 1).things)[:2]
    hold = {
        " left of ": lambda a, b: a.x < b.x,
        " right of ": lambda a, b: a.x > b.x,
        " above ": lambda a, b: a.y < b.y,
        " below ": lambda a, b: a.y > b.y,
    }
    named = [dataclasses.replace(thing, shape=shape) for thing, shape in zip(things, ("circle", "star"))]
    for at in range(4):
        text = caption(Scene(tuple(named), "grey", 125), np.random.default_rng([wording, at]))
        if "circle" not in text or "star" not in text:
            continue
        a, b = named if text.index("circle") < text.index("star") else named[::-1]
        assert all(holds(a, b) for words, holds in hold.items() if words in text), text


def test_each_relation_is_said_where_it_is_clear():
    here = one().things[0]
    said = {
        at: relation(one(x=at[0], y=at[1]).things[0], here) for at in [(5, 32), (60, 30), (32, 5), (30, 60), (5, 5)]
    }
    assert said == {(5, 32): "left of", (60, 30): "right of", (32, 5): "above", (30, 60): "below", (5, 5): None}
    texts = {caption(scene_of(seed), np.random.default_rng(seed)) for seed in range(1500)}
    for words in (" left of ", " right of ", " above ", " below ", *PLACES.values(), *OPENINGS):
        assert any(words in text for text in texts), words


@MANY
@given(seeds, seeds)
def test_captions_read_as_english(seed, wording):
    text = caption(scene_of(seed), np.random.default_rng(wording))
    assert text == " ".join(text.split()) and text == text.lower()
    assert " a orange" not in f" {text}" and " an " not in text.replace("an image of", "").replace("an o", "")
    words = text.split()
    for number, noun in itertools.pairwise(words):
        assert number not in ("two", "three") or noun not in scenes.SHAPES


@pytest.mark.parametrize("shape", [*scenes.SHAPES])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_phrase_is_read_back_as_it_was_said(shape, count):
    thing = one(shape).things[0]
    for wording in range(10):
        facts = parse(noun_phrase(thing, count, np.random.default_rng(wording)))
        assert facts.pop("count") == count
        assert facts.items() <= {"size": "large", "texture": "plain", "colour": "red", "shape": shape}.items()


@pytest.mark.parametrize(
    "text, facts",
    [
        ("two large red crosses", {"count": 2, "size": "large", "colour": "red", "shape": "cross"}),
        ("an image of an orange object at the top", {"count": 1, "colour": "orange", "position": "at the top"}),
        ("a red star and two small rings on a dark background", {"count": 3, "background": "dark"}),
        ("a picture of one heart above a ring", {"count": 2}),
        ("two dotted shapes", {"count": 2, "texture": "dotted"}),
        ("A man riding a wave on top of a surfboard.", {}),
        ("a red bus and a star", {}),
        ("a star on a bright background", {}),
        ("", {}),
        ("stars", {}),
    ],
)  # fmt: skip
def test_only_captions_of_the_grammar_are_understood(text, facts):
    assert parse(text) == facts


# -- the splits ----------------------------------------------------------------------------------------


def test_a_scene_of_a_split_follows_from_its_index_alone():
    late = world.scene("val", 50_000), world.captions("val", 50_000)
    world.scene.cache_clear()
    assert late == (world.scene("val", 50_000), world.captions("val", 50_000))
    assert len(late[1]) == world.CAPTIONS_EACH
    assert len({world.captions("val", n) for n in range(50)}) == 50


@MANY
@given(st.sampled_from(["train", "val", "test"]), st.integers(0, 10**6))
def test_answers_are_what_is_true_and_none_where_nothing_is(split, index):
    scene = world.scene(split, index)
    said = truths(scene)
    for question, classes in world.CLASSES.items():
        answer = world.answer(question, scene)
        if question == "count":
            assert classes[answer].split()[0] == ("one", "two", "three")[said["count"] - 1]
        elif answer is not None:
            assert classes[answer] == said[question]
        else:
            assert question == "position" or not scene.alike
        assert all(template.count("{}") == 1 for template in world.TEMPLATES[question])


@MANY
@given(seeds)
def test_grades_follow_the_words(seed):
    scene = scene_of(seed)
    assert world.grade("count", scene) == len(scene.things)
    assert (
        world.grade("background", scene)
        == scene.level
        == int(scenes.draw(Scene((), "", scene.level)).getpixel((0, 0))[0])
    )
    size = world.grade("size", scene)
    assert math.isnan(size) != scene.alike
    assert math.isnan(size) or min(SIZES, key=lambda name: abs(SIZES[name] - size)) == scene.things[0].size


def test_an_unknown_attribute_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'weight'.*size, count, background"):
        world.grade("weight", one())
