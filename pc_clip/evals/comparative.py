"""Comparative prompting: what is known of how two classes differ is put into their prompts.

PC-CLIP (arXiv 2409.09721): the prompt of class b becomes
    alpha * t_b + (1 - alpha) * mean over a of (t_a - enc(how a differs from b)),
where t is a class's ordinary prompt embedding; alpha = 1 is ordinary zero-shot. Alpha is chosen on validation
images and reported on test images.

The published form has a fault: enc(difference) has length 1 while |t_a - t_b| is 0.4 to 0.9, so it swamps
the prompt and shifts the scores of its class on every image alike. `calibrate` names what is done about it:
    none      as published
    norm      enc(difference) is brought to the length of t_a - t_b
    offset    the same, and its mean score over the validation images, unlabelled, is taken away
    centred   the same as norm, and the mean over those images is taken away from each class's whole score
    shuffled  a control: as norm, but every sentence is used for the next pair of classes
What centred gains has to be held against plain_centred: ordinary zero-shot whose classes' mean scores are taken
away. What any of them gains has to be more than shuffled does, or the sentences were not what helped.

With `--comparative.pairs auto` nobody writes comparisons: the pairs of classes most often confused on validation images
are found, and a writer says how they differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.paths import package_data
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.registry import held_out
from pc_clip.evals import Curve, Result, Subject, mean
from pc_clip.evals.zeroshot import class_embeddings, templates_of
from pc_clip.metrics import intervals as _intervals
from pc_clip.models.clip import Clip
from pc_clip.write.generate import compare_classes
from pc_clip.write.work import make_writer
from pc_clip.write.writers import Writer

FOLDER = package_data(Path(__file__).with_name("comparisons"))
CALIBRATIONS = ("none", "norm", "offset", "centred", "shuffled")

NEEDS = (
    "a data set with classes, comparisons of them in evals/comparisons/ or --comparative.pairs auto, and a second "
    "split to choose on"
)


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    known = config.comparative.pairs == "auto" or (FOLDER / f"{data.name}.yaml").is_file()
    return bool(data.questions) and known and held_out(data) is not None


def also_reads(subject: Subject) -> Dataset | None:
    """The split that alpha and the confused classes are chosen on."""
    split = held_out(subject.data)
    return subject.open(split) if split else None


class Space(NamedTuple):
    """Images with their classes, and the mean of the unlabelled images. z: [M, D], target: [M], mean: [D]."""

    z: Tensor
    target: np.ndarray
    mean: Tensor


def evaluate(subject: Subject) -> Result:
    """Test accuracy of each calibration at its own alpha, chosen on validation, beside ordinary zero-shot.

    Metrics are means over the questions: over all classes, and as subset_* over the compared classes alone (their
    images, and no other class to choose from). gain_* is the figure less its plain counterpart, with an interval.
    """
    config = subject.config
    check_choice("comparative.pairs", config.comparative.pairs, ("file", "auto"))
    for calibration in config.comparative.calibrate:
        check_choice("comparative.calibrate", calibration, CALIBRATIONS)
    chosen = subject.validation()
    writer = functools.cache(
        lambda: make_writer(config.comparative, "compare")
    )  # a language model is loaded once, if at all
    chosen_on = {question.name: question for question in chosen.data.questions}
    written = (
        read_comparisons(FOLDER / f"{subject.data.name}.yaml", subject.data)
        if config.comparative.pairs == "file"
        else None
    )
    details, curves, gains, total = {}, [], {}, 0
    for question in subject.data.questions:
        prompts = class_embeddings(subject.clip, question, templates_of(question, config))
        if question.name not in chosen_on:
            continue
        val = _space(chosen, chosen_on[question.name])
        if written is None:  # where nothing is confused nothing is compared, and the question counts as it is
            comparisons = _auto(chosen, question, prompts, val, writer)
        elif question.name in written:
            comparisons = written[question.name]
        else:
            continue
        test = Space(*_space(subject, question)[:2], val.mean)  # test images give no offset: it is from validation
        found = _question(subject.clip, config, question, prompts, comparisons, val, test)
        for name, gain in found.pop("gains").items():
            gains.setdefault(name, []).append((question.rows, gain))
        curves.append(_curve(question, found))
        details[question.name] = found | {"comparisons": comparisons}
        total += len(question.rows)
    if not details:
        raise UserError(f"no question of {subject.data.label} has comparisons; it asks about {', '.join(chosen_on)}")
    names = [n for n in next(iter(details.values())) if n.startswith(("plain", "comparative", "subset"))]
    names.sort(key=lambda name: not name.startswith("comparative"))  # the figure itself before what it is held against
    metrics = {
        name: mean(known) for name in names if (known := [d[name] for d in details.values() if d[name] is not None])
    }
    intervals = {}
    for name, of_questions in gains.items():
        metrics[f"gain_{name}"] = mean([gain.mean() for _, gain in of_questions])
        of_image = np.zeros(len(subject.data))  # what an image adds to the mean over questions, by all of them together
        for rows, gain in of_questions:
            np.add.at(of_image, rows, gain / len(gain) / len(of_questions))
        used = np.unique(np.concatenate([rows for rows, _ in of_questions]))
        intervals[f"gain_{name}"] = _intervals.of_mean(of_image[used] * len(used), config.seed)
    return Result(metrics, total, details, intervals=intervals, curves=curves)


def _space(subject: Subject, question: Question) -> Space:
    z = subject.z[torch.from_numpy(question.rows)]
    return Space(z, question.target, z.mean(0))


def _question(
    clip: Clip, config: EvaluateConfig, question: Question, prompts: Tensor, comparisons: list, val: Space, test: Space
) -> dict:
    """Everything about one question: each calibration's accuracy, its curve, and the classes that gained and lost."""
    named = {name for comparison in comparisons for name in (comparison["class_a"], comparison["class_b"])}
    touched = np.array([n for n, name in enumerate(question.classes) if name in named])
    plain = {"plain": _right(prompts @ test.z.T, test.target)}
    plain["plain_centred"] = _right(prompts @ (test.z - test.mean).T, test.target)
    found = {name: float(right.mean()) for name, right in plain.items()}
    found["subset_plain"] = _subset(prompts @ test.z.T, test.target, touched)
    table, gains, classes = {}, {}, {}
    for calibration in config.comparative.calibrate:
        used = _shifted(comparisons) if calibration == "shuffled" else comparisons
        corrected, shift = corrections(clip, question, prompts, used, calibration, val.mean)
        alphas = sorted({*config.comparative.alphas, 1.0})
        rows = []
        for alpha in alphas:
            scored = [_scores(s, prompts, corrected, shift, alpha, calibration) for s in (val, test)]
            rows.append((alpha, *[float(_right(x, s.target).mean()) for x, s in zip(scored, (val, test))]))
        best, _, reached = max(rows, key=lambda row: (row[1], row[0]))  # of equal ones the nearest to plain zero-shot
        scores = _scores(test, prompts, corrected, shift, best, calibration)
        right, against = _right(scores, test.target), plain["plain_centred" if calibration == "centred" else "plain"]
        found[f"comparative_{calibration}"] = reached
        found[f"subset_comparative_{calibration}"] = _subset(scores, test.target, touched)
        gains[calibration] = right - against
        table[calibration] = {"alpha": best, "gain": float((right - against).mean()), "curve": rows}
        classes[calibration] = _best_and_worst(right - against, test.target, question.classes)
    return found | {"table": table, "gains": gains, "classes": classes, "touched": len(touched)}


def corrections(
    clip: Clip, question: Question, prompts: Tensor, comparisons: list[dict[str, str]], calibration: str, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """mean over a of (t_a - enc(how a differs from b)) for each class b; t_b itself where nothing is known.

    Returns it [classes, D], and what `offset` says is to be added to each class's score [classes]: the mean
    score of its difference embeddings over unlabelled images, whose mean embedding `offset` [D] is.
    """
    corrected, shift = prompts.clone(), torch.zeros(len(prompts))
    for b, name in enumerate(question.classes):
        about = [c for c in comparisons if c["class_b"] == name]
        if about:
            from_a = prompts[[question.classes.index(c["class_a"]) for c in about]]  # [A, D]
            told = clip.embed_texts([c["text"] for c in about])  # [A, D]
            if calibration != "none":
                told = told * (from_a - prompts[b]).norm(dim=-1, keepdim=True)
            corrected[b] = (from_a - told).mean(0)
            if calibration == "offset":
                shift[b] = (told @ offset).mean()
    return corrected, shift


def _scores(space: Space, prompts: Tensor, corrected: Tensor, shift: Tensor, alpha: float, calibration: str) -> Tensor:
    """[classes, M]. The mixed prompts are brought to length 1, as ordinary ones are."""
    mixed = alpha * prompts + (1 - alpha) * corrected
    length = mixed.norm(dim=-1, keepdim=True)
    z = space.z - space.mean if calibration == "centred" else space.z
    return (mixed / length) @ z.T + (1 - alpha) * shift[:, None] / length


def _shifted(comparisons: list[dict[str, str]]) -> list[dict[str, str]]:
    """Every comparison with the next one's sentence, the last with the first's."""
    return [a | {"text": b["text"]} for a, b in zip(comparisons, comparisons[1:] + comparisons[:1])]


def _right(scores: Tensor, target: np.ndarray) -> np.ndarray:
    """[classes, M] -> [M], 1 where the highest score is the image's class."""
    return (scores.argmax(0).numpy() == target).astype(float)


def _subset(scores: Tensor, target: np.ndarray, touched: np.ndarray) -> float | None:
    """Accuracy among the compared classes alone; None where none is compared, or shown."""
    rows = np.isin(target, touched)
    if len(touched) < 2 or not rows.any():
        return None
    guess = touched[scores[torch.from_numpy(touched)][:, torch.from_numpy(rows)].argmax(0).numpy()]
    return float((guess == target[rows]).mean())


def _best_and_worst(gain: np.ndarray, target: np.ndarray, classes: tuple[str, ...]) -> dict[str, dict]:
    of_class = {k: float(gain[target == k].mean()) for k in np.unique(target)}
    best, worst = max(of_class, key=of_class.get), min(of_class, key=of_class.get)
    return {
        "best": {"class": classes[best], "gain": of_class[best]},
        "worst": {"class": classes[worst], "gain": of_class[worst]},
    }


def _curve(question: Question, found: dict) -> Curve:
    series = {name: [(alpha, test) for alpha, _, test in about["curve"]] for name, about in found["table"].items()}
    return Curve(f"Comparative prompting on {question.name}, test", "alpha (1 is plain zero-shot)", "accuracy", series)


# -- which classes are compared ------------------------------------------------------------------------


def _auto(
    held_out: Subject, question: Question, prompts: Tensor, val: Space, writer: Callable[[], Writer]
) -> list[dict[str, str]]:
    """The classes most often confused on validation images, and what a writer says of how they differ, both ways."""
    config = held_out.config
    check_at_least("comparative.n_comparisons", config.comparative.n_comparisons, 1)
    pairs = most_confused(prompts @ val.z.T, val.target, config.comparative.n_comparisons)
    both = [(question.classes[i], question.classes[j]) for a, b in pairs for i, j in ((a, b), (b, a))]
    texts = (
        compare_classes(writer(), config.comparative.writer, held_out.data, question, both, config.seed) if both else []
    )
    return [{"class_a": a, "class_b": b, "text": text} for (a, b), text in zip(both, texts) if text is not None]


def most_confused(scores: Tensor, target: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The n pairs of classes with the most images of one taken for the other, either way. scores: [classes, M]"""
    guess = scores.argmax(0).numpy()
    wrong = np.zeros((len(scores),) * 2, dtype=np.int64)
    np.add.at(wrong, (target, guess), 1)
    both = np.triu(wrong + wrong.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:n]
    return [divmod(int(k), len(scores)) for k in order if both.flat[k]]


def read_comparisons(path: Path, data: Dataset) -> dict[str, list[dict[str, str]]]:
    """question -> [{class_a, class_b, text}], where text says how an image of a differs from one of b.

    Raises UserError for a question or class the data set does not have.
    """
    classes = {question.name: question.classes for question in data.questions}
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, comparisons in found.items():
        if name not in classes:
            raise UserError(f"{path} compares classes of {name!r}; {data.name} asks about {', '.join(classes)}")
        for comparison in comparisons:
            unknown = {comparison["class_a"], comparison["class_b"]} - set(classes[name])
            if unknown:
                raise UserError(f"{path}: {sorted(unknown)[0]!r} is no class of {name}: {', '.join(classes[name])}")
    return found
