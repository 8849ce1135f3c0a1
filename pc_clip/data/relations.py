"""Spatial relations in sentences and the contradiction of each (relations.yaml)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import yaml

from pc_clip.core.errors import UserError

UNKNOWN = "other"  # the category of a relation that the table does not have


@dataclass(frozen=True)
class Relation:
    """opposites: one of them takes the relation's place; none: the relation is negated. verb: the infinitive that
    "does not" goes with, for a relation that holds the verb of the sentence."""

    category: str
    opposites: tuple[str, ...] = ()
    verb: str = ""


RELATIONS: dict[str, Relation] = {
    name: Relation(category, verb=about) if isinstance(about, str) else Relation(category, tuple(about))
    for category, relations in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).items()
    for name, about in relations.items()
}
_VERBS = {relation.verb: name for name, relation in RELATIONS.items() if relation.verb}

# Found only behind "is", "are" and the like: elsewhere they mostly mean something else ("about to eat").
_LOOSE = {"after", "at", "before", "by", "down", "from", "off", "past", "through", "to", "up"}
_IS = r"\b(?:is|are|was|were|isn['’]t|aren['’]t|wasn['’]t|weren['’]t)\b"
_BEING = re.compile(rf"{_IS}\s+(?:not\s+)?(?:\w+ly\s+)?$", re.IGNORECASE)
_IS_OF_ALL = re.compile(rf"(?<!that )(?<!which )(?<!who ){_IS}", re.IGNORECASE)  # and not of a part of the sentence
_NOT = re.compile(r"(?:\b(not)\s+|(n['’]t)\s+)((?:\w+ly\s+)?(?:\w+(?:ing|ed)\s+)?)$", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|not|none|never|nobody|nothing|neither|nor|cannot)\b|n['’]t\b", re.IGNORECASE)


def category(relation: str) -> str:
    """VSR's category of a relation, or "other"."""
    return RELATIONS[relation].category if relation in RELATIONS else UNKNOWN


def find_relation(text: str) -> str | None:
    """The relation a sentence is about: of those behind "is" or "are" the longest, else of all; the first if alike.

    None where there is none, and where those there only say which thing is meant ("The car in the street is red").
    """
    candidates = []
    for match in _pattern("").finditer(text):
        name, before, after = _name(match[0]), text[: match.start()], text[match.end() :]
        says = bool(_BEING.search(before) or RELATIONS[name].verb)
        # a place within what a sentence is about: it does not begin it, and "is" comes only after it
        says_which = before.strip() and not _IS_OF_ALL.search(before) and _IS_OF_ALL.search(after)
        if says or not (name in _LOOSE or says_which):
            candidates.append((says, len(name), -match.start(), name))
    return max(candidates)[-1] if candidates else None


def contradict(text: str, relation: str, seed: int = 0) -> str:
    """The sentence with its relation replaced by one that contradicts it, drawn by seed and sentence.

    The relation is meant where it stands as words of its own and no longer relation of the table covers it: "on" is
    not found in "person" nor in "on top of". Where it stands more than once, all are replaced alike. A sentence that
    negates it ("is not touching", "is not lying on") is contradicted by taking the "not" away. A relation that the
    table does not have is negated behind "is" or "are".
    Raises UserError where the sentence does not hold the relation, where it says no farther before it ("No cat is on
    the mat" and "No cat is off the mat" may both be true), and where an unknown relation cannot be negated.
    """
    relation = " ".join(relation.lower().split())
    places = [match for match in _pattern(relation).finditer(text) if _name(match[0]) == relation]
    if not relation or not places:
        raise UserError(f"the sentence {text!r} does not hold the relation {relation!r} as words of its own")
    for match in places:
        before = text[: match.start()]
        no = _NO.search(_NOT.sub("", before))
        if no or (relation not in RELATIONS and not _BEING.search(before)):
            why = f"{no[0]!r} comes before it" if no else "it is not known and does not follow is or are"
            raise UserError(
                f"the relation {relation!r} in {text!r} cannot be contradicted, since {why}; give both sentences "
                "instead, as columns caption and negative_caption"
            )
    known = RELATIONS.get(relation, Relation(UNKNOWN))
    choices = known.opposites or (f"does not {known.verb}" if known.verb else f"not {relation}",)
    opposite = choices[int.from_bytes(sha256(f"{seed} {text}".encode()).digest()[:8], "big") % len(choices)]
    for match in reversed(places):  # from the end, so that the places before keep theirs
        text = _replaced(text, match, relation, opposite)
    return text


def _replaced(text: str, match: re.Match[str], relation: str, opposite: str) -> str:
    """The sentence with one place contradicted: negated where it is not, and the other way round."""
    before, after = text[: match.start()], text[match.end() :]
    if " ".join(match[0].lower().split()) != relation:  # "does not contain"
        return before + _cased(relation, match[0]) + after
    if no := _NOT.search(before):
        kept, adverb = before[: no.start()], no[3] or ""
        if no[2]:  # "isn't" keeps its "is"
            return f"{kept} {adverb}{match[0]}{after}"
        return kept + _cased(adverb + match[0], no[1]) + after
    return before + _cased(opposite, match[0]) + after


def _cased(text: str, like: str) -> str:
    """The replacement in the case of the replaced text: upper case, capitalised or as it is."""
    if like.isupper() and len(like) > 1:
        return text.upper()
    return text[0].upper() + text[1:] if like[0].isupper() else text


def _name(words: str) -> str:
    """The relation that a place is of."""
    words = " ".join(words.lower().split())
    negated = re.fullmatch(r"(?:does not|doesn['’]t) (.+)", words)
    return _VERBS[negated[1]] if negated else words


@lru_cache(maxsize=256)
def _pattern(also: str) -> re.Pattern[str]:
    """All relations, and one more that the table may lack, each at word limits; the longest of those at a place."""

    def spaced(name: str) -> str:
        return r"\s+".join(map(re.escape, name.split()))

    forms = {name: spaced(name) for name in {*RELATIONS, also} - {""}}
    forms |= {f"does not {verb}": rf"(?:does\s+not|doesn['’]t)\s+{spaced(verb)}" for verb in _VERBS}
    longest = sorted(forms, key=lambda name: (-len(name), name))
    return re.compile(rf"(?<![\w'’-])(?:{'|'.join(forms[name] for name in longest)})(?![\w'’-])", re.IGNORECASE)
