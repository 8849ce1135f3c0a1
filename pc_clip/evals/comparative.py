"""Comparative prompting: differences between classes are put into their prompts.

PC-CLIP (arXiv 2409.09721): the prompt of class b becomes
    alpha * t_b + (1 - alpha) * mean over a of (t_a - enc(how a differs from b)),
where t is a class's ordinary prompt embedding; alpha = 1 is ordinary zero-shot. Alpha is chosen on validation
images and reported on test images.

The published form has a fault: enc(difference) has length 1 while |t_a - t_b| is 0.4 to 0.9, so it swamps
the prompt and shifts the scores of its class on every image alike. `calibrate` names the correction:
    none      as published
    norm      enc(difference) is brought to the length of t_a - t_b
    offset    as norm, and its mean score over the validation images, unlabelled, is subtracted
    centred   as norm, and the mean over those images is subtracted from each class's whole score
    shuffled  a control: as norm, but every sentence is used for the next pair of classes
The baseline of centred is plain_centred: ordinary zero-shot whose classes' mean scores are subtracted. A gain that
is not larger than that of shuffled does not come from the sentences.

With `--comparative.pairs auto` the comparisons are written here: of the pairs of classes most often confused on
validation images, by a writer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.registry import selection_split
from pc_clip.evals import COMPARISONS, Curve, EvalContext, Result
from pc_clip.evals.prompting import Comparisons, class_embeddings, corrections, templates_of
from pc_clip.metrics import intervals
from pc_clip.write.classes import compare_classes
from pc_clip.write.work import make_writer
from pc_clip.write.writers import Writer

CALIBRATIONS = ("none", "norm", "offset", "centred", "shuffled")
Scored = tuple[Tensor, np.ndarray]  # images [M, D] with their classes [M]


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    known = config.comparative.pairs == "auto" or (COMPARISONS / f"{data.name}.yaml").is_file()
    if data.questions and known and selection_split(data) is not None:
        return None
    return (
        "a data set with classes, comparisons of them in evals/comparisons/ or --comparative.pairs auto, and a second "
        "split to choose on"
    )


also_reads = EvalContext.selection_data  # alpha and the confused classes are chosen on it


def evaluate(context: EvalContext) -> Result:
    """Test accuracy of each calibration at its own alpha, chosen on validation, and of ordinary zero-shot.

    Metrics are means over the questions: over all classes, and as subset_* over the compared classes alone (their
    images, and no other class to choose from). gain_* is the figure less its plain counterpart, with an interval.
    """
    config, data = context.config, context.data
    check_choice("comparative.pairs", config.comparative.pairs, ("file", "auto"))
    for calibration in config.comparative.calibrate:
        check_choice("comparative.calibrate", calibration, CALIBRATIONS)
    validation = context.validation()
    chosen_on = {question.name: question for question in validation.data.questions}
    writer = functools.cache(lambda: make_writer(config.comparative, "compare"))  # an LLM is loaded once, if at all
    auto = config.comparative.pairs == "auto"
    written = {} if auto else read_comparisons(COMPARISONS / f"{data.name}.yaml", data)
    result, gains = Result({}, 0), {name: np.zeros(len(data)) for name in config.comparative.calibrate}  # by image
    asked = np.zeros(len(data), dtype=bool)
    for question in data.questions:
        if question.name not in chosen_on or not (auto or question.name in written):
            continue
        prompts = class_embeddings(context.clip, question, templates_of(question, config))
        val, test = _images(validation, chosen_on[question.name]), _images(context, question)
        # Where nothing is confused nothing is compared, and the question counts as it is.
        comparisons = _auto(validation, question, prompts, val, writer) if auto else written[question.name]
        figures, of_images = _answer(context, question, prompts, comparisons, val, test)
        asked[question.rows] = True
        for name, gain in of_images.items():
            np.add.at(gains[name], question.rows, gain / len(gain))
        series = {
            name: [(alpha, test) for alpha, _, test in about["curve"]] for name, about in figures["table"].items()
        }
        title = f"Comparative prompting on {question.name}, test"
        result.curves.append(Curve(title, "alpha (1 is plain zero-shot)", "accuracy", series))
        result.details[question.name] = figures | {"comparisons": comparisons}
        result.n += len(question.rows)
    if not result.details:
        raise UserError(f"no question of {data.label} has comparisons; it asks about {', '.join(chosen_on)}")
    every = list(result.details.values())
    names = [name for name in every[0] if name.startswith(("plain", "comparative", "subset"))]
    for name in sorted(names, key=lambda name: not name.startswith("comparative")):  # the figure before its baselines
        if known := [figures[name] for figures in every if figures[name] is not None]:
            result.metrics[name] = float(np.mean(known))
    for name, gain in gains.items():  # an image's part of the mean over questions, by all of them together
        of_image = gain[asked] * asked.sum() / len(every)
        result.metrics[f"gain_{name}"] = float(of_image.mean())
        result.intervals[f"gain_{name}"] = intervals.of_mean(of_image, config.seed)
    return result


def _images(context: EvalContext, question: Question) -> Scored:
    return context.z[torch.from_numpy(question.rows)], question.target


def _answer(
    context: EvalContext, question: Question, prompts: Tensor, comparisons: Comparisons, val: Scored, test: Scored
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One question's figures, with each calibration's curve and the classes that gain and lose; gains by image."""
    compared = {name for comparison in comparisons for name in (comparison["class_a"], comparison["class_b"])}
    options = context.config.comparative
    touched = np.array([n for n, name in enumerate(question.classes) if name in compared])
    offset = val[0].mean(0)  # test images give none: it is from validation
    plain = {"plain": _right(prompts @ test[0].T, test[1])}
    plain["plain_centred"] = _right(prompts @ (test[0] - offset).T, test[1])
    figures: dict[str, Any] = {name: float(right.mean()) for name, right in plain.items()}
    figures["subset_plain"] = _subset(prompts @ test[0].T, test[1], touched)
    figures |= {"table": {}, "classes": {}, "touched": len(touched)}
    gains = {}
    for calibration in options.calibrate:
        used = _shifted(comparisons) if calibration == "shuffled" else comparisons
        corrected, shift = corrections(context.clip, question, prompts, used, calibration, offset)
        centre = offset if calibration == "centred" else 0
        curve = []  # of (alpha, accuracy on validation, on test)
        for alpha in sorted({*options.alphas, 1.0}):
            scored = [(mixed_scores(z - centre, prompts, corrected, shift, alpha), target) for z, target in (val, test)]
            curve.append((alpha, *[float(_right(*each).mean()) for each in scored]))
        best, _, reached = max(curve, key=lambda row: (row[1], row[0]))  # of equal ones the nearest to plain zero-shot
        scores = mixed_scores(test[0] - centre, prompts, corrected, shift, best)
        gain = _right(scores, test[1]) - plain["plain_centred" if calibration == "centred" else "plain"]
        gains[calibration] = gain
        figures[f"comparative_{calibration}"] = reached
        figures[f"subset_comparative_{calibration}"] = _subset(scores, test[1], touched)
        figures["table"][calibration] = {"alpha": best, "gain": float(gain.mean()), "curve": curve}
        of_class = {name: float(gain[test[1] == k].mean()) for k, name in enumerate(question.classes) if k in test[1]}
        ends = {"best": max(of_class, key=of_class.get), "worst": min(of_class, key=of_class.get)}
        figures["classes"][calibration] = {end: {"class": k, "gain": of_class[k]} for end, k in ends.items()}
    return figures, gains


def mixed_scores(z: Tensor, prompts: Tensor, corrected: Tensor, shift: Tensor, alpha: float) -> Tensor:
    """Scores of images [M, D] by mixed prompts, which are brought to length 1 as ordinary ones are.  -> [classes, M]"""
    mixed = alpha * prompts + (1 - alpha) * corrected
    length = mixed.norm(dim=-1, keepdim=True)
    return (mixed / length) @ z.T + (1 - alpha) * shift[:, None] / length


def _shifted(comparisons: Comparisons) -> Comparisons:
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
    guess = touched[scores.numpy()[touched][:, rows].argmax(0)]
    return float((guess == target[rows]).mean())


# -- which classes are compared ------------------------------------------------------------------------


def _auto(
    validation: EvalContext, question: Question, prompts: Tensor, val: Scored, writer: Callable[[], Writer]
) -> Comparisons:
    """The classes most often confused on validation images, and what a writer says of how they differ, both ways."""
    options, seed = validation.config.comparative, validation.config.seed
    check_at_least("comparative.n_comparisons", options.n_comparisons, 1)
    confused = most_confused(prompts @ val[0].T, val[1], options.n_comparisons)
    pairs = [(question.classes[i], question.classes[j]) for a, b in confused for i, j in ((a, b), (b, a))]
    if not pairs:
        return []
    texts = compare_classes(writer(), options.writer, validation.data, question, pairs, seed)
    return [{"class_a": a, "class_b": b, "text": text} for (a, b), text in zip(pairs, texts) if text is not None]


def most_confused(scores: Tensor, target: np.ndarray, n: int) -> list[tuple[int, int]]:
    """The n pairs of classes with the most images of one taken for the other, either way. scores: [classes, M]"""
    wrong = np.zeros((len(scores),) * 2, dtype=np.int64)
    np.add.at(wrong, (target, scores.argmax(0).numpy()), 1)
    both = np.triu(wrong + wrong.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:n]
    return [divmod(int(k), len(scores)) for k in order if both.flat[k]]


def read_comparisons(path: Path, data: Dataset) -> dict[str, Comparisons]:
    """question -> [{class_a, class_b, text}], where text says how an image of a differs from one of b.

    Raises UserError for a question or class the data set does not have.
    """
    classes = {question.name: question.classes for question in data.questions}
    questions = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, comparisons in questions.items():
        if name not in classes:
            raise UserError(f"{path} compares classes of {name!r}; {data.name} asks about {', '.join(classes)}")
        for comparison in comparisons:
            if unknown := {comparison["class_a"], comparison["class_b"]} - set(classes[name]):
                raise UserError(f"{path}: {sorted(unknown)[0]!r} is not a class of {name}: {', '.join(classes[name])}")
    return questions
