"""Images through the image tower: decoded in worker processes, encoded in large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pc_clip.core.errors import check_at_least, check_choice
from pc_clip.data.dataset import BrokenImage, Dataset
from pc_clip.data.images import PIECE, Batch, once, plain
from pc_clip.models.clip import Clip

__all__ = ["PIECE", "Encoded", "Options", "encode", "pixels"]


@dataclass(frozen=True)
class Options:
    """How images are encoded.

    precision: "no" for float32, bf16 for autocast. dtype: what is kept, float32 or float16. broken: whether an image
    that does not decode is an "error", or left out ("skip"). workers: processes that decode.
    """

    batch_size: int = 128
    workers: int = 0
    precision: str = "no"
    dtype: str = "float32"
    broken: str = "error"

    def check(self) -> None:
        """Raises UserError for a value that means nothing."""
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("data.workers", self.workers, 0)
        check_choice("precision", self.precision, ("no", "bf16"))
        check_choice("dtype", self.dtype, ("float32", "float16"))
        check_choice("broken", self.broken, ("error", "skip"))

    @property
    def suffix(self) -> str:
        """What sets their files apart from exact ones, so that nothing reads the one for the other."""
        return "-bf16" * (self.precision == "bf16") + "-float16" * (self.dtype == "float16")


class Encoded(NamedTuple):
    """z: [n, D], not normalised; ids: of these n; left_out: of the images that do not decode."""

    z: Tensor
    ids: list[str]
    left_out: list[str]


def _batches(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[Batch]:
    starts = range(0, len(data), batch_size)
    batches = (range(start, min(start + batch_size, len(data))) for start in starts)
    return once(data, plain(clip.preprocess), workers, batches)


def pixels(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """The images of a data set as the tower takes them, in order: [B, 3, H, W] float32 each.

    Raises UserError for an image that cannot be read, with its path.
    """
    with closing(_batches(clip, data, batch_size, workers)) as coming:
        for batch in coming:
            yield batch.whole()


@torch.no_grad()
def encode(clip: Clip, data: Dataset, options: Options, seen: Callable[[int], object] = lambda n: None) -> Encoded:
    """Embeddings of the images of a data set; `seen` is called with the number of images of each batch.

    Raises UserError for an image that cannot be read, with its path, unless it is broken and such are left out: what
    the disk or the network did not give is there the next time, and is never left out.
    """
    was_training = clip.model.training
    clip.model.eval()
    try:
        with closing(_batches(clip, data, options.batch_size, options.workers)) as coming:
            return _encode(clip, data, coming, options, seen)
    finally:
        clip.model.train(was_training)


def _encode(
    clip: Clip, data: Dataset, batches: Iterator[Batch], options: Options, seen: Callable[[int], object]
) -> Encoded:
    z, done = None, 0  # filled batch by batch: what torch.cat makes would be there twice for a moment
    left_out: list[int] = []
    for batch in batches:
        for error in batch.broken.values():
            if options.broken == "error" or not isinstance(error, BrokenImage):
                raise error
        if len(batch.pixels):
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                found = clip.encode_image(batch.pixels.to(clip.device))
            if z is None:
                z = torch.empty(len(data), found.shape[1], dtype=getattr(torch, options.dtype))
            z[done : done + len(found)] = found  # on the CPU, and rounded if that is wanted
            done += len(found)
        left_out += batch.broken
        seen(len(batch.rows))
    if z is None:
        z = torch.empty(0, clip.embed_dim, dtype=getattr(torch, options.dtype))
    gone = set(left_out)
    ids = [key for row, key in enumerate(data.ids) if row not in gone] if gone else list(data.ids)
    return Encoded(z[:done], ids, [data.ids[row] for row in left_out])
