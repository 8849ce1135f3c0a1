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
        self.share = my_share("train.batch_size", config.train.batch_size)
        if not data.captions:
            raise UserError(
                f"method captions needs captions, and {config.data.dataset} has none; "
                "name a file of them with --data.captions"
            )
        self.images = Images(clip, data, config)
        said, self.rows = self._match(data)
        texts = [text for each in said for text in each]  # image by image
        self.texts = Texts(clip, texts)
        self.caption_rows = self.texts.rows(texts)
        self.captions_each = np.array([len(each) for each in said])
        self.first_caption = self.captions_each.cumsum() - self.captions_each
        if self.texts.truncated:
            self.notes.append(f"{self.texts.truncated} texts longer than the context, cut")
        self.steps_per_epoch = len(self.rows) // config.train.batch_size
        if not self.steps_per_epoch:
            raise UserError(f"{len(self.rows)} images do not fill one batch of {config.train.batch_size}")

    def _match(self, data: Dataset) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """Captions of those images that have some, and these images' rows, [N]. The others are counted in the notes."""
        by_id, ids = dict(zip(data.ids, data.captions)), list(self.images.ids)
        rows = [row for row, key in enumerate(ids) if key in by_id]
        images, captions = self.config.data.embeddings or data.label, self.config.data.captions or data.label
        if not rows:
            raise UserError(
                f"none of the {len(ids)} images of {images} has a caption in {captions}, "
                f"which is about {data.ids[0]!r} and others"
            )
        lacking = [
            (len(ids), f"images of {images} have no caption"),
            (len(by_id), f"images of {captions} are not there"),
        ]
        self.notes = [f"{n - len(rows)} {what} and are left out" for n, what in lacking if n > len(rows)]
        return [by_id[ids[row]] for row in rows], np.array(rows)

    def trainable(self) -> dict[str, nn.Parameter]:
        fixed = self.config.captions.temperature is not None or self.config.model.train != "both"
        found = self.clip.trainable(self.config.model.train)
        return {n: p for n, p in found.items() if not (fixed and n.startswith("logit_"))}

    def loader(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """This process's part of each batch; which of an image's captions it has is drawn anew each epoch."""
        rng = np.random.default_rng([self.config.seed, 2, epoch])
        for n, images in enumerate(shuffled_batches(len(self.rows), self.config.train.batch_size, rng)):
            texts = self.caption_rows[self.first_caption[images] + rng.integers(self.captions_each[images])]
            if n < skip:
                continue
            images, texts = self.rows[images[self.share]], texts[self.share]
            yield Batch([self.images.ids[row] for row in images], self.texts.batch(texts), self.images.batch(images))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.clip.encode_text(batch.tokens).float()  # [B, D]
        image = self.images.encode(batch.images).float()  # [B, D]
        temperature = self.config.captions.temperature or 1 / self.model.logit_scale.exp()
        loss = distributed.info_nce(text, image, temperature)
        return loss, {"temperature": torch.as_tensor(temperature).detach()}
