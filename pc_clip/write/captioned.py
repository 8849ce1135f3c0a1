"""Differences by a captioner of changes: pictures in, NAME.jsonl out, as write/generate.py writes it.

A change sentence says how the picture after differs from the one before. A difference says how its first image differs
from its second (train/methods/pairwise.py brings the sentence to z_first - z_second). So `first` is the picture
after, and `second` the one before. Sentences that say that nothing changed hold no direction to learn: they are
rejected under the name no_change, as an empty one is under empty, and counted in NAME.meta.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import Difference, choose_pairs, to_line
from pc_clip.data.training_data import load_dataset
from pc_clip.models import loading
from pc_clip.models.change_model import change_of
from pc_clip.models.clip import Clip
from pc_clip.write.captioner import ChangeWriter, ToldWriter
from pc_clip.write.cleaning import Checked
from pc_clip.write.progress import Item
from pc_clip.write.work import Work, check_free, draw_images, write_all
from pc_clip.write.writers import Job


def generate_change(config: GenerateConfig, processes: Processes) -> Path:
    """Write the sentences; returns the finished file. Interrupted and called again, it continues.

    Raises UserError for settings that do not fit, for a checkpoint that cannot write, and as all tasks do.
    """
    _check(config)
    out = Path(config.out) / f"{config.name}.jsonl"
    check_free(out, ".parquet")
    data = _data(config)
    clip = None if config.change.told else _captioner(config, processes)
    work = Work(
        items=lambda: pairs(data, config),
        job=lambda first, second, _: Job(first, second, 0),  # it draws nothing
        to_line=lambda row: to_line(Difference(row["first"], row["second"], row["text"])),
        unit="pairs",
        made_from={},
        writer=lambda config: ChangeWriter(clip, data, config.change) if clip else ToldWriter(data, config.seed),
        judge=lambda raw, _: judge(raw),
    )
    return write_all(config, work, out, json.loads(json.dumps(_settings(config, data, clip))), processes)


def pairs(data: Dataset, config: GenerateConfig) -> list[Item]:
    """(after, before) of each change of a data set, each pair once, or of `n_pairs` of them drawn by seed.

    A data set without changes gives pairs of its images as other writers have them. With `both_orders` the mirror
    image follows each pair, unless it came before. Raises UserError when fewer pairs exist than were asked for.
    """
    if not data.changes:
        return choose_pairs(
            draw_images(data.ids, config, "images are there"), config.n_pairs, config.seed, config.both_orders
        )
    if config.n_images is not None:
        raise UserError(f"--n_images has no effect on {data.label}, which has pairs of its own; take --n_pairs")
    found = list(dict.fromkeys((change.after, change.before) for change in data.changes))
    if config.n_pairs is not None:
        if config.n_pairs > len(found):
            raise UserError(f"{config.n_pairs} pairs were asked for, but {data.label} has {len(found)}; ask for fewer")
        rng = stream(config.seed, "pairs")
        found = [found[n] for n in np.sort(rng.choice(len(found), config.n_pairs, replace=False))]
    if config.both_orders:  # of which a data set may list some itself
        found = list(dict.fromkeys(p for pair in found for p in (pair, pair[::-1])))
    return found


# -- settings ------------------------------------------------------------------------------------------


def _check(config: GenerateConfig) -> None:
    change = config.change
    if change.told and (change.checkpoint or config.both_orders or change.beams != 1):
        raise UserError(
            "change.told writes what the data set says, of pairs in its own order alone; leave change.checkpoint, "
            "change.beams and both_orders out"
        )
    if not change.checkpoint and not change.told:
        raise UserError(
            "--writer change needs a captioner: --change.checkpoint RUN, one of finetune.py --method change "
            "--change.stage caption; or --change.told true for what the data set itself says"
        )
    check_choice("change.missing", change.missing, ("error", "skip"))
    resolve_device(change.device, "change.device")
    check_at_least("change.beams", change.beams, 1)
    check_at_least("change.batch_size", change.batch_size, 1)
    check_at_least("change.workers", change.workers, 0)


def _data(config: GenerateConfig) -> Dataset:
    data = load_dataset(DataConfig(config.dataset, config.root, config.split, config.change.missing))
    if len(data) < 2:
        raise UserError(f"{data.label} has {len(data)} images; a pair takes two")
    if config.change.told and not data.changes:
        raise UserError(f"{data.label} says nothing of pairs of images; leave change.told out")
    return data


def _captioner(config: GenerateConfig, processes: Processes) -> Clip:
    """Raises UserError for a checkpoint that has no decoder."""
    path = config.change.checkpoint
    device = resolve_device(config.change.device, "change.device")
    if device == "cuda" and processes.size > 1:
        device = f"cuda:{processes.local_rank}"
    clip = loading.load_model(path, device=device)
    if change_of(clip) is None:
        raise UserError(
            f"{path} reads no pairs of images; give --change.checkpoint a run of --method change, stage caption"
        )
    if clip.change.decoder is None:
        raise UserError(
            f"{path} is of stage retrieve and writes nothing; train stage caption from it: finetune.py --method change "
            f"--change.stage caption --model.start {path}"
        )
    return clip


def _settings(config: GenerateConfig, data: Dataset, clip: Clip | None) -> dict[str, Any]:
    """Everything the sentences depend on, and nothing else."""
    own = ("name", "writer", "n_images", "n_pairs", "both_orders", "seed")
    return {
        **{name: getattr(config, name) for name in own},
        "data": data.label,
        "fingerprint": data.fingerprint,
        "change": {"beams": config.change.beams, "length_penalty": config.change.length_penalty},
        "checkpoint": clip.weights_hash() if clip else "told",
    }


# -- sentences that say nothing ------------------------------------------------------------------------


def judge(raw: str) -> Checked:
    """A sentence to keep, or why it is not: empty, or no_change."""
    text = " ".join(raw.split())
    if not text:
        return Checked(None, "empty")
    return Checked(None, "no_change") if says_no_change(text) else Checked(text, "kept")


_WHOLE = (
    r"(?:every\ ?thing|all|they|it|(?:\w+\ ){0,2}(?:scenes?|images?|pictures?|photos?|shots?|pair|views?|two|both))"
)
_NO_CHANGE = re.compile(
    rf"""
    # "no visible differences", "nothing in the second picture has changed"
    \bno \ (?:\w+\ ){{0,2}}(?:changes?|different|differences?|alterations?|modifications?)\b
  | \bnothing \ (?:(?!else)\w+\ ){{0,8}}(?:chang|alter|modif|mov|differ|happen)\w*\b
    # "both images are the same", "everything is as it was", "the scene did not change"
  | ^{_WHOLE}\ (?:\w+\ ){{0,4}}(?:same|identical|unchanged|alike)(?:\ (?:as|in|to|with)\b.*)?\W*$
  | ^{_WHOLE}\ (?:\w+\ ){{0,2}}(?:is|are|was|were|looks?|stay\w*|remain\w*)\ (?:just\ |exactly\ )?as\b
  | ^{_WHOLE}\ (?:\w+\ )?(?:not|\w+n't|never)\ (?:\w+\ )?(?:chang|differ|alter)\w*\b
  | ^(?:the\ )?(?:same|no|none|nothing|unchanged|identical)\W*$
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EXCEPT = re.compile(
    r"\b(?:but|except\w*|other than|apart from|besides|aside from|only|however|although|though)\b", re.I
)


def says_no_change(text: str) -> bool:
    """Whether a sentence says that two pictures do not differ, in any of the usual ways, and says nothing else.

    What is the same must be the whole picture: "the ball is the same colour" is not meant. Nor is a sentence that
    makes an exception: "nothing changed but the ball".
    """
    return bool(_NO_CHANGE.search(text)) and not _EXCEPT.search(text)
