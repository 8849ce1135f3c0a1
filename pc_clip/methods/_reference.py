"""What the model thought of preferences before it was trained: found once and kept, or by a frozen copy of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pc_clip import losses
from pc_clip.clip import Clip
from pc_clip.config import FinetuneConfig
from pc_clip.methods import _coca, _embedded
from pc_clip.methods._batches import Images, Texts

if TYPE_CHECKING:
    from pc_clip.methods.preference import Batch

BLOCK = 65_536  # preferences whose embeddings are held at a time


def log_odds_of_all(
    texts: Texts, images: Images, text: tuple[np.ndarray, np.ndarray], image: tuple[np.ndarray, np.ndarray],
    logit_scale: float, config: FinetuneConfig,
) -> Tensor:  # fmt: skip
    """Log-odds of N preferences by the model as it was before training, from embeddings that are made once.

    They are made as a step makes them, in bf16 if it does: what is rounded off is then the same in both, and cancels.
    text, image: [N] rows each, of what is preferred and of what is rejected.  -> [N] float32, on the CPU
    """
    precision = config.train.precision
    z_text = texts.embeddings(precision)  # [U, D]
    used, places = np.unique(image, return_inverse=True)
    z_image = _embedded.of_images(images, used, precision == "bf16", config)  # those of the cache are exact
    places = places.reshape(2, -1)
    found = torch.empty(len(text[0]))
    for start in range(0, len(found), BLOCK):
        some = slice(start, start + BLOCK)
        cosine = [(z_text[text[k][some]] * z_image[places[k][some]]).sum(-1) for k in (0, 1)]
        found[some] = losses.log_odds(*cosine, logit_scale)
    return found


class FrozenCopy:
    """The start model, for batches of pixels that differ from epoch to epoch: random crops."""

    def __init__(self, clip: Clip, logit_scale: float, captioning: float = 0.0) -> None:
        self.model = copy.deepcopy(clip.model).eval().requires_grad_(False)
        self.logit_scale, self.captioning = logit_scale, captioning
        # Texts go the same way through it: two ways round differently in bf16. None: the way through its own weights.
        self.clip = dataclasses.replace(clip, model=self.model, _fast=None)

    @torch.no_grad()
    def log_odds(self, batch: Batch) -> Tensor:
        """[B] float32, of the batch's own pixels."""
        from pc_clip.methods.preference import cosines

        if self.captioning:
            text, image, likelier = _coca.encode(self.model, batch)
        else:
            text = self.clip.encode_text(batch.tokens).float()
            image = self.clip.encode_image(batch.images).float()
            likelier = 0.0
        return losses.log_odds(*cosines(text, image, batch), self.logit_scale) + self.captioning * likelier
