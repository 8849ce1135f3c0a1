"""The benchmark of evaluations compares like with like: reference and ours find the same, on small models."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.registry import open_dataset
from pc_clip.evals.evaluate import measure
from pc_clip.models.clip import Clip, blend

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import evaluation

CLASSES = ("a red square", "a blue circle", "two stars", "a dark scene", "nothing")


@pytest.fixture
def pictures():
    return evaluation.write_images(Path("images"), CLASSES, 20, 64)


@pytest.fixture
def model() -> Clip:
    """A model that a test may change."""
    return Clip.create("example")


def settings(mode: str, **more) -> EvaluateConfig:
    return EvaluateConfig(mode=mode, n_pairs=60, draws=2, alphas=[0.5], shots=[1], **more)


# -- reference and ours --------------------------------------------------------------------------------


def test_both_find_the_same_confusion_matrix_of_either_checkpoint(model, pictures):
    pixels, found = evaluation.transformed(model, pictures), []
    for _ in ("first", "second"):
        ours = evaluation.our_confusion(model, pictures)
        assert np.array_equal(ours, evaluation.published_confusion(model, pictures, pixels))
        assert ours.sum(1).tolist() == [4] * 5  # so many of each class were shown
        found.append(ours)
        evaluation.with_other_text(model, amount=1.0)
    assert not np.array_equal(*found)  # the second checkpoint is another model indeed


def test_both_find_the_same_cosine_for_every_pair(model, pictures):
    said = evaluation.write_sentences(evaluation.SENTENCES, pictures)
    assert len(said) == 20 * 19 / 2
    assert len({each.text for each in said}) == 6
    published = evaluation.published_cosines(model, pictures, evaluation.transformed(model, pictures), said)
    ours = evaluation.our_cosines(model, pictures, said)
    assert torch.allclose(ours, published, atol=1e-5)
    assert published.std() > 0.01  # so that being near one another means something
    sign = evaluation.our_difference_classification(model, pictures)["sign"]
    assert sign == pytest.approx(float((published > 0).double().mean()))


def test_a_second_checkpoint_needs_no_picture(model, pictures):
    before = evaluation.our_confusion(model, pictures)

    def gone(row):
        raise AssertionError("a picture was read again")

    unseen = dataclasses.replace(pictures, load=gone)
    assert evaluation.our_confusion(evaluation.with_other_text(model), unseen).sum() == before.sum() == 20


def test_a_sample_is_of_different_pairs_and_by_seed(pictures):
    said = evaluation.write_sentences(evaluation.SENTENCES, pictures)
    drawn = evaluation.sample(said, 50)
    assert len(set(drawn)) == 50
    assert set(drawn) <= set(said)
    assert drawn == evaluation.sample(said, 50)
    assert drawn != evaluation.sample(said, 50, seed=1)


# -- what is left out of an evaluation -----------------------------------------------------------------


def test_a_result_is_the_same_alone_and_after_others(model, small_example):
    """To the last digit, although prompts that several evaluations ask about are encoded once."""
    data = open_dataset("example", split="test")
    together = measure(model, data, settings("comparative,difference,rank,zeroshot", out="together"))
    for found in together:
        (alone,) = measure(model, data, settings(found["evaluation"], out="alone"))
        assert (alone["metrics"], alone["intervals"]) == (found["metrics"], found["intervals"])
        assert alone["key"] == found["key"]


def test_each_list_of_texts_is_encoded_once_a_run_and_again_when_the_weights_have_changed(
    model, small_example, monkeypatch
):
    asked, embed = [], Clip.embed_texts
    monkeypatch.setattr(
        Clip, "embed_texts", lambda clip, texts, size=256: asked.append(tuple(texts)) or embed(clip, texts, size)
    )
    data = open_dataset("example", split="test")
    (before, *_) = measure(model, data, settings("zeroshot,probe,comparative"))
    assert len(asked) == len(set(asked))
    evaluation.with_other_text(model)
    (after, *_) = measure(model, data, settings("zeroshot"))
    assert set(asked[: len(data.questions)]) == set(asked[-len(data.questions) :])
    assert before["weights"] != after["weights"]
    assert before["key"] != after["key"]
    assert before["details"] != after["details"]


def test_averaging_encodes_texts_for_every_alpha_anew(model, small_example, monkeypatch):
    """Each average is another model: what one made of a text is not taken for what the next one makes of it."""
    base = Clip.create("example")
    monkeypatch.setattr("pc_clip.evals.base_of", lambda clip: base)
    evaluation.with_other_text(model)
    config = settings("average", checkpoint="made/here")
    config.alphas = [0.25, 0.5, 0.75]
    data = open_dataset("example", split="test")
    (found,) = measure(model, data, config)
    table = {row["alpha"]: row["test"] for row in found["details"]["table"]}
    for alpha in (0.25, 0.5, 0.75):
        mixed = Clip.create("example")
        mixed.model.load_state_dict(blend(base.model.state_dict(), model.model.state_dict(), alpha))
        alone, differences = measure(mixed, data, settings("zeroshot,difference", again=True))
        assert table[alpha]["zeroshot"] == pytest.approx(alone["metrics"]["zeroshot"], abs=1e-6)
        assert table[alpha]["two_way"] == pytest.approx(differences["metrics"]["two_way"], abs=1e-6)
    assert len({row["two_way"] for row in table.values()}) == 5


def test_the_untrained_model_is_loaded_once_and_not_at_all_where_nothing_asks(model, small_example, monkeypatch):
    base, loaded = Clip.create("example"), []
    monkeypatch.setattr("pc_clip.evals.base_of", lambda clip: loaded.append(clip) or base)
    evaluation.with_other_text(model)
    data = open_dataset("example", split="test")
    measure(model, data, settings("zeroshot,retrieve", checkpoint="made/here"))
    assert not loaded
    measure(model, data, settings("rank,average,difference", checkpoint="made/here"))
    assert len(loaded) == 1
