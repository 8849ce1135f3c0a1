"""Pack a batch of texts into one row of tokens without padding, and lay it out for attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 16  # groups are padded to multiples of it: few shapes, because each new one costs a CPU kernel's compilation


class Group(NamedTuple):
    """n texts side by side, padded to `length` tokens; R of the packed rows are theirs. All indices are int64."""

    n: int
    length: int
    rows: int  # R
    spread: Tensor  # [n * length], for each padded place a row of the group's [R]
    real: Tensor  # [R], for each row its padded place
    beyond: Tensor  # [n, 1, length] bool, the padded places after each text's end


class Packed(NamedTuple):
    """A batch of N texts as T tokens without padding, sorted by length."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    ends: Tensor | None  # [N + 1] int32, where each text begins, and the last ends; None where rows are shared
    last: Tensor  # [N] int64, the row of each end-of-text token, in sorted order
    back: Tensor  # [N] int64, from sorted order to the order given
    longest: int  # tokens of a text, at most
    groups: tuple[Group, ...]  # none where FlashAttention takes texts of any length


def pack(tokens: Tensor, grouped: bool = True) -> Packed:
    """Texts without their padding. tokens: [N, L] int64, each text ends at its largest token (end of text)."""
    lengths = tokens.argmax(-1) + 1  # [N]
    lengths, order = lengths.sort(stable=True)
    kept = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [N, L]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(kept)[kept]
    groups, start = [], 0
    padded = -(-lengths // STEP) * STEP if grouped else lengths[:0]
    for length, n in zip(*(each.tolist() for each in padded.unique_consecutive(return_counts=True))):
        groups.append(_group(lengths[start : start + n], length))
        start += n
    ends = F.pad(lengths.cumsum(0), (1, 0))
    back, longest = order.argsort(), tokens.shape[1]
    return Packed(tokens[order][kept], positions, ends.int(), ends[1:] - 1, back, longest, tuple(groups))


def pack_shared(tokens: Tensor) -> Packed:
    """The same, with one row for all texts that begin alike, up to where they part. For what needs no gradient.

    Exact: under a causal mask nothing but its beginning reaches a token. Of 100 prompts "This is a photo of a ..." two
    thirds of the rows go. The rows of a text are not in one piece, so that `ends` is of no use.
    """
    lengths = tokens.argmax(-1) + 1  # [N]
    lengths, order = lengths.sort(stable=True)
    tokens, groups, rows, last, start, total = tokens[order], [], [], [], 0, 0
    padded = (-(-lengths // STEP) * STEP).clamp(max=tokens.shape[1])
    for length, n in zip(*(each.tolist() for each in padded.unique_consecutive(return_counts=True))):
        texts, ends = tokens[start : start + n, :length], lengths[start : start + n]
        kept = torch.arange(length, device=tokens.device) < ends[:, None]  # [n, length]
        row = _shared_rows(texts, kept)
        real = torch.empty(int(row.max()) + 1, dtype=torch.long, device=tokens.device)
        places = kept.flatten().nonzero().flatten()
        real[row.flatten()[places]] = places  # any place of a shared row will do: all of them come to the same
        groups.append(Group(n, length, len(real), row.flatten(), real, ~kept[:, None]))
        rows.append((texts.flatten()[real], real % length))
        last.append(row.gather(1, ends[:, None] - 1).flatten() + total)
        start, total = start + n, total + len(real)
    kept, positions = (torch.cat(parts) for parts in zip(*rows))
    return Packed(kept, positions, None, torch.cat(last), order.argsort(), tokens.shape[1], tuple(groups))


def _shared_rows(tokens: Tensor, kept: Tensor) -> Tensor:
    """The row of each token, the same one where all up to it is the same; 0 after the end. [n, length] each"""
    row, total, known = torch.zeros_like(tokens), 0, int(tokens.max()) + 1
    for place in range(tokens.shape[1]):
        there = kept[:, place]
        before = row[there, place - 1] if place else torch.zeros_like(tokens[there, 0])
        beginnings, which = (before * known + tokens[there, place]).unique(return_inverse=True)
        row[there, place] = which + total
        total += len(beginnings)
    return row


def _group(lengths: Tensor, length: int) -> Group:
    kept = torch.arange(length, device=lengths.device) < lengths[:, None]  # [n, length]
    real = kept.flatten().nonzero().flatten()
    spread = torch.zeros(kept.numel(), dtype=torch.long, device=lengths.device)
    spread[real] = torch.arange(len(real), device=lengths.device)
    return Group(len(lengths), length, len(real), spread, real, ~kept[:, None])
