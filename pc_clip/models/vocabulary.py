"""The words a caption decoder knows: those pieces of CLIP's tokenizer that its training sentences are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PAD, START, END = 0, 1, 2  # none of them is a word; CLIP's own padding, 0, is also "!"
SPECIAL = 3


class Vocabulary:
    """Numbers for pieces of words, as `tokenizer` cuts them. pieces: its ids of those known, in the order of ours."""

    def __init__(self, tokenizer: Any, pieces: Sequence[int]) -> None:
        self.tokenizer, self.pieces = tokenizer, list(pieces)
        self.number = {piece: n for n, piece in enumerate(self.pieces, start=SPECIAL)}

    @classmethod
    def of(cls, tokenizer: Any, texts: Iterable[str]) -> Vocabulary:
        """That of some texts."""
        return cls(tokenizer, sorted({piece for text in set(texts) for piece in _cut(tokenizer, text)}))

    def __len__(self) -> int:
        return SPECIAL + len(self.pieces)

    def encode(self, texts: Sequence[str], max_length: int) -> Tensor:
        """START, pieces, END, then PAD; what is longer than max_length is cut before its END.  -> [N, L] int64

        Pieces that are not known are left out.
        """
        cut = [[self.number[p] for p in _cut(self.tokenizer, text) if p in self.number] for text in texts]
        cut = [[START, *numbers[: max_length - 2], END] for numbers in cut]
        rows = torch.full((len(cut), max(map(len, cut), default=2)), PAD)
        for row, numbers in zip(rows, cut):
            row[: len(numbers)] = torch.tensor(numbers)
        return rows

    def lacks(self, text: str) -> bool:
        """Whether pieces of a text are not known."""
        return any(piece not in self.number for piece in _cut(self.tokenizer, text))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text up to END, in lower case where the tokenizer knows no other."""
        pieces = self._pieces(numbers)
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # of Hugging Face, inside open_clip's
        return " ".join(inner.decode(pieces).split()) if pieces else ""

    def words(self, numbers: Iterable[int]) -> list[str]:
        """The pieces one by one, for pictures."""
        return [self.decode([self.number[piece]]) for piece in self._pieces(numbers)]

    def _pieces(self, numbers: Iterable[int]) -> list[int]:
        found = []
        for number in map(int, numbers):
            if number == END:
                break
            if number >= SPECIAL:
                found.append(self.pieces[number - SPECIAL])
        return found


def _cut(tokenizer: Any, text: str) -> list[int]:
    """A text's pieces, without marks of beginning and end."""
    inner = getattr(tokenizer, "tokenizer", None)
    return inner.encode(text, add_special_tokens=False) if inner is not None else tokenizer.encode(text)
