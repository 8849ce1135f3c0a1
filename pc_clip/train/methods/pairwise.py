"""PC-CLIP: the embedding of a difference sentence moves to the difference of the two images' embeddings.

Finetuning CLIP to Reason about Pairwise Differences (arXiv 2409.09721, TMLR 2025). Three additions, all off unless
asked for: mirror pairs, a choice of pairs whose images are alike, and captions as targets instead of images
(target, captioned_differences). Batches of similar sentences or similar differences come from the sampler
(train/samplers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.random import stream
from pc_clip.data import differences
from pc_clip.data.captions import read_captions
from pc_clip.data.dataset import Dataset
from pc_clip.models.clip import Clip
from pc_clip.models.parameters import image_tower_learns
from pc_clip.train import losses, samplers
from pc_clip.train.methods.base import (
    CUT,
    BaseMethod,
    CaptionedImages,
    Images,
    Tokens,
    embed_rows_of_images,
    embed_rows_of_texts,
)

BLOCK = 8192  # pairs whose embeddings are held at a time


class Batch(NamedTuple):
    """B sentences, V of them distinct, about pairs of U images."""

    ids: list[str]
    tokens: Tensor  # [V, L] int64
    text: Tensor  # [B] int64, rows of tokens: a sentence that occurs twice is encoded once
    images: Tensor  # [U, D] embeddings, or [U, 3, H, W] pixels when the image tower learns
    first: Tensor  # [B] int64, rows of images
    second: Tensor  # [B] int64
    identical: Tensor  # scalar: the share of all processes' negatives that say the very same sentence


class Part(NamedTuple):
    """The random draw of a batch. pairs: [B, 2] rows of images; text: [B] rows of texts."""

    pairs: np.ndarray
    text: np.ndarray
    identical: float


class Method(BaseMethod):
    """One step: unit differences of unit image embeddings against unit text embeddings."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__(clip, config)
        self.options: PairwiseConfig = config.pairwise
        _check(self.options, config.train.batch_size)
        if self.options.target == "images":
            self.images = Images(clip, data, config)
        else:
            self.images = self._captioned(data)
        self._read_differences(config.data.differences, data.left_out)
        if self.options.captioned_differences:
            self.more_captions = self._add_captioned()
        self._keep_some()
        # With mirror pairs a batch of B sentences is about B / 2 differences.
        self.pairs_per_batch = config.train.batch_size // (2 if self.options.mirror else 1)
        self.sampler = samplers.make(config, len(self.pairs), self.pairs_per_batch, self, "differences")
        self.notes += self.sampler.notes

    def _captioned(self, data: Dataset) -> CaptionedImages:
        """The data set's images by their captions alone."""
        if self.config.data.embeddings or image_tower_learns(self.config.model.train):
            raise UserError("pairwise.target captions reads no image: leave data.embeddings out, train the text tower")
        known = [n for n, texts in enumerate(data.captions or []) if texts]
        if not known:
            raise UserError(f"pairwise.target captions needs captions, and {data.label} has none; set data.captions")
        return CaptionedImages(self.clip, [data.ids[n] for n in known], [data.captions[n] for n in known])

    def _add_captioned(self) -> list[tuple[str, ...]]:
        """Put images of which only captions are known after the others, with their sentences; returns the captions."""
        if not isinstance(self.images.z, Tensor):
            raise UserError(
                "pairwise.captioned_differences needs images that are embedded once: train the text tower alone, and "
                "name one file as data.embeddings, if any"
            )
        captions = read_captions(self.options.captions)
        texts = [texts for _, texts in captions.values()]
        pairs, text_rows, tokens, images = self.pairs, self.text_rows, self.texts.tokens, self.images
        self.images = CaptionedImages(self.clip, list(captions), texts)
        self._read_differences(self.options.captioned_differences)
        self.pairs = np.concatenate([pairs, self.pairs + len(images.z)])
        self.text_rows = np.concatenate([text_rows, self.text_rows + len(tokens)])
        self.texts = Tokens(self.clip, np.concatenate([tokens, self.texts.tokens]))
        self.images.z = torch.cat([images.z, self.images.z])
        self.images.ids = [*images.ids, *(f"captions:{key}" for key in captions)]
        return texts

    def _read_differences(self, path: str, left_out: Collection[str] = frozenset()) -> None:
        """Sentences as tokens, pairs as rows; those that cannot teach anything are dropped and counted."""
        with PartialState().main_process_first():  # the others then find in the cache what is slow
            compiled = differences.compiled(
                path, self.images.ids, self.clip.tokenizer, mirror=self.options.mirror, left_out=left_out
            )
        there = (compiled.pairs >= 0).all(1)
        self.note((~there).sum(), "pairs dropped, because a picture of theirs is absent or broken")
        usable = there & (compiled.pairs[:, 0] != compiled.pairs[:, 1])
        usable[usable] = ~self.images.equal(compiled.pairs[usable])  # a duplicate picture has no difference either
        self.note((there & ~usable).sum(), "pairs of equal images dropped")
        if compiled.mirror is not None:
            has_roles = compiled.mirror >= 0
            self.note((usable & ~has_roles).sum(), "sentences dropped that do not name both images, so have no mirror")
            usable &= has_roles
        if not usable.any():
            raise UserError(f"none of the {len(usable)} differences in {path} can be used: {'; '.join(self.notes)}")
        self.pairs = compiled.pairs[usable]  # [N, 2]
        text_rows = [compiled.text] if compiled.mirror is None else [compiled.text, compiled.mirror]
        self.text_rows = np.stack(text_rows, axis=1)[usable]  # [N, 1], rows of texts, or [N, 2] with the mirror
        self.texts = Tokens(self.clip, compiled.tokens)
        self.note(self.texts.count_truncated(self.text_rows), CUT)

    def _keep_some(self) -> None:
        """The share of the pairs that was asked for: the hardest by their images, or a control of as many."""
        if self.options.keep == 1:
            return
        kept = round(self.options.keep * len(self.pairs))
        if self.options.keep_by == "random":
            chosen = stream(self.config.seed, "keep").permutation(len(self.pairs))[:kept]
        else:
            closeness = self._of_both_images(lambda z, other: (z * other).sum(-1), now=False).numpy()
            chosen = np.argsort(-closeness, kind="stable")[:kept]
            self.notes.append(
                f"cosine of a pair's images: {closeness.mean():.3f} in all, {closeness[chosen].mean():.3f} in these"
            )
        chosen.sort()
        self.pairs, self.text_rows = self.pairs[chosen], self.text_rows[chosen]
        self.notes.append(f"{kept} pairs kept, {self.options.keep_by}")

    def _of_both_images(self, compute: Callable[[Tensor, Tensor], Tensor], now: bool) -> Tensor:
        """Something of the unit embeddings of each pair's two images, a block of pairs at a time.  -> [N, ...]"""
        used, places = np.unique(self.pairs, return_inverse=True)
        z = embed_rows_of_images(self.images, used, now, self.config)
        blocks = torch.from_numpy(places.reshape(self.pairs.shape)).split(BLOCK)
        return torch.cat([compute(z[some[:, 0]], z[some[:, 1]]) for some in blocks])

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """Embeddings for similarity: of the sentences, or image differences.  -> [N, D] float32, unit length"""
        if similarity == "text":
            return embed_rows_of_texts(self.texts, self.text_rows[:, 0])
        return self._of_both_images(losses.unit_differences, now)

    def alike(self, similarity: str) -> np.ndarray:
        """Pairs of which the same sentence is told, or whose two images are the same."""
        if similarity == "text":
            return self.text_rows[:, 0]
        return np.unique(self.pairs, axis=0, return_inverse=True)[1].reshape(-1)

    # -- the epoch -------------------------------------------------------------------------------------

    def draw(self, chosen: np.ndarray, rng: np.random.Generator, epoch: int, n: int) -> Part:
        pairs, rows = self.pairs[chosen], self.text_rows[chosen].T.reshape(-1)
        if self.options.mirror:
            pairs = np.concatenate([pairs, pairs[:, ::-1]])
        return Part(pairs[self.share], rows[self.share], _identical(rows))

    def image_rows(self, part: Part) -> np.ndarray:
        return np.unique(part.pairs)

    def batch(self, part: Part, images: Tensor) -> Batch:
        index = np.unique(part.pairs, return_inverse=True)[1]
        distinct, text = np.unique(part.text, return_inverse=True)
        index = torch.from_numpy(index.reshape(part.pairs.shape))
        return Batch(
            ids=[f"{self.images.ids[i]}|{self.images.ids[j]}" for i, j in part.pairs.tolist()],
            tokens=self.texts.batch(distinct),
            text=torch.from_numpy(text),
            images=images,
            first=index[:, 0],
            second=index[:, 1],
            identical=torch.tensor(part.identical),
        )

    # -- the step --------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.clip.encode_text(batch.tokens)[batch.text]  # [B, D]
        images = self.images.encode(batch.images)  # [U, D]
        target = losses.unit_differences(images[batch.first], images[batch.second])  # [B, D]
        if self.options.loss == "mse":
            loss = losses.squared_distance(text, target)
        else:
            loss = losses.over_all(losses.info_nce, text.float(), target.float(), self.options.temperature)
        logs = {"difference_loss": loss.detach(), "identical_negatives": batch.identical}
        return loss, logs | losses.hardness(text, target)


def _check(options: PairwiseConfig, batch_size: int) -> None:
    check_choice("pairwise.loss", options.loss, ("info_nce", "mse"))
    check_choice("pairwise.keep_by", options.keep_by, ("random", "similar"))
    check_choice("pairwise.target", options.target, ("images", "captions"))
    if bool(options.captioned_differences) != bool(options.captions):
        raise UserError("pairwise.captioned_differences and pairwise.captions go together: sentences, and of what")
    if options.loss == "info_nce":
        check_at_least("train.batch_size", batch_size, 2)  # one pair has no negative
    if options.mirror and batch_size % 2:
        raise UserError(f"train.batch_size {batch_size} is odd; mirror pairs come by twos")
    if not 0 < options.keep <= 1:
        raise UserError(f"pairwise.keep is {options.keep}; it is a share of the pairs, above 0 and at most 1")


def _identical(rows: np.ndarray) -> float:
    """The share of pairs of different places whose rows are the same."""
    n, counts = len(rows), np.unique(rows, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else 0.0
