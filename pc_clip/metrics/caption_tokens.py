"""Sentences into words as the COCO caption evaluation does it, without Java.

That evaluation takes the Stanford PTBTokenizer (CoreNLP 3.4.1, lower case) and drops punctuation. On plain English
these rules give the same: tests/test_caption_scores.py counts on how many real sentences they do not. What is not
here: mark-up, smileys, addresses of the web, currencies, and all but the commonest abbreviations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# What pycocoevalcap drops. Brackets stay: it lists them in upper case, and they come in lower case.
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"}
_ONE_SIGN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_FUSED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me",
    "wanna": "wan na", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip

_SHORT = "mr|mrs|ms|dr|prof|gen|gov|sgt|lt|col|capt|jr|sr|st|ave|blvd|rd|vs|etc|inc|ltd|co|corp|dept|mt|ft"
_LETTER = r"[^\W\d_]"
_PART = r"[^\W_]+(?:_+[^\W_]+)*"  # letters and digits
_END = r"(?![^\W_])"
_NOT = re.compile(rf"({_LETTER}*?)(n't){_END}", re.IGNORECASE)
_TOKEN = re.compile(
    rf"""
    '(?:s|m|d|ll|re|ve){_END}                         # of "it's"
  | '(?:tis|twas|em|til|cause|n'?|\d0s){_END}         # 'em, '60s
  | (?:{_SHORT})\.{_END}                              # st.
  | {_LETTER}(?:\.{_LETTER})+{_END}\.?                # u.s., p.m.
  | (?!I){_LETTER}\.(?![^\W_]|\Z)                     # J. Smith
  | (?-i:[A-Z]+(?:&[A-Z]+)+){_END}                    # AT&T
  | (?:[dol]'|ma'(?=am)|(?-i:[A-HJ-XZn])'(?={_LETTER}{{2}})|{_LETTER}+[aeiouy]'(?=[aeiou])){_PART}  # o'clock
  | \d+[ ]\d+/\d+{_END}                               # 22 3/4, a single word
  | \d+:\d\d(?=[ap]m)                                 # of 5:54pm
  | -?\d*(?:[.,:]\d+)+{_END} | -\d+{_END}             # 1,000, 7:30, .5
  | {_LETTER}{_PART}(?:[.!?]{_LETTER}+)+              # "end.A", written without a space
  | {_PART}(?:[-/]{_PART})*                           # two-tone, table/desk
  | <\w+> | [?!]{{2,}} | --+ | [^\w\s] | _+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(sentence: str) -> str:
    """The words of a sentence in lower case, with a space between two; an empty string where there are none."""
    found = _words(" ".join(sentence.translate(_ONE_SIGN).split()))
    words = " ".join(_FUSED.get(word, word) for word in found).split(" ")
    return " ".join(word for word in words if word and not word.startswith("--") and word not in PUNCTUATION)


def tokenize_all(sentences: Iterable[str]) -> list[str]:
    """The same for many, each distinct one once."""
    sentences = list(sentences)
    known = {sentence: tokenize(sentence) for sentence in set(sentences)}
    return [known[sentence] for sentence in sentences]


def _words(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        found = _NOT.match(text, place) or _TOKEN.match(text, place)
        place = found.end() if found else place + 1  # a space
        for word in found.groups() if found and found.re is _NOT else [found[0]] if found else []:
            yield _BRACKETS.get(word, word.lower().replace(" ", "\u00a0"))
