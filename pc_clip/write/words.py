"""Content words, their stems, and which of them describe which image."""

from __future__ import annotations

import re
from functools import lru_cache

from pc_clip.data.wordings import role_mentions

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def words_in(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in _WORD.findall(text.lower().replace("’", "'"))]


# how an image is spoken of, whatever it shows
WORDING = frozenset(
    words_in("""the a an in of first second former latter both image images picture pictures photo photos photograph
    photographs scene scenes shows show shown showing showed has have had is are was were features feature featuring
    depicts depict depicting displays display displaying contains contain containing includes include including captures
    capture capturing presents sees see seen while whereas but and there also too which that it its this other""")
)
# words that say nothing without others; numbers, sides and sizes are not among them
FUNCTION = WORDING | frozenset(
    words_in("""about across against along among around as at be been being by can could do does doing during each
    either every for from he her hers him his how i if into itself like may me might my near neither no nor not on
    onto or our out over own per she should so some such than their theirs them themselves then these they those
    through to together toward towards under up upon us very via we what when where who whom whose will with
    within without would you your another any appear appears look looks seem seems visible appearing depicted displayed
    compared contrast comparison difference differences different main instead rather more less least most only just""")
)


def content_words(text: str) -> list[str]:
    """The words that say what there is, in order, without their endings."""
    return [stem(word) for word in words_in(text) if word not in FUNCTION]


@lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """A word without the endings of number and tense: dogs, dog; riding, rides, ride; cities, city.

    A rule of endings, so it also joins a few words that only look alike. It is used to compare words, never shown.
    """
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    for ending in ("ing", "ed"):
        if len(word) >= len(ending) + 3 and word.endswith(ending) and re.search("[aeiouy]", word[: -len(ending)]):
            word = word[: -len(ending)]
            return word[:-1] if len(word) > 2 and word[-1] == word[-2] and word[-1] not in "ls" else word
    if len(word) > 4 and re.search(r"(?:ss|x|z|ch|sh)es$", word):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


# -- what is said of which image -----------------------------------------------------------------------

_CLAUSE = re.compile(
    r"[,:!?]|[.;](?=\s|$)|\b(?:while|whereas|but|although|though|unlike|than|(?:compared|in contrast) (?:to|with)|"
    r"(?:instead|rather) than)\b",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(  # "The main difference between the first and the second image is that ..."
    r"^\s*(?:(?:the|one|a) (?:\w+ ){0,3}differences?|what (?:looks|is) different)\b[^,.;]*?\b(?:is|are)\b(?: that)?",
    re.IGNORECASE,
)
BOTH = re.compile(r"\bboth (?:of the )?(?:images|pictures|photos|scenes)\b", re.IGNORECASE)


def split_by_image(text: str) -> tuple[list[str], list[str]]:
    """The words said of the first and of the second image, in order; empty for an image that is not named.

    A clause belongs to the image it names, one that names none to the image named last; in "a dog in the first image
    and a cat in the second" the words stand before the name. Words that only name images are left out.
    """
    by_image: tuple[list[str], list[str]] = ([], [])
    last: tuple[int, ...] = ()
    pending: list[str] = []
    for clause in _CLAUSE.split(_PREAMBLE.sub("", text)):
        parts = _parts(clause)
        if not parts and not last:
            pending += _telling(clause)
            continue
        for images, words in parts or [(last, _telling(clause))]:
            for image in images:
                by_image[image].extend(pending + words)
            pending, last = [], images
    return by_image


def _parts(clause: str) -> list[tuple[tuple[int, ...], list[str]]]:
    """The images a clause names, each with the words said of it."""
    if BOTH.search(clause):
        return [((0, 1), _telling(clause))]
    names = list(role_mentions(clause))
    if len(names) < 2:
        return [((image,), _telling(f"{clause[:start]} {clause[end:]}")) for start, end, image in names]
    starts, ends, images = zip(*names)
    before, after = _telling(clause[: starts[0]]), _telling(clause[ends[-1] :])
    between = [_telling(clause[end:start]) for end, start in zip(ends, starts[1:])]
    if not any(between):  # "the first and the second image show a dog"
        return [(tuple(sorted(set(images))), before + after)]
    words = [before, *between] if before and not after else [before + between[0], *between[1:], after]
    return [((image,), words_of) for image, words_of in zip(images, words)]


def _telling(text: str) -> list[str]:
    text = re.sub(r"\bone (?:can )?sees?\b|\b(?:image|picture) [12]\b", "", text, flags=re.IGNORECASE)
    return [stem(word) for word in words_in(text) if word not in WORDING]


def content_words_by_image(text: str) -> tuple[set[str], set[str]]:
    """The content words said of the first and of the second image, without their endings."""
    first, second = split_by_image(text)
    return set(first) - _FUNCTION_STEMS, set(second) - _FUNCTION_STEMS


_FUNCTION_STEMS = frozenset(map(stem, FUNCTION))
