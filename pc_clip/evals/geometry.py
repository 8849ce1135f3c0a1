"""What the embedding space looks like: where texts lie, where images lie, and whether their differences agree.

z_i is the unit embedding of image i, m(a) the mean of z over the images of class a, t_a the unit embedding of a's
prompts, enc(s) that of a sentence. Each figure of the model is there for the untrained one too, as base_*, where
that one is another.

- difference_alignment_phrases: mean of cos(enc(high) - enc(low), z_i - z_j) over pairs of images that differ
  clearly in a graded attribute, i having more of it; mean over attributes.
- difference_alignment_sentences: the same of cos(enc("The first image shows MORE, while the second shows LESS."),
  z_i - z_j). _reversed: the same fact told of the second image first.
- difference_alignment_classes: mean of cos(t_a - t_b, m(a) - m(b)) over pairs of classes; mean over questions.
- analogy_image: for two questions, classes a, b of the first and c, d of the second, and m(a, c) the mean of z over
  the images that are both: is m(a, d) - m(b, d) + m(b, c) nearer (in Euclidean distance) to m(a, c) than to any
  other such mean? Share of all (a, b, c, d) whose four means are over CELL or more images; mean over ordered pairs
  of questions. All means are candidates, those put in as well, so that "nothing changed" is a wrong answer.
- analogy_text: the same, with t_a - t_b at the length of m(a, d) - m(b, d) in that one's place.
- modality_gap: |mean of z - mean of the text embeddings|, from 0 to 2 (Liang et al. 2022). The texts are one
  caption an image where there are captions, else the prompts of all classes.
- image_cosine, text_cosine: mean cosine of two different random images, of two different random texts. The nearer
  to 1, the narrower the cone that they fill.

Where there are more, pairs and analogies are n_pairs random ones, and images and texts for gap and cosine MOST.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset, Question
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, Picture, Result, mean
from pc_clip.evals.difference import draw_pairs, pair_differences
from pc_clip.evals.plots import COLOURS, Layer, draw_map
from pc_clip.evals.zeroshot import class_embeddings, templates_of
from pc_clip.models.clip import Clip

log = logging.getLogger(__name__)

CELL = 5  # images that a mean of two classes has to be over
MOST = 5000  # images, and captions, of which gap and cosines are taken
TUPLES = 1_000_000  # analogies looked at for one pair of questions
ON_MAP = 500  # images on a map
FEW = 30  # points of which t-SNE makes nothing


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    known = data.questions or data.attributes or data.captions or attributes.tasks_of(data.name)
    return None if known else "a data set with classes, graded attributes or captions"


def evaluate(subject: EvalContext) -> Result:
    """The figures above, as far as the data set has what they need, and a map in two dimensions."""
    metrics, details = measure(subject, subject.clip, subject.z)
    before = subject.base is not None and subject.base.weights_hash() != subject.clip.weights_hash()
    if before:
        base, base_details = measure(subject, subject.base, subject.base_z)
        metrics |= {f"base_{name}": value for name, value in base.items()}
        details["base"] = base_details
    views = [View("before finetuning", subject.base, subject.base_z)] if before else []
    views.append(View("after finetuning" if before else "", subject.clip, subject.z))
    pictures = {}
    if subject.data.questions:
        pictures["map.png"] = map_of_images(subject, views)
    return Result(metrics, len(subject.data), details, pictures)


def measure(subject: EvalContext, clip: Clip, z: Tensor) -> tuple[dict[str, float], dict]:
    """All figures of one model, and what they are made of. z: [N, D], its unit image embeddings."""
    data, config = subject.data, subject.config
    metrics, details = {}, {}
    if subject.attributes:
        found, details["attributes"] = _alignment_of_attributes(clip, z, subject.attributes, config)
        metrics |= found
    prompts = [class_embeddings(clip, question, templates_of(question, config)) for question in data.questions]
    if data.questions:
        aligned = {
            question.name: alignment_of_classes(z, question, t, config.geometry.n_pairs, config.seed)
            for question, t in zip(data.questions, prompts)
        }
        aligned = {name: value for name, value in aligned.items() if value is not None}
        if aligned:
            metrics["difference_alignment_classes"] = mean(list(aligned.values()))
        details["classes"] = aligned
    found, details["analogies"] = _analogies(z, data.questions, prompts, config)
    metrics |= found
    return metrics | _gap(clip, z, data, prompts, config.seed), details


# -- differences ---------------------------------------------------------------------------------------


def clear_pairs(attribute: Attribute, n: int, seed: int) -> np.ndarray:
    """Up to n random pairs of images that differ clearly, the one with more first; none where no two do.  -> [P, 2]"""
    try:
        pairs = draw_pairs(attribute, n, stream(seed, "pairs"))
    except UserError:
        return np.empty((0, 2), dtype=np.int64)
    first_has_more = attribute.value[pairs[:, 0]] > attribute.value[pairs[:, 1]]
    return np.where(first_has_more[:, None], pairs, pairs[:, ::-1])


def _alignment_of_attributes(
    clip: Clip, z: Tensor, known: tuple[Attribute, ...], config: EvaluateConfig
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    details = {}
    for k, attribute in enumerate(known):
        pairs = clear_pairs(attribute, config.geometry.n_pairs, config.seed + 1000 * k)
        if not len(pairs):
            log.info("  no two images differ clearly in %s, which is left out", attribute.name)
            continue
        gaps = pair_differences(z, pairs)  # [P, D]
        first, second = (contrast(attribute.more, attribute.less, wording) for wording in (0, 1))
        high, low, told, told_reversed = clip.embed_texts([attribute.high, attribute.low, first, second])
        details[attribute.name] = {
            "phrases": float((gaps @ F.normalize(high - low, dim=0)).mean()),
            "sentences": float((gaps @ told).mean()),
            "sentences_reversed": float((gaps @ told_reversed).mean()),
            "pairs": len(pairs),
        }
    names = ("phrases", "sentences", "sentences_reversed") if details else ()
    return {f"difference_alignment_{name}": mean([d[name] for d in details.values()]) for name in names}, details


def alignment_of_classes(z: Tensor, question: Question, prompts: Tensor, n: int, seed: int) -> float | None:
    """Mean of cos(t_a - t_b, m(a) - m(b)) over pairs of classes, at most n of them; None with fewer than two."""
    means, counts = _means(z[torch.from_numpy(question.rows)], question.target, len(question.classes))
    there = np.flatnonzero(counts)
    a, b = (there[side] for side in np.triu_indices(len(there), 1))
    if not len(a):
        return None
    if len(a) > n:
        kept = stream(seed, "alignment").choice(len(a), n, replace=False)
        a, b = a[kept], b[kept]
    pairs = np.stack([a, b], axis=1)
    return float((pair_differences(prompts, pairs) * pair_differences(means, pairs)).sum(-1).mean())


def _means(z: Tensor, group: np.ndarray, groups: int) -> tuple[Tensor, np.ndarray]:
    """Mean of each group of rows, zero for an empty one.  [M, D], [M] -> [groups, D], counts [groups]"""
    counts = np.bincount(group, minlength=groups)
    sums = z.new_zeros(groups, z.shape[1]).index_add_(0, torch.from_numpy(group), z)
    return sums / torch.from_numpy(counts).clamp(min=1)[:, None], counts


# -- analogies -----------------------------------------------------------------------------------------


class Analogies(NamedTuple):
    """Of one ordered pair of questions. image, text: shares of right answers; cells: candidates; n: how many."""

    image: float
    text: float
    cells: int
    n: int


def _analogies(
    z: Tensor, questions: tuple[Question, ...], prompts: list[Tensor], config: EvaluateConfig
) -> tuple[dict[str, float], dict]:
    found = {}
    for n, p in enumerate(questions):
        for q in questions:
            if p is not q and (of_pair := analogies(z, p, q, prompts[n], config.geometry.n_pairs, config.seed)):
                found[f"{p.name}, {q.name}"] = of_pair
    if not found:
        return {}, {}
    metrics = {
        "analogy_image": mean([of_pair.image for of_pair in found.values()]),
        "analogy_text": mean([of_pair.text for of_pair in found.values()]),
    }
    chance = mean([1 / of_pair.cells for of_pair in found.values()])
    return metrics, {"chance": chance, "pairs": {name: of_pair._asdict() for name, of_pair in found.items()}}


def analogies(z: Tensor, p: Question, q: Question, prompts: Tensor, n: int, seed: int) -> Analogies | None:
    """a is to b as it is among images of d, so what is a among images of c? At most n analogies; None without any.

    prompts: [classes of p, D], of which analogy_text takes the differences.
    """
    _, in_p, in_q = np.intersect1d(p.rows, q.rows, return_indices=True)
    if not len(in_p):
        return None
    shape = len(p.classes), len(q.classes)
    cell = np.ravel_multi_index((p.target[in_p], q.target[in_q]), shape)
    means, counts = _means(z[torch.from_numpy(p.rows[in_p])], cell, shape[0] * shape[1])
    enough = (counts >= CELL).reshape(shape)
    a, b, c, d = _quadruples(enough, n, seed)
    if not len(a):
        return None
    cells = np.flatnonzero(enough.ravel())
    of = means.view(*shape, -1)
    step = of[a, d] - of[b, d]  # [Q, D]
    said = F.normalize(prompts[a] - prompts[b], dim=-1) * step.norm(dim=-1, keepdim=True)
    right = torch.from_numpy(np.searchsorted(cells, np.ravel_multi_index((a, c), shape)))
    image, text = (
        float((torch.cdist(of[b, c] + moved, means[cells]).argmin(1) == right).double().mean())
        for moved in (step, said)
    )
    return Analogies(image, text, len(cells), len(a))


def _quadruples(enough: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, ...]:
    """a != b and c != d whose four cells are all large enough. enough: [P, Q] bool  -> four of [<= n]"""
    shape = (enough.shape[0],) * 2 + (enough.shape[1],) * 2
    rng, total = stream(seed, "analogies"), int(np.prod(shape, dtype=np.int64))
    every = np.arange(total) if total <= TUPLES else np.unique(rng.integers(total, size=TUPLES))
    a, b, c, d = np.unravel_index(every, shape)
    good = (a != b) & (c != d) & enough[a, c] & enough[a, d] & enough[b, c] & enough[b, d]
    kept = np.flatnonzero(good)
    if len(kept) > n:
        kept = np.sort(rng.choice(kept, n, replace=False))
    return a[kept], b[kept], c[kept], d[kept]


# -- gap -----------------------------------------------------------------------------------------------


def _gap(clip: Clip, z: Tensor, data: Dataset, prompts: list[Tensor], seed: int) -> dict[str, float]:
    """Modality gap and mean cosines."""
    rng = stream(seed, "gap")
    rows = np.sort(rng.permutation(len(z))[:MOST])
    found = {} if len(rows) < 2 else {"image_cosine": mean_cosine(z[rows])}
    if data.captions:
        text = clip.embed_texts([data.captions[row][0] for row in rows if data.captions[row]])
    elif prompts:
        text = torch.cat(prompts)
    else:
        return found
    if len(text) > 1:
        found["text_cosine"] = mean_cosine(text)
    return found | {"modality_gap": float((z[rows].mean(0) - text.mean(0)).norm())}


def mean_cosine(z: Tensor) -> float:
    """Mean over all pairs of different rows of unit vectors [N, D], from |sum of z|^2 = N + sum of their cosines."""
    z = z.double()
    n = len(z)
    return float((z.sum(0).square().sum() - z.square().sum()) / (n * (n - 1)))


# -- maps ----------------------------------------------------------------------------------------------


class View(NamedTuple):
    """A model at one time. z: [N, D], its unit image embeddings."""

    title: str
    clip: Clip
    z: Tensor


def map_of_images(subject: EvalContext, views: list[View]) -> Picture:
    """Images and class prompts of the first question, on one map for all views, so that places can be compared.

    Texts lie far from images (the modality gap); prompts are moved by the first view's gap, the same for all
    views, or the map would show nothing else. Of many classes the most frequent have a colour and a prompt.
    """
    question = subject.data.questions[0]
    drawn = np.sort(stream(subject.config.seed, "map").permutation(len(question.rows))[:ON_MAP])
    rows, target = torch.from_numpy(question.rows[drawn]), question.target[drawn]
    classes, counts = np.unique(target, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind="stable")][: len(COLOURS)])
    prompts = [class_embeddings(view.clip, question, templates_of(question, subject.config)) for view in views]
    gap = views[0].z[rows].mean(0) - prompts[0].mean(0)
    places, method = flatten([view.z[rows] for view in views], [t[shown] + gap for t in prompts], subject.config.seed)
    panels = [
        (view.title, [Layer("image", images, target), Layer("text", texts, shown)])
        for view, (images, texts) in zip(views, places)
    ]
    when = ", before and after finetuning side by side" if len(views) > 1 else ""
    note = f"{method}. Large: class prompts, moved onto the images by the modality gap."
    image = draw_map(
        f"{question.name}: images and class prompts", panels, {c: question.classes[c] for c in shown}, note
    )
    return Picture(image, (
        f"Map of {len(drawn)} images of {subject.data.label} and of {len(shown)} of the {len(question.classes)} class "
        f"prompts for {question.name}{when}, coloured by class"
    ))  # fmt: skip


def flatten(images: list[Tensor], texts: list[Tensor], seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """(places of the images, places of the texts) of each view, by t-SNE or, of few points, PCA; and which it was.

    Images that a finetuning leaves where they were count once.  [P, D], [T, D] a view -> [P, 2], [T, 2] a view
    """
    frozen = all(torch.equal(images[0], other) for other in images[1:])
    groups = [*(images[:1] if frozen else images), *texts]
    points = torch.cat(groups).double().numpy()
    if len(points) < FEW:
        flat = PCA(min(2, *points.shape), random_state=seed).fit_transform(points)
        places, method = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "PCA"
    else:
        perplexity = min(30.0, (len(points) - 1) / 3)
        places, method = TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(points), "t-SNE"
    parts = np.split(places, np.cumsum([len(group) for group in groups])[:-1])
    return list(zip(parts[:1] * len(texts) if frozen else parts, parts[-len(texts) :])), method
