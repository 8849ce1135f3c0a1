"""What is said of images, as a model scores it, and as it comes out without looking at them.

A statement comes with its contradiction (data/statements.py), and a model prefers the one of the two that its image
is closer to. Whatever a benchmark's texts give away by themselves, a scorer gets right that never sees an image. Four
of these stand beside every figure:

    grey        the same model, on a constant grey picture in place of every image
    mean        the same model, on the mean embedding of the images asked about
    text_only   logistic regression on text embeddings, which learns from other photographs what the texts give away
    majority    always the commoner label, where there are labels

A tie counts as half right. One photograph is asked about in several statements, or in parts, so that intervals draw
photographs again and not statements. `python -m pc_clip blind FILES` gives these figures for files of true and false
statements (data/statements.py; VSR's, or your own), and needs no image: a test set on which one of them is far above
the majority can be passed without looking.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.statements import label_of, read_statements
from pc_clip.data.views import located
from pc_clip.evals import EvalContext
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model

log = logging.getLogger(__name__)

GREY = (128, 128, 128)
SIZE = 224  # pixels of the grey picture; any will do, since all are alike
FOLDS, INNER_FOLDS = 5, 3
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the penalty, on standardised embeddings
FEWEST = 10  # photographs of each label that logistic regression wants
TOO_FEW = f"text_only is left out: logistic regression wants {FEWEST} photographs of each label"
_PART = re.compile(r"@(?:box=.*|crop=.*|flip)$")


class Asked(NamedTuple):
    """Statements whose images are there, M of them, and how much closer each image is to the text than to the other.

    photograph: [M] int, which photograph each is about, in the data set's order, from 0. looking, grey, mean: [M]
    float64, cosine with the text less cosine with its contradiction: of the image, of a grey picture, of the mean
    image. texts, gap: [M, D], the text's unit embedding, and that less its contradiction's. absent: how many
    statements were left out because their images are not there.
    """

    statements: list[Statement]
    photograph: np.ndarray
    looking: np.ndarray
    grey: np.ndarray
    mean: np.ndarray
    texts: Tensor
    gap: Tensor
    absent: int

    @property
    def true(self) -> np.ndarray:
        return np.array([s.true for s in self.statements])


def statements_of(data: Dataset, config: EvaluateConfig) -> list[Statement]:
    """Those of the files that were named, else the data set's own."""
    return read_statements(config.statements, config.seed) if config.statements else list(data.statements)


def ask(subject: EvalContext, statements: Sequence[Statement]) -> Asked:
    """Score statements. Only the images that they are about are embedded.

    Raises UserError where none of these is there, and for embeddings that are not finite.
    """
    found = located(statements, subject.data)
    if found.absent:
        log.info("  %d of %d statements are left out: their images are absent", found.absent, len(statements))
    every = list(found.data.ids) == list(subject.data.ids)  # then they may have been embedded already
    z = subject.z if every else EvalContext(subject.clip, subject.find_base, found.data, subject.config).z
    texts, others = embed_both(subject.clip, found.statements)
    return Asked(
        found.statements,
        photographs(found.data.ids)[found.rows],
        closer(z[found.rows], texts, others, z[found.others]),
        closer(grey_image(subject.clip), texts, others),
        closer(F.normalize(z.mean(0), dim=0), texts, others),
        texts,
        texts - others,
        found.absent,
    )


def embed_both(clip: Clip, statements: Sequence[Statement]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of the texts and of their contradictions.  -> [M, D], [M, D]"""
    both = clip.embed_texts([s.text for s in statements] + [s.contradiction for s in statements])
    return both[: len(statements)], both[len(statements) :]


def photographs(views: Sequence[str]) -> np.ndarray:
    """Which photograph each view is of, from 0 in order: parts of one, and its mirror image, are one.  -> [N]"""
    number: dict[str, int] = {}
    return np.array([number.setdefault(_PART.sub("", view), len(number)) for view in views])


@torch.no_grad()
def grey_image(clip: Clip) -> Tensor:
    """The unit embedding of a constant grey picture, through the model's own transform.  -> [D]"""
    pixels = clip.preprocess(Image.new("RGB", (SIZE, SIZE), GREY))[None].to(clip.device)
    found = F.normalize(clip.encode_image(pixels).float().cpu(), dim=-1)[0]
    return found


def closer(image: Tensor, texts: Tensor, others: Tensor, instead: Tensor | None = None) -> np.ndarray:
    """cos(image, text) - cos(instead, other), of unit vectors: positive where the text is preferred.  -> [M] float64

    texts, others: [M, D]; image: [M, D], or [D] for the same one every time; instead: the image that `other` is said
    of, the same one when not given. Equal pairs give exactly 0.
    """
    image, texts, others = image.double(), texts.double(), others.double()
    instead = image if instead is None else instead.double()
    return (image * texts - instead * others).sum(-1).numpy()


def right(margin: np.ndarray, true: np.ndarray | bool = True) -> np.ndarray:
    """1 where the sign of the margin says what is so, 0 where not, a half for a tie.  [M], [M] bool -> [M] float64"""
    return 0.5 + 0.5 * np.sign(margin) * np.where(true, 1.0, -1.0)


def by_photograph(values: np.ndarray, photograph: np.ndarray) -> list[float]:
    """One number a photograph, in the data set's order, whose mean is that of the values: Result.items.

    It is the sum of the photograph's values over the mean number of statements a photograph.  [M], [M] -> [P]
    """
    asked = np.unique(photograph, return_inverse=True)[1].reshape(-1)
    sums = np.bincount(asked, values)
    return (sums * len(sums) / len(values)).round(4).tolist()


# -- what the texts give away ------------------------------------------------------------------------------


def tell_labels(texts: Tensor, true: np.ndarray, photograph: np.ndarray, seed: int) -> np.ndarray | None:
    """How true each statement sounds, from its text alone; positive for true.  [M, D], [M] bool, [M] -> [M]

    Each photograph's statements are judged by what was learnt from the other photographs' ones. None where either
    label has too few photographs to learn from.
    """
    return _cross_validated(texts.numpy(), true, photograph, seed, intercept=True)


def tell_texts_apart(gap: Tensor, photograph: np.ndarray, seed: int) -> np.ndarray | None:
    """How much better each text sounds than its contradiction, by the two alone; positive for the text.  -> [M]

    gap: [M, D], the text's embedding less its contradiction's. Half of them, drawn by seed, are turned round for
    learning, so that there are two labels; there is no intercept. None where there are too few photographs.
    """
    turned = stream(seed, "turned").permutation(len(gap)) % 2 == 0
    side = np.where(turned, -1.0, 1.0)
    said = _cross_validated(gap.numpy() * side[:, None], ~turned, photograph, seed, intercept=False)
    return None if said is None else said * side


def _cross_validated(
    x: np.ndarray, y: np.ndarray, photograph: np.ndarray, seed: int, intercept: bool
) -> np.ndarray | None:
    """Scores of logistic regression for what it did not learn from; the penalty is chosen within what it did."""
    if min(len(np.unique(photograph[y == label])) for label in (False, True)) < FEWEST:
        return None
    _, first, place = np.unique(photograph, return_index=True, return_inverse=True)
    photograph = np.argsort(np.argsort(first))[place.reshape(-1)]  # as they come: the same in whatever data set
    score = np.empty(len(x))
    model = make_pipeline(
        StandardScaler(with_mean=intercept), LogisticRegression(fit_intercept=intercept, max_iter=2000)
    )
    inner = StratifiedGroupKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    for learnt, judged in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, y, photograph):
        search = GridSearchCV(model, {"logisticregression__C": CS}, scoring="accuracy", cv=inner)
        search.fit(x[learnt], y[learnt], groups=photograph[learnt])
        score[judged] = search.decision_function(x[judged])
    return score


# -- the model against them ----------------------------------------------------------------------------------


class Against(NamedTuple):
    """How far the model is above one that does not look, and the 95 % interval of that."""

    difference: float
    low: float
    high: float


def against(looking: str, right: Mapping[str, np.ndarray], photograph: np.ndarray, seed: int) -> dict[str, Against]:
    """The model's share of right answers, right[looking], less that of each other one, on the same statements."""
    others = [name for name in right if name != looking]
    off = np.stack([right[looking] - right[name] for name in others], axis=1)  # [M, K]
    draws = intervals.redrawn_means(off, photograph, seed)
    return {n: Against(float(d), *intervals.between(column)) for n, d, column in zip(others, off.mean(0), draws.T)}


def beats(found: Mapping[str, Against], what: str) -> bool:
    """Whether the model is above every one of them, beyond what other photographs could change; warns where not."""
    level = {name: each for name, each in found.items() if not each.low > 0}
    if level:
        said = ", ".join(
            f"{name} {100 * each.difference:+.1f} [{100 * each.low:+.1f}, {100 * each.high:+.1f}]"
            for name, each in level.items()
        )
        log.warning("  %s, not clearly above what never looks at an image: it is above %s", what, said)
    return not level


# -- the command ---------------------------------------------------------------------------------------------

# As a study writes its table.
COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]


def audit(clip: Clip, path: str | Path, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Figures of one file or folder: metric -> share, and its 95 % interval over photographs.

    true: the share of true statements; majority, blind, text_only: shares judged rightly;
    blind_prefers_caption_as_written: how often the grey picture is closer to what is written, whatever its label.
    Raises UserError for statements that are all true, or all false.
    """
    statements = read_statements([path], seed)
    true = np.array([s.true for s in statements])
    photograph = photographs([s.image for s in statements])
    if true.all() or not true.any():
        raise UserError(
            f"all {len(true)} statements of {path} are {str(bool(true[0])).lower()}; this is for files with both kinds"
        )
    texts, others = embed_both(clip, statements)
    grey = closer(grey_image(clip), texts, others)
    common = np.full(len(true), 1.0 if true.mean() >= 0.5 else -1.0)
    figures = {
        "true": true.astype(float),
        "majority": right(common, true),
        "blind": right(grey, true),
        "blind_prefers_caption_as_written": right(grey),
    }
    by_text = tell_labels(texts, true, photograph, seed)
    if by_text is not None:
        figures["text_only"] = right(by_text, true)
    draws = intervals.redrawn_means(np.stack(list(figures.values()), axis=1), photograph, seed)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {
        name: (float(values.mean()), float(a), float(b)) for (name, values), a, b in zip(figures.items(), low, high)
    }


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip blind", description="What statements give away without an image."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--model", default="example", help="open_clip's name, example, or local-dir:FOLDER")
    parser.add_argument("--pretrained", help="a tag of open_clip's, or a file of weights")
    parser.add_argument("--seed", type=int, default=0, help="of contradictions that are drawn, folds and intervals")
    parser.add_argument("--out", type=Path, help="a CSV of the same columns as a study's")
    arguments = parser.parse_args(argv)
    clip = create_model(arguments.model, arguments.pretrained)
    rows = []
    for path in arguments.files:
        name = f"{path.resolve().parent.name}/{label_of([path])}"
        found = audit(clip, path, arguments.seed)
        variant = f"{Path(clip.name).name} {name}"
        rows += [(variant, "blind", name, metric, mean, np.nan, 1, *ends) for metric, (mean, *ends) in found.items()]
        shown = (f"{m} {100 * a:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for m, (a, low, high) in found.items())
        print(f"{name}: {', '.join(shown)}")
    if arguments.out:
        write_text(arguments.out, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
