"""Images through the image tower: decoded in worker processes, encoded in large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pc_clip.clip import Clip
from pc_clip.datasets import Dataset
from pc_clip.datasets.dataset import BrokenImage
from pc_clip.errors import UserError, check_at_least, check_choice

# Images that a worker hands over at once. A worker has at most three such pieces in hand, two ready and one in the
# making, however large the batch: 58 MB of pictures of 224 x 224.
PIECE = 32


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


class _Pictures(torch.utils.data.Dataset):
    """Decodes and transforms one image at a time, so that worker processes can share the work."""

    def __init__(self, data: Dataset, preprocess) -> None:
        self.data, self.preprocess = data, preprocess

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Tensor | UserError:
        try:
            return self.preprocess(self.data.load(row))
        except UserError as error:  # raised where it can be caught: a worker process would wrap it in its traceback
            return error
        except Exception as error:  # Pillow's decoders raise all kinds
            what = f"image {self.data.ids[row]} of {self.data.label} cannot be read ({type(error).__name__}: {error})"
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):  # not the image's fault
                return UserError(f"{what}; mend that and run the same command again")
            return BrokenImage(f"{what}; remove it")


class _Batch(NamedTuple):
    pixels: Tensor  # [B, 3, H, W] float32, without those that could not be read
    rows: range  # of the data set, those that could not be read included
    broken: dict[int, UserError]  # by row


def _collate(images: list[Tensor | UserError]) -> tuple[Tensor | None, dict[int, UserError]]:
    """One tensor, which is one shared file between two processes, and the errors by their place."""
    broken = {n: image for n, image in enumerate(images) if isinstance(image, UserError)}
    good = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(good) if good else None, broken


def _batches(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[_Batch]:
    starts = range(0, len(data), batch_size)
    batches = [range(start, min(start + batch_size, len(data))) for start in starts]
    pieces = [batch[n : n + PIECE] for batch in batches for n in range(0, len(batch), PIECE)]
    loader = iter(
        DataLoader(_Pictures(data, clip.preprocess), batch_sampler=pieces, num_workers=workers, collate_fn=_collate)
    )
    for batch in batches:
        found, broken = [], {}
        for start in range(batch.start, batch.stop, PIECE):
            images, errors = next(loader)
            found += [images] if images is not None else []
            broken |= {start + n: error for n, error in errors.items()}
        yield _Batch(torch.cat(found) if found else torch.empty(0), batch, broken)


def pixels(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """The images of a data set as the tower takes them, in order: [B, 3, H, W] float32 each.

    Raises UserError for an image that cannot be read, with its path.
    """
    for batch in _batches(clip, data, batch_size, workers):
        for error in batch.broken.values():
            raise error
        yield batch.pixels


@torch.no_grad()
def encode(clip: Clip, data: Dataset, options: Options, seen: Callable[[int], object] = lambda n: None) -> Encoded:
    """Embeddings of the images of a data set; `seen` is called with the number of images of each batch.

    Raises UserError for an image that cannot be read, with its path, unless it is broken and such are left out: what
    the disk or the network did not give is there the next time, and is never left out.
    """
    was_training = clip.model.training
    clip.model.eval()
    try:
        return _encode(clip, data, options, seen)
    finally:
        clip.model.train(was_training)


def _encode(clip: Clip, data: Dataset, options: Options, seen: Callable[[int], object]) -> Encoded:
    z, done = None, 0  # filled batch by batch: what torch.cat makes would be there twice for a moment
    left_out: list[int] = []
    for batch in _batches(clip, data, options.batch_size, options.workers):
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
