"""What statements give away to who does not look: `python -m pc_clip blind FILES`. No image is needed.

For each file of true and false statements (data/statements.py; VSR's, or your own): the rate of the commoner label,
the model on a constant grey picture, and a classifier of the texts alone. A test set on which one of these is far above
the majority can be passed without looking.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.data.statements import label_of, read_statements
from pc_clip.evals import _blind_baselines
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip

# As a study writes its table.
COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]


def audit(clip: Clip, path: str | Path, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Figures of one file or folder: metric -> share, and its 95 % interval over photographs.

    true: the share of true statements; majority, blind, text_only: shares judged rightly;
    blind_prefers_caption_as_written: how often the grey picture is closer to what is written, whatever its label.
    Raises UserError for statements that are all true, or all false.
    """
    statements = read_statements([path], seed)
    true, photograph = (
        np.array([s.true for s in statements]),
        _blind_baselines.photographs([s.image for s in statements]),
    )
    if true.all() or not true.any():
        raise UserError(
            f"all {len(true)} statements of {path} are {str(bool(true[0])).lower()}; this is for files with both kinds"
        )
    texts, others = _blind_baselines.embed_both(clip, statements)
    grey = _blind_baselines.closer(_blind_baselines.grey_image(clip), texts, others)
    common = np.full(len(true), 1.0 if true.mean() >= 0.5 else -1.0)
    found = {
        "true": true.astype(float),
        "majority": _blind_baselines.right(common, true),
        "blind": _blind_baselines.right(grey, true),
        "blind_prefers_caption_as_written": _blind_baselines.right(grey),
    }
    by_text = _blind_baselines.tell_labels(texts, true, photograph, seed)
    if by_text is not None:
        found["text_only"] = _blind_baselines.right(by_text, true)
    draws = intervals.redrawn_means(np.stack(list(found.values()), axis=1), photograph, seed)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {name: (float(values.mean()), float(a), float(b)) for (name, values), a, b in zip(found.items(), low, high)}


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m pc_clip blind", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--model", default="example", help="open_clip's name, example, or local-dir:FOLDER")
    parser.add_argument("--pretrained", help="a tag of open_clip's, or a file of weights")
    parser.add_argument("--seed", type=int, default=0, help="of contradictions that are drawn, folds and intervals")
    parser.add_argument("--out", type=Path, help="a CSV of the same columns as a study's")
    arguments = parser.parse_args(argv)
    clip = Clip.create(arguments.model, arguments.pretrained)
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
