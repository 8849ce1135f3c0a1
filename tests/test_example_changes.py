"""The example's changes: one change a pair under distractors, and sentences that are judged part by part."""

import dataclasses
import inspect
import re
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.data import example_sets
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


def test_kinds_and_values_are_about_equally_frequent():
    pairs = [changes.pair("train", i) for i in range(1800)]
    groups = [Counter(p.kind for p in pairs)]
    groups += [Counter(p.value for p in pairs if p.kind == kind) for kind in changes.VALUES]
    for group, size in zip(groups, (6, 8, 3, 4)):
        assert len(group) == size
        expected = group.total() / size
        assert all(abs(n - expected) < 4 * expected**0.5 for n in group.values()), group


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


SAYS = {  # sentence -> kind, facts, value; None for one that is not clear
    "the red star turned blue": ("colour", "colour=red shape=star", "blue"),
    "the colour of the large dotted red star changed to blue": (
        "colour", "size=large texture=dotted colour=red shape=star", "blue"
    ),
    "the red star changed from striped to dotted": ("texture", "texture=striped colour=red shape=star", "dotted"),
    "the small blue circle moved to the left": ("move", "size=small colour=blue shape=circle", "left"),
    "the blue circle is further down now": ("move", "colour=blue shape=circle", "down"),
    "an orange ring was added": ("add", "colour=orange shape=ring", ""),
    "the ring is gone": ("drop", "shape=ring", ""),
    "nothing changed": ("none", "", ""),
    **dict.fromkeys(
        (
            "", "a red star", "the red star turned huge", "the red turned blue", "the red star turned red",
            "the striped red star changed from dotted to plain", "the red blue star is gone",
            "the small large red star is gone", "the star red is gone", "the red star turned blue the ring is gone",
            "the red star moved left", "the texture of the red star changed to blue", "a orange ring appeared",
            "a green ring is gone", "Nothing changed", "the red unicorn is gone",
        )
    ),
}  # fmt: skip


def test_what_sentences_say():
    said = {
        s: changes.Said(v[0], dict(f.split("=") for f in v[1].split()), v[2]) if v else None for s, v in SAYS.items()
    }
    assert {sentence: changes.parse(sentence) for sentence in SAYS} == said
    unclear = [sentence for sentence, meaning in SAYS.items() if meaning is None]
    assert all(changes.judge(changes.pair("val", 0), sentence) == WRONG for sentence in unclear)


def test_each_part_of_a_sentence_is_judged_by_itself():
    """A star turns from red to blue; sentences that have another object, value or kind."""
    star = Thing("star", "red", "plain", "large", 20.0, 20.0, 14.0)
    pair = dataclasses.replace(changes.pair("val", 0), kind="colour", thing=star, value="blue")
    parts = {
        "the large red star became blue": (True, True, True),
        "the red star became green": (True, True, False),
        "the red ring became blue": (True, False, True),
        "the small red star became blue": (True, False, True),
        "the star became blue": (True, False, True),
        "the red star is gone": (False, True, False),
        "nothing changed": (False, False, False),
    }
    assert {text: tuple(changes.judge(pair, text).values()) for text in parts} == parts
    unchanged = dataclasses.replace(pair, kind="none", thing=None, value="")
    assert changes.judge(unchanged, "there is no change") == RIGHT
    assert changes.judge(unchanged, "the red star is gone") == WRONG


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
    one = example_changes("val")
    changes.pair.cache_clear()
    again = example_changes("val")
    assert one.changes == again.changes and one.fingerprint == again.fingerprint and one.label == "example_changes/val"
    assert np.array_equal(np.asarray(one.load(7)), np.asarray(again.load(7)))
    assert one.fingerprint != example_changes("val", 19).fingerprint
    shown = {split: {changes.pair(split, n) for n in range(200)} for split in changes.SEEDS}
    assert not shown["train"] & shown["val"] and not (shown["train"] | shown["val"]) & shown["test"]
