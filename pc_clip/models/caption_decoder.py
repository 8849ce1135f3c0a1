"""Sentences from the tokens of two images: a transformer decoder, with greedy and beam search."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pc_clip.core.errors import UserError
from pc_clip.models.vocabulary import END, PAD, START

KEPT = 0.75  # pairs whose sentences have ended are dropped once no more than this share is left: dropping takes a copy


@dataclass
class Shape:
    """Sizes of a decoder. max_length: of a sentence in pieces of words, its beginning and end included."""

    layers: int = 3
    heads: int = 8
    width: int = 512
    max_length: int = 32

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"change.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise UserError(f"change.width {self.width} cannot be shared by {self.heads} heads; make it a multiple")
        if self.max_length < 3:
            raise UserError(f"change.max_length is {self.max_length}; a sentence has a beginning, a word and an end")


class Found(NamedTuple):
    """B sentences."""

    tokens: Tensor  # [B, L] int64, without START; END closes each that is whole, PAD follows
    log_likelihood: Tensor  # [B] of these tokens


class Decoder(nn.Module):
    """A transformer decoder over what an image encoder saw, in torch's own layers, norms first; words weigh double: the
    table that reads them also finds the next (Press and Wolf 2017).

    What it looks at is told where in a picture it is and in which of both, by embeddings as large as the tokens: these
    themselves hardly show it, and where a thing went would be found late (docs/change.md).

    tokens: of one image, P + 1. seen: how wide they are.
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
        """For a decoder that was saved, and so made without any."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = share

    def memory(self, seen: Tensor) -> Tensor:
        """What the layers look at. [B, S, V] tokens of the encoder, before and after -> [B, S, W]"""
        return self.look_norm(self.look(seen)) + (self.which[:, None] + self.place).flatten(0, 1)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Logits of each next word, all prefixes of a sentence at once. [B, L], [B, S, V] -> [B, L, words - END]

        The first is of END: neither padding nor a beginning ever comes next. tokens may be [B, N, L] for N sentences on
        each pair, which know nothing of each other; the images are then looked up once for all.
        """
        length, memory = tokens.shape[-1], self.memory(seen)
        x = self._read(tokens, 0).flatten(1, -2)  # [B, N L, W]
        alone = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)  # True: not to be looked at
        others = ~torch.eye(x.shape[1] // length, dtype=torch.bool, device=x.device)
        mask = alone.repeat(len(others), len(others)) | others.repeat_interleave(length, 0).repeat_interleave(length, 1)
        with (
            sdpa_kernel(SDPBackend.MATH) if x.device.type == "cpu" else nullcontext()
        ):  # the quicker one there, in bf16
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
    def greedy(self, seen: Tensor) -> Found:
        """The likeliest word after each prefix, until all sentences of the batch have ended. [B, S, V]"""
        cache, longest = _Cache(self, seen, width=1), self.shape.max_length - 1
        written = torch.full((len(seen), longest), PAD, device=seen.device)
        total = torch.zeros(len(seen), device=seen.device)
        rows = torch.arange(len(seen), device=seen.device)  # the sentences that are gone on with, ended ones among them
        tokens, going = torch.full_like(rows, START), torch.ones_like(rows, dtype=torch.bool)
        for position in range(longest):
            likelihood, chosen = self._step(tokens[:, None], position, cache)[:, 0].log_softmax(-1).max(-1)
            tokens = (chosen + END).where(going, PAD)
            written[rows, position] = tokens
            total[rows] += likelihood.where(going, 0)
            going &= tokens != END
            if (left := int(going.sum())) == 0:
                break
            if left <= KEPT * len(going):
                rows, tokens = rows[going], tokens[going]
                cache.keep(going)
                going = going[going]
        return Found(written[:, : position + 1], total)

    @torch.no_grad()
    def beam(self, seen: Tensor, width: int, length_penalty: float = 1.0) -> Found:
        """The best of the sentences that beam search ends with. [B, S, V]

        Sentences are compared by log-likelihood / length ** length_penalty, their END counted. A pair's search stops
        when no open sentence can overtake its best finished one, or at max_length; an unfinished one is taken where
        none has ended.
        """
        batch, words = len(seen), len(self.bias)
        cache = _Cache(self, seen, width)
        tokens = torch.full((batch, width, 1), START, device=seen.device)
        score = torch.full((batch, width), -torch.inf, device=seen.device)
        score[:, 0] = 0  # all beams are the same at first
        best = _Best(batch, self.shape.max_length - 1, length_penalty, seen.device)
        for position in range(self.shape.max_length - 1):
            logits = self._step(tokens[:, :, -1], position, cache)  # [B, width, words - END]
            score = score[:, :, None] + logits.log_softmax(-1)
            score, chosen = score.flatten(1).topk(min(2 * width, score[0].numel()), dim=1)  # half of them may be ends
            parent, word = chosen // words, chosen % words + END
            grown = torch.cat(
                [tokens.gather(1, parent[:, :, None].expand(-1, -1, tokens.shape[2])), word[:, :, None]], 2
            )
            best.offer(grown[:, :, 1:], score.masked_fill(word != END, -torch.inf))
            score, kept = score.masked_fill(word == END, -torch.inf).topk(width, dim=1)
            tokens = grown.gather(1, kept[:, :, None].expand(-1, -1, grown.shape[2]))
            cache.reorder(parent.gather(1, kept))
            if best.settled(score).all():
                break
        else:
            best.offer(tokens[:, :, 1:], score, unfinished=True)
        return best.found()

    def _step(self, tokens: Tensor, position: int, cache: _Cache) -> Tensor:
        """Logits of what follows the words at `position`; the cache has the others. [B, K] -> [B, K, words - END]"""
        x = self._read(tokens[:, :, None], position).flatten(1, 2)  # [B, K, W]
        for layer, kept in zip(self.layers, cache.layers):
            x = x + kept.attend_words(layer.self_attn, layer.norm1(x))
            x = x + kept.attend_images(layer.multihead_attn, layer.norm2(x))
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


class _Cache:
    """Keys and values: of the images, found once, and of the words so far. width: beams a pair."""

    def __init__(self, decoder: Decoder, seen: Tensor, width: int) -> None:
        memory = decoder.memory(seen)
        self.layers = [_LayerCache(layer, memory, decoder.shape, width) for layer in decoder.layers]

    def keep(self, pairs: Tensor) -> None:
        """Go on with some of the pairs. [B] bool"""
        for layer in self.layers:
            layer.keep(pairs)

    def reorder(self, parent: Tensor) -> None:
        """Beams go on from others. parent: [B, K]"""
        for layer in self.layers:
            layer.reorder(parent)


class _LayerCache:
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
        found = F.scaled_dot_product_attention(q.flatten(0, 1)[:, :, None], keys, values)  # [B K, heads, 1, W / heads]
        return attn.out_proj(found.flatten(1).view_as(x))

    def attend_images(self, attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
        """Beams look at their pair's images, side by side: these lie there once. [B, K, W] -> [B, K, W]"""
        width = x.shape[-1]
        q = self._split(F.linear(x, attn.in_proj_weight[:width], attn.in_proj_bias[:width]))  # [B, heads, K, W / heads]
        found = F.scaled_dot_product_attention(q, self.image_keys, self.image_values)
        return attn.out_proj(found.transpose(1, 2).flatten(2))

    def keep(self, pairs: Tensor) -> None:
        self.image_keys, self.image_values = self.image_keys[pairs], self.image_values[pairs]
        self.keys, self.values = self.keys[pairs], self.values[pairs]

    def reorder(self, parent: Tensor) -> None:
        rows = torch.arange(len(parent), device=parent.device)[:, None]
        for kept in (self.keys, self.values):
            kept[:, :, :, : self.length] = kept[rows, parent, :, : self.length]


class _Best:
    """The best finished sentence of each pair so far."""

    def __init__(self, batch: int, length: int, penalty: float, device: torch.device) -> None:
        self.penalty, self.length = penalty, length
        self.tokens = torch.full((batch, length), PAD, device=device)
        self.score, self.total = (torch.full((batch,), -torch.inf, device=device) for _ in range(2))

    def offer(self, tokens: Tensor, total: Tensor, unfinished: bool = False) -> None:
        """tokens: [B, K, L]; total: [B, K] log-likelihoods, -inf for what has not ended."""
        total, place = total.max(1)
        score = total / tokens.shape[2] ** self.penalty
        better = score > self.score
        better &= self.score.isinf() if unfinished else True
        rows = torch.arange(len(place), device=place.device)
        found = F.pad(tokens[rows, place], (0, self.length - tokens.shape[2]), value=PAD)
        self.tokens = found.where(better[:, None], self.tokens)
        self.score, self.total = score.where(better, self.score), total.where(better, self.total)

    def settled(self, total: Tensor) -> Tensor:
        """Whether none of the open ones, [B, K], can win: the best they may reach is to end at full length for free."""
        reach = total.max(1).values / self.length ** max(self.penalty, 0.0)
        return self.score >= reach

    def found(self) -> Found:
        lengths = (self.tokens != PAD).sum(1)
        return Found(self.tokens[:, : int(lengths.max())], self.total)
