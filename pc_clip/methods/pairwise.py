"""PC-CLIP: the embedding of a difference sentence moves to the difference of the two images' embeddings.

Finetuning CLIP to Reason about Pairwise Differences (arXiv 2409.09721, TMLR 2025). Two additions, both
off unless asked for: an anchor that keeps ordinary captions where they were, and mirror pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from pc_clip import differences, distributed, losses
from pc_clip.clip import Clip
from pc_clip.config import FinetuneConfig
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError, check_at_least, check_choice
from pc_clip.methods._batches import Images, Texts, Tokens, my_share, shuffled_batches


@dataclass
class Config:
    """PC-CLIP: sentences against differences of images.

    Args:
        loss: info_nce, or mse for the ablation.
        temperature: Of the InfoNCE loss.
        anchor: Weight of the term that keeps ordinary captions near the start; 0 for none.
        anchor_captions: How many captions it holds in all, drawn from the data set's.
        anchor_batch: How many of them a step.
        mirror: Put each pair into the batch in both orders, the second with "first" and "second" exchanged.
    """

    loss: str = "info_nce"
    temperature: float = 1.0
    anchor: float = 0.0
    anchor_captions: int = 20000
    anchor_batch: int = 64
    mirror: bool = False


class Batch(NamedTuple):
    """B sentences, V of them distinct, about pairs of U images, and A captions of the anchor (A may be 0)."""

    ids: list[str]
    tokens: Tensor  # [V, L] int64
    text: Tensor  # [B] int64, rows of tokens: a sentence that occurs twice is encoded once
    images: Tensor  # [U, D] embeddings, or [U, 3, H, W] pixels when the image tower learns
    first: Tensor  # [B] int64, rows of images
    second: Tensor  # [B] int64
    anchor_tokens: Tensor  # [A, L'] int64
    anchor_start: Tensor  # [A, D] float32, where these captions were before training


class Method(nn.Module):
    """One step: unit differences of unit image embeddings against unit text embeddings."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__()
        self.options: Config = config.pairwise
        check_choice("pairwise.loss", self.options.loss, ("info_nce", "mse"))
        check_at_least("pairwise.anchor_batch", self.options.anchor_batch, 1)
        check_at_least("pairwise.anchor_captions", self.options.anchor_captions, 1)
        if self.options.mirror and config.train.batch_size % 2:
            raise UserError(f"train.batch_size {config.train.batch_size} is odd; mirror pairs come by twos")
        self.model, self.clip, self.config = clip.model, clip, config
        self.share = my_share("train.batch_size", config.train.batch_size)
        self.anchor_share = (
            my_share("pairwise.anchor_batch", self.options.anchor_batch) if self.options.anchor else slice(0)
        )
        self.notes: list[str] = []
        self.images = Images(clip, data, config)
        self._read_differences(config.data.differences)
        self._draw_anchor(data.captions or [])
        # With mirror pairs a batch of B sentences is about B / 2 differences.
        self.pairs_per_batch = config.train.batch_size // (2 if self.options.mirror else 1)
        self.steps_per_epoch = len(self.pairs) // self.pairs_per_batch
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(self.pairs)} differences do not fill one batch of {config.train.batch_size}; make it smaller"
            )

    def _read_differences(self, path: str) -> None:
        """Sentences as tokens, pairs as rows; those that cannot teach anything are dropped and counted."""
        with PartialState().main_process_first():  # the others then find in the cache what is slow
            found = differences.compiled(path, self.images.ids, self.clip.tokenizer, mirror=self.options.mirror)
        usable = found.pairs[:, 0] != found.pairs[:, 1]
        usable[usable] = ~self.images.equal(found.pairs[usable])  # a duplicate picture has no difference either
        self._note((~usable).sum(), "pairs of equal images dropped")
        if found.mirror is not None:
            has_roles = found.mirror >= 0
            self._note((usable & ~has_roles).sum(), "sentences dropped that do not name both images, so have no mirror")
            usable &= has_roles
        if not usable.any():
            raise UserError(f"none of the {len(usable)} differences in {path} can be used: {'; '.join(self.notes)}")
        self.pairs = found.pairs[usable]  # [N, 2]
        self.text_rows = found.text[usable]  # [N], rows of texts
        self.mirror_rows = None if found.mirror is None else found.mirror[usable]
        self.texts = Tokens(self.clip, found.tokens)
        said = [self.text_rows] if self.mirror_rows is None else [self.text_rows, self.mirror_rows]
        self._note(self.texts.count_truncated(*said), "texts longer than the context, cut")

    def _draw_anchor(self, captions: list[tuple[str, ...]]) -> None:
        """Some captions and where their embeddings are now. Drawn by the run's seed."""
        self.anchors: Texts | None = None
        if not self.options.anchor:
            return
        distinct = list(dict.fromkeys(text for each in captions for text in each))
        if not distinct:
            raise UserError(f"pairwise.anchor needs captions, and {self.config.data.dataset} has none; set it to 0")
        rng = np.random.default_rng([self.config.seed, 1])
        chosen = rng.permutation(len(distinct))[: self.options.anchor_captions]
        self.anchors = Texts(self.clip, [distinct[n] for n in chosen])
        self.anchor_start = self.anchors.embeddings()  # [captions, D]

    def _note(self, count: int, what: str) -> None:
        if count:
            self.notes.append(f"{count} {what}")

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.clip.trainable(self.config.model.train).items() if not n.startswith("logit_")}

    # -- the epoch -------------------------------------------------------------------------------------

    def loader(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This process's part of each batch. Every pair comes once an epoch, in whole batches."""
        rng = np.random.default_rng([self.config.seed, 2, epoch])
        for n, chosen in enumerate(shuffled_batches(len(self.pairs), self.pairs_per_batch, rng)):
            anchors = (
                rng.integers(len(self.anchors.distinct), size=self.options.anchor_batch)
                if self.anchors
                else np.empty(0, int)
            )
            if n < skip:
                continue
            pairs, rows = self.pairs[chosen], self.text_rows[chosen]
            if self.mirror_rows is not None:
                pairs = np.concatenate([pairs, pairs[:, ::-1]])
                rows = np.concatenate([rows, self.mirror_rows[chosen]])
            yield self._batch(pairs[self.share], rows[self.share], anchors[self.anchor_share])

    def _batch(self, pairs: np.ndarray, rows: np.ndarray, anchors: np.ndarray) -> Batch:
        used, index = np.unique(pairs, return_inverse=True)
        said, text = np.unique(rows, return_inverse=True)
        index = torch.from_numpy(index.reshape(pairs.shape))
        none = torch.empty(0, 0, dtype=torch.long)
        return Batch(
            ids=[f"{self.images.ids[i]}|{self.images.ids[j]}" for i, j in pairs.tolist()],
            tokens=self.texts.batch(said),
            text=torch.from_numpy(text),
            images=self.images.batch(used),
            first=index[:, 0],
            second=index[:, 1],
            anchor_tokens=self.anchors.batch(anchors) if self.anchors else none,
            anchor_start=self.anchor_start[torch.from_numpy(anchors)] if self.anchors else none.float(),
        )

    # -- the step --------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.clip.encode_text(batch.tokens)[batch.text]  # [B, D]
        images = self.images.encode(batch.images)  # [U, D]
        target = losses.unit_differences(images[batch.first], images[batch.second])  # [B, D]
        if self.options.loss == "mse":
            loss = losses.squared_distance(text, target)
        else:
            loss = distributed.info_nce(text.float(), target.float(), self.options.temperature)
        logs = {"difference_loss": loss.detach()}
        if len(batch.anchor_tokens):
            turned = losses.anchor(self.clip.encode_text(batch.anchor_tokens).float(), batch.anchor_start)
            logs["anchor"] = turned.detach()
            loss = loss + self.options.anchor * turned
        return loss, logs
