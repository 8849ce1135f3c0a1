"""Plain finetuning on captions: CLIP's own loss, the baseline that PC-CLIP's gains are measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pc_clip import distributed
from pc_clip.clip import Clip
from pc_clip.config import FinetuneConfig
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError
from pc_clip.methods._batches import Images, Texts, my_share, shuffled_batches


@dataclass
class Config:
    """Captions against their images.

    Args:
        temperature: Of the InfoNCE loss; null for the model's own.
    """

    temperature: float | None = None


class Batch(NamedTuple):
    """B images, each with one of its captions."""

    ids: list[str]
    tokens: Tensor  # [B, L] int64
    images: Tensor  # [B, D] embeddings, or [B, 3, H, W] pixels when the image tower learns


class Method(nn.Module):
    """One step of symmetric InfoNCE between captions and images. Each image comes once an epoch."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__()
        self.model, self.clip, self.config = clip.model, clip, config
        if not data.captions:
            raise UserError(f"method captions needs captions, and {config.data.dataset} has none")
        self.images = Images(clip, data, config)
        by_id = dict(zip(data.ids, data.captions))
        unknown = [key for key in self.images.ids if key not in by_id]
        if unknown:
            raise UserError(f"image {unknown[0]!r} of {config.data.embeddings} has no caption in {data.label}")
        self.texts = Texts(clip, [text for key in self.images.ids for text in by_id[key]])
        self.caption_rows = self.texts.rows([text for key in self.images.ids for text in by_id[key]])  # image by image
        self.captions_each = np.array([len(by_id[key]) for key in self.images.ids])
        self.first_caption = self.captions_each.cumsum() - self.captions_each
        self.notes = [f"{self.texts.truncated} texts longer than the context, cut"] if self.texts.truncated else []
        self.steps_per_epoch = len(self.images.ids) // config.train.batch_size
        if not self.steps_per_epoch:
            raise UserError(f"{len(self.images.ids)} images do not fill one batch of {config.train.batch_size}")

    def trainable(self) -> dict[str, nn.Parameter]:
        fixed = self.config.captions.temperature is not None or self.config.model.train != "both"
        found = self.clip.trainable(self.config.model.train)
        return {n: p for n, p in found.items() if not (fixed and n.startswith("logit_"))}

    def loader(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This process's part of each batch; which of an image's captions it has is drawn anew each epoch."""
        rng = np.random.default_rng([self.config.seed, 2, epoch])
        share = my_share("train.batch_size", self.config.train.batch_size)
        for n, images in enumerate(shuffled_batches(len(self.images.ids), self.config.train.batch_size, rng)):
            texts = self.caption_rows[self.first_caption[images] + rng.integers(self.captions_each[images])]
            if n < skip:
                continue
            images, texts = images[share], texts[share]
            yield Batch([self.images.ids[row] for row in images], self.texts.batch(texts), self.images.batch(images))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.clip.encode_text(batch.tokens).float()  # [B, D]
        image = self.images.encode(batch.images).float()  # [B, D]
        temperature = self.config.captions.temperature or 1 / self.model.logit_scale.exp()
        loss = distributed.info_nce(text, image, temperature)
        return loss, {"temperature": torch.as_tensor(temperature).detach()}
