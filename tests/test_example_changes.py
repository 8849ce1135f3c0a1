"""The example's changes: one change a pair under distractors, and sentences that are judged part by part."""

import dataclasses
import inspect
import pickle
import re
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.data import example_sets
from pc_clip.data.dataset import subset
from pc_clip.data.example_sets import example_changes
from pc_clip.example import changes, kept, scenes
from pc_clip.example.scenes import Thing

WRONG = {"type": False, "object": False, "value": False}
RIGHT = {"type": True, "object": True, "value": True}
index_of_pair = given(st.integers(0, 7999), st.sampled_from(["train", "val", "test"]))


def by_name(things: tuple[Thing, ...], *of: str) -> dict[tuple[str, ...], Thing]:
    found = {tuple(getattr(thing, name) for name in of): thing for thing in things}
    assert len(found) == len(things), "two things go by one name"
    return found


def pairs_of(kind: str, n: int = 10) -> list[int]:
    return [i for i in range(40 * n) if changes.pair("test", i).kind == kind][:n]


# -- pairs ---------------------------------------------------------------------------------------------


def seen(pair: changes.Pair) -> tuple[str, str]:
    """The kind and the value, from the two scenes alone; one change and not two."""
    before, after = pair.before.scene.things, pair.after.scene.things
    if len(before) != len(after):
        fewer, more = sorted((before, after), key=len)
        assert len(more) == len(fewer) + 1
        assert by_name(fewer, "colour", "shape").keys() < by_name(more, "colour", "shape").keys()
        return ("add" if more is after else "drop"), ""
    was, now = by_name(before, "shape"), by_name(after, "shape")
    assert was.keys() == now.keys()
    found = [
        (kind, getattr(now[shape], kind))
        for shape in was
        for kind in ("colour", "texture")
        if getattr(now[shape], kind) != getattr(was[shape], kind)
    ]
    steps = {shape: np.array([now[shape].x - was[shape].x, now[shape].y - was[shape].y]) for shape in was}
    for x, y in (step for step in steps.values() if abs(step).max() > 3.0):
        names = ("left", "right") if abs(x) > abs(y) else ("up", "down")
        found.append(("move", names[int((x if abs(x) > abs(y) else y) > 0)]))
    assert len(found) <= 1
    return found[0] if found else ("none", "")


@index_of_pair
def test_there_is_one_change_and_it_is_the_one_that_is_told(index, split):
    pair = changes.pair(split, index)
    assert seen(pair) == (pair.kind, pair.value)
    assert len(pair.before.scene.things) == 2 and 1 <= len(pair.after.scene.things) <= 3
    place = pair.after if pair.kind == "add" else pair.before
    if pair.kind == "none":
        assert pair.thing is None
    else:
        looks = by_name(place.scene.things, "colour", "shape")[pair.thing.colour, pair.thing.shape].looks
        assert looks == pair.thing.looks


@index_of_pair
def test_nothing_else_changes_but_the_light_and_the_camera(index, split):
    pair = changes.pair(split, index)
    was, now = by_name(pair.before.scene.things, "shape"), by_name(pair.after.scene.things, "shape")
    for shape in was.keys() & now.keys():
        a, b = was[shape], now[shape]
        free = {pair.kind: getattr(b, pair.kind)} if pair.kind in ("colour", "texture") else {}
        assert dataclasses.replace(a, x=b.x, y=b.y, **(free if pair.thing == a else {})) == b
        if pair.kind != "move" or pair.thing != a:
            assert max(abs(b.x - a.x), abs(b.y - a.y)) <= 3.0
    assert abs(pair.after.scene.level - pair.before.scene.level) <= 25
    assert pair.before.gain == 1 and 0.85 <= pair.after.gain <= 1.15


@index_of_pair
def test_all_things_of_a_scene_go_by_a_colour_and_by_a_shape(index, split):
    pair = changes.pair(split, index)
    for things in (pair.before.scene.things, pair.after.scene.things):
        by_name(things, "colour"), by_name(things, "shape")
    if pair.kind == "colour":
        assert pair.value not in {thing.colour for thing in pair.before.scene.things}


@index_of_pair
def test_things_neither_overlap_nor_leave_the_picture(index, split):
    """Each drawn alone, with room around the picture: no pixel is of two of them, and none is outside."""
    pair, room = changes.pair(split, index), 8
    for view in (pair.before, pair.after):
        covered = np.zeros((scenes.SIDE + 2 * room,) * 2, dtype=int)
        for thing in view.scene.things:
            alone = dataclasses.replace(thing, x=thing.x + room, y=thing.y + room, texture="plain")
            with mock.patch.object(scenes, "SIDE", scenes.SIDE + 2 * room):
                drawn = np.asarray(scenes.draw(scenes.Scene((alone,), "dark", 0)))
            covered += drawn.any(-1)
        assert covered.max() == 1
        covered[room:-room, room:-room] = 0
        assert not covered.any()


@given(st.integers(0, 7999))
def test_a_move_goes_one_way_for_certain(index):
    """Even in pixels of the picture, whatever the camera did: further along one axis than along the other."""
    pair = changes.pair("train", index)
    if pair.kind == "move":
        now = by_name(pair.after.scene.things, "colour", "shape")[pair.thing.colour, pair.thing.shape]
        along, across = now.x - pair.thing.x, now.y - pair.thing.y
        if pair.value in ("up", "down"):
            along, across = across, along
        assert (along < 0) == (pair.value in ("left", "up"))
        assert abs(along) > max(abs(across), 10.5)


@pytest.mark.parametrize(
    "to, way",
    [((34, 20), "right"), ((6, 20), "left"), ((20, 34), "down"), ((20, 6), "up"), ((33, 20), None), ((34, 28), None)],
)
def test_a_direction_is_told_of_a_long_straight_way_only(to, way):
    """By hand: 14 pixels are enough and 13 are not; 8 to the side of 14 are too many."""
    thing = Thing("circle", "red", "plain", "small", 20.0, 20.0, 6.0)
    assert changes.direction(thing, dataclasses.replace(thing, x=float(to[0]), y=float(to[1]))) == way


def test_kinds_and_values_are_about_equally_frequent():
    pairs = [changes.pair("train", i) for i in range(1800)]
    groups = [Counter(p.kind for p in pairs)]
    groups += [Counter(p.value for p in pairs if p.kind == kind) for kind in changes.VALUES]
    for group, size in zip(groups, (6, 8, 3, 4)):
        assert len(group) == size
        expected = group.total() / size
        assert all(abs(n - expected) < 4 * expected**0.5 for n in group.values()), group


def test_where_nothing_changed_the_pictures_differ_all_the_same():
    for index in pairs_of("none"):
        pair = changes.pair("test", index)
        before, after = (np.asarray(changes.draw(view)).astype(int) for view in (pair.before, pair.after))
        assert (before != after).any(-1).mean() > 0.01
        assert any(a.x != b.x for a, b in zip(pair.before.scene.things, pair.after.scene.things))


def test_the_light_makes_every_pixel_brighter_or_darker():
    scene = scenes.Scene((Thing("square", "red", "plain", "large", 32.0, 32.0, 14.0),), "grey", 100)
    shown = {gain: changes.draw(changes.View(scene, gain)).getpixel((32, 32)) for gain in (1.0, 0.5, 2.0)}
    assert shown == {1.0: (214, 39, 40), 0.5: (107, 20, 20), 2.0: (255, 78, 80)}
    assert changes.draw(changes.View(scene, 0.5)).getpixel((0, 0)) == (50, 50, 50)


# -- sentences -----------------------------------------------------------------------------------------


@index_of_pair
def test_every_sentence_of_a_pair_is_understood_and_fully_right(index, split):
    pair, said = changes.pair(split, index), changes.sentences(split, index)
    assert len(set(said)) == 5
    for sentence in said:
        meant = changes.parse(sentence)
        assert (meant.kind, meant.value) == (pair.kind, pair.value), sentence
        assert changes.judge(changes.pair(split, index), sentence) == RIGHT, sentence
        assert pair.thing is None or {"colour", "shape"} <= meant.facts.keys()
        assert sentence == sentence.lower() and not sentence.endswith(".") and "{" not in sentence
        assert not re.search(r"\ba [aeiou]", sentence) and not re.search(r"\ban [^aeiou]", sentence)


@pytest.mark.parametrize("kind", changes.KINDS)
def test_every_template_is_used_and_sizes_and_textures_are_named_now_and_then(kind):
    indices = pairs_of(kind, 60)
    said = {s for i in indices for s in changes.sentences("test", i)}
    for template in changes.TEMPLATES[kind]:
        words = re.escape(re.sub(r"\{.*?\}", "@", template)).replace("@", "[a-z ]+")
        assert any(re.fullmatch(words, s) for s in said), template
    if kind != "none":
        facts = [changes.parse(s).facts for s in said]
        shares = [np.mean([name in named for named in facts]) for name in ("size", "texture")]
        assert all(0.1 < share < 0.5 for share in shares), shares  # without repetitions, more than NAMED


@pytest.mark.parametrize(
    "sentence, kind, facts, value",
    [
        ("the red star turned blue", "colour", "colour=red shape=star", "blue"),
        ("the colour of the large dotted red star changed to blue", "colour",
         "size=large texture=dotted colour=red shape=star", "blue"),
        ("the red star turned striped", "texture", "colour=red shape=star", "striped"),
        ("the red star changed from striped to dotted", "texture", "texture=striped colour=red shape=star", "dotted"),
        ("the small blue circle moved to the left", "move", "size=small colour=blue shape=circle", "left"),
        ("the blue circle shifted up", "move", "colour=blue shape=circle", "up"),
        ("the blue circle is further down now", "move", "colour=blue shape=circle", "down"),
        ("a green ring appeared", "add", "colour=green shape=ring", ""),
        ("an orange ring was added", "add", "colour=orange shape=ring", ""),
        ("a dotted orange ring was added", "add", "texture=dotted colour=orange shape=ring", ""),
        ("there is a new green ring", "add", "colour=green shape=ring", ""),
        ("the green ring is gone", "drop", "colour=green shape=ring", ""),
        ("the ring is gone", "drop", "shape=ring", ""),
        ("nothing changed", "none", "", ""),
    ],
)  # fmt: skip
def test_what_a_sentence_says(sentence, kind, facts, value):
    assert changes.parse(sentence) == changes.Said(kind, dict(f.split("=") for f in facts.split()), value)


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "a red star",
        "the red star turned",
        "the red star turned huge",
        "the red turned blue",
        "turned blue",
        "the red star turned red",  # it was so before
        "the striped red star became striped",
        "the red star changed from dotted to dotted",
        "the striped red star changed from dotted to plain",
        "the red blue star is gone",
        "the red red star is gone",
        "the small large red star is gone",
        "the red star ring is gone",
        "the star red is gone",
        "the red star is gone and the blue ring is gone",
        "the red star turned blue the red star turned blue",
        "the red star moved left",
        "the red star moved to the left up",
        "the colour of the red star changed to striped",
        "the texture of the red star changed to blue",
        "a orange ring appeared",
        "an green ring appeared",
        "a green ring is gone",
        "Nothing changed",
        "nothing changed.",
        "nothing changed the ring is gone",
        "the red unicorn is gone",
    ],
)
def test_a_sentence_that_is_not_clear_says_nothing_and_nothing_in_it_is_right(sentence):
    assert changes.parse(sentence) is None
    assert changes.judge(changes.pair("val", 0), sentence) == WRONG


TOLD = {
    "colour": "the {} became {}",
    "texture": "the {} became {}",
    "move": "the {} is further {} now",
    "add": "there is a new {}",
    "drop": "the {} is gone",
}


def other(words, *than: str) -> str:
    return next(word for word in words if word not in than)


@pytest.mark.parametrize("kind", changes.VALUES)
def test_another_value_is_wrong_in_the_value_alone(kind):
    for index in pairs_of(kind):
        pair = changes.pair("test", index)
        was = "" if kind == "move" else getattr(pair.thing, kind)
        value = other(changes.VALUES[kind], pair.value, was)
        text = TOLD[kind].format(f"{pair.thing.colour} {pair.thing.shape}", value)
        assert changes.judge(changes.pair("test", index), text) == {"type": True, "object": True, "value": False}, text


@pytest.mark.parametrize("kind", TOLD)
def test_another_object_is_wrong_in_the_object_alone(kind):
    for index in pairs_of(kind):
        pair = changes.pair("test", index)
        colour, shape, size, texture = (getattr(pair.thing, name) for name in ("colour", "shape", "size", "texture"))
        wrong = [
            f"{other(scenes.COLOURS, colour, pair.value)} {shape}",
            f"{colour} {other(scenes.SHAPES, shape)}",
            f"{other(scenes.SIZES, size)} {colour} {shape}",
            shape,
        ]
        if kind != "texture":  # there another texture may be the new one
            wrong.append(f"{other(scenes.TEXTURES, texture)} {colour} {shape}")
        assert (
            changes.judge(changes.pair("test", index), TOLD[kind].format(f"{size} {colour} {shape}", pair.value))
            == RIGHT
        )
        for name in wrong:
            text = TOLD[kind].format(name, pair.value)
            assert changes.judge(changes.pair("test", index), text) == {"type": True, "object": False, "value": True}, (
                text
            )


def test_another_texture_before_is_wrong_in_the_object_alone():
    for index in pairs_of("texture"):
        pair = changes.pair("test", index)
        name = f"{pair.thing.colour} {pair.thing.shape}"
        for old in set(scenes.TEXTURES) - {pair.value}:
            text = f"the {name} changed from {old} to {pair.value}"
            right = {"type": True, "object": old == pair.thing.texture, "value": True}
            assert changes.judge(changes.pair("test", index), text) == right, text


@pytest.mark.parametrize("kind", TOLD)
def test_another_kind_is_wrong_in_type_and_value_though_it_names_the_thing(kind):
    for index in pairs_of(kind):
        thing = changes.pair("test", index).thing
        name = f"{thing.colour} {thing.shape}"
        text = f"the {name} is gone" if kind != "drop" else f"there is a new {name}"
        assert changes.judge(changes.pair("test", index), text) == {"type": False, "object": True, "value": False}, text
        assert changes.judge(changes.pair("test", index), "nothing changed") == WRONG


def test_where_nothing_changed_only_that_is_right():
    for index in pairs_of("none"):
        thing = changes.pair("test", index).before.scene.things[0]
        assert changes.judge(changes.pair("test", index), "there is no change") == RIGHT
        assert changes.judge(changes.pair("test", index), f"the {thing.colour} {thing.shape} is gone") == WRONG


# -- the data set --------------------------------------------------------------------------------------


def test_a_data_set_has_two_images_a_pair_and_what_is_said_of_them():
    data = example_changes("val", 12)
    assert len(data) == 24 and len(data.changes) == 12
    for i, change in enumerate(data.changes):
        pair = changes.pair("val", i)
        assert (change.before, change.after) == (data.ids[2 * i], data.ids[2 * i + 1])
        assert (change.kind, change.sentences) == (pair.kind, changes.sentences("val", i))
        for row, view in ((2 * i, pair.before), (2 * i + 1, pair.after)):
            for _ in range(2):  # drawn, and then remembered
                assert np.array_equal(np.asarray(data.load(row)), np.asarray(changes.draw(view)))


def test_a_data_set_judges_sentences_also_in_a_part_of_it_and_in_another_process():
    data = example_changes("val", 12)
    part = pickle.loads(pickle.dumps(subset(data, np.arange(10, 24))))
    for of in (data, part):
        for row, change in enumerate(of.changes):
            assert of.judge(row, change.sentences[0]) == RIGHT
    kind = part.changes[0].kind
    assert part.judge(0, "nothing changed") == (RIGHT if kind == "none" else WRONG)


def test_pairs_that_are_kept_are_those_that_were_found(monkeypatch):
    found = kept.told_pairs("val", 40)
    assert found == [(changes.pair("val", i), changes.sentences("val", i)) for i in range(40)]
    assert not kept.CACHE.exists()  # they are few
    fingerprint = example_changes("val", 40).fingerprint
    monkeypatch.setattr(kept, "FEW", 39)
    assert kept.told_pairs("val", 40) == found
    monkeypatch.setattr(changes, "pair", lambda *_: pytest.fail("found again"))
    assert kept.told_pairs("val", 40) == found
    assert example_changes("val", 40).fingerprint == fingerprint
    monkeypatch.setattr(inspect, "getsource", lambda module: f"another {module.__name__}")
    with pytest.raises(pytest.fail.Exception):  # pairs of other code are not these
        kept.told_pairs("val", 40)


def test_the_same_pairs_every_time_and_none_in_two_splits(monkeypatch):
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", {"train": 30, "val": 20, "test": 20})
    one = example_sets.open_changes(None, "val")
    changes.pair.cache_clear()
    again = example_sets.open_changes(None, "val")
    assert one.changes == again.changes and one.fingerprint == again.fingerprint and one.label == "example_changes/val"
    assert np.array_equal(np.asarray(one.load(7)), np.asarray(again.load(7)))
    assert one.fingerprint != example_changes("val", 19).fingerprint
    shown = {split: {changes.pair(split, n) for n in range(200)} for split in changes.SEEDS}
    assert not shown["train"] & shown["val"] and not (shown["train"] | shown["val"]) & shown["test"]
