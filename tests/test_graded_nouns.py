"""Comparisons from captions: what graded words say, in training sentences and in the values of images."""

import numpy as np
import pytest

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.config.write import WordingConfig
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset
from pc_clip.data.graded_nouns import compared, table
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Job


def test_two_captions_are_compared_by_what_their_first_graded_words_say():
    rng = np.random.default_rng(0)
    drawn = {compared("Two elephants by a river", "a kitten on a sofa", rng) for _ in range(200)}
    larger = {phrase for each in drawn for phrase in each[:1]}
    assert "something larger" in larger and "something larger such as an elephant" in larger
    assert {second for _, second in drawn} & {"something smaller such as a kitten", "something smaller"}
    back = {compared("a kitten on a sofa", "Two elephants by a river", rng) for _ in range(200)}
    assert back == {pair[::-1] for pair in drawn}
    assert compared("a blue thing", "a red thing", rng) is None


def test_no_phrase_that_is_asked_as_unseen_is_in_a_training_sentence():
    for grades in table():
        trained = {phrase for pair in grades.phrases for phrase in pair}
        assert trained.isdisjoint({phrase for pair in grades.unseen for phrase in pair})


def test_the_rules_writer_compares_the_share_that_was_asked_for():
    jobs = [Job("an elephant in a field", "a cat on a bed", seed) for seed in range(400)]
    for share in (0.0, 0.25):
        written = [text for _, text in RulesWriter(WordingConfig(graded=share)).stream(jobs)]
        sentences = np.mean(["elephant in a field" not in text and "cat on a bed" not in text for text in written])
        assert sentences == pytest.approx(share, abs=0.07)


def test_captioned_images_are_ranked_by_graded_nouns_on_request():
    captions = [("an elephant", "a big elephant"), ("a cat", "an animal"), ("a thing", "a cup", "some things")]
    data = Dataset("made", "test", ["a", "b", "c"], None, "f", captions=captions)
    assert not attributes.of(data, EvaluateConfig())
    asked = attributes.of(data, EvaluateConfig(tasks=["nouns"]))
    sizes = [attribute for attribute in asked if attribute.task == "nouns_size_unseen"]
    assert len(sizes) == 2 and sizes[0].more == "a huge object"
    assert sizes[0].value[:2].tolist() == [2.0, -1.0] and np.isnan(sizes[0].value[2])
