"""Caption metrics by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

All are fractions. Papers print 100 times as much, CIDEr too: its highest value is 10, and 1.5075 is printed as 150.75.
CIDEr weighs words by how many of the references at hand have them, so that a part of a data set has other scores than
the same pairs within the whole. The tokenizer (PTBTokenizer), METEOR and SPICE are Java programs. Without a Java,
lower-case words are the tokens, and METEOR is left out.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.metrics import intervals as _intervals

log = logging.getLogger(__name__)

ORDERS = 4  # BLEU-1 to BLEU-4
TOKENIZERS = {True: "PTBTokenizer", False: "lower-case words, because no Java runs here"}
PATIENCE = 1800  # seconds that a Java program may take; pycocoevalcap's classes can hang after an error of theirs
NO_JAVA = "not computed: it is a Java program, and no Java runs here. Install one, then run with --again true"
ONE_PAIR = "0 by definition: CIDEr weighs words by how rare they are among the pairs, and there is only one pair"


def find_java(spice: bool = False) -> bool:
    """Whether a Java runs here, asked before anything is decoded. On some systems `java` only says that it is absent.

    Raises UserError where pycocoevalcap is absent, and where SPICE is wanted and no Java runs.
    """
    _scorer("bleu.bleu_scorer", "BleuScorer")
    try:
        java = subprocess.run(["java", "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        java = False
    if spice and not java:
        raise UserError("SPICE is a Java program, and no Java runs here. Install Java 8, or leave --caption.spice out")
    if not java:
        log.warning("METEOR is left out, and tokens are lower-case words: no Java runs here")
    return java


@dataclass(frozen=True)
class Scores:
    """Scores of N sentences.

    corpus: name -> score of all together; items: name -> [N], of each sentence, whose mean the corpus score is but for
    METEOR and BLEU. bleu: [N, 10] statistics, as `bleu_of` takes them. tokens: the hypotheses as they were scored.
    intervals: of the corpus scores, bootstrap 95 %, but for METEOR's and SPICE's. notes: name -> why a score is absent
    or odd.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]
    bleu: np.ndarray
    tokens: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    seed: int = 0,
    *,
    java: bool = False,
    spice: bool = False,
    quick: bool = False,
) -> Scores:
    """Score one sentence an item against its references.  [N], [N] of one or more each

    METEOR, and SPICE where it is wanted, are left out where they do not run, which the notes say. quick: BLEU, ROUGE-L
    and CIDEr alone, without intervals. Raises UserError for an item without a reference, and for no item at all.
    """
    tokenized = _tokenized(hypotheses, references, java)
    stats = bleu_statistics(*tokenized)
    items = {"rouge_l": _each("rouge.rouge", "Rouge", *tokenized), "cider": _each("cider.cider", "Cider", *tokenized)}
    corpus = {f"bleu_{k}": float(value) for k, value in enumerate(bleu_of(stats.sum(0)), 1)}
    corpus |= {name: float(np.mean(values)) for name, values in items.items()}
    notes = {"cider": ONE_PAIR} if len(hypotheses) == 1 else {}
    if quick:
        return Scores(corpus, items, stats, tokenized[0], notes=notes)
    redrawn = bleu_of(_intervals.redrawn_sums(stats, np.arange(len(stats)), seed))
    intervals = {f"bleu_{k}": _intervals.between(draws) for k, draws in enumerate(redrawn.T, 1)}
    intervals |= {name: _intervals.of_mean(values, seed) for name, values in items.items()}
    if not java:
        notes["meteor"] = NO_JAVA
    for name in ["meteor"] * java + ["spice"] * spice:
        try:
            corpus[name], _ = _by_java(f"{name}.{name}", name.capitalize(), *_numbered(*tokenized))
        except RuntimeError as error:  # the other scores are not lost with it
            log.warning("%s is left out: %s", name.upper(), error)
            notes[name] = f"not computed: {error}"
    return Scores(corpus, items, stats, tokenized[0], intervals, notes)


def validation_cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr, quickly and without Java, to choose an epoch by. Raises UserError where pycocoevalcap is absent."""
    return float(np.mean(_each("cider.cider", "Cider", *_tokenized(hypotheses, references, java=False))))


# -- one score each; sentences are tokenized --------------------------------------------------------------


def _each(module: str, name: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The scores of pycocoevalcap's class, of each sentence.  -> [N]"""
    return np.array(_scorer(module, name)().compute_score(*_numbered(hypotheses, references))[1], dtype=np.float64)


def _numbered(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    """References and hypotheses as pycocoevalcap takes them."""
    return {n: list(each) for n, each in enumerate(references)}, {n: [each] for n, each in enumerate(hypotheses)}


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The counts in BLEU: right n-grams and all of them, for n of 1 to 4, the length, and the nearest reference's.

    -> [N, 10]; the score of any set of sentences is `bleu_of` their sum. Of two equally near references the shorter
    one counts.
    """
    scorer = _scorer("bleu.bleu_scorer", "BleuScorer")(n=ORDERS)
    for hypothesis, of_one in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, list(of_one))
    nearest = [min((abs(length - c["testlen"]), length) for length in c["reflen"])[1] for c in scorer.ctest]
    return np.array(
        [[*c["correct"], *c["guess"], c["testlen"], near] for c, near in zip(scorer.ctest, nearest)], dtype=np.float64
    )


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 of summed statistics, with the small numbers that pycocoevalcap adds.  [..., 10] -> [..., 4]"""
    small, tiny = 1e-9, 1e-15
    right, all_of_them = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    precision = np.cumprod((right + tiny) / (all_of_them + small), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (sums[..., -2:-1] + tiny) / (sums[..., -1:] + small)
    return np.where(ratio < 1, precision * np.exp(1 - 1 / np.minimum(ratio, 1)), precision)


def _tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], java: bool
) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references as the scorers take them: words with one space between two."""
    without = sum(not each for each in references)
    if without or not len(hypotheses):
        what = f"{without} of {len(references)} pairs have no reference" if without else "there is no pair"
        raise UserError(f"{what}; captions are scored against at least one sentence each")
    texts = list(dict.fromkeys([*hypotheses, *(sentence for each in references for sentence in each)]))
    if java:  # a line break would shift all that follows, and "|||" is METEOR's mark between sentences
        lines = [{"caption": " ".join(text.replace("|||", " ").split()) or "."} for text in texts]
        tokens = _by_java("tokenizer.ptbtokenizer", "PTBTokenizer", {0: lines})["0"]
    else:
        tokens = [" ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower())) for text in texts]
    words = dict(zip(texts, tokens, strict=True))
    return [words[text] for text in hypotheses], [[words[text] for text in each] for each in references]


# -- pycocoevalcap ------------------------------------------------------------------------------------------


def _scorer(module: str, name: str) -> type:
    """A class of pycocoevalcap, which is imported only where captions are scored."""
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ModuleNotFoundError as error:
        raise UserError(
            "captions are scored with pycocoevalcap, which is not installed: pip install pycocoevalcap"
        ) from error


def _by_java(module: str, name: str, *arguments: dict) -> Any:
    """The answer of a class that calls Java, in a process of its own that ends itself after PATIENCE.

    Raises RuntimeError with the last line of its complaint.
    """
    environment = {**os.environ, "JAVA_TOOL_OPTIONS": "-Dfile.encoding=UTF-8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", __name__, module, name, str(PATIENCE)], input=json.dumps(arguments), env=environment,
        start_new_session=True, capture_output=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if done.returncode == -signal.SIGKILL:
        raise RuntimeError(f"{name} gave no answer in {PATIENCE} seconds")
    if done.returncode:
        raise RuntimeError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(module: str, name: str, patience: str) -> None:
    """The other end of `_by_java`."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # its Java with it
    signal.alarm(int(patience))
    try:
        scorer = _scorer(module, name)()
        method = scorer.compute_score if hasattr(scorer, "compute_score") else scorer.tokenize
        print(json.dumps(method(*json.load(sys.stdin)), default=np.ndarray.tolist))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # METEOR's class would wait for a lock of its own when it is taken down


if __name__ == "__main__":
    _answer(*sys.argv[1:])
