"""What a writer said -> a sentence to keep, or the name of the rule it broke.

Rules that trim come first and cut away what stands around the answer (TRIMS); rules that reject then judge
what is left (RULES). Each has a name, and `check` says which of them applied, so that they can be counted.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from pc_clip.data.differences import _OF_AN_IMAGE, _ORDINAL

MIN_CHARACTERS = 60
COPIED = 4  # content words in a row that make a copy of a worked example


class Checked(NamedTuple):
    """text: what is kept, or None. reason: "kept", "trimmed" or the rule of RULES that rejected it.

    trims: the rules of TRIMS that changed something, in their order. "newlines" alone leaves the reason at "kept":
    no word was lost.
    """

    text: str | None
    reason: str
    trims: tuple[str, ...] = ()


class Given(NamedTuple):
    """What is known beside the sentence.

    captions: what the writer was told of the two images or classes. examples: every text of the worked examples
    in its prompt. instructions: the texts that said what it was to do.
    """

    min_characters: int = MIN_CHARACTERS
    captions: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()


def clean(
    text: str,
    *,
    min_characters: int = MIN_CHARACTERS,
    captions: Sequence[str] = (),
    examples: Sequence[str] = (),
    instructions: Sequence[str] = (),
) -> tuple[str | None, str]:
    """Keep, trim or reject a writer's sentence: (the text to keep, or None; the reason). See Given and Checked."""
    found = check(text, Given(min_characters, tuple(captions), tuple(examples), tuple(instructions)))
    return found.text, found.reason


def check(text: str, given: Given = Given()) -> Checked:  # noqa: B008  (it cannot be changed)
    """The same, with the names of the rules that trimmed."""
    text, original = text.strip(), _one_line(text)
    if not original:
        return Checked(None, "empty")
    trims = []
    for name, trim in TRIMS:
        shorter = trim(text)
        if shorter != text:
            trims.append(name)
        text = shorter
    for name, broken in RULES:
        if broken(text, given):
            return Checked(None, name, tuple(trims))
    return Checked(text, "kept" if text == original else "trimmed", tuple(trims))


# -- rules that trim: text -> text ---------------------------------------------------------------------

_FIELD = r"(?:question|answer|note|q|(?:caption|picture|image) ?\d|user|human|assistant|instruction|response)\s*:"
_OPENING = re.compile(  # "Sure! Here is the difference between the two images:"
    r"^(?:(?:(?:sure|of course|certainly|okay|absolutely)\b[,!.]*|(?:great(?: question)?|thanks|thank you)[,!.]+)\s*)*"
    r"(?:[^.!?\n:]{0,80}\bhere(?: is| are|['’]s)\b[^.!?\n:]{0,120}:|(?:answer|a|response|assistant|differences?)\s*:)?"
    r"\s*",
    re.IGNORECASE,
)
_NEXT = re.compile(rf"(?:\n|(?<=[.!?])[\"”]?\s)\s*(?:#+\s*)?{_FIELD}.*$", re.IGNORECASE | re.DOTALL)
_QUESTION = re.compile(r"(?<=[.!])\s+(?:[A-Z][^.!?]*\?\s*)+$")
_CLOSING = re.compile(
    r"(?<=[.!?])\s+(?:I|I['’](?:m|d|ll|ve)|(?:Please )?[Ll]et me|Hope|Feel free|Is there any|Would you|Do you|Please|"
    r"Note|Thanks?|You['’]re welcome)\b.*$",
    re.DOTALL,
)
_PARTIAL = re.compile(r"(?<=[.!?])\s+[^.!?]*$")


def drop_opening(text: str) -> str:
    """ "Sure! Here is the difference:" answers the person who asked; it says nothing of an image."""
    return _OPENING.sub("", text, count=1)


def drop_next_question(text: str) -> str:
    """A model that was shown worked examples writes the next one after its answer: another question, about nothing."""
    return _QUESTION.sub("", _NEXT.sub("", text, count=1), count=1)


def drop_other_paragraphs(text: str) -> str:
    """The first paragraph is the answer; later ones stay if they name an image. At the first that does not, all ends.

    A heading, a piece of prompt or an essay on the captions follows often, but so does "The second image shows ...".
    """
    first, *others = re.split(r"\n\s*\n", text)
    kept = [first]
    for paragraph in others:
        if not any(_names(paragraph)) and not _BOTH.search(paragraph):
            break
        kept.append(paragraph)
    return "\n\n".join(kept) if len(kept) <= len(others) else text


def drop_closing(text: str) -> str:
    """ "I hope this helps! Let me know ..." is talk as well. It is cut where a sentence after the first begins so."""
    return _CLOSING.sub("", text, count=1)


def drop_list_marks(text: str) -> str:
    """Chat models like lists. The marks at the start of lines are no words of the answer."""
    return re.sub(r"^\s*(?:[-*•]|\d{1,2}[.)])[ \t]+", "", text, flags=re.MULTILINE)


def join_lines(text: str) -> str:
    """Newlines become spaces, never nothing: words must not fuse, as they do in the filter of the paper's code."""
    return _one_line(text)


def drop_quotes(text: str) -> str:
    """Some models put their answer into quotation marks."""
    return text.strip('"“”').strip() if text[:1] in '"“' else text


def drop_unfinished(text: str) -> str:
    """A model that runs out of tokens stops within a sentence; the whole ones before it are kept."""
    if text and text[-1] not in ".!?" and re.search(r"[.!?]\s", text):
        return _PARTIAL.sub("", text)
    return text


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# -- rules that reject: (text, what is given) -> whether it is broken ----------------------------------

_CODE = re.compile(
    r"```|[{}]|;$|\b(?:def|function) \w+\(|\b\w+\(\)|\bprint\(|^(?:from [\w.]+ )?import \w+|"
    r"#include\b|[!=]==?|=>|\breturn;"
)
_MARKUP = re.compile(
    r"</?[\w|][^<>]{0,80}>|\*\*|__|(?:^|\s)#{1,6} \w|\]\(|https?://|\bwww\.|\|\s*-{2,}|&\w+;|\[/?[A-Z]+\]|\\\w+"
)
_REFUSAL = re.compile(
    r"\bas an? (?:ai|language model)\b|\bi(?:'m| am) (?:just |only )?an? (?:ai|language model|text)|"
    r"\bi (?:cannot|can't|can not|could not|couldn't|do not|don't|will not|won't)\b|"
    r"\bi(?:'m| am) (?:sorry|afraid|unable|not able|not sure)\b|\bi apologi[sz]e\b|\bplease provide\b|"
    r"\b(?:is|it's|be) (?:not possible|impossible|difficult) to (?:determine|say|tell|know|compare|describe)\b",
    re.IGNORECASE,
)
_STARTS_AS_PROMPT = re.compile(rf"\s*(?:#+\s*)?{_FIELD}", re.IGNORECASE)


def prompt_echo(text: str, given: Given) -> bool:
    """It goes on with the prompt, repeats what it was asked, or copies a worked example instead of answering.

    A copy is a run of four content words of an example that are not all in one caption: "a close view of food on
    a plate" is a fair answer where there is a plate of food, and of a giraffe it is not.
    """
    if _STARTS_AS_PROMPT.match(text) or _mostly_of(text, given.instructions):
        return True
    return bool(given.examples) and copies(text, given.examples, given.captions)


def code(text: str, _: Given) -> bool:
    """A program or its data. Sentences on images have no braces and no calls."""
    return bool(_CODE.search(text))


def markup(text: str, _: Given) -> bool:
    """HTML, Markdown, LaTeX, links, and the marks of chat templates: nothing the text tower should learn."""
    return bool(_MARKUP.search(text))


def refusal(text: str, _: Given) -> bool:
    """The model says what it cannot do. It would teach the text tower that about two images drawn by chance."""
    return bool(_REFUSAL.search(text.replace("’", "'")))


def not_english(text: str, _: Given) -> bool:
    """A letter of another script, a broken character, or more than one sign in twenty that English prose has not.

    CLIP's text tower knows English; accents (café) and typographic quotes and dashes are part of that.
    """
    strange = [c for c in text if ord(c) > 0x24F and c not in "‘’“”–—…ʻʼ"]
    return any(c.isalpha() or c == "\ufffd" for c in strange) or len(strange) > 0.05 * len(text)


def repetition(text: str, _: Given) -> bool:
    """It goes in circles, as small models do at low temperature.

    Said of any loop, whatever its words: a phrase three times in a row, three words four times (those with which
    images are named, "the first image", may recur), or a text that compresses far better than prose does.
    """
    words = _words(text)
    if any(_in_a_row(words, period) for period in range(1, min(12, len(words) // 3) + 1)):
        return True
    trigrams = Counter(zip(words, words[1:], words[2:]))
    if any(n >= 4 and not _WORDING.issuperset(said) for said, n in trigrams.items()):
        return True
    raw = text.encode()
    return len(raw) > 200 and len(zlib.compress(raw, 9)) < 0.35 * len(raw)


def same_of_both(text: str, _: Given) -> bool:
    """The first image shows X, while the second image shows X: no difference, so no direction to learn."""
    first, second = said_of(text)
    return bool(first) and first == second


def too_short(text: str, given: Given) -> bool:
    """A few words cannot set two photographs apart; "Two cats." is a caption, if anything."""
    return len(text) < given.min_characters


TRIMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("opening", drop_opening),
    ("next_question", drop_next_question),
    ("other_paragraphs", drop_other_paragraphs),
    ("closing", drop_closing),
    ("list_marks", drop_list_marks),
    ("newlines", join_lines),
    ("quotes", drop_quotes),
    ("unfinished", drop_unfinished),
)
RULES: tuple[tuple[str, Callable[[str, Given], bool]], ...] = (
    ("prompt_echo", prompt_echo),
    ("code", code),
    ("markup", markup),
    ("refusal", refusal),
    ("not_english", not_english),
    ("repetition", repetition),
    ("same_of_both", same_of_both),
    ("too_short", too_short),
)
REASONS = ("kept", "trimmed", "empty", *(name for name, _ in RULES))


def _in_a_row(words: list[str], period: int) -> bool:
    """Whether some `period` words are said three times, one directly after the other."""
    run = 0
    for now, before in zip(words[period:], words):
        run = run + 1 if now == before else 0
        if run == 2 * period:
            return True
    return False


def _mostly_of(text: str, sources: tuple[str, ...], n: int = 5) -> bool:
    """Whether more than half of the words stand in runs of n words of one of the sources."""
    known = _runs(sources, n) if sources else frozenset()
    if not known:
        return False
    words = _words(text)
    covered = [False] * len(words)
    for start in range(len(words) - n + 1):
        if tuple(words[start : start + n]) in known:
            covered[start : start + n] = [True] * n
    return 2 * sum(covered) > len(words)


@lru_cache(maxsize=64)
def _runs(sources: tuple[str, ...], n: int) -> frozenset[tuple[str, ...]]:
    return frozenset(run for words in map(_words, sources) for run in zip(*(words[k:] for k in range(n))))


# -- what is said of which image -----------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
# how an image is spoken of, whatever it shows
_WORDING = frozenset(
    re.findall(
        r"\w+",
        """
    the a an in of first second former latter both image images picture pictures photo photos photograph
    photographs scene scenes shows show shown showing showed has have had is are was were features feature
    featuring depicts depict depicting displays display displaying contains contain containing includes
    include including captures capture capturing presents sees see seen while whereas but and there also too
    which that it its this other
    """,
    )
)
# words that say nothing without others; numbers, sides and sizes are not among them
_FUNCTION = _WORDING | frozenset(
    re.findall(
        r"\w+",
        """
    about across against along among around as at be been being by can could do does doing during each
    either every for from he her hers him his how i if into itself like may me might my near neither no nor
    not on onto or our out over own per she should so some such than their theirs them themselves then these
    they those through to together toward towards under up upon us very via we what when where who whom
    whose will with within without would you your another any appear appears look looks seem seems visible
    appearing depicted displayed compared contrast comparison difference differences different main instead
    rather more less least most only just
    """,
    )
)
_CLAUSE = re.compile(
    r"[,:!?]|[.;](?=\s|$)|\b(?:while|whereas|but|although|though|unlike|than|(?:compared|in contrast) (?:to|with)|"
    r"(?:instead|rather) than)\b",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(  # "The main difference between the first and the second image is that ..."
    r"^\s*(?:(?:the|one|a) (?:\w+ ){0,3}differences?|what (?:looks|is) different)\b[^,.;]*?\b(?:is|are)\b(?: that)?",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\bboth (?:of the )?(?:images|pictures|photos|scenes)\b", re.IGNORECASE)


def content_words(text: str) -> list[str]:
    """The words that say what there is, in order, without their endings."""
    return [stem(word) for word in _words(text) if word not in _FUNCTION]


def copies(text: str, examples: Sequence[str], captions: Sequence[str] = ()) -> bool:
    """Whether a run of COPIED content words of an example recurs, and no caption has all of its words."""
    known = _content_runs(tuple(examples))
    words = content_words(text)
    found = [run for run in zip(*(words[k:] for k in range(COPIED))) if run in known]
    if not found:
        return False
    told = [set(content_words(caption)) for caption in captions]
    return any(not any(words.issuperset(run) for words in told) for run in found)


def said_of(text: str) -> tuple[list[str], list[str]]:
    """The words said of the first and of the second image, in order; empty for an image that is not named.

    A clause belongs to the image it names, one that names none to the image named last; in "a dog in the first image
    and a cat in the second" the words stand before the name. Words that only name images are left out.
    """
    said: tuple[list[str], list[str]] = ([], [])
    last: tuple[int, ...] = ()
    pending: list[str] = []
    for clause in _CLAUSE.split(_PREAMBLE.sub("", text)):
        parts = _parts(clause)
        if not parts and not last:
            pending += _telling(clause)
            continue
        for images, words in parts or [(last, _telling(clause))]:
            for image in images:
                said[image].extend(pending + words)
            pending, last = [], images
    return said


def said_words(text: str) -> tuple[set[str], set[str]]:
    """The content words said of the first and of the second image."""
    first, second = said_of(text)
    return set(first) - _function_stems(), set(second) - _function_stems()


@lru_cache(maxsize=1)
def _function_stems() -> frozenset[str]:
    return frozenset(map(stem, _FUNCTION))


def _parts(clause: str) -> list[tuple[tuple[int, ...], list[str]]]:
    """The images a clause names, each with the words said of it."""
    if _BOTH.search(clause):
        return [((0, 1), _telling(clause))]
    names = list(_names(clause))
    if len(names) < 2:
        return [((image,), _telling(clause)) for _, _, image in names]
    starts, ends, images = zip(*names)
    before, after = _telling(clause[: starts[0]]), _telling(clause[ends[-1] :])
    between = [_telling(clause[end:start]) for end, start in zip(ends, starts[1:])]
    if not any(between):  # "the first and the second image show a dog"
        return [(tuple(sorted(set(images))), before + after)]
    words = [before, *between] if before and not after else [before + between[0], *between[1:], after]
    return [((image,), told) for image, told in zip(images, words)]


def _names(clause: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, 0 or 1) of each word that names the first or the second image."""
    for match in _ORDINAL.finditer(clause):
        word = match.group().lower()
        if word not in ("first", "second") or _OF_AN_IMAGE.match(clause, match.end()):
            yield match.start(), match.end(), 0 if word in ("first", "former", "1") else 1


def _telling(text: str) -> list[str]:
    text = re.sub(r"\bone (?:can )?sees?\b|\b(?:image|picture) [12]\b", "", text, flags=re.IGNORECASE)
    return [stem(word) for word in _words(text) if word not in _WORDING]


def _words(text: str) -> list[str]:
    found = _WORD.findall(text.lower().replace("’", "'"))
    return [word.removesuffix("'s") for word in found]


@lru_cache(maxsize=64)
def _content_runs(examples: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(run for words in map(content_words, examples) for run in zip(*(words[k:] for k in range(COPIED))))


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
