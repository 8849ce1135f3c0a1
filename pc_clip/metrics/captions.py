"""How well generated sentences agree with what people said: BLEU, METEOR, ROUGE-L, CIDEr and SPICE, by pycocoevalcap.

All are fractions. Papers print 100 times as much, CIDEr too: its highest value is 10, and 1.5075 is printed as 150.75.
CIDEr weighs words by how many of the references at hand have them, so that a part of a data set has other scores than
the same pairs within the whole.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.metrics import intervals as _intervals
from pc_clip.metrics import java as programs
from pc_clip.metrics.caption_tokens import PUNCTUATION, tokenize_all
from pc_clip.metrics.java import HOW_TO_GET, Java, find_java

log = logging.getLogger(__name__)

ORDERS = 4  # BLEU-1 to BLEU-4
NO_JAVA = f"not computed: it is a Java program, and no Java runs here. {HOW_TO_GET}; then run with --again true"
_PERFECT = (0, 1, 21, 20)  # METEOR's statistics: words of the hypothesis, of the reference, matched; chunks


@dataclass(frozen=True)
class Tools:
    """What is there to score with. java: None where there is none; spice: whether that is wanted."""

    java: Java | None
    spice: bool = False

    @property
    def tokenizer(self) -> str:
        return (
            f"PTBTokenizer, Java {self.java.version}"
            if self.java
            else "in Python, made to give what PTBTokenizer gives"
        )


def find_tools(spice: bool = False) -> Tools:
    """Look for all that scoring needs, before anything is decoded.

    Raises UserError where pycocoevalcap is absent, and where SPICE is wanted and does not run here.
    """
    _scorer("bleu.bleu_scorer", "BleuScorer")
    tools = Tools(find_java(), spice)
    if spice and tools.java is None:
        raise UserError(f"SPICE is a Java program, and no Java runs here. Leave --caption.spice out, or {HOW_TO_GET}")
    if spice:
        programs.spice(tools.java, ["a dog runs"], [["a dog runs"]])
    if tools.java is None:
        log.warning("METEOR will not be computed, and the tokenizer is our own: no Java runs here. %s", HOW_TO_GET)
    return tools


@dataclass(frozen=True)
class Scores:
    """Scores of N sentences.

    corpus: name -> score of all together; items: name -> [N] of each; what corpus scores are the mean of. METEOR's and
    BLEU's are not that mean. bleu: [N, 10] statistics, as `bleu_of` takes them. meteor: [N, 23] statistics. tokens:
    the hypotheses as they were scored. intervals: of the corpus scores, bootstrap 95 %.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]
    bleu: np.ndarray
    tokens: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tools: Tools, seed: int = 0, *, quick: bool = False
) -> Scores:
    """Score one sentence an item against its references.  [N], [N] of one or more each

    METEOR is left out where there is no Java. quick: BLEU, ROUGE-L and CIDEr alone, without intervals.
    Raises UserError for an item without a reference, and for no item at all.
    """
    said, told = _tokenized(hypotheses, references, tools)
    stats = bleu_statistics(said, told)
    items = {"rouge_l": _rouge(said, told), "cider": cider(said, told)}
    if tools.spice and not quick:
        items["spice"] = np.array(programs.spice(tools.java, said, told))
    corpus = {f"bleu_{k}": float(value) for k, value in enumerate(bleu_of(stats.sum(0)), 1)}
    corpus |= {name: float(np.mean(values)) for name, values in items.items()}
    if quick:
        return Scores(corpus, items, stats, said)
    redrawn = bleu_of(_intervals.redrawn_sums(stats, np.arange(len(stats)), seed))
    intervals = {f"bleu_{k}": _intervals.between(of) for k, of in enumerate(redrawn.T, 1)}
    intervals |= {name: _intervals.of_mean(values, seed) for name, values in items.items()}
    if tools.java:
        corpus["meteor"], items["meteor"], redrawn = _meteor(tools.java, said, told, seed)
        intervals["meteor"] = _intervals.between(redrawn)
    return Scores(corpus, items, stats, said, intervals)


def validation_cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr, quickly and without Java, to choose an epoch by. Raises UserError where pycocoevalcap is absent."""
    return float(np.mean(cider(*_tokenized(hypotheses, references, Tools(None)))))


# -- one score each; sentences are tokenized --------------------------------------------------------------


def cider(said: Sequence[str], told: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each sentence, between 0 and 10; the corpus score is the mean.  -> [N]"""
    scorer = _scorer("cider.cider_scorer", "CiderScorer")(n=4, sigma=6.0)
    for one, of in zip(said, told, strict=True):
        scorer += (one, list(of))
    return np.array(scorer.compute_score()[1], dtype=np.float64)


def bleu_statistics(said: Sequence[str], told: Sequence[Sequence[str]]) -> np.ndarray:
    """What BLEU is made of: right n-grams and all of them, for n of 1 to 4, the length, and the nearest reference's.

    -> [N, 10]; the score of any set of sentences is `bleu_of` their sum. Of two equally near references the shorter
    one counts.
    """
    scorer = _scorer("bleu.bleu_scorer", "BleuScorer")(n=ORDERS)
    for one, of in zip(said, told, strict=True):
        scorer += (one, list(of))
    nearest = [min((abs(length - c["testlen"]), length) for length in c["reflen"])[1] for c in scorer.ctest]
    return np.array(
        [[*c["correct"], *c["guess"], c["testlen"], near] for c, near in zip(scorer.ctest, nearest)], dtype=np.float64
    ).reshape(-1, 2 * ORDERS + 2)


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 of summed statistics, with the small numbers that pycocoevalcap adds.  [..., 10] -> [..., 4]"""
    small, tiny = 1e-9, 1e-15
    right, all_of_them = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    precision = np.cumprod((right + tiny) / (all_of_them + small), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (sums[..., -2:-1] + tiny) / (sums[..., -1:] + small)
    return np.where(ratio < 1, precision * np.exp(1 - 1 / np.minimum(ratio, 1)), precision)


def _rouge(said: Sequence[str], told: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each sentence; the corpus score is the mean.  -> [N]"""
    scorer, known = _scorer("rouge.rouge", "Rouge")(), {}
    for key in zip(said, map(tuple, told)):  # it is slow, and templates are said of many pairs
        if key not in known:
            known[key] = scorer.calc_score([key[0]], list(key[1]))
    return np.array([known[key] for key in zip(said, map(tuple, told))], dtype=np.float64)


def _meteor(
    java: Java, said: Sequence[str], told: Sequence[Sequence[str]], seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """METEOR of all, of each [N], and of all as items are drawn again [draws].

    The corpus score is not the mean: the program adds up statistics, and leaves out the chunks of perfect sentences.
    """
    with programs.Meteor(java) as meteor:
        lines = meteor.statistics(said, told)
        each, whole = meteor.scores(lines)
        values = np.array([line.split() for line in lines], dtype=np.float64)
        length, reference, matched, chunks = values[:, _PERFECT].T
        perfect = (length == reference) & (length == matched) & (chunks == 1)
        values[perfect, _PERFECT[-1]] = 0
        sums = _intervals.redrawn_sums(values, np.arange(len(values)), seed)
        redrawn = meteor.scores_of_sums([" ".join(map(repr, row)) for row in sums.tolist()])
    return whole, np.array(each), np.array(redrawn)


# -- words --------------------------------------------------------------------------------------------------


def _tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tools: Tools
) -> tuple[list[str], list[list[str]]]:
    """Sentences as the scorers take them: words with one space between two."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} sentences and references of {len(references)} items")
    without = [n for n, of in enumerate(references) if not of]
    if without or not len(hypotheses):
        what = f"{len(without)} of {len(references)} pairs have no reference" if without else "there is no pair"
        raise UserError(f"{what}; captions are scored against at least one sentence each")
    every = [*hypotheses, *(sentence for of in references for sentence in of)]
    every = [re.sub(r"\|\|+", "|", sentence) for sentence in every]  # METEOR's mark between sentences
    words = iter(_java_words(tools.java, every) if tools.java else tokenize_all(every))
    return [next(words) for _ in hypotheses], [[next(words) for _ in of] for of in references]


def _java_words(java: Java, sentences: Sequence[str]) -> list[str]:
    distinct = list(dict.fromkeys(sentences))
    found = programs.tokenize(java, distinct)
    known = {s: " ".join(word for word in words if word not in PUNCTUATION) for s, words in zip(distinct, found)}
    return [known[sentence] for sentence in sentences]


def most_frequent(sentences: Sequence[str]) -> str:
    """The sentence that is said most often; of several, the one said first."""
    return Counter(sentences).most_common(1)[0][0]


def _scorer(module: str, name: str) -> type:
    """A class of pycocoevalcap, which is imported only where captions are scored."""
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ModuleNotFoundError as error:
        raise UserError(
            "captions are scored with pycocoevalcap, which is not installed: pip install pycocoevalcap"
        ) from error
