"""Saying what changed between two images: sentences a second, against a search that reads all anew for each word.

    python bench/change.py

The decoder's greedy search, in float32, on what ViT-B/32 sees of a pair (2 x 50 tokens), with the words of one data
set and with all of CLIP's. Weights and tokens are random, END is brought to where sentences have the lengths of real
ones; then to where none ends by itself. Both take turns in one process, and their sentences are compared.
"""

from __future__ import annotations

import sys
import time
from math import inf, nan
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference
import surroundings
import torch
from record import Figure, exit_if_missed, record
from torch import Tensor

from pc_clip.core.errors import run_script
from pc_clip.models.caption_decoder import Decoder, Shape
from pc_clip.models.vocabulary import END, START

SHAPE = Shape()  # the paper's: 3 layers, 8 heads, 512 wide, 32 pieces
SEEN, WIDTH = 100, 768  # tokens of a pair, and how wide they are
WORDS = (500, 49_408)  # about those of a data set, and all of CLIP's
BATCH, BEAMS = 64, 5
LENGTH = 10.0  # of a sentence on average, its end included
RISE = 3.0  # how fast END grows likelier from word to word: with it lengths spread from about 5 to 15
ROUNDS = 2
FLOOR = 10.0  # asked for, where sentences end as real ones do


def figures(threads: int = 1) -> list[Figure]:
    """Sentences a second, and how many times as many as the reference's.

    Raises RuntimeError where the two do not write the same.
    """
    results = []
    with surroundings.threads(threads):
        for words in WORDS:
            decoder, seen = make_decoder(words), make_seen()
            for ends in (True, False):
                lengths = set_ends(decoder, seen, ends)
                results += _compare(decoder, seen, ends, f"{_described(lengths)}, batch {BATCH}, {threads} thread(s)")
    return results


def _compare(decoder: Decoder, seen: Tensor, ends: bool, about: str) -> list[Figure]:
    seconds: dict[str, list[float]] = {"greedy": [], "beam": [], "reference": []}
    for _ in range(ROUNDS):
        mine = _timed(seconds["greedy"], lambda: decoder.search(seen).tokens)
        _timed(seconds["beam"], lambda: decoder.search(seen, BEAMS).tokens)
        true = _timed(seconds["reference"], lambda: published(decoder, seen))
        if differ := sum(a != b for a, b in zip(sentences(mine), sentences(true), strict=True)):
            raise RuntimeError(f"{differ} of {len(seen)} sentences are not the reference's")
    greedy, beam, slow = (mean(seconds[name]) for name in ("greedy", "beam", "reference"))
    what = f"{len(decoder.bias) + END:,} words" + ("" if ends else ", none ends")
    return [
        Figure(f"change sentences, greedy, {what}", len(seen) / greedy, nan, "/s", about),
        Figure(f"change sentences, greedy, {what}, ours : reference", slow / greedy, FLOOR if ends else nan, "x",
               f"{about}; all sentences are the same; the reference writes {len(seen) / slow:.2f} a second"),
        Figure(f"change sentences, {BEAMS} beams, {what}, ours : the reference's greedy search", slow / beam, nan, "x",
               f"{about}; ours writes {len(seen) / beam:.1f} a second"),
    ]  # fmt: skip


def _timed(seconds: list[float], search) -> Tensor:
    begin = time.perf_counter()
    results = search()
    seconds.append(time.perf_counter() - begin)
    return results


def published(decoder: Decoder, seen: Tensor) -> Tensor:
    """The reference's words on our decoder, which gives logits from END on. -> [B, max_length - 1]"""
    return reference.greedy_words(lambda words: decoder(words, seen), len(seen), START, END, SHAPE.max_length - 1)


def sentences(tokens: Tensor) -> list[list[int]]:
    """Rows of words up to their END, as the reference cuts them; [B, L]"""
    rows = tokens.tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


# -- what is decoded -----------------------------------------------------------------------------------


def make_seen() -> Tensor:
    return torch.randn(BATCH, SEEN, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def make_decoder(words: int) -> Decoder:
    """Random weights, of layers three times as large as at the start of training: pairs then get words of their own.

    From position to position more of what END is read as is added, so that it grows likelier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        decoder = Decoder(words, SEEN // 2, WIDTH, SHAPE).eval()
    for parameter in decoder.layers.parameters():
        if parameter.dim() == 2:
            parameter *= 3
    end = decoder.words.weight[END]
    decoder.positions += RISE * torch.arange(SHAPE.max_length)[:, None] * end / end.norm()
    return decoder


@torch.no_grad()
def set_ends(decoder: Decoder, seen: Tensor, ends: bool) -> Tensor:
    """Set END's bias: sentences get LENGTH words on average, or none ends. -> [B], their lengths with END"""
    decoder.bias[0] = -inf
    tokens = decoder.search(seen).tokens  # no end changes what stands before it
    if not ends:
        return (tokens != END).sum(1)
    decoder.bias[0] = 0
    logits = decoder(torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1), seen)
    lacking = logits[..., 1:].max(-1).values - logits[..., 0]  # [B, L]: END comes next once the bias is above it
    lowest = lacking.cummin(1).values

    def lengths(bias: Tensor) -> Tensor:
        return (lowest >= bias).sum(1).clamp(max=tokens.shape[1] - 1) + 1

    biases = lacking.flatten().sort().values
    means = torch.stack([lengths(bias).double().mean() for bias in biases])
    decoder.bias[0] = biases[(means - LENGTH).abs().argmin()] + 1e-3
    return lengths(decoder.bias[0])


def _described(lengths: Tensor) -> str:
    low, middle, high = (int(lengths.double().quantile(q, interpolation="nearest")) for q in (0.05, 0.5, 0.95))
    return f"{low} to {high} words, {middle} in the middle" if low < high else f"{low} words each"


def main() -> None:
    exit_if_missed(record(figures()))


if __name__ == "__main__":
    run_script(main)
