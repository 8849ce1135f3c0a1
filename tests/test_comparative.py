"""Comparative prompting on embeddings whose right answer is known by arithmetic."""

import json

import numpy as np
import pytest
import torch
from made_space import FakeClip, made_context

from pc_clip.core.config.evaluate import ComparativeConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Question
from pc_clip.data.registry import open_dataset
from pc_clip.evals import EvalContext, comparative, zeroshot

ABC = Question("q", ("a", "b", "c"), np.arange(3), np.arange(3), ("{}",))
TEXTS = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1], "a over b": [0.6, 0.8, 0], "c over b": [0, 0.6, 0.8]}
COMPARISONS = [
    {"class_a": "a", "class_b": "b", "text": "a over b"},
    {"class_a": "c", "class_b": "b", "text": "c over b"},
]


def corrections(calibration, offset=(0.0, 0.0, 0.0)):
    clip = FakeClip(TEXTS, np.eye(3))
    prompts = zeroshot.class_embeddings(clip, ABC)
    return comparative.corrections(clip, ABC, prompts, COMPARISONS, calibration, torch.tensor(offset)), prompts


def test_prompts_are_corrected_by_the_mean_of_the_comparisons():
    (result, shift), prompts = corrections("none")
    expected = ((np.array([1, 0, 0]) - [0.6, 0.8, 0]) + (np.array([0, 0, 1]) - [0, 0.6, 0.8])) / 2
    assert np.allclose(result[1], expected, atol=1e-6)
    assert torch.equal(result[[0, 2]], prompts[[0, 2]])
    assert not shift.any()


def test_with_the_offset_a_comparison_scores_nothing_on_the_mean_image():
    """The fault: a difference embedding that all images score alike must not move its class's threshold."""
    mean = torch.tensor([0.5, 0.0, 0.25])
    (corrected, shift), prompts = corrections("offset", offset=tuple(mean.tolist()))
    scored = comparative.mixed_scores(mean[None], prompts, corrected, shift, 0.0)[1, 0] * corrected[1].norm()
    assert float(scored) == pytest.approx(float((prompts[[0, 2]] @ mean).mean()), abs=1e-6)


def test_alpha_is_chosen_on_validation_and_reported_on_test(monkeypatch, tmp_path):
    """On validation alpha 0 is best; on test it is worse than plain zero-shot, and that is what is reported."""
    question = Question("q", ("a", "b"), np.arange(2), np.array([0, 1]), ("{}",))
    flipped = Question("q", ("a", "b"), np.arange(2), np.array([1, 0]), ("{}",))
    texts = {"a": [1, 0], "b": [0, 1], "worse": [1.0, 0.0], "more": [0.0, 1.0]}
    z = [[1, 0.2], [0.2, 1]]
    test, held_out = made_context(texts, z, questions=(question,)), made_context(texts, z, questions=(flipped,))
    monkeypatch.setattr(EvalContext, "validation", lambda self: held_out)
    monkeypatch.setattr(comparative, "COMPARISONS", tmp_path)
    comparisons = {
        "q": [{"class_a": "b", "class_b": "a", "text": "worse"}, {"class_a": "a", "class_b": "b", "text": "more"}]
    }
    (tmp_path / "made.yaml").write_text(json.dumps(comparisons))
    result = comparative.evaluate(test)
    about = result.details["q"]["table"]["none"]
    curve = {alpha: (on_val, on_test) for alpha, on_val, on_test in about["curve"]}
    assert curve[about["alpha"]][0] == max(on_val for on_val, _ in curve.values()) == 1.0
    assert result.metrics["plain"] == result.metrics["subset_plain"] == 1.0
    assert result.metrics["comparative_none"] == result.metrics["subset_comparative_none"] == 0.0
    assert result.metrics["gain_none"] == -1.0
    assert result.intervals["gain_none"] == (-1.0, -1.0)
    assert result.details["q"]["classes"]["none"]["worst"]["gain"] == -1.0


def test_the_most_confused_pairs_are_counted_both_ways():
    target = np.array([0, 0, 0, 1, 1, 2])
    guess = [1, 1, 0, 0, 2, 1]
    scores = torch.zeros(3, 6)
    scores[guess, range(6)] = 1.0
    assert comparative.most_confused(scores, target, 5) == [(0, 1), (1, 2)]
    assert comparative.most_confused(scores, target, 1) == [(0, 1)]
    right = torch.zeros(3, 6)
    right[target.tolist(), range(6)] = 1.0
    assert comparative.most_confused(right, target, 5) == []


def test_auto_finds_and_describes_the_confused_classes_of_the_example(small_example, example_clip):
    data = open_dataset("example", split="test")
    config = EvaluateConfig(
        comparative=ComparativeConfig(pairs="auto", n_comparisons=1, calibrate=["norm", "shuffled"])
    )
    result = comparative.evaluate(EvalContext(example_clip, lambda: example_clip, data, config))
    assert any(about["comparisons"] for about in result.details.values())
    for about in result.details.values():
        if not about["comparisons"]:  # nothing was confused, so nothing changes
            assert about["comparative_norm"] == about["plain"] and about["subset_plain"] is None
            continue
        (ab, ba) = about["comparisons"]
        assert (ab["class_a"], ab["class_b"]) == (ba["class_b"], ba["class_a"]) and ab["text"] != ba["text"]
    assert {"plain", "plain_centred", "comparative_norm", "comparative_shuffled", "gain_norm"} <= result.metrics.keys()
    assert result.intervals["gain_norm"][0] <= result.metrics["gain_norm"] <= result.intervals["gain_norm"][1]
    assert [curve.title for curve in result.curves] == [
        f"Comparative prompting on {name}, test" for name in result.details
    ]


def test_settings_and_comparisons_that_make_no_sense_are_refused(small_example, example_clip, tmp_path):
    data, path = open_dataset("example", split="val"), tmp_path / "c.yaml"
    for setting, message in (
        ({"pairs": "all"}, "pairs is 'all'"),
        ({"calibrate": ["length"]}, "calibrate is 'length'"),
        ({"pairs": "auto", "n_comparisons": 0}, "n_comparisons is 0"),
    ):
        config = EvaluateConfig(comparative=ComparativeConfig(**setting))
        context = EvalContext(example_clip, lambda: example_clip, open_dataset("example", split="test"), config)
        with pytest.raises(UserError, match=message):
            comparative.evaluate(context)
    for comparisons, message in (
        (
            "size:\n  - {class_a: huge, class_b: small, text: x}\n",
            "'huge' is not a class of size: small, medium, large",
        ),
        ("weight:\n  - {class_a: a, class_b: b, text: x}\n", "compares classes of 'weight'"),
    ):
        path.write_text(comparisons)
        with pytest.raises(UserError, match=message):
            comparative.read_comparisons(path, data)
