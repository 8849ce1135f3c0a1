"""The example: scenes follow from their seed, stay in the picture, and captions are true of them."""

import dataclasses
import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_clip.example import scenes, world
from pc_clip.example.captions import caption, parse
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
def test_a_thing_is_drawn_at_its_position_and_size(seed):
    for thing in scene_of(seed).things:
        rows, columns = np.nonzero(ink(Scene((thing,), "grey", 125)))
        for actual, centre in ((columns, thing.x), (rows, thing.y)):
            assert (
                centre - 1.1 * thing.radius - 1.5 <= actual.min() <= actual.max() <= centre + 1.1 * thing.radius + 0.5
            )
        extent = max(np.ptp(columns), np.ptp(rows)) + 1
        cut = 2 if min(thing.x, thing.y) < thing.radius + 2 or max(thing.x, thing.y) > SIDE - thing.radius - 2 else 0
        assert 1.7 * thing.radius - 1 - cut < extent < 2.2 * thing.radius + 2.5


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


# -- captions ------------------------------------------------------------------------------------------


def truths(scene):
    """All that may be said for certain of a scene, slowly and without a grammar."""
    actual = {"count": len(scene.things), "background": scene.background}
    for kind in ("size", "texture", "colour", "shape"):
        values = {getattr(thing, kind) for thing in scene.things}
        if len(values) == 1:
            actual[kind] = values.pop()
    if len(scene.things) == 1:
        dx, dy = scene.things[0].x - 32, scene.things[0].y - 32
        places = {
            "in the middle": max(abs(dx), abs(dy)) < 5,
            "on the left": dx < -4 and -dx > abs(dy),
            "on the right": dx > 4 and dx > abs(dy),
            "at the top": dy < -4 and -dy > abs(dx),
            "at the bottom": dy > 4 and dy > abs(dx),
        }
        actual["position"] = next((place for place, holds in places.items() if holds), None)
    return actual


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


def test_only_captions_of_the_grammar_are_understood():
    known = {
        "two large red crosses": {"count": 2, "size": "large", "colour": "red", "shape": "cross"},
        "an image of an orange object at the top": {"count": 1, "colour": "orange", "position": "at the top"},
        "a red star and two small rings on a dark background": {"count": 3, "background": "dark"},
        "A man riding a wave on top of a surfboard.": {},
        "a star on a bright background": {},
        "stars": {},
    }
    assert {text: parse(text) for text in known} == known


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
    sentences = truths(scene)
    for question, classes in world.CLASSES.items():
        answer = world.answer(question, scene)
        if question == "count":
            assert classes[answer].split()[0] == ("one", "two", "three")[sentences["count"] - 1]
        elif answer is not None:
            assert classes[answer] == sentences[question]
        else:
            assert question == "position" or not scene.alike
        assert all(template.count("{}") == 1 for template in world.TEMPLATES[question])
