"""Candidates in order: by the words that their descriptions share with a caption, or as a language model says.

What is known of a crop depends on who described it. A vision-language model has seen it, and it takes its own place in
the order. Any other writer knows the captions of the whole alone: such a crop comes directly after its whole, of which
it shows less, and is compared with nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pc_clip.core.random import stream
from pc_clip.data.overlap import content_words
from pc_clip.write.candidates import Candidate, Query
from pc_clip.write.cleaning import Checked, stem
from pc_clip.write.writers import Job

# True of what is called otherwise ("three objects" of three stars, "one star" of a star): their absence says nothing.
_GENERAL = frozenset({stem(word) for word in ("object", "shape", "thing", "item", "one")})
_BETWEEN = r"(?:\s*(?:,|;|>|->|→)\s*(?:and\s+)?|\s+(?:and\s+|then\s+)?)"
_LIST = re.compile(rf"[0-9]{{1,4}}(?:{_BETWEEN}[0-9]{{1,4}})*")
_AROUND = re.compile(r"^(?:(?:answer|order|ranking)\s*:\s*)?[\[(]?\s*(.*?)\s*[\])]?\s*\.?$", re.DOTALL | re.IGNORECASE)


class Ranked(NamedTuple):
    """A candidate in its place. rank: 1 is best; candidates of one rank are tied. text: its description."""

    candidate: Candidate
    rank: int
    text: str


class Pair(NamedTuple):
    """Two candidates, of which the first fits the caption better."""

    preferred: Ranked
    rejected: Ranked


# -- by words ------------------------------------------------------------------------------------------


def overlap(caption: str, description: str) -> float:
    """The share of a caption's content words that a description has, endings aside; 0 for a caption without any."""
    asked, told = ({stem(word) for word in content_words(text)} for text in (caption, description))
    asked -= _GENERAL
    return len(asked & told) / len(asked) if asked else 0.0


def places_by_words(caption: str, texts: Sequence[str]) -> list[int]:
    """A place for each description, 0 for the best; those that have as many of the caption's words share one.

    What is made of an image's captions has all words of each of them.
    """
    fits = [overlap(caption, text) for text in texts]
    values = sorted(set(fits), reverse=True)
    return [values.index(fit) for fit in fits]


# -- by a language model -------------------------------------------------------------------------------


def shuffled(n: int, seed: int, query: Query) -> list[int]:
    """In which order n descriptions are shown, so that the likeliest one does not always come first."""
    return stream(seed, "shuffle", query.row).permutation(n).tolist()


def numbered(texts: Sequence[str]) -> str:
    """Descriptions as they are shown, a line each, from 1."""
    return "\n".join(f"{n}. {' '.join(text.split())}" for n, text in enumerate(texts, 1))


def parse_order(raw: str, n: int) -> tuple[list[int] | None, str]:
    """An answer that must be the numbers 1 to n in some order: those, or None; and the reason.

    Between the numbers may be commas, semicolons, spaces, line ends, arrows or >; around them brackets, a full stop and
    "Answer:". Anything else is no answer: what else was said of the numbers is not known.
    Reasons: kept, empty, no_list, unknown_number, twice, not_all.
    """
    text = " ".join(raw.split())  # a long run of spaces would keep the patterns busy for hours
    if not text:
        return None, "empty"
    inner = _AROUND.match(text)[1]
    if not _LIST.fullmatch(inner):
        return None, "no_list"
    order = [int(number) for number in re.findall("[0-9]+", inner)]
    if not all(1 <= number <= n for number in order):
        return None, "unknown_number"
    if len(set(order)) < len(order):
        return None, "twice"
    return (order, "kept") if len(order) == n else (None, "not_all")


def judge_order(raw: str, job: Job) -> Checked:
    """`parse_order` in the place of the cleaning of sentences; what is kept is written "2, 1, 3"."""
    order, reason = parse_order(raw, job.second.count("\n") + 1)
    return Checked(", ".join(map(str, order)) if order else None, reason)


def places_by_order(order: Sequence[int], shown: Sequence[int]) -> list[int]:
    """A place for each candidate, 0 for the best. order: numbers from 1; shown: which candidate had which number."""
    place = [0] * len(order)
    for k, number in enumerate(order):
        place[shown[number - 1]] = k
    return place


# -- order -> pairs ------------------------------------------------------------------------------------


def own_first(
    query: Query, as_good: Collection[int], candidates: Sequence[Candidate], places: Sequence[int]
) -> tuple[list[int], bool]:
    """The same places with the caption's own image (all of it) before all others; and whether it was there already.

    With it go those that nobody told from it, and make no pair with it: what is tied with it, and the images in
    `as_good` (rows). Tied for the first place counts as there.
    """
    first = min(places)
    mine = next(place for c, place in zip(candidates, places) if c.row == query.row and c.is_whole)
    best = first if mine == first else first - 1
    found = [
        best if place == mine or (c.is_whole and c.row in as_good) else place for c, place in zip(candidates, places)
    ]
    return found, mine == first


def ranked(candidates: Sequence[Candidate], places: Sequence[int], texts: Sequence[str], seen: bool) -> list[Ranked]:
    """Candidates by rank, then as they stood. seen: whether crops were looked at; otherwise they follow their whole."""
    keys = [(place, not (seen or c.is_whole)) for c, place in zip(candidates, places)]
    ranks = {key: n for n, key in enumerate(sorted(set(keys)), 1)}
    found = [Ranked(c, ranks[key], text) for c, key, text in zip(candidates, keys, texts)]
    return sorted(found, key=lambda r: r.rank)


def pairs(order: Sequence[Ranked], seen: bool) -> list[Pair]:
    """All pairs of candidates of which one is known to fit better: a crop that nobody saw is, of its whole alone."""
    return [
        Pair(a, b) for a in order for b in order if a.rank < b.rank and (seen or _comparable(a.candidate, b.candidate))
    ]


def _comparable(a: Candidate, b: Candidate) -> bool:
    return (a.is_whole and b.is_whole) or (a.row == b.row and a.is_whole)


def draw_pairs(found: Sequence[Pair], n: int | None, seed: int, query: Query) -> list[Pair]:
    """At most n of a query's pairs, in their order."""
    if n is None or len(found) <= n:
        return list(found)
    rng = stream(seed, "pairs of candidates", query.row)
    return [found[k] for k in sorted(rng.choice(len(found), n, replace=False))]
