"""What a writer said -> a sentence to keep, or the name of the rule it broke.

An answer is built as: a greeting, an offer, an announcement, the sentences themselves, an offer of more, another
question. Rules that trim (TRIMS) cut away what stands around the sentences; rules that reject (RULES) judge these. Each
has a name, and `check` says which of them applied, so that they can be counted.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from pc_clip.data.wordings import role_mentions
from pc_clip.write.words import BOTH, FUNCTION, WORDING, content_words, said_of, words_in

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


def clean(text: str, min_characters: int = MIN_CHARACTERS) -> tuple[str | None, str]:
    """Keep, trim or reject a writer's sentence: (the text to keep, or None; the reason)."""
    return check(text, Given(min_characters))[:2]


def check(text: str, given: Given = Given()) -> Checked:  # noqa: B008  (it cannot be changed)
    """Keep, trim or reject a sentence, with the names of the rules that trimmed."""
    text, original = text.strip(), join_lines(text)
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


# words of the talk around an answer, which say nothing of a picture either
_TALK = frozenset(
    re.findall(
        r"\w+",
        """sure course certainly okay absolutely definitely gladly yes alright thing problem great good question hello
    hi thanks thank welcome happy glad help here difference differences comparison answer answers response assistant
    result summary sentence sentences description descriptions caption captions know need let hope""",
    )
)

# -- rules that trim: text -> text ---------------------------------------------------------------------

_FIELD = r"(?:question|answer|note|q|(?:caption|picture|image) ?\d|user|human|assistant|instruction|response)\s*:"
_GREETING = re.compile(
    r"(?:(?:sure|of course|certainly|okay|absolutely)\b[,!.]*|"
    r"(?:great|hello|hi|no problem|thanks|thank you|yes|definitely)[,!.]+)\s*",
    re.IGNORECASE,
)
_SEGMENT = re.compile(r"\s*[^.!?:\n]*(?:[.!?]+(?=\s)|:(?=\s)|(?=\n))\s*")  # up to the end of a sentence or a heading
_SPEAKS = re.compile(  # to the person who asked, of what one can do; "I see a dog" is a description
    r"\W*(?:(?:if|and|so|would|do|should|as|but) )?(?:(?:I|we)\b(?!(?:['’]ve| can| could| also)? "
    r"(?:see|saw|seen|notice|spot|observe|find)\b)|you\b|(?:please|let (?:me|us|[a-z]+ know)|let['’]s|hope|feel free|"
    r"is there any|are there any|happy to|glad to|note|thanks?|thank you)\b)",
    re.IGNORECASE,
)
_HERE_IS = re.compile(r"\bhere(?: is| are|['’]s)\b", re.IGNORECASE)
_NEXT = re.compile(rf"(?:\n|(?<=[.!?])[\"”]?\s)\s*(?:#+\s*)?{_FIELD}.*$", re.IGNORECASE | re.DOTALL)
_QUESTION = re.compile(r"(?<=[.!])\s+(?:[A-Z][^.!?]*\?\s*)+$")
_PARTIAL = re.compile(r"(?<=[.!?])\s+[^.!?]*$")


def _is_talk(segment: str) -> bool:
    """Whether a sentence, or a heading that ends in a colon, speaks of the answer and not of a picture."""
    heading, words = segment.rstrip().endswith(":"), words_in(segment)
    if heading and (_HERE_IS.search(segment) or words == ["a"]):
        return True
    if len({image for _, _, image in role_mentions(segment)}) == 1 or refusal(segment, Given()):
        return False
    of_talk = bool(words) and not _TALK.isdisjoint(words) and (_TALK | FUNCTION | {"two", "between"}).issuperset(words)
    return of_talk or (not heading and bool(_SPEAKS.match(segment)))


def drop_opening(text: str) -> str:
    """ "Sure thing! I'd be happy to help. Here is the difference:" answers the person who asked."""
    while True:
        greeting, segment = _GREETING.match(text), _SEGMENT.match(text)
        if segment and _is_talk(segment.group()):
            text = text[segment.end() :]
        elif greeting:
            text = text[greeting.end() :]
        else:
            return text


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
        if not _on_an_image(paragraph):
            break
        kept.append(paragraph)
    return "\n\n".join(kept) if len(kept) <= len(others) else text


def drop_closing(text: str) -> str:
    """ "I hope this helps! Let me know ..." is talk as well, at the end of an answer."""
    sentences = re.split(r"(?<=[.!?])(?=\s)", text)
    talk = next((n for n, sentence in enumerate(sentences) if n and _is_talk(sentence)), len(sentences))
    on_images = any(_on_an_image(sentence) and not _is_talk(sentence) for sentence in sentences[talk:])
    return text if on_images else "".join(sentences[:talk])


def _on_an_image(text: str) -> bool:
    return any(role_mentions(text)) or bool(BOTH.search(text))


def drop_list_marks(text: str) -> str:
    """Chat models like lists. The marks at the start of lines are no words of the answer."""
    return re.sub(r"^\s*(?:[-*•]|\d{1,2}[.)])[ \t]+", "", text, flags=re.MULTILINE)


def join_lines(text: str) -> str:
    """Newlines become spaces, never nothing: words must not fuse, as they do in the filter of the paper's code."""
    return re.sub(r"\s+", " ", text).strip()


def drop_quotes(text: str) -> str:
    """Some models put their answer into quotation marks."""
    return text.strip('"“”').strip() if text[:1] in '"“' else text


def drop_unfinished(text: str) -> str:
    """A model that runs out of tokens stops within a sentence; the whole ones before it are kept."""
    if text and text[-1] not in ".!?" and re.search(r"[.!?]\s", text):
        return _PARTIAL.sub("", text)
    return text


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
    words = words_in(text)
    if any(_in_a_row(words, period) for period in range(1, min(12, len(words) // 3) + 1)):
        return True
    trigrams = Counter(zip(words, words[1:], words[2:]))
    if any(n >= 4 and not WORDING.issuperset(said) for said, n in trigrams.items()):
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
    known = _runs(sources, n, words_in)
    if not known:
        return False
    words = words_in(text)
    covered = [False] * len(words)
    for start in range(len(words) - n + 1):
        if tuple(words[start : start + n]) in known:
            covered[start : start + n] = [True] * n
    return 2 * sum(covered) > len(words)


@lru_cache(maxsize=64)
def _runs(sources: tuple[str, ...], n: int, split: Callable[[str], list[str]]) -> frozenset[tuple[str, ...]]:
    """All n words in a row of some texts."""
    return frozenset(run for words in map(split, sources) for run in zip(*(words[k:] for k in range(n))))


def copies(text: str, examples: Sequence[str], captions: Sequence[str] = ()) -> bool:
    """Whether a run of COPIED content words of an example recurs, and no caption has all of its words."""
    copied = _runs((text,), COPIED, content_words) & _runs(tuple(examples), COPIED, content_words)
    told = [set(content_words(caption)) for caption in captions] if copied else []
    return any(not any(words.issuperset(run) for words in told) for run in copied)
