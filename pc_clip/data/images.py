"""Images as pixels: decoded, transformed and randomly cropped in the worker processes of a DataLoader."""

from __future__ import annotations

import math
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import BrokenImage, Dataset, images_alone
from pc_clip.models.clip import Clip
from pc_clip.models.torchvision_compat import torchvision

from open_clip.transform import CenterCropOrPad, ResizeKeepRatio  # isort: skip

InterpolationMode = torchvision.transforms.InterpolationMode

ASPECTS = (3 / 4, 4 / 3)  # width over height of a random crop
FIT = (torchvision.transforms.Resize, torchvision.transforms.CenterCrop, ResizeKeepRatio, CenterCropOrPad)

# (image, its row, epoch) -> a tensor of the same shape for all images. It may be pickled for worker processes.
Transform = Callable[[Image.Image, int, int], Tensor]


class Batch(NamedTuple):
    pixels: Tensor  # [B, 3, H, W] float32, without images that could not be read
    rows: Sequence[int]  # of the data set, images that could not be read included
    broken: dict[int, UserError]  # by row

    def whole(self) -> Tensor:
        """The pixels; raises UserError where an image could not be read, with its path."""
        for error in self.broken.values():
            raise error
        return self.pixels


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, data: Dataset, transform: Transform) -> None:
        self.data, self.transform = images_alone(data), transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | UserError]:
        """An error is returned: a worker process that raises wraps it in a traceback."""
        row, epoch = key
        try:
            return row, self.transform(self.data.load(row), row, epoch)
        except UserError as error:
            return row, error
        except Exception as error:  # Pillow's decoders raise all kinds
            what = f"image {self.data.ids[row]} of {self.data.label} cannot be read ({type(error).__name__}: {error})"
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):  # not the image's fault
                return row, UserError(f"{what}; fix that and run the same command again")
            return row, BrokenImage(f"{what}; remove it")


def _collate(images: list[tuple[int, Tensor | UserError]]) -> Batch:
    pixels = [image for _, image in images if isinstance(image, Tensor)]
    broken = {row: image for row, image in images if isinstance(image, UserError)}
    return Batch(torch.stack(pixels) if pixels else torch.empty(0), [row for row, _ in images], broken)


class _Plan:
    """The batch sampler of a DataLoader whose worker processes outlive an epoch: each epoch has other batches."""

    def __init__(self) -> None:
        self.batches: Iterable[Sequence[int]] = ()
        self.epoch = self.asked = 0  # asked: batches that were asked for and are not given back
        self.left = False  # whether an epoch has batches left

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self.batches:
            self.asked += 1
            yield [(int(row), self.epoch) for row in rows]
        self.left = False


class Reader:
    """Reads images of a data set batch by batch, in worker processes or, with 0 of them, in this one.

    The processes stay between epochs; an epoch that is left before its end stops them, and so does `close`. They
    ignore Ctrl-C, which this process answers. torch's generator is not drawn from.
    """

    def __init__(self, data: Dataset, transform: Transform, workers: int) -> None:
        check_at_least("data.workers", workers, 0)
        self.pictures, self.workers = _Pictures(data, transform), workers
        self.loader: DataLoader | None = None

    def start(self) -> None:
        """Start the processes before they are needed: best in the main thread, where they can be forked."""
        if self.workers and self.loader is None:
            self.loader = self._loader()
            iter(self.loader)

    def batches(self, batches: Iterable[Sequence[int]], epoch: int = 0) -> Iterator[Batch]:
        """Batches of rows as pixels, in order. Two batches a process are asked for ahead."""
        if self.loader is None or self.loader.batch_sampler.left or self.loader.batch_sampler.asked:
            self.loader = self._loader()  # another epoch is under way, and keeps its own processes
        loader, plan = self.loader, self.loader.batch_sampler
        plan.batches, plan.epoch, plan.left = batches, epoch, True
        try:
            for batch in _caught(loader):
                plan.asked -= 1
                yield batch
        finally:
            if (plan.left or plan.asked) and self.loader is loader:
                self.close()

    def close(self) -> None:
        """End the processes."""
        self.loader = None

    def _loader(self) -> DataLoader:
        # A process forked beside a thread that computes may inherit a lock that is held for ever.
        in_main = threading.current_thread() is threading.main_thread()
        safe = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        return DataLoader(
            self.pictures,
            batch_sampler=_Plan(),
            num_workers=self.workers,
            collate_fn=_collate,
            persistent_workers=self.workers > 0,
            multiprocessing_context=safe if self.workers and not in_main else None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),
        )


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _caught(loader: DataLoader) -> Iterator[Batch]:
    try:
        yield from loader
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:  # the last three: half of a message
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            "a process that reads images has died, perhaps for want of memory; "
            "try fewer --data.workers, and run the same command again"
        ) from error


def plain(preprocess: Callable[[Image.Image], Tensor]) -> Transform:
    """The model's own transform, the same in every epoch."""
    return partial(_plain, preprocess)


def _plain(preprocess: Callable[[Image.Image], Tensor], image: Image.Image, row: int, epoch: int) -> Tensor:
    return preprocess(image)


def once(data: Dataset, transform: Transform, workers: int, batch_size: int) -> Iterator[Batch]:
    """All images of a data set in order, by worker processes that then end. Close it when leaving early."""
    starts = range(0, len(data), batch_size)
    with closing(Reader(data, transform, workers)) as reader:
        yield from reader.batches(range(start, min(start + batch_size, len(data))) for start in starts)


def broken_images(data: Dataset, workers: int, seen: Callable[[int], object] = lambda n: None) -> dict[int, UserError]:
    """The images that do not decode, by row. All are decoded; `seen` is called with the number of images of each batch.

    Raises UserError for what the disk did not give, which is not the image's fault.
    """
    broken: dict[int, UserError] = {}
    with closing(once(data, _nothing, workers, 32)) as batches:
        for batch in batches:
            for error in batch.broken.values():
                if not isinstance(error, BrokenImage):
                    raise error
            broken |= batch.broken
            seen(len(batch.rows))
    return broken


def _nothing(image: Image.Image, row: int, epoch: int) -> Tensor:
    return torch.empty(0)


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
        """Crops in place of the steps by which a model's own transform fits an image. Its other steps stay.

        Raises UserError for a share that is none.
        """
        if not 0 < share <= 1:
            raise UserError(f"data.min_crop is {share:g}; it is a share of an image's area, above 0 and at most 1")
        settings = clip.model.visual.preprocess_cfg
        size, mode = settings["size"], settings["interpolation"]
        size = tuple(size) if isinstance(size, Sequence) else (size, size)
        then = tuple(step for step in clip.preprocess.transforms if not isinstance(step, FIT))
        return cls(share, size, mode if mode in {known.value for known in InterpolationMode} else "bicubic", then, seed)

    def __call__(self, image: Image.Image, row: int, epoch: int) -> Tensor:
        """[3, H, W] float32"""
        image = image.convert("RGB")
        box = crop_box(image.height, image.width, self.share, stream(self.seed, "crop", epoch, row))
        resize, mode = torchvision.transforms.functional.resized_crop, InterpolationMode(self.interpolation)
        pixels = resize(image, *box, list(self.size), mode)
        for step in self.then:
            pixels = step(pixels)
        return pixels


def crop_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop in pixels, distributed as torchvision's RandomResizedCrop.get_params.

    That one draws from torch's global generator, which a training step uses at the same time in another thread.
    """
    for _ in range(10):
        area = height * width * rng.uniform(share, 1)
        aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ASPECTS[1])))
    h = min(height, max(1, round(width / ASPECTS[0])))
    return (height - h) // 2, (width - w) // 2, h, w
