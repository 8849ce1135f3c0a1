"""Statements scored by a model, and by baselines without an image: grey picture, mean image, text-only classifier.

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
from typing import Any, NamedTuple

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

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.random import stream
from pc_clip.data.dataset import Statement
from pc_clip.data.statements import label_of, read_statements
from pc_clip.data.views import located
from pc_clip.evals import EvalContext
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model

log = logging.getLogger(__name__)

GREY = (128, 128, 128)
FOLDS, INNER_FOLDS = 5, 3
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the penalty, on standardised embeddings
FEWEST = 10  # photographs of each label that logistic regression wants


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


def ask(context: EvalContext) -> Asked:
    """Score the context's statements. Only the images that they are about are embedded.

    Raises UserError where none of these is there.
    """
    asked = located(context.statements, context.data)
    if asked.absent:
        log.info("  %d of %d statements are left out: their images are absent", asked.absent, len(context.statements))
    z = context.on(asked.data).z
    texts, others = embed_both(context.clip, asked.statements)
    return Asked(
        asked.statements,
        photographs(asked.data.ids)[asked.rows],
        margin(z[asked.rows], texts, others, z[asked.others]),
        margin(grey_image(context.clip), texts, others),
        margin(F.normalize(z.mean(0), dim=0), texts, others),
        texts,
        texts - others,
        asked.absent,
    )


def embed_both(clip: Clip, statements: Sequence[Statement]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of the texts and of their contradictions.  -> [M, D], [M, D]"""
    both = clip.embed_texts([s.text for s in statements] + [s.contradiction for s in statements])
    return both[: len(statements)], both[len(statements) :]


def photographs(views: Sequence[str]) -> np.ndarray:
    """Which photograph each view is of, from 0 in order: parts of one are one.  -> [N]"""
    return pd.factorize(np.array([re.sub("@box=.*$", "", view) for view in views]))[0]


@torch.no_grad()
def grey_image(clip: Clip) -> Tensor:
    """The unit embedding of a constant grey picture, through the model's own transform.  -> [D]"""
    pixels = clip.preprocess(Image.new("RGB", (224, 224), GREY))[None].to(clip.device)
    return F.normalize(clip.encode_image(pixels).float().cpu(), dim=-1)[0]


def margin(image: Tensor, texts: Tensor, others: Tensor, other_image: Tensor | None = None) -> np.ndarray:
    """cos(image, text) - cos(other_image, other), unit vectors: positive where the text is preferred.  -> [M] float64

    texts, others: [M, D]; image: [M, D], or [D] for the same one every time; other_image: the image of `other`,
    the same one when not given. Equal pairs give exactly 0.
    """
    image, texts, others = image.double(), texts.double(), others.double()
    other_image = image if other_image is None else other_image.double()
    return (image * texts - other_image * others).sum(-1).numpy()


def right(margin: np.ndarray, true: np.ndarray | bool = True) -> np.ndarray:
    """1 where the sign of the margin says what is so, 0 where not, a half for a tie.  [M], [M] bool -> [M] float64"""
    return 0.5 + 0.5 * np.sign(margin) * np.where(true, 1.0, -1.0)


def by_photograph(values: np.ndarray, photograph: np.ndarray) -> list[float]:
    """One number a photograph, in the data set's order, whose mean is that of the values: Result.items.

    It is the sum of the photograph's values over the mean number of statements a photograph.  [M], [M] -> [P]
    """
    sums = np.bincount(np.unique(photograph, return_inverse=True)[1].ravel(), values)
    return (sums * len(sums) / len(values)).round(4).tolist()


# -- what the texts give away ------------------------------------------------------------------------------


def judge(
    margins: Mapping[str, np.ndarray], texts: Tensor, true: np.ndarray, photograph: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """How right true and false statements are judged by margins, by the commoner label, by texts alone.  -> [M] each

    text_only is left out where there are too few photographs to learn from.
    """
    commoner = np.full(len(true), 1.0 if true.mean() >= 0.5 else -1.0)
    answers = {name: right(margin, true) for name, margin in margins.items()} | {"majority": right(commoner, true)}
    by_text = text_only_classifier(texts.numpy(), true, photograph, seed)
    return answers if by_text is None else answers | {"text_only": right(by_text, true)}


def tell_texts_apart(gap: Tensor, photograph: np.ndarray, seed: int) -> np.ndarray | None:
    """How much better each text sounds than its contradiction, by the two alone; positive for the text.  -> [M]

    gap: [M, D], the text's embedding less its contradiction's. Half of them, drawn by seed, are turned round for
    learning, so that there are two labels; there is no intercept. None where there are too few photographs.
    """
    turned = stream(seed, "turned").permutation(len(gap)) % 2 == 0
    side = np.where(turned, -1.0, 1.0)
    score = text_only_classifier(gap.numpy() * side[:, None], ~turned, photograph, seed, intercept=False)
    return None if score is None else score * side


def text_only_classifier(
    x: np.ndarray, true: np.ndarray, photograph: np.ndarray, seed: int, intercept: bool = True
) -> np.ndarray | None:
    """How true each statement sounds, from its text alone; positive for true.  [M, D], [M] bool, [M] -> [M]

    Each photograph's statements are judged by what logistic regression learnt from the other photographs' ones; the
    penalty is chosen within these. None where either label has too few photographs to learn from.
    """
    if min(len(np.unique(photograph[true == label])) for label in (False, True)) < FEWEST:
        log.info("  text_only is left out: logistic regression wants %d photographs of each label", FEWEST)
        return None
    photograph = pd.factorize(photograph)[0]  # numbered as they come: the same in whatever data set
    score = np.empty(len(x))
    model = make_pipeline(
        StandardScaler(with_mean=intercept), LogisticRegression(fit_intercept=intercept, max_iter=2000)
    )
    inner = StratifiedGroupKFold(INNER_FOLDS, shuffle=True, random_state=seed)
    for learnt, judged in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, true, photograph):
        search = GridSearchCV(model, {"logisticregression__C": CS}, scoring="accuracy", cv=inner)
        search.fit(x[learnt], true[learnt], groups=photograph[learnt])
        score[judged] = search.decision_function(x[judged])
    return score


# -- the model against them ----------------------------------------------------------------------------------


def against(looking: str, answers: Mapping[str, np.ndarray], photograph: np.ndarray, seed: int) -> dict[str, Any]:
    """The model's share of right answers, answers[looking], less that of each other one, on the same statements.

    above: name -> difference, and low and high of its 95 % interval; beats_blind: whether every difference is beyond
    what other photographs could change, of which there must be intervals.FEWEST. Warns where not.
    """
    gains = {name: answers[looking] - right for name, right in answers.items() if name != looking}  # [M] each
    differences, known = intervals.of_columns(gains, photograph, seed)
    above = {name: {"difference": differences[name], "low": low, "high": high} for name, (low, high) in known.items()}
    level = {
        name: [100 * value for value in margin.values()] for name, margin in above.items() if not margin["low"] > 0
    }
    if level:
        listed = ", ".join(f"{name} {gain:+.1f} [{low:+.1f}, {high:+.1f}]" for name, (gain, low, high) in level.items())
        figure = f"{looking} {100 * answers[looking].mean():.1f}"
        log.warning("  %s, not clearly above what never looks at an image: it is above %s", figure, listed)
    few = len(np.unique(photograph)) < intervals.FEWEST
    if few and not level:
        log.warning("  %s is of fewer than %d photographs: too few to say what it is above", looking, intervals.FEWEST)
    return {"beats_blind": not level and not few, "above": above}


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
    grey = margin(grey_image(clip), texts, others)
    figures = {"true": true.astype(float), **judge({"blind": grey}, texts, true, photograph, seed)}
    figures["blind_prefers_caption_as_written"] = right(grey)
    shares, known = intervals.of_columns(figures, photograph, seed)
    return {name: (share, *known[name]) for name, share in shares.items()}


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
        figures = audit(clip, path, arguments.seed)
        variant = f"{Path(clip.name).name} {name}"
        rows += [(variant, "blind", name, metric, mean, np.nan, 1, *ends) for metric, (mean, *ends) in figures.items()]
        shown = (f"{m} {100 * a:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for m, (a, low, high) in figures.items())
        print(f"{name}: {', '.join(shown)}")
    if arguments.out:
        write_text(arguments.out, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
