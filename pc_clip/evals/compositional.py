"""SugarCrepe (Hsieh et al. 2023): does an image prefer its caption to one with a small, wrong change?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError
from pc_clip.evals import Result, Subject

NEEDS = "--sugar_crepe FOLDER with SugarCrepe's JSON files, and a data set that holds their photographs (coco)"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(config.sugar_crepe) and Path(config.sugar_crepe).is_dir()


def evaluate(subject: Subject) -> Result:
    """Accuracy over the rows whose photograph the data set holds, each file apart and all together.

    blind: the same texts scored against the mean image embedding, that is, without looking.
    """
    row_of = {_stem(key): row for row, key in enumerate(subject.data.ids)}
    rows, captions, negatives, kinds = [], [], [], []
    for path, items in read_sugar_crepe(subject.config.sugar_crepe).items():
        for item in items:
            if (row := row_of.get(_stem(Path(item["filename"]).stem))) is not None:
                rows.append(row)
                captions.append(item["caption"])
                negatives.append(item["negative_caption"])
                kinds.append(path)
    if not rows:
        raise UserError(f"none of the photographs in {subject.config.sugar_crepe} is in {subject.data.label}")
    gap = subject.clip.embed_texts(captions) - subject.clip.embed_texts(negatives)  # [M, D]
    right = ((subject.z[rows] * gap).sum(-1) > 0).double()
    blind = (gap @ F.normalize(subject.z.mean(0), dim=0) > 0).double()
    of = {kind: torch.tensor([k == kind for k in kinds]) for kind in sorted(set(kinds))}
    metrics = {"sugarcrepe": float(right.mean()), "sugarcrepe_blind": float(blind.mean())}
    metrics |= {f"sugarcrepe_{kind}": float(right[mask].mean()) for kind, mask in of.items()}
    return Result(metrics, len(rows), {"rows": {kind: int(mask.sum()) for kind, mask in of.items()}})


def read_sugar_crepe(folder: str | Path) -> dict[str, list[dict[str, str]]]:
    """SugarCrepe's files as published: name -> rows with filename, caption, negative_caption."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise UserError(
            f"{folder} holds no SugarCrepe files (add_obj.json, swap_att.json, ...; github.com/RAIVNLab/sugar-crepe)"
        )
    found = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error})") from error
        items = list(content.values()) if isinstance(content, dict) else content
        if not all({"filename", "caption", "negative_caption"} <= item.keys() for item in items):
            raise UserError(f"{path} is no SugarCrepe file: rows need filename, caption and negative_caption")
        found[path.stem] = items
    return found


def _stem(key: str) -> str:
    """COCO's ids with and without their leading zeros are the same photograph."""
    return key.lstrip("0") or "0"
