"""The geometry of spaces that are laid out by hand, so that every figure is known by arithmetic."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pc_clip.core.config.evaluate import EvaluateConfig, GeometryConfig
from pc_clip.data.dataset import Attribute, Dataset, Question
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, geometry
from pc_clip.models import lora
from pc_clip.models.loading import create_model


class FakeClip:
    """Texts have the embeddings they are given."""

    def __init__(self, texts, weights="fake") -> None:
        self.texts, self.weights = texts, weights

    def embed_texts(self, texts):
        return F.normalize(torch.tensor([list(self.texts[t]) for t in texts], dtype=torch.float32), dim=-1)

    def weights_hash(self):
        return self.weights


def subject(texts, z, base=None, config=None, **known) -> EvalContext:
    """Images that lie at z, after finetuning and before."""
    data = Dataset("made", "test", [str(n) for n in range(len(z))], lambda row: Image.new("RGB", (8, 8)), "f", **known)
    found = EvalContext(
        FakeClip(texts), lambda: base, data, config or EvaluateConfig(geometry=GeometryConfig(n_pairs=200))
    )
    found.__dict__["z"] = found.__dict__["base_z"] = torch.as_tensor(np.array(z), dtype=torch.float32)
    return found


SIZE = Attribute("size", np.array([0.0, 0.0, 1.0, 1.0, np.nan]), "more", "less", "big", "small", gap=0.5)
ON_CIRCLE = [[-0.6, 0.8], [-0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0.0, -1.0]]  # size grows along the first axis


def sentences(told, told_reversed):
    """Embeddings of the sentences on size: the vectors given, and their opposites when the first image has less."""
    return {
        contrast("more", "less", 0): told,
        contrast("more", "less", 1): told_reversed,
        contrast("less", "more", 0): np.negative(told),
        contrast("less", "more", 1): np.negative(told_reversed),
    }


def asks(name, target, classes, rows=None):
    target = np.array(target)
    rows = np.arange(len(target)) if rows is None else np.array(rows)
    return Question(name, tuple(classes), rows, target, ("{}",))


# -- differences -------------------------------------------------------------------------------------------


def test_alignment_of_attributes_is_the_mean_cosine_with_the_difference_of_the_images():
    half, third = np.deg2rad(60), np.deg2rad(120)
    told = [np.cos(half), np.sin(half)], [np.cos(third), np.sin(third)]
    texts = {"big": [1, 0], "small": [0, 1], **sentences(*told)}
    metrics, details = geometry.measure(s := subject(texts, ON_CIRCLE, attributes=(SIZE,)), s.clip, s.z)
    assert metrics["difference_alignment_phrases"] == pytest.approx(np.sqrt(0.5), abs=1e-6)
    assert metrics["difference_alignment_sentences"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["difference_alignment_sentences_reversed"] == pytest.approx(-0.5, abs=1e-6)
    assert details["attributes"]["size"]["pairs"] == 200


def test_alignment_of_attributes_is_the_mean_over_attributes_and_leaves_out_those_in_which_nothing_differs():
    against = Attribute("age", np.array([1.0, 1.0, 0.0, 0.0, np.nan]), "more", "less", "big", "small")
    alike = Attribute("kind", np.ones(5), "more", "less", "big", "small")
    texts = {"big": [1, 0], "small": [-1, 0], **sentences([1, 0], [1, 0])}
    s = subject(texts, ON_CIRCLE, attributes=(SIZE, against, alike))
    metrics, details = geometry.measure(s, s.clip, s.z)
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
    found = geometry.alignment_of_classes(z, question, prompts, n=100, seed=0)
    assert found == pytest.approx((1 + ac + bc) / 3, abs=1e-6)
    swapped = geometry.alignment_of_classes(z[:3], asks("q", [0, 0, 1], "ab"), prompts[[1, 0]], n=100, seed=0)
    assert swapped == pytest.approx(-1, abs=1e-6)
    assert geometry.alignment_of_classes(z, asks("q", [1, 1], "ab"), prompts[:2], n=100, seed=0) is None


# -- analogies ---------------------------------------------------------------------------------------------


def grid(of_p, of_q, each=5):
    """`each` images of every pair of classes, at the sum of two vectors.  -> z, question p, question q"""
    cells = list(itertools.product(range(len(of_p)), range(len(of_q)))) * each
    z = np.array([np.add(of_p[a], of_q[c]) for a, c in cells], dtype=np.float32)
    p, q = (asks(name, [cell[n] for cell in cells], "abcdef"[: len(of)]) for n, (name, of) in enumerate(
        (("p", of_p), ("q", of_q))
    ))  # fmt: skip
    return torch.from_numpy(z), p, q


P, Q = [[0.0, 0, 0], [2, 0, 0], [0, 2, 0]], [[0.0, 0, 0], [0, 0, 5]]


def test_where_two_questions_add_up_every_analogy_holds():
    z, p, q = grid(P, Q)
    found = geometry.analogies(z, p, q, torch.tensor(P) * 0.1, n=1000, seed=0)
    assert found == (1.0, 1.0, 6, 3 * 2 * 2 * 1)  # texts are brought to the images' length


def test_analogies_want_cells_of_five_images():
    z, p, q = grid(P[:2], Q, each=4)
    assert geometry.analogies(z, p, q, torch.tensor(P[:2]), n=1000, seed=0) is None
    z, p, q = grid(P, Q)
    first = np.flatnonzero((p.target == 2) & (q.target == 1))[
        0
    ]  # an image that one of the questions does not ask about
    kept = np.delete(np.arange(len(z)), first)
    partly = asks("q", q.target[kept], "ab", rows=kept)
    found = geometry.analogies(z, p, partly, torch.tensor(P), n=1000, seed=0)
    assert (found.cells, found.n) == (5, 2 * 2)  # only a and b of p have all four


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
            said = prompts[a] - prompts[b]
            for hits, moved in ((image, step), (text, said / np.linalg.norm(said) * np.linalg.norm(step))):
                at = mean_of[b, c] + moved
                hits.append(min(mean_of, key=lambda cell, at=at: np.linalg.norm(at - mean_of[cell])) == (a, c))
    found = geometry.analogies(
        torch.tensor(z), asks("p", target[0], "abc"), asks("q", target[1], "abc"), torch.tensor(prompts), 10_000, 0
    )
    assert found == (pytest.approx(np.mean(image)), pytest.approx(np.mean(text)), len(mean_of), len(image))


def test_the_figure_is_the_mean_over_ordered_pairs_of_questions_with_chance_beside_it():
    z, p, q = grid(P[:2], Q)
    texts = {"a": P[0], "b": P[1]}  # right for p; for q, whose classes are called the same, at right angles
    s = subject(texts, z.tolist(), questions=(p, q))
    metrics, details = geometry.measure(s, s.clip, z)
    assert metrics["analogy_image"] == 1.0
    assert details["analogies"]["pairs"]["p, q"]["n"] == 4
    assert details["analogies"]["chance"] == 0.25
    alone = subject(texts, z.tolist(), questions=(p,))
    assert "analogy_image" not in geometry.measure(alone, alone.clip, z)[0]


# -- gap ---------------------------------------------------------------------------------------------------


def test_modality_gap_and_cones_by_hand():
    z = [[1.0, 0], [0, 1]]
    texts = {"a": [-1, 0], "b": [0, -1]}
    s = subject(texts, z, questions=(asks("q", [0, 1], "ab"),))
    metrics, _ = geometry.measure(s, s.clip, s.z)
    assert metrics["modality_gap"] == pytest.approx(np.sqrt(2), abs=1e-6)  # from (.5, .5) to (-.5, -.5)
    assert metrics["image_cosine"] == metrics["text_cosine"] == pytest.approx(0, abs=1e-6)


def test_the_gap_is_to_the_captions_where_there_are_some():
    s = subject({"x": [1, 0], "y": [1, 0]}, [[1.0, 0], [1, 0]], captions=[("x", "unused"), ("y",)])
    metrics, _ = geometry.measure(s, s.clip, s.z)
    assert metrics == {"image_cosine": 1.0, "text_cosine": 1.0, "modality_gap": 0.0}


def test_mean_cosine_is_over_pairs_of_different_rows():
    z = F.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(z[i] @ z[j]) for i, j in itertools.permutations(range(7), 2)]
    assert geometry.mean_cosine(z) == pytest.approx(np.mean(pairs), abs=1e-6)


# -- maps --------------------------------------------------------------------------------------------------


def test_points_are_mapped_by_pca_or_tsne_the_same_every_time():
    line = torch.tensor([[0.0, 0, 0], [3, 4, 0], [6, 8, 0]])
    ((a, b),), method = geometry.flatten([line[:1]], [line[1:]], seed=0)
    assert method == "PCA"
    assert [np.linalg.norm(a[0] - b[n]) for n in (0, 1)] == pytest.approx([5, 10])
    rng = np.random.default_rng(0)
    near, far = (torch.tensor(rng.normal(size=(20, 4)) * 0.01 + shift) for shift in (0, 1))
    first, method = geometry.flatten([near, near], [far, -far], seed=3)
    assert method == "t-SNE" and len(first) == 2
    assert np.array_equal(first[0][0], first[1][0])  # images that stay are at one place
    again, _ = geometry.flatten([near, near], [far, -far], seed=3)
    assert all(np.array_equal(x, y) for one, other in zip(first, again) for x, y in zip(one, other))


def test_the_pictures_are_drawn_and_say_in_words_what_they_show():
    question = asks("kind", [0, 1, 2, 3, 4], "abcdefghijkl")
    texts = {"big": [1, 0], "small": [-1, 0], **dict.fromkeys("abcdefghijkl", [1, 0]), **sentences([1, 0], [-1, 0])}
    s = subject(texts, ON_CIRCLE, base=FakeClip(texts, "other"), questions=(question,), attributes=(SIZE,))
    found = geometry.evaluate(s)
    assert "of 5 of the 12 class prompts for kind" in found.pictures["map.png"].alt
    for picture in found.pictures.values():
        assert picture.image.width == 900 and "before and after finetuning" in picture.alt
        assert len(picture.image.getcolors(maxcolors=1 << 20)) > 20  # something was drawn


# -- all of it ---------------------------------------------------------------------------------------------


def test_the_untrained_model_stands_beside_a_model_that_differs_from_it_and_only_then():
    question = asks("kind", [0, 0, 1, 1], "ab")
    texts = {"a": [1, 0], "b": [-1, 0]}
    same = geometry.evaluate(subject(texts, ON_CIRCLE, base=FakeClip(texts), questions=(question,)))
    other = {"a": [-1, 0], "b": [1, 0]}
    changed = geometry.evaluate(subject(texts, ON_CIRCLE, base=FakeClip(other, "other"), questions=(question,)))
    unknown = geometry.evaluate(subject(texts, ON_CIRCLE, questions=(question,)))
    assert same.metrics == unknown.metrics
    assert not any(name.startswith("base_") for name in same.metrics)
    assert changed.metrics["difference_alignment_classes"] == pytest.approx(-1, abs=1e-6)
    assert changed.metrics["base_difference_alignment_classes"] == pytest.approx(1, abs=1e-6)
    assert changed.n == 5


def test_on_the_example_images_and_texts_agree(small_example, example_clip):
    clip = create_model("example")
    with torch.no_grad():
        for parameter in lora.trainable(clip, "text_blocks").values():
            parameter.mul_(0.5)
    data = open_dataset("example", split="test")
    found = geometry.evaluate(
        EvalContext(clip, lambda: example_clip, data, EvaluateConfig(geometry=GeometryConfig(n_pairs=100)))
    )
    assert found.metrics["base_difference_alignment_classes"] > 0.5
    assert found.metrics["base_difference_alignment_classes"] > found.metrics["difference_alignment_classes"]
    assert found.metrics["base_image_cosine"] == found.metrics["image_cosine"]  # the image tower is the same
    assert found.metrics["base_analogy_image"] > 2 * found.details["analogies"]["chance"]
    assert found.pictures.keys() == {"map.png"}
