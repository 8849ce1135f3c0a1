"""Differences in many wordings: templates by family, names of the two images by scheme, and the exchange of roles.

wordings.yaml holds the table. A wording is a template, two names and an order of mention; all wordings of a pair say
the same fact. A family or scheme that is held out is in no training sentence, so that an evaluation can tell what a
model understood from what it learnt by heart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.paths import package_data

FILE = package_data(Path(__file__).parent) / "wordings.yaml"
_TABLE = yaml.safe_load(FILE.read_text(encoding="utf-8"))
FAMILIES: dict[str, tuple[str, ...]] = {name: tuple(each) for name, each in _TABLE["families"].items()}
SCHEMES: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple((*names, *names)[:4] for names in each) for name, each in _TABLE["schemes"].items()
}
OPENERS: tuple[str, ...] = tuple(_TABLE["openers"])
HELD_OUT_FAMILIES: tuple[str, ...] = tuple(_TABLE["held_out"]["families"])
HELD_OUT_SCHEMES: tuple[str, ...] = tuple(_TABLE["held_out"]["schemes"])


class Wording(NamedTuple):
    """names: first, second, and both in short; exchanged: what the template says of the first is said of the second.

    opener: what stands before the sentence, such as "Overall,".
    """

    template: str
    names: tuple[str, ...]
    exchanged: bool
    opener: str = ""

    def say(self, a: str, b: str) -> str:
        """The sentence for a pair of which the first image shows `a` and the second `b`."""
        first, second, first_short, second_short = self.names
        if self.exchanged:
            a, b, first, second, first_short, second_short = b, a, second, first, second_short, first_short
        facts = {"a": a, "b": b, "there_a": f"{_there(a)} {a}", "there_b": f"{_there(b)} {b}"}
        named = {"first": first, "second": second, "first_short": first_short, "second_short": second_short}
        sentence = self.template.format(**facts, **named)
        if self.opener:
            begins_with_a_word = self.template[0].isupper() and not self.template.startswith("I ")
            first = sentence[0].lower() if begins_with_a_word else sentence[0]
            sentence = f"{self.opener} {first}{sentence[1:]}"
        return _SENTENCE_START.sub(lambda match: match.group().upper(), sentence)


_SENTENCE_START = re.compile(r"^[a-z]|(?<=[.?!] )(?<!vs\. )[a-z]")
_PLURAL = re.compile(
    r"(?:two|three|four|five|six|seven|eight|nine|ten|\d+|some|several|many|few|people|men|women|children|both|these|those"
    r"|various|multiple)\b|(?!(?:a|an|the|one|another|this|each|no)\b)(?:\S+ ){0,2}\w*[^s\W]s\b",
    re.IGNORECASE,
)


def _there(phrase: str) -> str:
    return "there are" if _PLURAL.match(phrase) else "there is"


class Wordings:
    """The wordings of some families and schemes, to draw from: each family as often, each scheme as often.

    Empty lists stand for all that are not held out. order: both (of mention) or first (the template's own). openers:
    the share of sentences with an opener. without: families and schemes that are left out.
    Raises UserError for an unknown name, and where none is left.
    """

    def __init__(
        self,
        families: Sequence[str] = (),
        schemes: Sequence[str] = (),
        order: str = "both",
        openers: float = 0.0,
        without: Sequence[str] = (),
    ) -> None:
        left_out = {*HELD_OUT_FAMILIES, *HELD_OUT_SCHEMES}
        self.families = tuple(families) or tuple(name for name in FAMILIES if name not in left_out)
        self.schemes = tuple(schemes) or tuple(name for name in SCHEMES if name not in left_out)
        for kind, chosen, known in (
            ("family", self.families, FAMILIES),
            ("scheme", self.schemes, SCHEMES),
            ("family or scheme", without, {**FAMILIES, **SCHEMES}),
        ):
            for name in chosen:
                if name not in known:
                    raise UserError(f"no {kind} of wordings is called {name!r}. {nearest(name, list(known))}")
        self.families = tuple(name for name in self.families if name not in without)
        self.schemes = tuple(name for name in self.schemes if name not in without)
        if not (self.families and self.schemes):
            raise UserError(f"without {', '.join(without)} no wording is left")
        self.order, self.openers = order, openers

    def draw(self, rng: np.random.Generator, template: str | None = None) -> Wording:
        """template: one that is taken in place of the one that is drawn."""

        def one_of(options: Sequence) -> Any:
            return options[int(rng.integers(len(options)))]

        drawn = one_of(FAMILIES[one_of(self.families)])
        names = one_of(SCHEMES[one_of(self.schemes)])
        exchanged = self.order == "both" and one_of((False, True))
        opener = one_of(OPENERS) if self.openers and rng.random() < self.openers else ""
        return Wording(template or drawn, names, exchanged, opener)


def contrast(a: str, b: str, n: int) -> str:
    """The n-th of the four plain wordings of "the first image has a, the second b". Odd n name the second first."""
    return Wording(FAMILIES["plain"][n // 2 % 2], SCHEMES["first_image"][0], bool(n % 2)).say(a, b)


_NAMES_A_PICTURE = re.compile(
    r"(?:this is |there (?:is|are) |it is |(?:a|an|the|this) (?:(?:close[- ]?up|black and white|color|colour)\s)?"
    r"(?:picture|image|photo|photograph|close[- ]?up|view|shot) (?:of|showing) )+",
    re.IGNORECASE,
)
_COPULA = re.compile(r"(?<!\bthat)(?<!\bwhich)(?<!\bwho)(?<!\bthere)(?<!\bit)(?<!\bwhat)(?<!\bwhere) (?:is|are)(?= )")


def as_phrase(caption: str) -> str:
    """A caption as it stands inside a sentence: "A man is riding a horse." becomes "a man riding a horse".

    Without its full stop, without "a photo of", without the first "is" or "are", and without the capital of its first
    word unless that has more of them. A name loses its capital too; CLIP's tokenizer lowercases everything anyway.
    """
    caption = re.sub(r"[\s.!,;:]+$", "", " ".join(caption.split()))
    caption = _NAMES_A_PICTURE.sub("", caption, count=1) if _NAMES_A_PICTURE.match(caption) else caption
    first, *rest = _COPULA.sub("", caption, count=1).split(" ")
    return " ".join([first.lower() if first.istitle() else first, *rest])


# -- the roles of the two images in any sentence -------------------------------------------------------------

_NOUNS = r"(?:images?|pictures?|photos?|photographs?|scenes?|ones?)"
_VERBS = (
    "shows?|has|have|is|are|was|does|contains?|features?|depicts?|displays?|includes?|captures?|lacks?|appears?|looks?"
    "|comes?|focuses|can"
)
_AFTER_A_NAME = (  # what follows a name that stands for an image: "second base" is none
    rf"(?=\s+(?:{_VERBS}|only|alone|while|but|and|or|whereas|with|without|there|it|vs|which|where|that|rather)\b"
    r"|\s*(?:[.,;:!?)(=/]|[-–—]\s|'s\b|$))"
)


def _any_of(pairs: Iterable[Sequence[str]]) -> str:
    words = sorted({word for pair in pairs for word in pair}, key=len, reverse=True)
    # A letter names an image only as a capital: "image a" is the start of something else.
    return "|".join(word if len(word) == 1 and word.isalpha() else f"(?i:{word})" for word in words)


_WORDS = _TABLE["role_words"]
_AFTER = _any_of(_WORDS["after_noun"])
# "that image one shows" has no "that image" in it.
_CONJUNCTION = rf"(?!(?i:that)\s+(?i:{_NOUNS})\s+(?:number\s+|#\s*)?(?:{_AFTER})\s+(?:{_VERBS})\b)"
_MENTION = re.compile(
    rf"\b(?i:the\s+)?(?:(?i:{_NOUNS})\s+(?i:(?:on|at)\s+the)\s+(?P<at>{_any_of(_WORDS['at_the'])})\b"
    r"(?!\s+(?:wall|page|desk|table|shelf|screen)\b)"
    rf"|{_CONJUNCTION}(?P<before>{_any_of(_WORDS['before_noun'])})\s+(?i:{_NOUNS})\b"
    rf"|(?i:{_NOUNS})\s+(?:(?i:number)\s+|#\s*)?(?P<after>{_AFTER})\b"
    rf"|(?P<alone>{_any_of(_WORDS['alone'])})\b{_AFTER_A_NAME}"
    rf"|(?P<anywhere>{_any_of(_WORDS['anywhere'])})\b)"
)
_STRAY = re.compile(r"\b(?:first|second|former|latter)\b", re.IGNORECASE)
_ONE_SIDED = re.compile(r"\b(?:only|alone)\b", re.IGNORECASE)


@lru_cache
def _pairs_with(word: str) -> tuple[tuple[str, str], ...]:
    """The pairs a role's word belongs to, each as (the word, its counterpart)."""
    pairs = dict.fromkeys(tuple(pair) for group in _WORDS.values() for pair in group)
    return tuple(either for pair in pairs for either in (pair, pair[::-1]) if either[0] == word)


def role_mentions(text: str) -> list[tuple[int, int, int]]:
    """(start, end, 0 or 1) of each name of the first or of the second image: of "the first image", "image B"."""
    return [(*match.span(), _side(_lower(match[match.lastgroup]))) for match in _MENTION.finditer(text)]


@lru_cache
def _side(word: str) -> int:
    return next(pair.index(word) for group in _WORDS.values() for pair in group if word in pair)


def swap_roles(text: str) -> str | None:
    """The sentence with the names of the two images exchanged: of (i, j) it is false, of (j, i) it is true.

    None when the sentence does not name both images, because then the exchange may say nothing new ("only" and
    "alone" excepted), when it mixes names of several schemes, and when it has an ordinal that may not be an image's
    ("a runner on second base").
    """
    mentions = list(_MENTION.finditer(text))
    words = [_lower(match[match.lastgroup]) for match in mentions]
    exchange = {}
    for word in words:
        partners = [other for _, other in _pairs_with(word)]
        named = [other for other in partners if other in words]
        if not named and not _ONE_SIDED.search(text):
            return None
        exchange[word] = (named or partners)[0]
    if not exchange or len({frozenset(pair) for pair in exchange.items()}) > 1 or _has_stray(text, mentions):
        return None
    pieces, end = [], 0
    for match, word in zip(mentions, words):
        start, stop = match.span(match.lastgroup)
        pieces += [text[end:start], _in_case_of(text[start:stop], exchange[word])]
        end = stop
    return "".join([*pieces, text[end:]])


def _has_stray(text: str, mentions: list[re.Match]) -> bool:
    """Whether an ordinal stands outside of all mentions, where it may or may not be an image's."""
    inside = [match.span() for match in mentions]
    return any(not any(a <= each.start() < b for a, b in inside) for each in _STRAY.finditer(text))


def _lower(word: str) -> str:
    return word if len(word) == 1 else " ".join(word.lower().split())


def _in_case_of(word: str, other: str) -> str:
    if len(other) == 1:
        return other
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


# -- any sentence in other words -------------------------------------------------------------------------------

_JOINT = re.compile(r"(?:,|;|\.)\s+(?:(?:while|whereas|but|and)\s+)?|\s+(?:while|whereas)\s+")
_CONNECTIVES = (", while ", ", whereas ", ", but ", "; ", ". ")


def reword(text: str, wordings: Wordings, rng: np.random.Generator) -> str | None:
    """A difference sentence of any writer in other words: other names of the images, another order or connective.

    "The first image shows a dog, while the second shows a cat." becomes "Image two shows a cat; image one shows a
    dog." Its two halves change places only where each speaks of one image. None where `swap_roles` gives none.
    """
    if swap_roles(text) is None:
        return None
    names = wordings.draw(rng).names
    halves = _halves(text)
    if halves and rng.integers(2):
        halves = halves[::-1]
    joint = _CONNECTIVES[int(rng.integers(len(_CONNECTIVES)))]
    plain = joint.join(halves) + "." if halves else text
    pieces, end = [], 0
    for n, (start, stop, side) in enumerate(role_mentions(plain)):
        pieces += [plain[end:start], names[side] if n == 0 else names[2 + side]]
        end = stop
    sentence = "".join([*pieces, plain[end:]])
    return _SENTENCE_START.sub(lambda match: match.group().upper(), sentence)


def _halves(text: str) -> list[str]:
    """The two halves of a sentence of which each begins with the name of one image; none where it is built otherwise.

    Without capitals at their beginnings, as they stand after a connective.
    """
    text, cuts = text.rstrip(" ."), []
    for match in _JOINT.finditer(text):
        halves = [text[: match.start()], text[match.end() :]]
        mentions = [role_mentions(half) for half in halves]
        begin = all(each and re.fullmatch("(?:in )?", half[: each[0][0]], re.I) for half, each in zip(halves, mentions))
        sides = [{side for _, _, side in each} for each in mentions]
        if begin and sides in ([{0}, {1}], [{1}, {0}]):
            cuts.append(halves)
    return [half[0].lower() + half[1:] for half in cuts[0]] if len(cuts) == 1 else []
