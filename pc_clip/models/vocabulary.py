"""The vocabulary of a caption decoder: those subwords of CLIP's tokenizer that its training sentences contain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

PAD, START, END = 0, 1, 2  # none of them is a word; CLIP's own padding, 0, is also "!"
SPECIAL = 3


class Vocabulary:
    """Numbers for subwords. pieces: the tokenizer's ids of the known subwords, in the order of the numbers."""

    def __init__(self, tokenizer: Any, pieces: Sequence[int]) -> None:
        self.tokenizer, self.pieces = tokenizer, list(pieces)
        self.number = {piece: n for n, piece in enumerate(self.pieces, start=SPECIAL)}

    @classmethod
    def of(cls, tokenizer: Any, texts: Iterable[str]) -> Vocabulary:
        """The vocabulary of some texts."""
        return cls(tokenizer, sorted({piece for text in set(texts) for piece in _cut(tokenizer, text)}))

    def __len__(self) -> int:
        return SPECIAL + len(self.pieces)

    def encode(self, texts: Sequence[str], max_length: int) -> Tensor:
        """START, subwords, END, then PAD; longer texts are cut before END.  -> [N, L] int64, L <= max_length

        Unknown subwords are left out: `lacks` says where.
        """
        cut = [[self.number[p] for p in _cut(self.tokenizer, text) if p in self.number] for text in texts]
        cut = [[START, *numbers[: max_length - 2], END] for numbers in cut]
        rows = torch.full((len(cut), max(map(len, cut), default=2)), PAD)
        for row, numbers in zip(rows, cut):
            row[: len(numbers)] = torch.tensor(numbers)
        return rows

    def lacks(self, text: str) -> bool:
        """Whether a text has unknown subwords."""
        return any(piece not in self.number for piece in _cut(self.tokenizer, text))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text up to END, in lower case where the tokenizer knows no other."""
        pieces = self._pieces(numbers)
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # of Hugging Face, inside open_clip's
        return " ".join(inner.decode(pieces).split()) if pieces else ""

    def words(self, numbers: Iterable[int]) -> list[str]:
        """The subwords one by one, for pictures."""
        return [self.decode([self.number[piece]]) for piece in self._pieces(numbers)]

    def _pieces(self, numbers: Iterable[int]) -> list[int]:
        words = takewhile(lambda number: number != END, map(int, numbers))
        return [self.pieces[number - SPECIAL] for number in words if number >= SPECIAL]


def _cut(tokenizer: Any, text: str) -> list[int]:
    """A text's subwords, without start and end tokens."""
    inner = getattr(tokenizer, "tokenizer", None)
    return inner.encode(text, add_special_tokens=False) if inner is not None else tokenizer.encode(text)
