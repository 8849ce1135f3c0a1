"""Comparative prompting: what is known of how two classes differ is put into their prompts.

PC-CLIP (arXiv 2409.09721): the prompt of class b becomes
    alpha * t_b + (1 - alpha) * mean over a of (t_a - enc(how a differs from b)),
where t is a class's ordinary prompt embedding. alpha = 1 is ordinary zero-shot. It is chosen on validation
images and reported on test images.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from pc_clip.clip import Clip
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset, Question
from pc_clip.errors import UserError
from pc_clip.evals import Result, Subject, mean
from pc_clip.evals.zeroshot import class_embeddings, score

FOLDER = Path(__file__).parents[2] / "configs" / "comparisons"

NEEDS = "a data set with classes and comparisons of them in configs/comparisons/"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions) and (FOLDER / f"{data.name}.yaml").is_file()


def evaluate(subject: Subject) -> Result:
    """Test accuracy at the alpha chosen on validation, beside ordinary zero-shot, for each compared question."""
    comparisons = read_comparisons(FOLDER / f"{subject.data.name}.yaml", subject.data)
    held_out = subject.validation()
    chosen_on = {question.name: question for question in held_out.data.questions}
    details, total = {}, 0
    for question in subject.data.questions:
        if question.name not in comparisons:
            continue
        prompts = class_embeddings(subject.clip, question, subject.config.templates)
        corrected = corrected_prompts(subject.clip, question, prompts, comparisons[question.name])
        curve = {
            alpha: [
                _accuracy(s.z, q, prompts, corrected, alpha)
                for s, q in ((held_out, chosen_on[question.name]), (subject, question))
            ]
            for alpha in sorted({*subject.config.alphas, 1.0})
        }
        best = max(curve, key=lambda alpha: (curve[alpha][0], alpha))  # of equal ones the nearest to plain zero-shot
        total += len(question.rows)
        details[question.name] = {
            "alpha": best,
            "comparative": curve[best][1],
            "plain": curve[1.0][1],
            "curve": [{"alpha": alpha, "validation": val, "test": test} for alpha, (val, test) in curve.items()],
        }
    metrics = {name: mean([d[name] for d in details.values()]) for name in ("comparative", "plain")}
    return Result({**metrics, **{f"comparative_{q}": d["comparative"] for q, d in details.items()}}, total, details)


def corrected_prompts(clip: Clip, question: Question, prompts: Tensor, comparisons: list[dict[str, str]]) -> Tensor:
    """mean over a of (t_a - enc(difference of a from b)) for each class b; t_b where none is known.  [classes, D]"""
    corrected = prompts.clone()
    for b, name in enumerate(question.classes):
        about = [c for c in comparisons if c["class_b"] == name]
        if about:
            from_a = prompts[[question.classes.index(c["class_a"]) for c in about]]
            corrected[b] = (from_a - clip.embed_texts([c["text"] for c in about])).mean(0)
    return corrected


def _accuracy(z: Tensor, question: Question, prompts: Tensor, corrected: Tensor, alpha: float) -> float:
    mixed = F.normalize(alpha * prompts + (1 - alpha) * corrected, dim=-1)
    return score(z[torch.from_numpy(question.rows)] @ mixed.T, question)["top1"]


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
