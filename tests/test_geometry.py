"""The geometry of spaces that are laid out by hand, so that every figure is known by arithmetic."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_space import FakeClip, made_context

from pc_clip.core.config.evaluate import EvaluateConfig, GeometryConfig
from pc_clip.data.dataset import Attribute, Question
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, geometry
from pc_clip.models import lora
from pc_clip.models.loading import create_model

CONFIG = EvaluateConfig(geometry=GeometryConfig(n_pairs=200))
SIZE = Attribute("size", np.array([0.0, 0.0, 1.0, 1.0, np.nan]), "more", "less", "big", "small", gap=0.5)
ON_CIRCLE = [[-0.6, 0.8], [-0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, -1.0]]  # size grows along the first axis


def measure(texts, z, **known):
    context = made_context(texts, z, CONFIG, **known)
    return geometry.measure(context, context.clip, context.z)


def sentences(vector, vector_reversed):
    """Embeddings of the sentences on size, with the larger first."""
    return {contrast("more", "less", 0): vector, contrast("more", "less", 1): vector_reversed}


def asks(name, target, classes, rows=None):
    target = np.array(target)
    rows = np.arange(len(target)) if rows is None else np.array(rows)
    return Question(name, tuple(classes), rows, target, ("{}",))


# -- differences -------------------------------------------------------------------------------------------


def test_attribute_alignment_is_the_mean_cosine():
    half, third = np.deg2rad(60), np.deg2rad(120)
    vectors = [np.cos(half), np.sin(half)], [np.cos(third), np.sin(third)]
    metrics, _ = measure({"big": [1, 0], "small": [0, 1], **sentences(*vectors)}, ON_CIRCLE, attributes=(SIZE,))
    assert metrics["difference_alignment_phrases"] == pytest.approx(np.sqrt(0.5), abs=1e-6)
    assert metrics["difference_alignment_sentences"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["difference_alignment_sentences_reversed"] == pytest.approx(-0.5, abs=1e-6)


def test_attribute_alignment_skips_constant_attributes():
    against = Attribute("age", np.array([1.0, 1.0, 0.0, 0.0, np.nan]), "more", "less", "big", "small")
    alike = Attribute("kind", np.ones(5), "more", "less", "big", "small")
    texts = {"big": [1, 0], "small": [-1, 0], **sentences([1, 0], [1, 0])}
    metrics, details = measure(texts, ON_CIRCLE, attributes=(SIZE, against, alike))
    assert details["attributes"].keys() == {"size", "age"}
    assert details["attributes"]["age"]["phrases"] == pytest.approx(-1, abs=1e-6)
    assert metrics["difference_alignment_phrases"] == pytest.approx(0, abs=1e-6)


def test_alignment_of_classes_is_over_pairs_of_class_means():
    """Texts and images agree on a and b; of c the texts say the third axis and the images the second."""
    z = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]])
    question = asks("q", [0, 0, 1, 2], "abcd")  # no image of d, and the last image has no class
    prompts = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 1, 0]])
    ac = np.dot([1, 0, -1], [1, -1, 0]) / 2
    bc = np.dot([-1, 0, -1], [-1, -1, 0]) / 2
    aligned = geometry.alignment_of_classes(z, question, prompts, n=100, seed=0)
    assert aligned == pytest.approx((1 + ac + bc) / 3, abs=1e-6)
    swapped = geometry.alignment_of_classes(z[:3], asks("q", [0, 0, 1], "ab"), prompts[[1, 0]], n=100, seed=0)
    assert swapped == pytest.approx(-1, abs=1e-6)
    assert geometry.alignment_of_classes(z, asks("q", [1, 1], "ab"), prompts[:2], n=100, seed=0) is None


# -- analogies ---------------------------------------------------------------------------------------------

P, Q = [[0.0, 0, 0], [2, 0, 0], [0, 2, 0]], [[0.0, 0, 0], [0, 0, 5]]


def grid(of_p, of_q, each=5):
    """`each` images of every pair of classes, at the sum of two vectors.  -> z, question p, question q"""
    cells = list(itertools.product(range(len(of_p)), range(len(of_q)))) * each
    z = np.array([np.add(of_p[a], of_q[c]) for a, c in cells], dtype=np.float32)
    p, q = zip(*cells)
    return torch.from_numpy(z), asks("p", p, "abcdef"[: len(of_p)]), asks("q", q, "abcdef"[: len(of_q)])


def test_where_two_questions_add_up_every_analogy_holds():
    z, p, q = grid(P, Q)
    figures = geometry.analogies(z, p, q, torch.tensor(P) * 0.1, n=1000, seed=0)  # texts get the images' length
    assert figures == {"image": 1.0, "text": 1.0, "chance": 1 / 6, "n": 3 * 2 * 2 * 1}
    texts = {"a": P[0], "b": P[1], "c": P[2]}
    metrics, details = measure(texts, z, unit=False, questions=(p, q))
    assert metrics["analogy_image"] == 1.0 and details["analogies"].keys() == {"p, q", "q, p"}
    assert "analogy_image" not in measure(texts, z, unit=False, questions=(p,))[0]


def test_analogies_want_cells_of_five_images():
    z, p, q = grid(P[:2], Q, each=4)
    assert geometry.analogies(z, p, q, torch.tensor(P[:2]), n=1000, seed=0) == {}
    z, p, q = grid(P, Q)
    last = np.flatnonzero((p.target == 2) & (q.target == 1))[0]  # an image that one of the questions does not ask about
    kept = np.delete(np.arange(len(z)), last)
    figures = geometry.analogies(z, p, asks("q", q.target[kept], "ab", rows=kept), torch.tensor(P), n=1000, seed=0)
    assert (figures["chance"], figures["n"]) == (1 / 5, 2 * 2)  # only a and b of p have all four


@pytest.mark.parametrize("seed", range(3))
def test_analogies_equal_going_through_them_one_by_one(seed):
    rng = np.random.default_rng(seed)
    target = np.stack([rng.integers(0, 3, 90), rng.integers(0, 3, 90)])
    z, prompts = rng.normal(size=(90, 4)), rng.normal(size=(3, 4))
    mean_of = {}
    for cell in itertools.product(range(3), repeat=2):
        own = (target[0] == cell[0]) & (target[1] == cell[1])
        if own.sum() >= 5:
            mean_of[cell] = z[own].mean(0)
    image, text = [], []
    for a, b, c, d in itertools.product(range(3), repeat=4):
        if a != b and c != d and {(a, c), (a, d), (b, c), (b, d)} <= mean_of.keys():
            step = mean_of[a, d] - mean_of[b, d]
            gap = prompts[a] - prompts[b]
            for hits, moved in ((image, step), (text, gap / np.linalg.norm(gap) * np.linalg.norm(step))):
                at = mean_of[b, c] + moved
                hits.append(min(mean_of, key=lambda cell, at=at: np.linalg.norm(at - mean_of[cell])) == (a, c))
    figures = geometry.analogies(
        torch.tensor(z), asks("p", target[0], "abc"), asks("q", target[1], "abc"), torch.tensor(prompts), 10_000, 0
    )
    expected = {"image": np.mean(image), "text": np.mean(text), "chance": 1 / len(mean_of), "n": len(image)}
    assert figures == pytest.approx(expected)


# -- gap ---------------------------------------------------------------------------------------------------


def test_modality_gap_and_cones_by_hand():
    metrics, _ = measure({"a": [-1, 0], "b": [0, -1]}, [[1.0, 0], [0, 1]], questions=(asks("q", [0, 1], "ab"),))
    assert metrics["modality_gap"] == pytest.approx(np.sqrt(2), abs=1e-6)  # from (.5, .5) to (-.5, -.5)
    assert metrics["image_cosine"] == metrics["text_cosine"] == pytest.approx(0, abs=1e-6)
    metrics, _ = measure({"x": [1, 0], "y": [1, 0]}, [[1.0, 0], [1, 0]], captions=[("x", "unused"), ("y",)])
    assert metrics == {"image_cosine": 1.0, "text_cosine": 1.0, "modality_gap": 0.0}


def test_mean_cosine_is_over_pairs_of_different_rows():
    z = F.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(z[i] @ z[j]) for i, j in itertools.permutations(range(7), 2)]
    assert geometry.mean_cosine(z) == pytest.approx(np.mean(pairs), abs=1e-6)


# -- all of it ---------------------------------------------------------------------------------------------


def test_the_untrained_model_is_shown_beside_a_different_one_only():
    question, texts = asks("kind", [0, 0, 1, 1], "ab"), {"a": [-1, 0], "b": [1, 0]}

    def evaluated(texts, weights, base):
        context = made_context(texts, ON_CIRCLE, CONFIG, base, questions=(question,))
        context.clip.weights = weights
        return geometry.evaluate(context)

    base = FakeClip(texts, ON_CIRCLE)
    same, unknown = evaluated(texts, "fake", base), evaluated(texts, "fake", None)
    changed = evaluated({"a": [1, 0], "b": [-1, 0]}, "other", base)
    assert same.metrics == unknown.metrics
    assert not any(name.startswith("base_") for name in same.metrics)
    assert changed.metrics["difference_alignment_classes"] == pytest.approx(-1, abs=1e-6)
    assert changed.metrics["base_difference_alignment_classes"] == pytest.approx(1, abs=1e-6)
    assert "before and after finetuning" in changed.pictures["map.png"].alt
    assert "before" not in same.pictures["map.png"].alt


@pytest.mark.slow
def test_on_the_example_images_and_texts_agree(small_example, example_clip):
    clip = create_model("example")
    with torch.no_grad():
        for parameter in lora.trainable(clip, "text_blocks").values():
            parameter.mul_(0.5)
    context = EvalContext(clip, lambda: example_clip, open_dataset("example", split="test"), CONFIG)
    result = geometry.evaluate(context)
    assert result.metrics["base_difference_alignment_classes"] > 0.5
    assert result.metrics["base_difference_alignment_classes"] > result.metrics["difference_alignment_classes"]
    assert result.metrics["base_image_cosine"] == result.metrics["image_cosine"]  # the image tower is the same
    chance = np.mean([figures["chance"] for figures in result.details["analogies"].values()])
    assert result.metrics["base_analogy_image"] > 2 * chance
    map_of_both = result.pictures["map.png"].image
    assert map_of_both.width == 900 and len(map_of_both.getcolors(maxcolors=1 << 20)) > 20  # something was drawn
