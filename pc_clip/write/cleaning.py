"""Clean a language model's output: a sentence to keep, or the name of the rule that rejects it.

An answer is built as: a greeting, an offer, an announcement, the sentences themselves, an offer of more, another
question. TRIMS cut away what stands around the sentences; RULES judge these, and name what is rejected.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from pc_clip.data.wordings import role_mentions
from pc_clip.write.words import BOTH, FUNCTION, WORDING, content_words, split_by_image, words_in

MIN_CHARACTERS = 60
COPIED = 4  # content words in a row that make a copy of a worked example


class Checked(NamedTuple):
    """text: what is kept, or None. reason: "kept", "trimmed", "empty" or the name of the rule that rejected it."""

    text: str | None
    reason: str


class Given(NamedTuple):
    """The writer's input, which its output is checked against.

    captions: of the two images or classes. examples: every text of the worked examples in its prompt. instructions:
    the other texts of its prompt.
    """

    min_characters: int = MIN_CHARACTERS
    captions: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()

    @classmethod
    def of(cls, min_characters: int, writer: Mapping[str, Any]) -> Given:
        """writer: what it said of itself (Writer.describe)."""
        examples = tuple(text for example in writer.get("worked_examples", ()) for text in example.values())
        asked = tuple(writer[name] for name in ("system", "instruction") if name in writer)
        return cls(min_characters, (), examples, asked)


def clean(text: str, min_characters: int = MIN_CHARACTERS) -> Checked:
    """Keep, trim or reject a writer's sentence of which nothing else is known."""
    return check(text, Given(min_characters))


def check(text: str, given: Given) -> Checked:
    """Keep, trim or reject a sentence. Newlines that become spaces do not count as trimmed: no word is lost."""
    text, original = text.strip(), join_lines(text)
    if not original:
        return Checked(None, "empty")
    for trim in TRIMS:
        text = trim(text)
    for broken in RULES:
        if broken(text, given):
            return Checked(None, broken.__name__)
    return Checked(text, "kept" if text == original else "trimmed")


# -- rules that trim: text -> text ---------------------------------------------------------------------

# words of the talk around an answer, which say nothing of a picture either
_TALK = frozenset(
    words_in("""sure course certainly okay absolutely definitely gladly yes alright thing problem great good question
    hello hi thanks thank welcome happy glad help here difference differences comparison answer answers response
    assistant result summary sentence sentences description descriptions caption captions know need let hope""")
)
_OF_ANSWERS = re.compile(  # what a heading speaks of that stands before an answer
    r"\b(?:differ\w*|compar\w*|contrast\w*|descri\w*|answers?|responses?|results?|summar\w*|sentences?|captions?|here|"
    r"follow\w*|below)\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"^\s*(?:\*\*|__)([^*_\n]{1,80}?)(?:(:)(?:\*\*|__)|(?:\*\*|__):)")  # **Answer:**
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
    of_one_image = len({image for _, _, image in role_mentions(segment)}) == 1
    if heading and _OF_ANSWERS.search(segment) and not of_one_image and "(" not in segment:
        return True
    if of_one_image or refusal(segment, Given()):
        return False
    of_talk = bool(words) and not _TALK.isdisjoint(words) and (_TALK | FUNCTION | {"two", "between"}).issuperset(words)
    return of_talk or (not heading and bool(_SPEAKS.match(segment)))


def _is_interjection(segment: str) -> bool:
    """ "Got it." before an answer."""
    return segment.rstrip().endswith((".", "!")) and len(words_in(segment)) <= 3 and not _on_an_image(segment)


def drop_opening(text: str) -> str:
    """ "Sure thing! I'd be happy to help. Here is the difference:" answers the person who asked."""
    text = _BOLD.sub(r"\1:", text, count=1)
    while True:
        greeting, segment = _GREETING.match(text), _SEGMENT.match(text)
        if segment and (_is_talk(segment.group()) or _is_interjection(segment.group())):
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
    return "\n\n".join([first, *takewhile(_on_an_image, others)])


def drop_closing(text: str) -> str:
    """ "I hope this helps! Let me know ..." is talk as well, at the end of an answer."""
    sentences = re.split(r"(?<=[.!?])(?=\s)", text)
    talk = next((n for n, sentence in enumerate(sentences) if n and _is_talk(sentence)), len(sentences))
    on_images = any(_on_an_image(sentence) and not _is_talk(sentence) for sentence in sentences[talk:])
    return text if on_images else "".join(sentences[:talk])


def _on_an_image(text: str) -> bool:
    return any(role_mentions(text)) or bool(BOTH.search(text))


def drop_list_marks(text: str) -> str:
    """Chat models like lists. The marks at the start of lines are not words of the answer."""
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
_THREE_TIMES = re.compile(r"(?<!\S)((?:\S+ ){1,12}?)\1\1")


def prompt_echo(text: str, given: Given) -> bool:
    """It goes on with the prompt, repeats what it was asked, or copies a worked example instead of answering."""
    runs = _runs((text,), 5, words_in)
    repeated = len(runs & _runs(given.instructions, 5, words_in))
    return (
        bool(_STARTS_AS_PROMPT.match(text)) or 2 * repeated > len(runs) or copies(text, given.examples, given.captions)
    )


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

    Said of any loop, whatever its words: a phrase of up to 12 words three times in a row, three words four times (those
    with which images are named, "the first image", may recur), or a text that compresses far better than prose does.
    """
    words, raw = words_in(text), text.encode()
    trigrams = Counter(zip(words, words[1:], words[2:]))
    return (
        bool(_THREE_TIMES.search(" ".join(words) + " "))
        or any(n >= 4 and not WORDING.issuperset(trigram) for trigram, n in trigrams.items())
        or (len(raw) > 200 and len(zlib.compress(raw, 9)) < 0.35 * len(raw))
    )


def same_of_both(text: str, _: Given) -> bool:
    """The first image shows X, while the second image shows X: no difference, so no direction to learn."""
    first, second = split_by_image(text)
    return bool(first) and first == second


def too_short(text: str, given: Given) -> bool:
    """A few words cannot set two photographs apart; "Two cats." is a caption, if anything."""
    return len(text) < given.min_characters


TRIMS = (
    drop_opening,
    drop_next_question,
    drop_other_paragraphs,
    drop_closing,
    drop_list_marks,
    join_lines,
    drop_quotes,
    drop_unfinished,
)
RULES = (prompt_echo, code, markup, refusal, not_english, repetition, same_of_both, too_short)


@lru_cache(maxsize=64)
def _runs(texts: tuple[str, ...], n: int, split: Callable[[str], list[str]]) -> frozenset[tuple[str, ...]]:
    """All n words in a row of some texts."""
    return frozenset(run for words in map(split, texts) for run in zip(*(words[k:] for k in range(n))))


def copies(text: str, examples: Sequence[str], captions: Sequence[str] = ()) -> bool:
    """Whether a run of COPIED content words of an example recurs, and no caption has all of its words.

    "A close view of food on a plate" is a fair answer where there is a plate of food, and of a giraffe it is not.
    """
    copied = _runs((text,), COPIED, content_words) & _runs(tuple(examples), COPIED, content_words)
    shown = [set(content_words(caption)) for caption in captions] if copied else []
    return any(not any(words.issuperset(run) for words in shown) for run in copied)
