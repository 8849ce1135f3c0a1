"""Which of ten nearly equal images does a sentence mean? ImageCoDe (Krojer et al. 2022).

The sentence mostly says what is so of that image and not of the others, which is what differences are for: beside the
plain cosine the sentence is held against each image's difference from the mean of the others.
"""

from __future__ import annotations

import logging
import re
from pathlib import PurePath

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.groups import Pick, form_of
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements and form_of(config.statements) is Pick:
        return None
    return "ImageCoDe's valid_data.json as --statements, and --dataset folder with its folders of images"


def evaluate(context: EvalContext) -> Result:
    """The share of sentences that pick their image, in all, of videos and of photographs, with intervals over sets.

    plain: by the cosine of sentence and image. difference: by the cosine of the sentence with the image's difference
    from the mean of the others. commonest: the position that most sentences mean, without looking. chance: one image
    at random. A tie counts as wrong.
    Raises UserError where none of the sets is there, and for a set that lacks the image that a sentence means.
    """
    picks, folders = context.statements, _folders(context.data.ids)
    there = [pick for pick in picks if len(folders.get(pick.folder, ())) > 1]
    if not there:
        raise UserError(f"{context.data.label} has none of the {len({pick.folder for pick in picks})} sets of images")
    if absent := len(picks) - len(there):
        log.info("  %d of %d sentences are left out: their images are absent", absent, len(picks))
    rows = np.unique([row for pick in there for row in folders[pick.folder].values()])
    z, place = context.on(subset(context.data, rows)).z, {row: n for n, row in enumerate(rows.tolist())}
    texts = context.clip.embed_texts([pick.caption for pick in there])
    right: dict[str, list[float]] = {"plain": [], "difference": []}
    for pick, text in zip(there, texts):
        images = folders[pick.folder]
        if pick.target not in images:
            raise UserError(f"set {pick.folder} has no image {pick.target}, which a sentence means")
        of_set, target = z[[place[row] for row in images.values()]], list(images).index(pick.target)
        for name, vectors in (("plain", of_set), ("difference", from_the_others(of_set))):
            cosines = vectors.double() @ text.double()
            others = cosines[[n for n in range(len(cosines)) if n != target]]
            right[name].append(float(cosines[target] > others.max()))
    targets, kinds = np.array([pick.target for pick in there]), np.array([pick.kind for pick in there])
    shares = {name: np.array(values) for name, values in right.items()}
    shares["commonest"] = (targets == np.bincount(targets).argmax()).astype(float)
    shares["chance"] = np.array([1 / len(folders[pick.folder]) for pick in there])
    for kind in np.unique(kinds):
        shares |= {f"{name}_{kind}": np.where(kinds == kind, shares[name], np.nan) for name in right}
    sets = np.unique([pick.folder for pick in there], return_inverse=True)[1]
    metrics, known = intervals.of_columns(shares, sets, context.config.seed)
    return Result(metrics, len(there), {"sets": int(sets.max()) + 1, "absent": absent}, intervals=known)


def from_the_others(z: Tensor) -> Tensor:
    """Each image's unit difference from the mean of the others.  [N, D] -> [N, D]"""
    return F.normalize(z - (z.sum(0) - z) / (len(z) - 1), dim=-1)


def _folders(ids: list[str]) -> dict[str, dict[int, int]]:
    """Folder -> number in an image's name -> row, in the order of the numbers."""
    folders: dict[str, dict[int, int]] = {}
    for row, name in enumerate(ids):
        path = PurePath(name)
        if number := re.search(r"(\d+)$", path.stem):
            of_set = folders.setdefault(path.parent.name, {})
            if (earlier := of_set.setdefault(int(number[1]), row)) != row:
                raise UserError(f"{ids[earlier]} and {name} are both image {int(number[1])} of set {path.parent.name}")
    return {folder: dict(sorted(images.items())) for folder, images in folders.items()}
