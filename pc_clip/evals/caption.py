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

import numpy as np
import pandas as pd
import torch

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import pairs
from pc_clip.data.changes import NoSplit
from pc_clip.data.dataset import Dataset
from pc_clip.data.registry import sibling_split
from pc_clip.evals import EvalContext, Picture, Result
from pc_clip.evals.change_retrieval import LACKING, change_model, rows_by_kind
from pc_clip.evals.plots import change_sheet
from pc_clip.metrics import captions, intervals
from pc_clip.metrics.captions import Scores, bleu_of

log = logging.getLogger(__name__)

UNCHANGED = "none"  # the kind of pairs without a change
LISTED = 20  # pairs whose sentences are in the details
SHOWN = 12  # pairs on the sheet
AT_ONCE = 2**24  # cosines held at once
PARTS = ("type", "object", "value")


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.changes else LACKING


def also_reads(context: EvalContext) -> Dataset | None:
    """The training split, for the commonest sentence and the nearest one; None where there is none.

    Only its sentences are read, so that its images may be absent.
    """
    split = sibling_split(context.data, "train")
    try:
        return context.open(split, "keep") if split else None
    except NoSplit as error:
        log.info("no training sentences: %s", error)
        return None


def evaluate(context: EvalContext) -> Result:
    """Scores of all sentences and of each kind of change, with intervals, and the sheet of pairs.

    BLEU is of all sentences together, and of a kind of its sentences together; CIDEr is the mean of CIDEr-D, 1 for what
    papers print as 100. Where the data set can judge sentences: right names type, object and value of the change and
    nothing that is wrong; right_type, right_object, right_value are shares of changed pairs; changed says rightly
    whether anything changed. METEOR is left out where no Java runs.
    Raises UserError for a model that cannot caption, and where scoring lacks something, before anything is decoded.
    """
    change, data, config = change_model(context), context.data, context.config
    train = also_reads(context)
    if change.decoder is None and train is None:
        raise UserError(
            f"{context.clip.describe()} has no decoder, and {data.label} has no training sentences to choose from; "
            "train stage caption"
        )
    java, seed = captions.find_java(config.caption.spice), config.seed
    references = [change.sentences for change in data.changes]
    learnt = [sentence for change in train.changes for sentence in change.sentences] if train else []
    sentences = [each.text for each in _write(context, data)] if change.decoder else _nearest(context, learnt)
    scores = captions.score(sentences, references, seed, java=java, spice=config.caption.spice)
    result = _figures(data, sentences, scores, seed)
    for name, others in _baselines(sentences, learnt, seed).items():
        figures = captions.score(others, references, java=java, quick=True).corpus
        result.metrics |= {f"{name}_{metric}": figures[metric] for metric in ("bleu_4", "cider")}
        if data.judge:
            result.metrics[f"{name}_right"] = float(judge(data, others).all(axis=1).mean())
    captioner = "decoder" if change.decoder else "nearest training sentence"
    beams = config.caption.beams if change.decoder else None
    result.details = {
        "captioner": captioner,
        "beams": beams,
        "tokenizer": captions.TOKENIZERS[java],
        **scores.notes,  # why METEOR is absent, or CIDEr of one pair is 0
        "distinct": len(set(sentences)),
        "distinct_references": len({text for of_pair in references for text in of_pair}),
        "mean_length": float(np.mean([len(tokens.split()) for tokens in scores.tokens])),
        "kinds": dict(Counter(change.kind for change in data.changes)),
        **result.details,
        "sentences": [
            {"before": c.before, "after": c.after, "kind": c.kind, "generated": text, "references": list(c.sentences)}
            for c, text in zip(data.changes[:LISTED], sentences)
        ],
    }
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
    baselines = {"most_common": [Counter(train).most_common(1)[0][0]] * len(sentences)} if train else {}
    if len(sentences) > 1:
        ring = stream(seed, "shuffled").permutation(len(sentences))  # drawn: a file may have kinds take turns
        other = np.empty_like(ring)
        other[ring] = np.roll(ring, 1)  # the one before in the ring: no pair gets its own
        baselines["shuffled"] = [sentences[row] for row in other]
    return baselines


# -- figures ------------------------------------------------------------------------------------------------


def judge(data: Dataset, sentences: Sequence[str]) -> np.ndarray:
    """Which of PARTS each pair's sentence has right, by the data set's own judge.  -> [N, 3] bool"""
    judged = [data.judge(row, text) for row, text in enumerate(sentences)]
    return np.array([[each[part] for part in PARTS] for each in judged])


def kinds_described(data: Dataset, sentences: Sequence[str]) -> np.ndarray:
    """The kind of change each sentence tells of: of which one pair of that kind it has the type right; else "".  [N]"""
    first = {change.kind: row for row, change in reversed(list(enumerate(data.changes)))}
    kinds = {
        text: next((kind for kind, row in first.items() if data.judge(row, text)["type"]), "")
        for text in set(sentences)
    }
    return np.array([kinds[text] for text in sentences])


def _figures(data: Dataset, sentences: Sequence[str], scores: Scores, seed: int) -> Result:
    """Metrics, intervals, and items for those that are means over pairs."""
    n, by_kind, kinds = len(sentences), rows_by_kind(data.changes), np.array([change.kind for change in data.changes])
    result, means = Result({}, n), {"cider": scores.items["cider"]}  # name -> [N], NaN where it is not counted
    if data.judge:
        parts, kinds_written, changed = judge(data, sentences), kinds_described(data, sentences), kinds != UNCHANGED
        means = {"right": parts.all(axis=1), **means}
        result.metrics["right"] = float(means["right"].mean())
        if changed.any():
            means |= {f"right_{part}": np.where(changed, right, np.nan) for part, right in zip(PARTS, parts.T)}
        if not changed.all():
            means["changed"] = (kinds_written != "") & ((kinds_written != UNCHANGED) == changed)
        result.details["described_as"] = {
            kind: dict(Counter(each or "not understood" for each in kinds_written[kinds == kind].tolist()))
            for kind in dict.fromkeys(kinds.tolist())
        }
    for name in [name for name in ("right", "cider") if name in means]:
        means |= {f"{name}_{kind}": np.where(here, means[name], np.nan) for kind, here in by_kind.items()}
    shares, known = intervals.of_columns(means, np.arange(n), seed)
    result.metrics |= scores.corpus | shares
    result.intervals = scores.intervals | known
    for kind, here in by_kind.items():
        result.metrics[f"bleu_4_{kind}"] = float(bleu_of(scores.bleu[here].sum(0))[-1])
        sums = intervals.redrawn_sums(np.column_stack([scores.bleu * here[:, None], here]), np.arange(n), seed)
        draws = np.where(sums[:, -1] > 0, bleu_of(sums[:, :-1])[:, -1], np.nan)  # a draw without the kind has no BLEU
        result.intervals[f"bleu_4_{kind}"] = intervals.between(draws)
    items = {name: scores.items[name] for name in ("cider", "rouge_l")}
    items |= {name: means[name].astype(float) for name in ("right", "changed") if name in means}
    result.items = {name: values.round(4).tolist() for name, values in items.items()}
    return result


# -- the sheet ----------------------------------------------------------------------------------------------


def _sheet(context: EvalContext, sentences: Sequence[str], title: str) -> Picture:
    """Some pairs of each kind, drawn by seed, with their sentences and where the decoder looked."""
    data = context.data
    rows = draw_rows([change.kind for change in data.changes], SHOWN, stream(context.config.seed, "sheet"))
    written = [pairs.Caption(sentences[row], 0.0, []) for row in rows]
    if context.clip.change.decoder is not None:
        few = dataclasses.replace(data, changes=tuple(data.changes[row] for row in rows), judge=None)
        written = _write(context, few, attention=True)
    right = [all(data.judge(row, each.text).values()) if data.judge else None for row, each in zip(rows, written)]
    return change_sheet(data, list(zip([data.changes[row] for row in rows], written, right)), title)


def draw_rows(kinds: Sequence[str], most: int, rng: np.random.Generator) -> list[int]:
    """Rows of pairs, about as many of each kind, in the order of kinds; all where they are few."""
    shuffled = pd.Series(kinds).iloc[rng.permutation(len(kinds))]
    turns = shuffled.groupby(shuffled).cumcount().sort_values(kind="stable")
    return sorted(turns.index[:most].tolist(), key=lambda row: (kinds[row], row))
