"""Likely false negatives: captions whose every content word another image of the batch is told with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.data.overlap import content_words, false_negative_rate

WORDS = ["red", "circle", "a", "two", "the", "blue", "of"]
captions = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
batches = st.lists(st.lists(captions, min_size=1, max_size=3), min_size=2, max_size=6)


def test_content_words_say_what_is_in_the_picture():
    assert content_words("A photo of TWO red circles, on the left!") == {"two", "red", "circles", "left"}


def test_the_share_of_negatives_that_are_likely_none():
    for captions, expected in [
        ([["a red circle"], ["a blue star"]], 0.0),
        ([["a red circle"], ["two circles", "a large red circle"]], 0.5),  # the first is true of the second image
        ([["a circle"], ["the circle"]], 1.0),
        ([["red circle"], ["red"], ["circle"]], 2 / 6),  # words of several images do not count together
        ([["the picture"], ["blue"]], 0.5),  # what says nothing is true of all
        ([["red"]], 0.0),
    ]:
        assert false_negative_rate([texts[0] for texts in captions], captions) == pytest.approx(expected)


@given(batches, st.integers(0, 2))
def test_it_agrees_with_looking_at_each_pair(captions, which):
    sentences = [texts[which % len(texts)] for texts in captions]
    pairs = [(n, m) for n in range(len(captions)) for m in range(len(captions)) if n != m]
    false = sum(content_words(sentences[n]) <= set().union(*map(content_words, captions[m])) for n, m in pairs)
    assert false_negative_rate(sentences, captions) == pytest.approx(false / len(pairs))
