"""Random crops of the images that an image tower learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.models.clip import Clip
from pc_clip.models.torchvision_compat import torchvision

from open_clip.transform import CenterCropOrPad, ResizeKeepRatio  # isort: skip

InterpolationMode = torchvision.transforms.InterpolationMode

ASPECTS = (3 / 4, 4 / 3)  # width over height, of a crop
TRIES = 10
FIT = (torchvision.transforms.Resize, torchvision.transforms.CenterCrop, ResizeKeepRatio, CenterCropOrPad)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of an image, resized to what a tower takes. The draw depends on seed, epoch and row alone.

    share: the least share of the image's area; size: (height, width) of the result; interpolation: bilinear, bicubic
    or another of torchvision's; then: what makes a normalised tensor of a resized image.
    """

    share: float
    size: tuple[int, int]
    interpolation: str
    then: tuple[Callable, ...]
    seed: int = 0

    @classmethod
    def of(cls, clip: Clip, share: float, seed: int) -> RandomCrop:
        """Crops in place of the steps by which a model's own transform fits an image. Its other steps are kept.

        Raises UserError for a share that is none.
        """
        if not 0 < share <= 1:
            raise UserError(f"data.min_crop is {share:g}; it is a share of an image's area, above 0 and at most 1")
        settings = clip.model.visual.preprocess_cfg
        size, how = settings["size"], settings["interpolation"]
        size = tuple(size) if isinstance(size, Sequence) else (size, size)
        then = tuple(step for step in clip.preprocess.transforms if not isinstance(step, FIT))
        return cls(share, size, how if how in {mode.value for mode in InterpolationMode} else "bicubic", then, seed)

    def __call__(self, image: Image.Image, row: int, epoch: int) -> Tensor:
        """[3, H, W] float32"""
        rng = stream(self.seed, "crop", epoch, row)
        image = image.convert("RGB")
        top, left, height, width = crop_box(image.height, image.width, self.share, rng)
        resize = torchvision.transforms.functional.resized_crop
        found = resize(image, top, left, height, width, list(self.size), InterpolationMode(self.interpolation))
        for step in self.then:
            found = step(found)
        return found


def crop_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop in pixels, as torchvision's RandomResizedCrop draws them.

    Its area is uniform between `share` and all of the image's, its aspect log-uniform in ASPECTS. What does not fit is
    drawn again; after TRIES it is the largest crop in the middle whose aspect is allowed.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(share, 1)
        aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ASPECTS[1])))
    h = min(height, max(1, round(width / ASPECTS[0])))
    return (height - h) // 2, (width - w) // 2, h, w
