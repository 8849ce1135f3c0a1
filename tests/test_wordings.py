"""Differences in many wordings: templates, names of the images, the exchange of roles."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_clip.core.errors import UserError
from pc_clip.data.wordings import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    HELD_OUT_SCHEMES,
    SCHEMES,
    Wording,
    Wordings,
    as_phrase,
    contrast,
    reword,
    role_mentions,
    swap_roles,
)

ALL = [
    (scheme, Wording(template, names, exchanged))
    for templates in FAMILIES.values()
    for template in templates
    for scheme, variants in SCHEMES.items()
    for names in variants
    for exchanged in (False, True)
]


def with_names_exchanged(wording):
    first, second, first_short, second_short = wording.names
    return wording._replace(names=(second, first, second_short, first_short))


def test_there_are_sixty_templates_and_ten_schemes_and_some_are_held_out():
    assert sum(map(len, FAMILIES.values())) >= 60
    assert len(SCHEMES) >= 10
    assert set(HELD_OUT_FAMILIES) < FAMILIES.keys()
    assert set(HELD_OUT_SCHEMES) < SCHEMES.keys()
    assert len({template for templates in FAMILIES.values() for template in templates}) == sum(
        map(len, FAMILIES.values())
    )


def test_every_wording_is_a_sentence_that_says_whose_the_content_is():
    wrong = []
    for _, wording in ALL:
        sentence = wording.say("a dog", "two red cats")
        both = "{second" in wording.template
        if (
            re.search(r"[{}]|\s\s|\s[.,;?]|\.\.", sentence)
            or sentence[0].islower()
            or re.search(r"(?<!vs)[.?!] [a-z]", sentence)
            or (both and not ("dog" in sentence.lower() and "two red cats" in sentence.lower()))
        ):
            wrong.append(sentence)
    assert not wrong


def test_the_roles_of_every_wording_can_be_exchanged():
    """Half of the pairs of a batch are mirrored: what cannot be exchanged teaches nothing."""
    none, wrong = [], []
    for scheme, wording in ALL:
        sentence = wording.say("a dog", "two red cats")
        swapped = swap_roles(sentence)
        if swapped is None:
            none.append(sentence)
        # Of an image that is named alone, as in "only this photo", the other may be called "that photo".
        elif "{second" in wording.template or scheme not in ("this_that", "original_edited"):
            wrong += [(sentence, swapped)] * (swapped != with_names_exchanged(wording).say("a dog", "two red cats"))
    assert not wrong and not none


def test_in_either_order_of_mention_a_wording_says_the_same():
    template, names = "{first} shows {a}, while {second_short} shows {b}.", SCHEMES["first_image"][0]
    assert Wording(template, names, False).say("a dog", "a cat") == (
        "The first image shows a dog, while the second shows a cat."
    )
    assert Wording(template, names, True).say("a dog", "a cat") == (
        "The second image shows a cat, while the first shows a dog."
    )


def test_there_is_agrees_with_what_there_is():
    wording = Wording("{there_a} in {first} and {b} in {second}.", SCHEMES["first_image"][0], False)
    cases = {
        "a dog": "is", "two dogs": "are", "several dogs": "are", "people on a beach": "are", "larger stars": "are",
        "the glass": "is", "a man with dogs": "is", "grass": "is", "a group of zebras": "is", "more objects": "are",
    }  # fmt: skip
    assert {phrase: wording.say(phrase, "x").split()[1] for phrase in cases} == cases


def test_a_caption_becomes_a_phrase():
    cases = {
        "A man is riding a horse.": "a man riding a horse",
        "A tray is filled with broccoli .": "a tray filled with broccoli",
        "A dog that is lying on a bed": "a dog that is lying on a bed",
        "A photo of two cats": "two cats",
        "There are two cats on a sofa.": "two cats on a sofa",
        "This is a close up of a pizza": "a pizza",
        "a picture of a large red star": "a large red star",
        "NASA rocket  on a pad, ": "NASA rocket on a pad",
        "A man is standing while a dog is running": "a man standing while a dog is running",
    }
    assert {caption: as_phrase(caption) for caption in cases} == cases


def test_draws_keep_to_what_was_asked_for_and_reach_all_of_it():
    wordings = Wordings(order="first")
    drawn = [wordings.draw(np.random.default_rng(n)) for n in range(1500)]
    usual = {t for name, templates in FAMILIES.items() if name not in HELD_OUT_FAMILIES for t in templates}
    named = {names for name, variants in SCHEMES.items() if name not in HELD_OUT_SCHEMES for names in variants}
    assert {each.template for each in drawn} == usual
    assert {each.names for each in drawn} == named
    assert not any(each.exchanged for each in drawn)
    both = Wordings(["plain"], ["letters"])
    assert {both.draw(np.random.default_rng(n)).exchanged for n in range(20)} == {False, True}
    with pytest.raises(UserError, match="no family .*'negations'.*negation"):
        Wordings(["negations"])
    with pytest.raises(UserError, match="no scheme .*'lefts'"):
        Wordings([], ["lefts"])
    with pytest.raises(UserError, match="no family or scheme of wordings is called 'lefts'"):
        Wordings(without=["lefts"])
    with pytest.raises(UserError, match="without terse no wording is left"):
        Wordings(["terse"], without=["terse"])
    assert "terse" not in Wordings(without=["terse", "numbers"]).families


# -- the roles in anybody's sentence ---------------------------------------------------------------------------

words = st.lists(st.sampled_from(["a", "dog", "red,", "on", "the", "sofa.", "2", "is", "Larger", "than"]), max_size=4)
naming = st.sampled_from(
    ["first", "second", "First", "Second", "former", "Latter", "image 1", "Image 2", "picture 2", "image A", "Photo B",
     "the left image", "The photo on the right", "this picture", "that picture"]
)  # fmt: skip
sentences = st.lists(st.tuples(words, naming), max_size=5).map(
    lambda parts: " ".join(f"{' '.join(w)} {o}" for w, o in parts)
)


@settings(deadline=None, max_examples=300)
@given(sentences)
def test_exchanging_the_roles_twice_changes_nothing(text):
    swapped = swap_roles(text)
    assert swapped is None or (swapped != text and swap_roles(swapped) == text)


def test_the_roles_are_exchanged_only_where_it_is_clear_whose_they_are():
    cases = {
        "Image 1 shows 2 dogs; image 2 shows 1.": "Image 2 shows 2 dogs; image 1 shows 1.",
        "The former is red, the latter blue.": "The latter is red, the former blue.",
        "The first image is larger than the second.": "The second image is larger than the first.",
        "This photo has a dog, the other photo a cat.": "The other photo has a dog, this photo a cat.",
        "The image on the left shows a dog on the right, the one on the right a cat.":
            "The image on the right shows a dog on the right, the one on the left a cat.",
        "Image A is darker than image B.": "Image B is darker than image A.",
        "Only the first image shows a dog.": "Only the second image shows a dog.",
        "The difference is that image 1 shows a dog and image 2 a cat.":
            "The difference is that image 2 shows a dog and image 1 a cat.",
        "The first image shows two dogs.": None,  # and the second may as well
        "Two dogs, 1 of them seconds from the firstborn, 2 asleep.": None,
        "The first image shows a runner on second base, while the second shows a cat.": None,
        "The first image shows a dog, unlike image B.": None,  # names of two schemes
        "The first image shows a sign in this photo, the second a cat.": None,
    }  # fmt: skip
    assert {text: swap_roles(text) for text in cases} == cases


def test_mentions_say_which_image_is_named():
    text = "The left image has a dog; the one on the right, a cat."
    assert [(text[start:end], side) for start, end, side in role_mentions(text)] == [
        ("The left image", 0),
        ("the one on the right", 1),
    ]


def test_a_sentence_is_said_in_other_words_and_stays_true():
    """Other names, another order or connective; where it is not clear whose the halves are, names alone."""
    wordings, rng = Wordings(schemes=["letters"]), np.random.default_rng(0)
    sentences = {
        reword("The first image shows a dog, while the second shows a cat.", wordings, rng) for _ in range(400)
    }
    assert len(sentences) == 30  # three pairs of names, two orders, five connectives
    for text in sentences:
        assert re.search(r"(?i)[AX] shows a dog.*[BY] shows a cat|[BY] shows a cat.*[AX] shows a dog", text), text
        assert text[0].isupper() and swap_roles(text) is not None
    kept = {reword("Unlike the second image, the first has a bus.", wordings, rng) for _ in range(50)}
    assert all(re.fullmatch(r"Unlike \w+ [BY], \w+ [AX] has a bus\.", text) for text in kept), kept
    assert reword("The first image shows two dogs.", wordings, rng) is None


def test_the_four_plain_wordings_say_the_same_and_differ():
    assert [contrast("A", "B", n) for n in range(5)] == [
        "The first image shows A, while the second shows B.",
        "The second image shows B, while the first shows A.",
        "In the first image one sees A, in the second image B.",
        "In the second image one sees B, in the first image A.",
        "The first image shows A, while the second shows B.",
    ]


def test_an_opener_stands_before_a_sentence_and_changes_nothing_else():
    names = SCHEMES["first_image"][0]
    cases = {
        ("In {first} one sees {a}, in {second} {b}.", False): "Overall, in the first image one sees a dog, in the",
        (
            "I see {a} when I look at {first}, and {b} when I look at {second_short}.",
            False,
        ): "Overall, I see a dog when I",
        (
            "{first} shows {a}, while {second_short} shows {b}.",
            True,
        ): "Overall, the second image shows a cat, while the",
        (
            "Which one shows {a}? {first}. Which one shows {b}? {second}.",
            False,
        ): "Overall, which one shows a dog? The first",
    }
    for (template, exchanged), begins in cases.items():
        assert Wording(template, names, exchanged, "Overall,").say("a dog", "a cat").startswith(begins)
    drawn = [Wordings(openers=0.3).draw(np.random.default_rng(seed)).opener for seed in range(1000)]
    assert np.mean([bool(opener) for opener in drawn]) == pytest.approx(0.3, abs=0.04)
