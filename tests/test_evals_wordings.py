"""Mode wordings: what a model understands in wordings that it learnt, and in others."""

import logging

import numpy as np
import pytest
from test_evals import FakeClip

from pc_clip.core.config.evaluate import EvaluateConfig, WordingsConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Attribute, Dataset
from pc_clip.data.wordings import FAMILIES, HELD_OUT_FAMILIES, HELD_OUT_SCHEMES, SCHEMES, Wording
from pc_clip.evals import EvalContext, wordings

SIZE = Attribute("size", np.arange(8.0), "more", "less", "big", "small", gap=0.5)


def texts_of(wrong_families=(), wrong_schemes=(), phrases=(("more", "less"),)) -> dict[str, list[float]]:
    """Every sentence points along the first axis as it should, or against it where it is wrong."""
    texts = {}
    for family, templates in FAMILIES.items():
        for scheme, variants in SCHEMES.items():
            sign = -1.0 if family in wrong_families or scheme in wrong_schemes else 1.0
            for names in variants:
                for template in templates:
                    for exchanged in (False, True):
                        for a, b in phrases:
                            texts[Wording(template, names, exchanged).say(a, b)] = [sign, 0.1]
                            texts[Wording(template, names, exchanged).say(b, a)] = [-sign, 0.1]
    return texts | {"big": [1.0, 0.0], "small": [-1.0, 0.0], "more": [1.0, 0.0], "less": [-1.0, 0.0]}


def context_of(texts, options=None, **known) -> EvalContext:
    z = np.stack([np.linspace(-1, 1, 8), np.ones(8)], axis=1)
    clip = FakeClip(texts, z.tolist())
    data = Dataset("made", "test", [str(n) for n in range(8)], None, "f", **known)
    context = EvalContext(clip, lambda: clip, data, EvaluateConfig(wordings=options or WordingsConfig(n_pairs=60)))
    context.__dict__["z"] = context.__dict__["base_z"] = clip.z
    return context


def test_what_was_learnt_by_heart_is_told_from_what_is_understood():
    right = wordings.evaluate(context_of(texts_of(), attributes=(SIZE,))).metrics
    for name in ("unseen", "unseen_worst", "unseen_names", "unseen_names_worst", "consistency", "subtraction"):
        assert right[name] == 1.0, name
    assert all(right[f"two_way_{family}"] == 1.0 for family in FAMILIES)

    family, scheme = HELD_OUT_FAMILIES[0], HELD_OUT_SCHEMES[0]
    result = wordings.evaluate(context_of(texts_of([family], [scheme]), attributes=(SIZE,)))
    actual = result.metrics
    assert actual[f"two_way_{family}"] == actual["unseen_worst"] == 0.0
    assert actual["unseen"] == pytest.approx(1 - 1 / len(HELD_OUT_FAMILIES))
    assert actual[f"two_way_{scheme}"] == actual["unseen_names"] == actual["unseen_names_worst"] == 0.0
    assert actual["consistency"] == 0.0
    assert result.details["held_out_families"] == list(HELD_OUT_FAMILIES)
    assert "unseen_r1" not in actual  # many pairs share an attribute


def test_other_families_and_schemes_can_be_held_out():
    options = WordingsConfig(n_pairs=20, families=["terse"], schemes=["numbers"], trained_schemes=["letters"])
    result = wordings.evaluate(context_of(texts_of(["terse"], ["left_right"]), options, attributes=(SIZE,))).metrics
    assert (result["unseen"], result["two_way_negation"], result["two_way_numbers"]) == (0.0, 1.0, pytest.approx(0.9))
    assert "two_way_left_right" not in result
    for wrong in (WordingsConfig(families=["long"]), WordingsConfig(schemes=["long"]), WordingsConfig(n_pairs=0)):
        with pytest.raises(UserError, match="long|n_pairs"):
            wordings.evaluate(context_of({}, wrong, attributes=(SIZE,)))


def test_captions_are_compared_where_no_attribute_is_graded(caplog):
    caplog.set_level(logging.INFO)
    captions = [("More.",) if n >= 4 else ("less",) for n in range(8)]
    data = {"captions": captions, "attributes": ()}
    same = texts_of(phrases=(("more", "less"), ("more", "more"), ("less", "less")))
    result = wordings.evaluate(context_of(same, WordingsConfig(n_pairs=1000), **data))
    assert result.n == 4 * 4  # all that say something else of either image
    assert result.metrics["unseen"] == 1 and "caption_subtraction_r1" in result.metrics
    assert "R@1 is among 16 pairs, not 100" in caplog.text and "12 of 28 pairs are left out" in caplog.text
    assert wordings.applies(context_of({}, **data).data, EvaluateConfig()) is None
    assert "captions" in wordings.applies(context_of({}).data, EvaluateConfig())
