"""CLIP4IDC on top of a Clip: a pair encoder, and later a caption decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import seed_of
from pc_clip.models.caption_decoder import Decoder, Found, Shape
from pc_clip.models.clip import Clip
from pc_clip.models.pair_encoder import PairEncoder
from pc_clip.models.vocabulary import Vocabulary

PREFIX = "change."  # of its weights, among the names of a checkpoint


class Search(NamedTuple):
    """Beam search; 1 beam is greedy. Sentences are compared by log-likelihood / length ** length_penalty."""

    beams: int = 1
    length_penalty: float = 1.0

    def check(self) -> None:
        check_at_least("beams", self.beams, 1)
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty is {self.length_penalty}; it must be a number, such as 1 or 0")


class ChangeModel(nn.Module):
    """The weights in addition to CLIP's. It calls CLIP's image tower, whose weights stay with CLIP."""

    def __init__(self, clip: Clip, intra_layers: int | None = None, aligned_tokens: bool = False) -> None:
        """Raises UserError where CLIP's image tower cannot take pairs."""
        super().__init__()
        self.encoder = PairEncoder(clip.model.visual, clip.name, intra_layers, aligned_tokens)
        self.decoder: Decoder | None = None
        self.vocabulary: Vocabulary | None = None

    def add_decoder(self, vocabulary: Vocabulary, shape: Shape, dropout: float = 0.0) -> None:
        self.vocabulary = vocabulary
        self.decoder = Decoder(len(vocabulary), self.encoder.patches + 1, self.encoder.width, shape, dropout)

    def write(self, seen: Tensor, search: Search) -> Found:
        """Sentences about pairs that the encoder has seen. [B, S, V]"""
        return self.decoder.search(seen, *search)

    def maps(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Where the decoder looks at each word. [B, L], [B, S, V] -> [B, L, 2, rows, columns]; class tokens left out"""
        attention = self.decoder.attention(tokens, seen).unflatten(-1, (2, -1))[..., 1:]
        return attention.unflatten(-1, self.encoder.grid)

    def describe(self) -> dict[str, Any]:
        """The settings that `build` needs."""
        encoder = self.encoder
        about: dict[str, Any] = {"intra_layers": encoder.intra_layers, "aligned_tokens": encoder.aligned_tokens}
        if self.decoder is not None:
            about |= {"decoder": asdict(self.decoder.shape), "pieces": self.vocabulary.pieces}
        return about

    @classmethod
    def build(cls, clip: Clip, about: Mapping[str, Any]) -> ChangeModel:
        """A model of the sizes that `describe` gave; its weights are still to be loaded."""
        made = cls(clip, about["intra_layers"], about["aligned_tokens"])
        if "decoder" in about:
            made.add_decoder(Vocabulary(clip.tokenizer, about["pieces"]), Shape(**about["decoder"]))
        return made.to(clip.device).eval()


def fresh(clip: Clip, intra_layers: int | None, seed: int, aligned_tokens: bool = False) -> ChangeModel:
    """A change model whose weights are drawn by seed; torch's own generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "pair encoder"))
        return ChangeModel(clip, intra_layers, aligned_tokens)


@dataclass
class ChangeClip(Clip):
    """A Clip with a change model."""

    change: ChangeModel | None = None

    @classmethod
    def of(cls, clip: Clip, change: ChangeModel) -> ChangeClip:
        """The same weights, not copied, with a change model beside them."""
        known = {f.name: getattr(clip, f.name) for f in dataclasses.fields(Clip)}
        return cls(**known, change=change)

    def extra_weights(self) -> dict[str, Tensor]:
        return {PREFIX + name: value for name, value in self.change.state_dict().items()}

    def about(self) -> dict[str, Any]:
        return {"change": self.change.describe()}


def change_of(clip: Clip) -> ChangeModel | None:
    """The change model of a CLIP model; most have none."""
    return getattr(clip, "change", None)
