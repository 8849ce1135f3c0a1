"""What changed between two images, said by the model: BLEU, METEOR, ROUGE-L, CIDEr, and whether it is true.

A checkpoint with a decoder writes its sentences. One without (of stage retrieve) says of each pair the nearest of all
training sentences. Beside the scores stand two that look at no image: `most_common` says the commonest training
sentence of every pair; `shuffled` says of each pair what the model said of another one, so that it has the model's
words and lengths and only the images are missing.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import pairs as apply
from pc_clip.data.changes import NoSplit
from pc_clip.data.dataset import Dataset
from pc_clip.data.registry import beside
from pc_clip.evals import Result, Subject
from pc_clip.evals.change_retrieval import rows_by_kind
from pc_clip.evals.plots import Shown, change_sheet
from pc_clip.metrics import captions as caption_scores
from pc_clip.metrics import intervals as _intervals
from pc_clip.metrics.captions import Scores, Tools, bleu_of
from pc_clip.models.change_model import change_of

log = logging.getLogger(__name__)

DECODER, NEAREST = "decoder", "nearest training sentence"
UNCHANGED = "none"  # the kind of change that is none
LISTED = 20  # pairs whose sentences are in the details
SHOWN = 12  # pairs on the sheet
AT_ONCE = 2**24  # cosines held at once
PARTS = ("type", "object", "value")

DEFINITIONS = {
    "bleu_4": "BLEU of all sentences together, as pycocoevalcap's; of a kind, of its sentences together.",
    "cider": "The mean of CIDEr-D, 1 for what papers print as 100; of a kind, the mean of the same figures.",
    "right": "The sentence names type, object and value of the change, and nothing that is wrong, by its grammar.",
    "right_type, right_object, right_value": "The share of changed pairs whose sentence has this part right.",
    "changed": "The sentence says rightly whether anything changed; one that cannot be understood does not.",
    "most_common": "The commonest sentence of the training split, said of every pair.",
    "shuffled": "What the model said of another pair, drawn by seed.",
}

NEEDS = "a data set with changes (example_changes, clevr_change, spot_the_diff, image_editing_request, changes)"


class Judged(NamedTuple):
    """What is right in N sentences. parts: [N, 3] bool, of PARTS; told: [N], the kind each tells of, empty for none."""

    parts: np.ndarray
    told: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.parts.all(axis=1)


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.changes)


def lacks(subject: Subject) -> str | None:
    """Why these weights cannot say anything; None when they can."""
    change = change_of(subject.clip)
    if change is None:
        return f"{subject.clip.describe()} has no pair encoder; finetune.py --method change trains one"
    if change.decoder is None and also_reads(subject) is None:
        return (
            f"{subject.clip.describe()} has no decoder, and {subject.data.label} has no training sentences to choose "
            "from; train stage caption"
        )
    return None


def also_reads(subject: Subject) -> Dataset | None:
    """The training split, for the commonest sentence and the nearest one; None where there is none.

    Its sentences alone are read, so that its pictures may be absent.
    """
    split = beside(subject.data, "train")
    try:
        return subject.open(split, "keep") if split else None
    except NoSplit as error:
        log.info("no training sentences: %s", error)
        return None


def evaluate(subject: Subject) -> Result:
    """Scores of all sentences and of each kind of change, with intervals, and the sheet of pairs.

    What is right is there where the data set can judge sentences. METEOR is left out where no Java runs.
    Raises UserError for a model that can say nothing, and where scoring lacks something, before anything is decoded.
    """
    if why := lacks(subject):
        raise UserError(why)
    data, config = subject.data, subject.config
    tools = caption_scores.find_tools(config.caption.spice)
    references = [change.sentences for change in data.changes]
    train = _training_sentences(subject)
    said = _say(subject, train)
    scores = caption_scores.score(said, references, tools, config.seed)
    metrics, intervals, items = _metrics(data, said, scores, config.seed)
    for name, others in _without_looking(said, train, config.seed).items():
        found = caption_scores.score(others, references, tools, quick=True)
        metrics |= {f"{name}_{of}": found.corpus[of] for of in ("bleu_4", "cider")}
        if data.judge:
            metrics[f"{name}_right"] = float(judge(data, others).right.mean())
    details = _details(subject, said, scores, tools)
    sheet = change_sheet(data, _shown(subject, said), f"{data.label}: what changed, {details['captioner']}")
    pictures = {"sheet.png": sheet}
    return Result(metrics, len(said), details, pictures, intervals, items=items)


# -- sentences ----------------------------------------------------------------------------------------------


def _say(subject: Subject, train: Sequence[str]) -> list[str]:
    """A sentence on each pair."""
    config = subject.config
    if subject.clip.change.decoder is not None:
        return [found.text for found in _written(subject, subject.data)]
    pairs = apply.embed_pairs(subject.clip, subject.data, batch_size=config.batch_size, workers=config.workers)
    distinct = list(dict.fromkeys(train))
    sentences = subject.clip.embed_texts(distinct)
    blocks = pairs.split(max(1, AT_ONCE // len(distinct)))
    return [distinct[n] for n in torch.cat([(block @ sentences.T).argmax(1) for block in blocks]).tolist()]


def _written(subject: Subject, data: Dataset, attention: bool = False) -> list[apply.Caption]:
    config, options = subject.config, subject.config.caption
    return apply.captions(
        subject.clip, data, beams=options.beams, length_penalty=options.length_penalty,
        batch_size=config.batch_size, workers=config.workers, attention=attention,
    )  # fmt: skip


def _training_sentences(subject: Subject) -> list[str]:
    data = also_reads(subject)
    return [sentence for change in data.changes for sentence in change.sentences] if data else []


def _without_looking(said: Sequence[str], train: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Sentences by those who look at no pair."""
    found = {"most_common": [caption_scores.most_frequent(train)] * len(said)} if train else {}
    if len(said) > 1:
        ring = stream(seed, "shuffled").permutation(len(said))  # drawn, because a file may have kinds take turns
        other = np.empty_like(ring)
        other[ring] = np.roll(ring, 1)  # the one before in the ring: no pair gets its own
        found["shuffled"] = [said[row] for row in other]
    return found


# -- figures ------------------------------------------------------------------------------------------------


def _metrics(
    data: Dataset, said: Sequence[str], scores: Scores, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]], dict[str, list[float]]]:
    """Metrics, intervals, and one number a pair for those that are means over pairs."""
    named = rows_by_kind(data.changes)
    order = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
    metrics = {name: scores.corpus[name] for name in order if name in scores.corpus}
    intervals = {name: scores.intervals[name] for name in metrics if name in scores.intervals}
    means = {"cider": scores.items["cider"]}
    if data.judge:
        judged = judge(data, said)
        means = {"right": judged.right, **_shares(judged, np.array([c.kind for c in data.changes])), **means}
        metrics = {"right": float(judged.right.mean()), **metrics}
    for name, values in list(means.items()):
        if name in ("cider", "right"):
            means |= {f"{name}_{kind}": np.where(of, values, np.nan) for kind, of in named.items()}
    redrawn = _intervals.redrawn_means(np.column_stack([*means.values()]).astype(float), np.arange(len(said)), seed)
    for (name, values), draws in zip(means.items(), redrawn.T):
        metrics.setdefault(name, float(np.nanmean(values.astype(float))))
        intervals[name] = _intervals.between(draws)
    for kind, of in named.items():
        metrics[f"bleu_4_{kind}"] = float(bleu_of(scores.bleu[of].sum(0))[-1])
        sums = _intervals.redrawn_sums(np.column_stack([scores.bleu * of[:, None], of]), np.arange(len(said)), seed)
        draws = np.where(sums[:, -1] > 0, bleu_of(sums[:, :-1])[:, -1], np.nan)  # without a pair of the kind: no BLEU
        intervals[f"bleu_4_{kind}"] = _intervals.between(draws)
    items = {"cider": scores.items["cider"], "rouge_l": scores.items["rouge_l"]}
    items |= {name: means[name].astype(float) for name in ("right", "changed") if name in means}
    return metrics, intervals, {name: values.round(4).tolist() for name, values in items.items()}


def judge(data: Dataset, said: Sequence[str]) -> Judged:
    """What is right in a sentence on each pair, by the data set's own judge.

    The kind that a sentence tells of is found by asking, of one pair of each kind, whether the type is right.
    """
    first = {change.kind: row for row, change in reversed(list(enumerate(data.changes)))}
    kind_of = {
        text: next((kind for kind, row in first.items() if data.judge(row, text)["type"]), "") for text in set(said)
    }
    found = [data.judge(row, text) for row, text in enumerate(said)]
    parts = np.array([[one[part] for part in PARTS] for one in found])
    return Judged(parts, np.array([kind_of[text] for text in said]))


def _shares(judged: Judged, kinds: np.ndarray) -> dict[str, np.ndarray]:
    """Each part, of changed pairs alone (NaN for others); and whether it is said rightly that anything changed."""
    changed = kinds != UNCHANGED
    found = {f"right_{part}": np.where(changed, of, np.nan) for part, of in zip(PARTS, judged.parts.T)}
    if not changed.any():
        found = {}
    if not changed.all():
        found["changed"] = (judged.told != "") & ((judged.told != UNCHANGED) == changed)
    return found


def _details(subject: Subject, said: Sequence[str], scores: Scores, tools: Tools) -> dict[str, Any]:
    data, decoder = subject.data, subject.clip.change.decoder is not None
    about: dict[str, Any] = {
        "captioner": DECODER if decoder else NEAREST,
        "beams": subject.config.caption.beams if decoder else None,
        "tokenizer": tools.tokenizer,
        "distinct": len(set(said)),
        "distinct_references": len({text for change in data.changes for text in change.sentences}),
        "mean_length": float(np.mean([len(tokens.split()) for tokens in scores.tokens])),
        "kinds": dict(Counter(change.kind for change in data.changes)),
        "definitions": DEFINITIONS,
        "sentences": [
            {"before": c.before, "after": c.after, "kind": c.kind, "generated": text, "references": list(c.sentences)}
            for c, text in zip(data.changes[:LISTED], said)
        ],
    }
    about |= scores.notes  # why METEOR is absent, or CIDEr 0
    if data.judge:
        told = judge(data, said).told
        pairs = Counter(zip((change.kind for change in data.changes), told.tolist()))
        about["told_as"] = {
            kind: {t or "not understood": n for (k, t), n in pairs.items() if k == kind} for kind, _ in pairs
        }
    return about


# -- what is shown ------------------------------------------------------------------------------------------


def _shown(subject: Subject, said: Sequence[str]) -> list[Shown]:
    """Some pairs of each kind, drawn by seed, with what was said of them and where the decoder looked."""
    data = subject.data
    rows = draw_rows([change.kind for change in data.changes], SHOWN, stream(subject.config.seed, "sheet"))
    few = dataclasses.replace(data, changes=tuple(data.changes[row] for row in rows), judge=None)
    looks: list[apply.Caption | None] = [None] * len(rows)
    if subject.clip.change.decoder is not None:
        looks = _written(subject, few, attention=True)
    texts = [found.text if found else said[row] for row, found in zip(rows, looks)]
    right = [all(data.judge(row, text).values()) if data.judge else None for row, text in zip(rows, texts)]
    return [
        Shown(data.changes[row], text, verdict, found.tokens if found else [], found.attention if found else None)
        for row, text, verdict, found in zip(rows, texts, right, looks)
    ]


def draw_rows(kinds: Sequence[str], most: int, rng: np.random.Generator) -> list[int]:
    """Rows of pairs, as many of each kind as there are places for, in the order of kinds; all where they are few."""
    shuffled = rng.permutation(len(kinds)).tolist()
    turns: dict[int, int] = {}
    seen: Counter[str] = Counter()
    for row in shuffled:
        turns[row] = seen[kinds[row]]
        seen[kinds[row]] += 1
    chosen = sorted(shuffled, key=lambda row: turns[row])[:most]
    return sorted(chosen, key=lambda row: (kinds[row], row))
