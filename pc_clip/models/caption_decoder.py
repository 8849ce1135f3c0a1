"""Sentences from the tokens of two images: a transformer decoder, with greedy and beam search."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pc_clip.core.errors import UserError, check_at_least
from pc_clip.models.vocabulary import END, PAD, START

KEPT = 0.75  # ended pairs are dropped from the batch once at most this share is open, because dropping takes a copy


@dataclass
class Shape:
    """Sizes of a decoder. max_length: of a sentence in subwords, START and END included."""

    layers: int = 3
    heads: int = 8
    width: int = 512
    max_length: int = 32

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("heads", 1), ("width", 1), ("max_length", 3)):  # START, a word, END
            check_at_least(f"change.{name}", getattr(self, name), least)
        if self.width % self.heads:
            raise UserError(f"change.width {self.width} cannot be shared by {self.heads} heads; make it a multiple")


class Found(NamedTuple):
    """B sentences."""

    tokens: Tensor  # [B, L] int64, without START; END closes each that is whole, PAD follows
    log_likelihood: Tensor  # [B] of these tokens


class Decoder(nn.Module):
    """A pre-norm transformer decoder over the image encoder's tokens, in torch's own layers. The table of word
    embeddings is tied to the output layer (Press and Wolf 2017).

    Image tokens get embeddings of their place and of before or after, as large as the tokens: these themselves hardly
    show it, and where a thing went would be learnt late (docs/change.md).

    tokens: tokens of one image, P + 1. seen: their width.
    """

    def __init__(self, words: int, tokens: int, seen: int, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.max_length, width))
        nn.init.normal_(self.words.weight, std=width**-0.5)
        self.look = nn.Linear(seen, width)
        self.look_norm = nn.LayerNorm(width)
        self.place = nn.Parameter(torch.randn(tokens, width))
        self.which = nn.Parameter(torch.randn(2, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, shape.heads, 4 * width, dropout, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(words - END))
        self.dropout = nn.Dropout(dropout)

    def set_dropout(self, share: float) -> None:
        """Set the dropout of a loaded decoder."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = share

    def memory(self, seen: Tensor) -> Tensor:
        """The decoder's memory. [B, S, V] tokens of the encoder, before and after -> [B, S, W]"""
        return self.look_norm(self.look(seen)) + (self.which[:, None] + self.place).flatten(0, 1)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Logits of each next word, all prefixes of a sentence at once. [B, L], [B, S, V] -> [B, L, words - END]

        The first is of END: neither PAD nor START ever comes next. tokens may be [B, N, L] for N sentences on
        each pair, which do not see each other; the images are then looked up once for all.
        """
        length, memory = tokens.shape[-1], self.memory(seen)
        x = self._read(tokens, 0).flatten(1, -2)  # [B, N L, W]
        alone = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)  # True: not to be looked at
        others = ~torch.eye(x.shape[1] // length, dtype=torch.bool, device=x.device)
        mask = alone.repeat(len(others), len(others)) | others.repeat_interleave(length, 0).repeat_interleave(length, 1)
        on_cpu = x.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():  # the quicker one there, in bf16
            for layer in self.layers:
                x = layer(x, memory, tgt_mask=mask)
        return self._next(x).unflatten(1, tokens.shape[1:])

    def _read(self, tokens: Tensor, start: int) -> Tensor:
        """Embeddings of words from position `start` on. [..., L] -> [..., L, W]"""
        scale = self.shape.width**0.5
        return self.dropout(scale * self.words(tokens) + self.positions[start : start + tokens.shape[-1]])

    def _next(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., words - END]"""
        return F.linear(self.norm(x), self.words.weight[END:], self.bias).float()

    # -- searching -------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, seen: Tensor, width: int = 1, length_penalty: float = 1.0) -> Found:
        """The best sentence that beam search finds for each pair; with width 1, greedy search. [B, S, V]

        Sentences are compared by log-likelihood / length ** length_penalty, END included. The search for a pair stops
        when no open sentence can overtake its best finished one, or at max_length; an unfinished one is taken where
        none has ended.
        """
        batch, words, longest = len(seen), len(self.bias), self.shape.max_length - 1
        caches = self._caches(seen, width)
        best = _Best(batch, longest, length_penalty, seen.device)
        rows = torch.arange(batch, device=seen.device)  # pairs that are still searched, stopped ones among them
        tokens = torch.full((batch, width, 1), START, device=seen.device)
        score = torch.full((batch, width), -torch.inf, device=seen.device)
        score[:, 0] = 0  # all beams are the same at first
        candidates = 1 if width == 1 else 2 * width  # of beams, half may be ends; greedy search stops at its first END
        for position in range(longest):
            likelihood = self._step(tokens[:, :, -1], position, caches).log_softmax(-1)  # [B, width, words - END]
            score = (score[:, :, None] + likelihood).flatten(1)
            score, chosen = score.topk(min(candidates, score.shape[1]), dim=1)
            parent, word = chosen // words, chosen % words + END
            tokens = torch.cat([_rows_of(tokens, parent), word[:, :, None]], dim=2)
            best.offer(rows, tokens[:, :, 1:], score.masked_fill(word != END, -torch.inf))
            score, beams = score.masked_fill(word == END, -torch.inf).topk(width, dim=1)
            tokens = _rows_of(tokens, beams)
            if width > 1:
                for cache in caches:
                    cache.reorder(parent.gather(1, beams))
            open_rows = ~best.finished(rows, score)
            if (left := int(open_rows.sum())) == 0:
                break
            if left <= KEPT * len(rows):
                rows, tokens, score = rows[open_rows], tokens[open_rows], score[open_rows]
                for cache in caches:
                    cache.keep(open_rows)
        else:
            best.offer(rows, tokens[:, :, 1:], score, unfinished=True)
        return best.found()

    def _caches(self, seen: Tensor, width: int) -> list[_LayerCache]:
        memory = self.memory(seen)
        return [_LayerCache(layer, memory, self.shape, width) for layer in self.layers]

    def _step(self, tokens: Tensor, position: int, caches: list[_LayerCache]) -> Tensor:
        """Logits of what follows the words at `position`; the caches have the others. [B, K] -> [B, K, words - END]"""
        x = self._read(tokens[:, :, None], position).flatten(1, 2)  # [B, K, W]
        for layer, cache in zip(self.layers, caches):
            x = x + cache.attend_words(layer.self_attn, layer.norm1(x))
            x = x + cache.attend_images(layer.multihead_attn, layer.norm2(x))
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        return self._next(x)

    @torch.no_grad()
    def attention(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """How much the last layer looks at each token of the images when it writes each of `tokens`; heads averaged.

        tokens: [B, L] as found by a search; seen: [B, S, V].  -> [B, L, S], rows sum to 1
        """
        start = torch.full_like(tokens[:, :1], START)
        x, memory = self._read(torch.cat([start, tokens[:, :-1]], dim=1), 0), self.memory(seen)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=x.device, dtype=x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        last = self.layers[-1]
        h = last.norm1(x)
        x = x + last.self_attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return last.multihead_attn(last.norm2(x), memory, memory, need_weights=True)[1]


def _rows_of(tokens: Tensor, beams: Tensor) -> Tensor:
    """The sentences of some beams. [B, K, L], [B, M] -> [B, M, L]"""
    return tokens.gather(1, beams[:, :, None].expand(-1, -1, tokens.shape[2]))


class _LayerCache:
    """Keys and values of one layer: of the images, computed once, and of the words so far. width: beams a pair."""

    def __init__(self, layer: nn.TransformerDecoderLayer, memory: Tensor, shape: Shape, width: int) -> None:
        self.heads, self.length = shape.heads, 0
        attn = layer.multihead_attn
        weight, bias = attn.in_proj_weight[shape.width :], attn.in_proj_bias[shape.width :]
        self.image_keys, self.image_values = map(self._split, F.linear(memory, weight, bias).chunk(2, dim=-1))
        room = len(memory), width, self.heads, shape.max_length, shape.width // self.heads
        self.keys, self.values = (memory.new_zeros(room, dtype=self.image_keys.dtype) for _ in range(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, W] -> [B, heads, L, W / heads]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend_words(self, attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """Each beam's newest word looks at that beam's words. [B, K, W] -> [B, K, W]"""
        q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        self.keys[:, :, :, self.length], self.values[:, :, :, self.length] = k, v  # [B, K, heads, W / heads]
        self.length += 1
        keys, values = (kept[:, :, :, : self.length].flatten(0, 1) for kept in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q.flatten(0, 1)[:, :, None], keys, values)  # [B K, heads, 1, W / heads]
        return attn.out_proj(out.flatten(1).view_as(x))

    def attend_images(self, attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """All beams of a pair look at the same images, whose keys lie there once. [B, K, W] -> [B, K, W]"""
        width = x.shape[-1]
        q = self._split(F.linear(x, attn.in_proj_weight[:width], attn.in_proj_bias[:width]))  # [B, heads, K, W / heads]
        out = F.scaled_dot_product_attention(q, self.image_keys, self.image_values)
        return attn.out_proj(out.transpose(1, 2).flatten(2))

    def keep(self, pairs: Tensor) -> None:
        """Go on with some of the pairs. [B] bool"""
        self.image_keys, self.image_values = self.image_keys[pairs], self.image_values[pairs]
        self.keys, self.values = self.keys[pairs], self.values[pairs]

    def reorder(self, parent: Tensor) -> None:
        """Beams continue others. [B, K]"""
        rows = torch.arange(len(parent), device=parent.device)[:, None]
        for kept in (self.keys, self.values):
            kept[:, :, :, : self.length] = kept[rows, parent, :, : self.length]


class _Best:
    """The best finished sentence of each pair so far."""

    def __init__(self, batch: int, length: int, penalty: float, device: torch.device) -> None:
        self.penalty, self.length = penalty, length
        self.tokens = torch.full((batch, length), PAD, device=device)
        self.score, self.total = (torch.full((batch,), -torch.inf, device=device) for _ in range(2))

    def offer(self, rows: Tensor, tokens: Tensor, total: Tensor, unfinished: bool = False) -> None:
        """rows: [B] pairs; tokens: [B, K, L]; total: [B, K] log-likelihoods, -inf for what has not ended."""
        total, place = total.max(1)
        score = total / tokens.shape[2] ** self.penalty
        better = score > self.score[rows]
        better &= self.score[rows].isinf() if unfinished else True
        tokens, rows = tokens[torch.arange(len(place), device=place.device), place][better], rows[better]
        self.tokens[rows] = F.pad(tokens, (0, self.length - tokens.shape[1]), value=PAD)
        self.score[rows], self.total[rows] = score[better], total[better]

    def finished(self, rows: Tensor, total: Tensor) -> Tensor:
        """Whether none of the open ones, [B, K], can win: the best they may reach is to end at full length for free."""
        reach = total.max(1).values / self.length ** max(self.penalty, 0.0)
        return self.score[rows] >= reach

    def found(self) -> Found:
        lengths = (self.tokens != PAD).sum(1)
        return Found(self.tokens[:, : int(lengths.max())], self.total)
