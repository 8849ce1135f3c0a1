"""CLIP's own loss on captions: plain finetuning, the baseline of PC-CLIP; with `sampler.kind clusters` it is SimCLIP.

SimCLIP: "An empirical study of CLIP fine-tuning with similarity clusters" (FITML 2024). What makes it one is which
images come together in a batch (train/samplers.py); the loss is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.data.dataset import Dataset
from pc_clip.data.overlap import false_negative_rate
from pc_clip.models.clip import Clip
from pc_clip.train import losses, samplers
from pc_clip.train.methods.base import CUT, BaseMethod, Images, Texts, embed_rows_of_images, embed_rows_of_texts


class Batch(NamedTuple):
    """B images, each with one of its captions."""

    ids: list[str]
    tokens: Tensor  # [B, L] int64
    images: Tensor  # [B, D] embeddings, or [B, 3, H, W] pixels when the image tower learns
    false_negative_rate: Tensor  # scalar, estimated over all processes; NaN in steps that are not logged


class Part(NamedTuple):
    """The random draw of a batch. examples: [B]; captions: [B], which of its captions each comes with."""

    examples: np.ndarray
    captions: np.ndarray
    false_negative_rate: float


class Method(BaseMethod):
    """One step of symmetric InfoNCE between captions and images. Each image comes once an epoch, unless in clusters."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        super().__init__(clip, config)
        check_at_least("train.batch_size", config.train.batch_size, 2)  # one image has no negative
        temperature = config.contrastive.temperature
        if temperature is not None and not temperature > 0:
            raise UserError(f"contrastive.temperature is {temperature}; it must be above 0, or null for the model's")
        if temperature is None:
            self.idle = ("logit_bias", "text_decoder.")  # the logit scale learns
        if not data.captions:
            raise UserError(
                f"method contrastive needs captions, and {config.data.dataset} has none: name --data.captions"
            )
        self.images = Images(clip, data, config)
        self.captions, self.rows = self._match(data)
        texts = [text for each in self.captions for text in each]  # image by image
        self.texts = Texts(clip, texts)
        self.caption_rows = self.texts.rows(texts)
        self.captions_each = np.array([len(each) for each in self.captions])
        self.first_caption = self.captions_each.cumsum() - self.captions_each
        self.note(self.texts.truncated, CUT)
        self.sampler = samplers.make(config, len(self.rows), config.train.batch_size, self, "images")
        self.notes += self.sampler.notes

    def _match(self, data: Dataset) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """Captions of those images that have some, and these images' rows, [N]. The others are counted in the notes."""
        by_id = {key: texts for key, texts in zip(data.ids, data.captions) if texts}
        ids = list(self.images.ids)
        rows = [row for row, key in enumerate(ids) if key in by_id]
        images, captions = self.config.data.embeddings or data.label, self.config.data.captions or data.label
        if not rows:
            example = f"which is about {data.ids[0]!r} and others"
            raise UserError(f"none of the {len(ids)} images of {images} has a caption in {captions}, {example}")
        self.note(len(ids) - len(rows), f"images of {images} have no caption and are left out")
        self.note(len(by_id) - len(rows), f"images of {captions} are not there and are left out")
        return [by_id[ids[row]] for row in rows], np.array(rows)

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """Embeddings for similarity: of the images, or the mean of their captions'.  -> [N, D] float32, unit length"""
        if similarity == "image":
            return embed_rows_of_images(self.images, self.rows, now, self.config)
        z = embed_rows_of_texts(self.texts, self.caption_rows)  # [captions, D]
        means = torch.zeros(len(self.rows), z.shape[1])
        means.index_add_(0, torch.from_numpy(np.repeat(np.arange(len(self.rows)), self.captions_each)), z)
        return nn.functional.normalize(means, dim=-1)

    def alike(self, similarity: str) -> np.ndarray:
        return np.arange(len(self.rows))

    def draw(self, chosen: np.ndarray, rng: np.random.Generator, epoch: int, n: int) -> Part:
        """Which of an image's captions it has is drawn anew each epoch."""
        captions = rng.integers(self.captions_each[chosen])
        train, step, share = self.config.train, epoch * self.steps_per_epoch + n + 1, float("nan")
        if step % train.log_every == 0 or step == self.total_steps:
            captions_of = [self.captions[image] for image in chosen]
            share = false_negative_rate([texts[k] for texts, k in zip(captions_of, captions)], captions_of)
        return Part(chosen[self.share], captions[self.share], share)

    def image_rows(self, part: Part) -> np.ndarray:
        return self.rows[part.examples]

    def batch(self, part: Part, images: Tensor) -> Batch:
        tokens = self.texts.batch(self.caption_rows[self.first_caption[part.examples] + part.captions])
        ids = [self.images.ids[row] for row in self.rows[part.examples]]
        return Batch(ids, tokens, images, torch.tensor(part.false_negative_rate))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.clip.encode_text(batch.tokens).float()  # [B, D]
        image = self.images.encode(batch.images).float()  # [B, D]
        fixed = self.config.contrastive.temperature
        temperature = 1 / self.model.logit_scale.exp() if fixed is None else fixed
        loss = losses.over_all(losses.info_nce, text, image, temperature)
        logs = {"temperature": torch.as_tensor(temperature).detach()}
        logs |= {"false_negative_rate": batch.false_negative_rate} | losses.hardness(text, image)
        return loss, logs
