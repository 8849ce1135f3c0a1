"""How well generated sentences agree with those of people: BLEU, METEOR, ROUGE-L, CIDEr and SPICE, by pycocoevalcap.

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
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.metrics import intervals as _intervals

log = logging.getLogger(__name__)

ORDERS = 4  # BLEU-1 to BLEU-4
PATIENCE = 1800  # seconds that a Java program may take; pycocoevalcap's classes can hang after an error of theirs
NO_JAVA = "not computed: it is a Java program, and no Java runs here. Install one, then run with --again true"
ONE_PAIR = "0 by definition: CIDEr weighs words by how rare they are among the pairs, and there is only one pair"


@dataclass(frozen=True)
class Tools:
    """What there is to score with. java: that runs, or None; spice: whether that is wanted."""

    java: str | None
    spice: bool = False

    @property
    def tokenizer(self) -> str:
        return "PTBTokenizer" if self.java else "lower-case words, because no Java runs here"


def find_java() -> str | None:
    """The Java on the PATH, where pycocoevalcap looks for it; None where there is none that runs."""
    try:  # on some systems `java` is there only to say that Java is not
        runs = subprocess.run(["java", "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        runs = False
    return shutil.which("java") if runs else None


def find_tools(spice: bool = False) -> Tools:
    """Look for all that scoring needs, before anything is decoded.

    Raises UserError where pycocoevalcap is absent, and where SPICE is wanted and does not run here.
    """
    _scorer("bleu.bleu_scorer", "BleuScorer")
    tools = Tools(find_java(), spice)
    if spice and tools.java is None:
        raise UserError("SPICE is a Java program, and no Java runs here. Install Java 8, or leave --caption.spice out")
    if spice:
        try:  # its models are fetched by pycocoevalcap at the first use
            _by_java("spice.spice", "Spice", {0: ["a dog runs"]}, {0: ["a dog runs"]})
        except RuntimeError as error:
            raise UserError(f"SPICE does not run ({error}). It wants Java 8; or leave --caption.spice out") from error
    if tools.java is None:
        log.warning("METEOR is left out, and tokens are lower-case words: no Java runs here")
    return tools


@dataclass(frozen=True)
class Scores:
    """Scores of N sentences.

    corpus: name -> score of all together; items: name -> [N], of each sentence, whose mean the corpus score is but for
    METEOR and BLEU. bleu: [N, 10] statistics, as `bleu_of` takes them. tokens: the hypotheses as they were scored.
    intervals: of the corpus scores, bootstrap 95 %, but for METEOR's. notes: name -> why a score is absent or odd.
    """

    corpus: dict[str, float]
    items: dict[str, np.ndarray]
    bleu: np.ndarray
    tokens: list[str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tools: Tools, seed: int = 0, *, quick: bool = False
) -> Scores:
    """Score one sentence an item against its references.  [N], [N] of one or more each

    METEOR is left out where there is no Java. quick: BLEU, ROUGE-L and CIDEr alone, without intervals.
    Raises UserError for an item without a reference, and for no item at all.
    """
    said, told = _tokenized(hypotheses, references, tools)
    stats = bleu_statistics(said, told)
    items = {"rouge_l": _each("rouge.rouge", "Rouge", said, told), "cider": _each("cider.cider", "Cider", said, told)}
    notes = {"cider": ONE_PAIR} if len(said) == 1 else {}
    if tools.spice and not quick:
        _, every = _by_java("spice.spice", "Spice", *_numbered(said, told))
        items["spice"] = np.array([one["All"]["f"] for one in every])
    corpus = {f"bleu_{k}": float(value) for k, value in enumerate(bleu_of(stats.sum(0)), 1)}
    corpus |= {name: float(np.mean(values)) for name, values in items.items()}
    if quick:
        return Scores(corpus, items, stats, said, notes=notes)
    redrawn = bleu_of(_intervals.redrawn_sums(stats, np.arange(len(stats)), seed))
    intervals = {f"bleu_{k}": _intervals.between(draws) for k, draws in enumerate(redrawn.T, 1)}
    intervals |= {name: _intervals.of_mean(values, seed) for name, values in items.items()}
    try:
        if tools.java:
            corpus["meteor"], every = _by_java("meteor.meteor", "Meteor", *_numbered(said, told))
            items["meteor"] = np.array(every)
        else:
            notes["meteor"] = NO_JAVA
    except RuntimeError as error:  # the other scores are not lost with it
        log.warning("METEOR is left out: %s", error)
        notes["meteor"] = f"not computed: {error}"
    return Scores(corpus, items, stats, said, intervals, notes)


def validation_cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr, quickly and without Java, to choose an epoch by. Raises UserError where pycocoevalcap is absent."""
    return float(np.mean(_each("cider.cider", "Cider", *_tokenized(hypotheses, references, Tools(None)))))


def most_frequent(sentences: Sequence[str]) -> str:
    """The most frequent sentence; of several, the first."""
    return Counter(sentences).most_common(1)[0][0]


# -- one score each; sentences are tokenized --------------------------------------------------------------


def _each(module: str, name: str, said: Sequence[str], told: Sequence[Sequence[str]]) -> np.ndarray:
    """The scores of pycocoevalcap's class, of each sentence.  -> [N]"""
    return np.array(_scorer(module, name)().compute_score(*_numbered(said, told))[1], dtype=np.float64)


def _numbered(said: Sequence[str], told: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    """References and hypotheses as pycocoevalcap takes them."""
    return {n: list(each) for n, each in enumerate(told)}, {n: [each] for n, each in enumerate(said)}


def bleu_statistics(said: Sequence[str], told: Sequence[Sequence[str]]) -> np.ndarray:
    """The counts in BLEU: right n-grams and all of them, for n of 1 to 4, the length, and the nearest reference's.

    -> [N, 10]; the score of any set of sentences is `bleu_of` their sum. Of two equally near references the shorter
    one counts.
    """
    scorer = _scorer("bleu.bleu_scorer", "BleuScorer")(n=ORDERS)
    for one, each in zip(said, told, strict=True):
        scorer += (one, list(each))
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


# -- words --------------------------------------------------------------------------------------------------


def _tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tools: Tools
) -> tuple[list[str], list[list[str]]]:
    """Sentences as the scorers take them: words with one space between two."""
    without = sum(not each for each in references)
    if without or not len(hypotheses):
        what = f"{without} of {len(references)} pairs have no reference" if without else "there is no pair"
        raise UserError(f"{what}; captions are scored against at least one sentence each")
    every = [*hypotheses, *(sentence for each in references for sentence in each)]
    words = dict.fromkeys(every)
    if tools.java:  # a line break would shift all that follows, and "|||" is METEOR's mark between sentences
        lines = [{"caption": " ".join(text.replace("|||", " ").split()) or "."} for text in words]
        tokens = _by_java("tokenizer.ptbtokenizer", "PTBTokenizer", {0: lines})["0"]
        words = dict(zip(words, tokens, strict=True))
    else:
        words = {text: " ".join(re.findall(r"\w+(?:['’-]\w+)*", text.lower())) for text in words}
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
    """The answer of a class that calls Java, in a process of its own that is ended after PATIENCE.

    Raises RuntimeError with the last line of its complaint.
    """
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "JAVA_TOOL_OPTIONS": "-Dfile.encoding=UTF-8", "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, module, name], env=environment, start_new_session=True, encoding="utf-8",
        errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        answer, complaint = process.communicate(json.dumps(arguments), timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name} gave no answer in {PATIENCE} seconds") from error
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # its Java with it
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{name} failed: {(complaint.strip().splitlines() or ['no reason given'])[-1][:300]}")
    return json.loads(answer.splitlines()[-1])


def _answer() -> None:
    """The other end of `_by_java`."""
    arguments = json.load(sys.stdin)
    try:
        scorer = _scorer(*sys.argv[1:])()
        method = scorer.compute_score if hasattr(scorer, "compute_score") else scorer.tokenize
        print(json.dumps(method(*arguments), default=np.ndarray.tolist))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # METEOR's class would wait for a lock of its own when it is taken down


if __name__ == "__main__":
    _answer()
