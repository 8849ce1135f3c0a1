"""The Python API, as `import pc_clip` has it: a model in the hand, and what the three scripts do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pc_clip.core.files import write_text
from pc_clip.data.differences import read
from pc_clip.data.registry import open_dataset
from pc_clip.interface import finetune as finetune_script
from pc_clip.interface import generate_diffs, run
from pc_clip.interface.model import Model, load
from pc_clip.report.results import long_table

__all__ = ["Model", "evaluate", "finetune", "load", "open_dataset", "write_differences"]


def finetune(config: str | Path | None = None, **settings: Any) -> Path:
    """Finetune a model, as finetune.py does.  -> the run's folder, which `load` and `evaluate` take

    config: a YAML file of settings, or the name of a recipe such as "pc_clip_coco.yaml"; the embedded example's unless
    given. settings: any settings again; groups as dictionaries.
    Raises UserError for a setting that is unknown or does not fit, with the nearest known one.

    >>> pc_clip.finetune(name="mine", train={"steps": 2, "batch_size": 4})
    step 2/2  loss ...
    the model is in runs/mine; evaluate it: python run.py --dataset example --checkpoint runs/mine
    PosixPath('runs/mine')
    """
    return finetune_script.main(_flags(config, settings))


def evaluate(
    checkpoint: str | Path | None = None, dataset: str = "example", modes: Sequence[str] = (), **settings: Any
) -> pd.DataFrame:
    """Evaluate a model, as run.py does: results are kept in results/ and not computed again.

    checkpoint: a run's folder or a file; None for the pretrained model that `model` names. dataset: a name that
    `python -m pc_clip datasets` lists. modes: evaluations; all that the data set allows unless given. settings: any
    settings of run.py; those of an evaluation as a dictionary under its name.
    Returns a row a figure: model, evaluation, dataset, about, metric, value (a fraction), n, and the ends low and high
    of its 95 % interval, NaN where it has none.

    >>> figures = pc_clip.evaluate(dataset="example", modes=["zeroshot"], split="val")
    >>> figures.metric.tolist()[:3]
    ['zeroshot', 'zeroshot_colour', 'top5_colour']
    """
    known = {"dataset": dataset, "mode": ",".join(modes), "checkpoint": checkpoint and str(checkpoint)}
    argv = _flags(None, {name: value for name, value in known.items() if value} | settings)
    return long_table(run.results(run.settings(argv)))


def write_differences(captions: str | Path | Mapping[str, str | Sequence[str]], **settings: Any) -> pd.DataFrame:
    """Write how images differ, from their captions, as generate_diffs.py does.

    captions: a COCO captions JSON or a SimCLIP TSV; or image -> its captions. settings: any settings of
    generate_diffs.py: name, n_pairs, writer, ...
    Returns a row a sentence: first, second, text. They are kept in llm_diffs/NAME.jsonl.

    >>> written = pc_clip.write_differences({"a.jpg": ["a dog on a sofa"], "b.jpg": ["two cats"]}, name="pets")
    >>> written.text[0]
    'Picture seven shows a dog on a sofa and not two cats; picture eight shows two cats and not a dog on a sofa.'
    """
    if isinstance(captions, Mapping):
        captions = _written(captions, Path(settings.get("out", "llm_diffs")) / f"{settings.get('name', 'mine')}.json")
    path = generate_diffs.main(_flags(None, {"captions": str(captions)} | settings))
    return pd.DataFrame([(d.first, d.second, d.text) for d in read(path)], columns=["first", "second", "text"])


def _flags(config: str | Path | None, settings: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """Settings as a command line has them, so that they are checked in one place."""
    argv = ["--config", str(config)] if config else []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            argv += _flags(None, value, f"{prefix}{name}.")
        else:
            value = value.item() if isinstance(value, np.generic) else value
            argv += [prefix + name, str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)]
    return argv


def _written(captions: Mapping[str, str | Sequence[str]], path: Path) -> Path:
    """Captions as a file in COCO's layout."""
    images = [{"id": name, "file_name": name} for name in captions]
    several = {name: [texts] if isinstance(texts, str) else texts for name, texts in captions.items()}
    annotations = [{"image_id": name, "caption": text} for name, texts in several.items() for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False))
    return path
