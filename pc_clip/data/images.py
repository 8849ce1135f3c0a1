"""Images as pixels, decoded and transformed in worker processes."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.context import BaseContext
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pc_clip.core.errors import UserError, check_at_least
from pc_clip.data.dataset import BrokenImage, Dataset

# Images that a worker hands over at once. A worker has at most three such pieces in hand, two ready and one in the
# making, however large the batch: 58 MB of pictures of 224 x 224.
PIECE = 32

# What becomes of an image: (image, its row, epoch) -> a tensor of the same shape for all. Worker processes that are
# not forked get it pickled.
Transform = Callable[[Image.Image, int, int], Tensor]


class _Pictures(torch.utils.data.Dataset):
    """Decodes and transforms one image at a time, so that worker processes can share the work."""

    def __init__(self, data: Dataset, transform: Transform) -> None:
        # Without what nobody needs there.
        nothing = {"captions": None, "questions": (), "attributes": (), "statements": (), "changes": (), "judge": None}
        self.data = dataclasses.replace(data, **nothing)
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> Tensor | UserError:
        row, epoch = key
        try:
            return self.transform(self.data.load(row), row, epoch)
        except UserError as error:  # raised where it can be caught: a worker process would wrap it in its traceback
            return error
        except Exception as error:  # Pillow's decoders raise all kinds
            what = f"image {self.data.ids[row]} of {self.data.label} cannot be read ({type(error).__name__}: {error})"
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):  # not the image's fault
                return UserError(f"{what}; mend that and run the same command again")
            return BrokenImage(f"{what}; remove it")


class Batch(NamedTuple):
    pixels: Tensor  # [B, 3, H, W] float32, without those that could not be read
    rows: Sequence[int]  # of the data set, those that could not be read included
    broken: dict[int, UserError]  # by row

    def whole(self) -> Tensor:
        """The pixels; raises UserError where an image could not be read, with its path."""
        for error in self.broken.values():
            raise error
        return self.pixels


def _collate(images: list[Tensor | UserError]) -> tuple[Tensor | None, dict[int, UserError]]:
    """One tensor, which is one shared file between two processes, and the errors by their place."""
    broken = {n: image for n, image in enumerate(images) if isinstance(image, UserError)}
    good = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(good) if good else None, broken


class _Pieces:
    """The pieces of an epoch, as a DataLoader asks for them. asked: for all of them; out: those not yet given back."""

    def __init__(self) -> None:
        self.pieces: Iterable[list[tuple[int, int]]] = ()
        self.out, self.asked = 0, True

    def begin(self, batches: Iterable[Sequence[int]], epoch: int) -> None:
        self.pieces = ([(int(row), epoch) for row in piece] for rows in batches for piece in _cut(rows))
        self.out, self.asked = 0, False

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for piece in self.pieces:
            self.out += 1
            yield piece
        self.asked = True

    @property
    def unfinished(self) -> bool:
        return self.out > 0 or not self.asked


def _cut(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[n : n + PIECE] for n in range(0, len(rows), PIECE)]


class Reader:
    """Reads images of a data set batch by batch, in worker processes or, with 0 of them, in this one.

    The processes stay between epochs, for they may take seconds to start. An epoch that is left before its end stops
    them; so does `close`. They heed no Ctrl-C, which this process answers; torch's generator is not drawn from.
    """

    def __init__(self, data: Dataset, transform: Transform, workers: int) -> None:
        check_at_least("data.workers", workers, 0)
        self.pictures, self.workers = _Pictures(data, transform), workers
        self.loader: DataLoader | None = None

    def start(self) -> None:
        """Start the processes before they are needed: best in the main thread, before any other (see `_context`)."""
        if self.workers and self.loader is None:
            self.loader = self._start()
            _iterate(self.loader)

    def batches(self, batches: Iterable[Sequence[int]], epoch: int = 0) -> Iterator[Batch]:
        """Batches of rows as pixels, in order. `batches` is asked for no more than the processes have in hand."""
        if self.loader is None or self.loader.batch_sampler.unfinished:
            self.loader = self._start()  # where another epoch is under way, that one keeps its own processes
        pieces: _Pieces = self.loader.batch_sampler
        ours, theirs = itertools.tee(batches)
        pieces.begin(theirs, epoch)
        loader = _iterate(self.loader)
        try:
            for rows in ours:
                found, broken = [], {}
                for piece in _cut(rows):
                    images, errors = _next(loader)
                    pieces.out -= 1
                    found += [images] if images is not None else []
                    broken |= {int(piece[n]): error for n, error in errors.items()}
                yield Batch(
                    found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0), rows, broken
                )
        finally:
            del loader
            if pieces.unfinished:
                self.close()

    def close(self) -> None:
        """End the processes."""
        self.loader = None

    def _start(self) -> DataLoader:
        return DataLoader(
            self.pictures,
            batch_sampler=_Pieces(),
            num_workers=self.workers,
            collate_fn=_collate,
            persistent_workers=self.workers > 0,
            multiprocessing_context=_context() if self.workers else None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),
        )


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _context() -> BaseContext | None:
    """How processes are started: by fork in the main thread, as torch does it; by the fork server in any other.

    Forking takes 0.2 s. But a process that is forked while another thread is within torch may inherit a lock that
    nobody will open: of 100 such starts beside a training loop one hung. Processes of the fork server are safe from
    that; they import everything anew, which takes about 10 s on two shared cores.
    """
    if threading.current_thread() is threading.main_thread():
        return None
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


def _iterate(loader: DataLoader) -> Iterator:
    """Begin an epoch. In the main thread torch would also see to it that a process's death raises there, anywhere."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)  # who waits for a batch is told soon enough


def _next(loader: Iterator[tuple[Tensor | None, dict[int, UserError]]]) -> tuple[Tensor | None, dict[int, UserError]]:
    try:
        return next(loader)
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:  # the last three: half of a message
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            "a process that reads images has died, perhaps for want of memory; "
            "try fewer --data.workers, and run the same command again"
        ) from error


def plain(preprocess: Callable[[Image.Image], Tensor]) -> Transform:
    """The model's own transform, the same in every epoch."""
    return partial(_transform, preprocess)


def _transform(preprocess: Callable[[Image.Image], Tensor], image: Image.Image, row: int, epoch: int) -> Tensor:
    return preprocess(image)


def once(data: Dataset, transform: Transform, workers: int, batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
    """Batches from processes that end with them. Who may leave before the end should close it: garbage ends slowly."""
    with closing(Reader(data, transform, workers)) as reader:
        yield from reader.batches(batches)


def broken_images(data: Dataset, workers: int, seen: Callable[[int], object] = lambda n: None) -> dict[int, UserError]:
    """The images of a data set that do not decode, by row. All are decoded; `seen` is called as for `encode`.

    Raises UserError for what the disk did not give, which is nothing that the image could help.
    """
    found: dict[int, UserError] = {}
    batches = (range(start, min(start + PIECE, len(data))) for start in range(0, len(data), PIECE))
    with closing(once(data, _nothing, workers, batches)) as coming:
        for batch in coming:
            for error in batch.broken.values():
                if not isinstance(error, BrokenImage):
                    raise error
            found |= batch.broken
            seen(len(batch.rows))
    return found


def _nothing(image: Image.Image, row: int, epoch: int) -> Tensor:
    return torch.empty(0)
