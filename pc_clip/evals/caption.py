"""Change captioning: BLEU, METEOR, ROUGE-L, CIDEr, and whether a sentence is true.

A checkpoint with a decoder writes its sentences. One without (of stage retrieve) gives each pair the nearest of all
training sentences. Two baselines look at no image: `most_common` says the commonest training sentence of every pair;
`shuffled` says of each pair the model's sentence on another one, so that words and lengths are the model's.
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
from pc_clip.data import pairs
from pc_clip.data.changes import NoSplit
from pc_clip.data.dataset import Dataset
from pc_clip.data.registry import beside
from pc_clip.evals import EvalContext, Picture, Result
from pc_clip.evals.change_retrieval import LACKING, change_model, rows_by_kind
from pc_clip.evals.plots import Shown, change_sheet
from pc_clip.metrics import captions, intervals
from pc_clip.metrics.captions import Scores, bleu_of

log = logging.getLogger(__name__)

UNCHANGED = "none"  # the kind of pairs without a change
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
    "shuffled": "The model's sentence on another pair, drawn by seed.",
}


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.changes else LACKING


def also_reads(context: EvalContext) -> Dataset | None:
    """The training split, for the commonest sentence and the nearest one; None where there is none.

    Only its sentences are read, so that its images may be absent.
    """
    split = beside(context.data, "train")
    try:
        return context.open(split, "keep") if split else None
    except NoSplit as error:
        log.info("no training sentences: %s", error)
        return None


def evaluate(context: EvalContext) -> Result:
    """Scores of all sentences and of each kind of change, with intervals, and the sheet of pairs.

    `right` is there where the data set can judge sentences. METEOR is left out where no Java runs.
    Raises UserError for a model that cannot caption, and where scoring lacks something, before anything is decoded.
    """
    change, data, config = change_model(context), context.data, context.config
    train = also_reads(context)
    if change.decoder is None and train is None:
        raise UserError(
            f"{context.clip.describe()} has no decoder, and {data.label} has no training sentences to choose from; "
            "train stage caption"
        )
    tools = captions.find_tools(config.caption.spice)
    references = [change.sentences for change in data.changes]
    learnt = [sentence for change in train.changes for sentence in change.sentences] if train else []
    sentences = [each.text for each in _write(context, data)] if change.decoder else _nearest(context, learnt)
    scores = captions.score(sentences, references, tools, config.seed)
    result = _figures(data, sentences, scores, config.seed)
    for name, others in _baselines(sentences, learnt, config.seed).items():
        figures = captions.score(others, references, tools, quick=True).corpus
        result.metrics |= {f"{name}_{metric}": figures[metric] for metric in ("bleu_4", "cider")}
        if data.judge:
            result.metrics[f"{name}_right"] = float(judge(data, others).right.mean())
    captioner = "decoder" if change.decoder else "nearest training sentence"
    beams = config.caption.beams if change.decoder else None
    result.details = {"captioner": captioner, "beams": beams, "tokenizer": tools.tokenizer, **result.details}
    result.details |= scores.notes  # why METEOR is absent, or CIDEr of one pair is 0
    result.pictures["sheet.png"] = _sheet(context, sentences, f"{data.label}: what changed, {captioner}")
    return result


# -- sentences ----------------------------------------------------------------------------------------------


def _nearest(context: EvalContext, train: Sequence[str]) -> list[str]:
    """The training sentence nearest to each pair."""
    config, distinct = context.config, list(dict.fromkeys(train))
    z = pairs.embed_pairs(context.clip, context.data, batch_size=config.batch_size, workers=config.workers)
    of_texts = context.clip.embed_texts(distinct)
    blocks = z.split(max(1, AT_ONCE // len(distinct)))
    return [distinct[n] for n in torch.cat([(block @ of_texts.T).argmax(1) for block in blocks]).tolist()]


def _write(context: EvalContext, data: Dataset, attention: bool = False) -> list[pairs.Caption]:
    config, options = context.config, context.config.caption
    return pairs.captions(
        context.clip, data, beams=options.beams, length_penalty=options.length_penalty,
        batch_size=config.batch_size, workers=config.workers, attention=attention,
    )  # fmt: skip


def _baselines(sentences: Sequence[str], train: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Sentences that depend on no image."""
    baselines = {"most_common": [captions.most_frequent(train)] * len(sentences)} if train else {}
    if len(sentences) > 1:
        ring = stream(seed, "shuffled").permutation(len(sentences))  # drawn: a file may have kinds take turns
        other = np.empty_like(ring)
        other[ring] = np.roll(ring, 1)  # the one before in the ring: no pair gets its own
        baselines["shuffled"] = [sentences[row] for row in other]
    return baselines


# -- figures ------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """The judgement of N sentences. parts: [N, 3] bool, of PARTS; kinds: [N], the kind each tells of, or ""."""

    parts: np.ndarray
    kinds: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.parts.all(axis=1)


def judge(data: Dataset, sentences: Sequence[str]) -> Judged:
    """Judge a sentence on each pair, by the data set's own judge.

    The kind that a sentence tells of is found by asking, of one pair of each kind, whether the type is right.
    """
    first = {change.kind: row for row, change in reversed(list(enumerate(data.changes)))}
    kinds = {
        text: next((kind for kind, row in first.items() if data.judge(row, text)["type"]), "")
        for text in set(sentences)
    }
    judged = [data.judge(row, text) for row, text in enumerate(sentences)]
    parts = np.array([[each[part] for part in PARTS] for each in judged])
    return Judged(parts, np.array([kinds[text] for text in sentences]))


def _figures(data: Dataset, sentences: Sequence[str], scores: Scores, seed: int) -> Result:
    """Metrics, intervals, and items for those that are means over pairs."""
    n, by_kind, kinds = len(sentences), rows_by_kind(data.changes), [change.kind for change in data.changes]
    order = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
    result = Result({}, n, _details(data, sentences, scores))
    means = {"cider": scores.items["cider"]}
    if data.judge:
        judged = judge(data, sentences)
        result.metrics["right"] = float(judged.right.mean())
        means = {"right": judged.right, **_shares(judged, np.array(kinds)), **means}
        result.details["told_as"] = {
            kind: dict(Counter(told or "not understood" for k, told in zip(kinds, judged.kinds.tolist()) if k == kind))
            for kind in dict.fromkeys(kinds)
        }
    result.metrics |= {name: scores.corpus[name] for name in order if name in scores.corpus}
    result.intervals = {name: scores.intervals[name] for name in result.metrics if name in scores.intervals}
    for name in [name for name in ("right", "cider") if name in means]:
        means |= {f"{name}_{kind}": np.where(here, means[name], np.nan) for kind, here in by_kind.items()}
    redrawn = intervals.redrawn_means(np.column_stack([*means.values()]).astype(float), np.arange(n), seed)
    for (name, values), draws in zip(means.items(), redrawn.T):
        result.metrics.setdefault(name, float(np.nanmean(values.astype(float))))
        result.intervals[name] = intervals.between(draws)
    for kind, here in by_kind.items():
        result.metrics[f"bleu_4_{kind}"] = float(bleu_of(scores.bleu[here].sum(0))[-1])
        sums = intervals.redrawn_sums(np.column_stack([scores.bleu * here[:, None], here]), np.arange(n), seed)
        draws = np.where(sums[:, -1] > 0, bleu_of(sums[:, :-1])[:, -1], np.nan)  # a draw without the kind has no BLEU
        result.intervals[f"bleu_4_{kind}"] = intervals.between(draws)
    items = {name: scores.items[name] for name in ("cider", "rouge_l")}
    items |= {name: means[name].astype(float) for name in ("right", "changed") if name in means}
    result.items = {name: values.round(4).tolist() for name, values in items.items()}
    return result


def _shares(judged: Judged, kinds: np.ndarray) -> dict[str, np.ndarray]:
    """Each part, of changed pairs alone (NaN for others); and whether it is said rightly that anything changed."""
    changed = kinds != UNCHANGED
    shares = {}
    if changed.any():
        shares = {f"right_{part}": np.where(changed, of_part, np.nan) for part, of_part in zip(PARTS, judged.parts.T)}
    if not changed.all():
        shares["changed"] = (judged.kinds != "") & ((judged.kinds != UNCHANGED) == changed)
    return shares


def _details(data: Dataset, sentences: Sequence[str], scores: Scores) -> dict[str, Any]:
    return {
        "distinct": len(set(sentences)),
        "distinct_references": len({text for change in data.changes for text in change.sentences}),
        "mean_length": float(np.mean([len(tokens.split()) for tokens in scores.tokens])),
        "kinds": dict(Counter(change.kind for change in data.changes)),
        "definitions": DEFINITIONS,
        "sentences": [
            {"before": c.before, "after": c.after, "kind": c.kind, "generated": text, "references": list(c.sentences)}
            for c, text in zip(data.changes[:LISTED], sentences)
        ],
    }


# -- the sheet ----------------------------------------------------------------------------------------------


def _sheet(context: EvalContext, sentences: Sequence[str], title: str) -> Picture:
    """Some pairs of each kind, drawn by seed, with their sentences and where the decoder looked."""
    data = context.data
    rows = draw_rows([change.kind for change in data.changes], SHOWN, stream(context.config.seed, "sheet"))
    few = dataclasses.replace(data, changes=tuple(data.changes[row] for row in rows), judge=None)
    written = [pairs.Caption(sentences[row], 0.0, []) for row in rows]
    if context.clip.change.decoder is not None:
        written = _write(context, few, attention=True)
    shown = []
    for row, caption in zip(rows, written):
        right = all(data.judge(row, caption.text).values()) if data.judge else None
        shown.append(Shown(data.changes[row], caption.text, right, caption.tokens, caption.attention))
    return change_sheet(data, shown, title)


def draw_rows(kinds: Sequence[str], most: int, rng: np.random.Generator) -> list[int]:
    """Rows of pairs, about as many of each kind, in the order of kinds; all where they are few."""
    shuffled = rng.permutation(len(kinds)).tolist()
    seen: Counter[str] = Counter()
    turns: dict[int, int] = {}
    for row in shuffled:
        turns[row] = seen[kinds[row]]
        seen[kinds[row]] += 1
    chosen = sorted(shuffled, key=lambda row: turns[row])[:most]
    return sorted(chosen, key=lambda row: (kinds[row], row))
