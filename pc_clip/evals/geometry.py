"""What the embedding space looks like: where texts lie, where images lie, and whether their differences agree.

z_i is the unit embedding of image i, m(a) the mean of z over the images of class a, t_a the unit embedding of a's
prompts, enc(s) that of a sentence. Each figure of the model is there for the untrained one too, as base_*, where
that one is another.

- difference_alignment_phrases: mean of cos(enc(high) - enc(low), z_i - z_j) over pairs of images that differ
  clearly in a graded attribute, i having more of it; mean over attributes.
- difference_alignment_sentences: the same of cos(enc("The first image shows MORE, while the second shows LESS."),
  z_i - z_j). _reversed: the same fact with the second image mentioned first.
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
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset, Question
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, Picture, Result
from pc_clip.evals.answers import draw_pairs, pair_differences
from pc_clip.evals.plots import MARKS, draw_map
from pc_clip.evals.prompting import class_embeddings, templates_of
from pc_clip.models.clip import Clip

log = logging.getLogger(__name__)

CELL = 5  # images that a mean of two classes has to be over
MOST = 5000  # images, and captions, of which gap and cosines are taken
TUPLES = 1_000_000  # analogies looked at for one pair of questions
ON_MAP = 500  # images on a map


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    known = data.questions or data.attributes or data.captions or attributes.tasks_of(data.name)
    return None if known else "a data set with classes, graded attributes or captions"


def evaluate(context: EvalContext) -> Result:
    """The figures above, as far as the data set has what they need, and a map in two dimensions."""
    metrics, details = measure(context, context.clip, context.z)
    views = [("", context.clip, context.z)]
    if context.base is not None and context.base.weights_hash() != context.clip.weights_hash():
        of_base, details["base"] = measure(context, context.base, context.base_z)
        metrics |= {f"base_{name}": value for name, value in of_base.items()}
        views = [
            ("before finetuning", context.base, context.base_z),
            ("after finetuning", context.clip, context.z),
        ]
    pictures = {"map.png": map_of_images(context, views)} if context.data.questions else {}
    return Result(metrics, len(context.data), details, pictures)


def measure(context: EvalContext, clip: Clip, z: Tensor) -> tuple[dict[str, float], dict]:
    """All figures of one model, and what they are made of. z: [N, D], its unit image embeddings."""
    data, config, n = context.data, context.config, context.config.geometry.n_pairs
    check_at_least("geometry.n_pairs", n, 1)
    prompts = [class_embeddings(clip, question, templates_of(question, config)) for question in data.questions]
    metrics, of_attributes = _alignment_of_attributes(clip, z, context.attributes, config)
    aligned = {q.name: alignment_of_classes(z, q, t, n, config.seed) for q, t in zip(data.questions, prompts)}
    of_classes = {name: value for name, value in aligned.items() if value is not None}
    of_pairs = {
        f"{p.name}, {q.name}": analogies(z, p, q, of_p, n, config.seed)
        for p, of_p in zip(data.questions, prompts)
        for q in data.questions
        if p is not q
    }
    of_pairs = {name: figures for name, figures in of_pairs.items() if figures}
    if of_classes:
        metrics["difference_alignment_classes"] = float(np.mean([*of_classes.values()]))
    if of_pairs:
        metrics |= {
            f"analogy_{kind}": float(np.mean([analogy[kind] for analogy in of_pairs.values()]))
            for kind in ("image", "text")
        }
    metrics |= _gap(clip, z, data, prompts, config.seed)
    return metrics, {"attributes": of_attributes, "classes": of_classes, "analogies": of_pairs}


# -- differences ---------------------------------------------------------------------------------------


def _alignment_of_attributes(
    clip: Clip, z: Tensor, attributes: Sequence[Attribute], config: EvaluateConfig
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    details: dict[str, dict[str, float]] = {}
    for k, attribute in enumerate(attributes):
        try:
            pairs = draw_pairs(attribute, config.geometry.n_pairs, stream(config.seed + 1000 * k, "pairs"))
        except UserError as error:
            log.info("  %s is left out: %s", attribute.name, error)
            continue
        up = attribute.value[pairs[:, 0]] > attribute.value[pairs[:, 1]]
        gaps = pair_differences(z, np.where(up[:, None], pairs, pairs[:, ::-1]))  # [P, D], the one with more first
        first, second = (contrast(attribute.more, attribute.less, wording) for wording in (0, 1))
        high, low, sentence, reversed_sentence = clip.embed_texts([attribute.high, attribute.low, first, second])
        texts = {
            "phrases": F.normalize(high - low, dim=0),
            "sentences": sentence,
            "sentences_reversed": reversed_sentence,
        }
        details[attribute.name] = {name: float((gaps @ text).mean()) for name, text in texts.items()}
    means = pd.DataFrame(details).mean(axis=1).add_prefix("difference_alignment_").to_dict()
    return means, details


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


def analogies(z: Tensor, p: Question, q: Question, prompts: Tensor, n: int, seed: int) -> dict[str, float]:
    """a is to b as it is among images of d, so what is a among images of c? At most n analogies; {} without any.

    prompts: [classes of p, D], of which analogy_text takes the differences.  -> image, text: shares of right answers;
    chance: 1 / candidates; n: how many
    """
    _, in_p, in_q = np.intersect1d(p.rows, q.rows, return_indices=True)
    shape = len(p.classes), len(q.classes)
    cell = np.ravel_multi_index((p.target[in_p], q.target[in_q]), shape)
    means, counts = _means(z[torch.from_numpy(p.rows[in_p])], cell, shape[0] * shape[1])
    enough = (counts >= CELL).reshape(shape)
    a, b, c, d = _quadruples(enough, n, seed)
    if not len(a):
        return {}
    cells = np.flatnonzero(enough.ravel())
    grid = means.view(*shape, -1)
    step = grid[a, d] - grid[b, d]  # [Q, D]
    by_text = F.normalize(prompts[a] - prompts[b], dim=-1) * step.norm(dim=-1, keepdim=True)
    right = torch.from_numpy(np.searchsorted(cells, np.ravel_multi_index((a, c), shape)))
    shares = {
        name: float((torch.cdist(grid[b, c] + moved, means[cells]).argmin(1) == right).double().mean())
        for name, moved in (("image", step), ("text", by_text))
    }
    return shares | {"chance": 1 / len(cells), "n": len(a)}


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
    rows = np.sort(stream(seed, "gap").permutation(len(z))[:MOST])
    images, texts = z[rows], torch.cat(prompts) if prompts else z[:0]
    if data.captions:
        texts = clip.embed_texts([data.captions[row][0] for row in rows if data.captions[row]])
    cosines = {"image_cosine": images, "text_cosine": texts}
    metrics = {name: mean_cosine(each) for name, each in cosines.items() if len(each) > 1}
    return metrics | ({"modality_gap": float((images.mean(0) - texts.mean(0)).norm())} if len(texts) else {})


def mean_cosine(z: Tensor) -> float:
    """Mean over all pairs of different rows of unit vectors [N, D], from |sum of z|^2 = N + sum of their cosines."""
    z = z.double()
    n = len(z)
    return float((z.sum(0).square().sum() - z.square().sum()) / (n * (n - 1)))


# -- the map -------------------------------------------------------------------------------------------


def map_of_images(context: EvalContext, views: list[tuple[str, Clip, Tensor]]) -> Picture:
    """Images and class prompts of the first question, on one map for all views, so that places can be compared.

    views: of (title, model, its unit image embeddings [N, D]). Texts lie far from images (the modality gap); prompts
    are moved by the first view's gap, the same for all views, or the map would show nothing else. Of many classes the
    most frequent have a colour and a prompt.
    """
    question = context.data.questions[0]
    drawn = np.sort(stream(context.config.seed, "map").permutation(len(question.rows))[:ON_MAP])
    rows, target = torch.from_numpy(question.rows[drawn]), question.target[drawn]
    classes, counts = np.unique(target, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind="stable")][: len(MARKS)])
    prompts = [class_embeddings(clip, question, templates_of(question, context.config)) for _, clip, _ in views]
    gap = views[0][2][rows].mean(0) - prompts[0].mean(0)
    points = [z[rows] for _, _, z in views] + [of_view[shown] + gap for of_view in prompts]
    places = np.split(flatten(torch.cat(points)), np.cumsum([len(each) for each in points])[:-1])
    panels = [
        (title, images, target, texts, shown)
        for (title, _, _), images, texts in zip(views, places, places[len(views) :])
    ]
    note = "First two principal components. Large: class prompts, moved onto the images by the modality gap."
    names = {k: question.classes[k] for k in shown}
    alt = f"Map of {len(drawn)} images of {context.data.label} and {len(shown)} class prompts, coloured by class"
    when = ", before and after finetuning side by side" if len(views) > 1 else ""
    return Picture(draw_map(f"{question.name}: images and class prompts", panels, names, note), alt + when)


def flatten(points: Tensor) -> np.ndarray:
    """The first two principal components; zero where there is none.  [P, D] -> [P, 2]"""
    flat = PCA(min(2, *points.shape), random_state=0).fit_transform(points.double().numpy())
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
