"""Reading images: only broken ones are ever left out; worker processes change nothing and leave nothing."""

import errno
import itertools
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pc_clip.core.config.settings import DataConfig, ModelConfig
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import BrokenImage, Dataset
from pc_clip.data.embeddings import Options, encode, pixels
from pc_clip.data.example_sets import example
from pc_clip.data.images import Reader, broken_images
from pc_clip.data.registry import open_dataset
from pc_clip.models.clip import Clip
from pc_clip.train.methods.base import Images


class Model(nn.Module):
    """The upper left pixel of an image, of which training mode drops half."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Dropout(0.5)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.text = SimpleNamespace(output_dim=3)

    def encode_image(self, images):
        return self.visual(images[:, :, 0, 0])


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


@pytest.fixture
def clip():
    return Clip(Model(), None, to_tensor, "tiny")


def make_data(n, faults=None):
    """Pictures in the colour of their row, 1 and up; faults: row -> what looking at it raises."""

    def load(row):
        if row in (faults or {}):
            raise faults[row]
        return Image.new("RGB", (4, 3), (row + 1, 10, 7))

    return Dataset("some", "train", [f"image {row}" for row in range(n)], load, "0")


def truth(rows):
    return torch.tensor([[row + 1, 10, 7] for row in rows]).float()


def test_broken_images_are_left_out_and_named(clip):
    faults = {2: BrokenImage("pictures/2.png is no image"), 5: ZeroDivisionError(), 6: OSError("broken data stream")}
    for workers in (0, 1):
        seen, options = [], Options(batch_size=3, workers=workers, broken="skip")
        encoded = encode(clip, make_data(8, faults), options, seen.append)
        assert torch.equal(encoded.z, truth([0, 1, 3, 4, 7])) and seen == [3, 3, 2]
        assert encoded.ids == [f"image {n}" for n in (0, 1, 3, 4, 7)]
        assert encoded.left_out == ["image 2", "image 5", "image 6"]
        assert list(broken_images(make_data(8, faults), workers)) == [2, 5, 6]
    assert encode(clip, make_data(1, {0: BrokenImage("no image")}), options).z.shape == (0, 3)


def test_what_is_no_fault_of_the_image_stops_whatever_is_left_out(clip):
    for fault, message in [
        (OSError(errno.EIO, "Input/output error"), "image 2 of some/train .*Input/output error.*fix that"),
        (MemoryError(), "image 2 of some/train cannot be read .*MemoryError"),
        (UserError("no file at 0.tar"), "no file at 0.tar"),
    ]:
        data = make_data(4, {1: BrokenImage("no image"), 2: fault})
        for look in (lambda data=data: encode(clip, data, Options(broken="skip")), lambda d=data: broken_images(d, 0)):
            with pytest.raises(UserError, match=message) as caught:
                look()
            assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize("training", [True, False])
def test_encoding_uses_eval_mode_and_restores_the_model(clip, training):
    clip.model.train(training)
    assert torch.equal(encode(clip, make_data(7), Options(batch_size=3)).z, truth(range(7)))
    for look in (lambda data: encode(clip, data, Options(3)), lambda data: list(pixels(clip, data, 3, 0))):
        with pytest.raises(BrokenImage, match="no image"):
            look(make_data(7, {4: BrokenImage("no image")}))
    assert clip.model.training == clip.model.visual.training == training


# -- epochs of training --------------------------------------------------------------------------------


def marked(image, row, epoch):
    """What is known of an image where it is transformed."""
    return torch.tensor([image.getpixel((0, 0))[0] - 1, row, epoch, os.getpid()])


def rows_of(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, n) for n in sizes]


def children():
    return {process.pid for process in multiprocessing.active_children()}


def gone(processes):
    end = time.monotonic() + 10
    while children() & processes and time.monotonic() < end:
        time.sleep(0.01)
    return not children() & processes


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_are_not_asked_for_long_before(workers):
    reader = Reader(make_data(200), marked, workers)
    for epoch in (0, 5):
        rows = rows_of(3, 100, 0, 1)
        for some, batch in zip(rows, reader.batches(iter(rows), epoch), strict=True):
            assert batch.rows == some.tolist() and len(batch.pixels) == len(some)
            assert all(mark[:3] == [row, row, epoch] for row, mark in zip(some.tolist(), batch.pixels.tolist()))
    asked = []
    endless = (asked.append(n) or np.full(32, n % 200) for n in itertools.count())
    coming = reader.batches(endless)
    for n in range(8):
        assert next(coming).pixels[0, 0] == n and len(asked) <= n + 1 + 2 * workers
    coming.close()
    reader.close()


def test_workers_persist_between_epochs_and_end_on_early_exit():
    reader, plan, before = Reader(make_data(200), marked, 2), rows_of(64, 64, 64, 64, 64, 64, 64), children()
    used = [{mark[3] for batch in reader.batches(plan, n) for mark in batch.pixels.tolist()} for n in range(2)]
    assert used[0] == used[1] == children() - before and len(used[0]) == 2
    for _ in zip(plan, reader.batches(plan, 2)):  # which never asks for the end
        pass
    assert used[0] <= children()
    for one, other in zip(reader.batches(plan, 3), reader.batches(plan, 4)):  # two epochs at a time
        assert (one.pixels[0, 2], other.pixels[0, 2]) == (3, 4)
    coming = reader.batches(plan, 5)
    next(coming)
    coming.close()
    reader.close()
    assert gone(children() - before)


def test_a_dead_worker_is_a_user_error_and_workers_ignore_sigint(monkeypatch):
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # seconds until it looks who is alive, in place of 5
    workers: set[int] = set()

    def rows():
        """The worker is killed while the reader asks for a batch: torch raises where the news reaches it."""
        for n, some in enumerate(rows_of(*[32] * 50)):
            if n == 20:
                os.kill(next(iter(workers)), signal.SIGKILL)
                time.sleep(0.5)
            yield some

    coming = Reader(make_data(200), marked, 1).batches(rows())
    workers |= {mark[3] for mark in next(coming).pixels.tolist()}
    os.kill(next(iter(workers)), signal.SIGINT)
    assert {mark[3] for batch in itertools.islice(coming, 8) for mark in batch.pixels.tolist()} == workers
    with pytest.raises(UserError, match=r"a process that reads images has died.*--data\.workers"):
        list(coming)


@pytest.mark.slow
def test_a_thread_may_start_processes_beside_a_main_thread_that_computes(tmp_path):
    """Where a forked one does not always live: it may inherit a lock that is held for ever."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.png")
    data, broken = open_dataset("folder", tmp_path), {}
    thread = threading.Thread(target=lambda: broken.update(broken_images(data, 1)), daemon=True)
    thread.start()
    while thread.is_alive():
        torch.randn(32, 32).softmax(-1)
        time.sleep(0.001)
    assert list(broken) == [0] and "a.png cannot be read as an image" in str(broken[0])


# -- what methods are given ----------------------------------------------------------------------------


def images(clip, data, train="both", **settings):
    return Images(clip, data, FinetuneConfig(seed=3, model=ModelConfig(train=train), data=DataConfig(**settings)))


PLAN = [np.random.default_rng(n).permutation(60)[:25] for n in range(3)]


@pytest.mark.parametrize("min_crop", [0.7, 1.0])
def test_pixels_depend_on_seed_epoch_and_row_and_not_on_the_processes(example_clip, min_crop):
    data, state, pictures = example("train", 60), torch.random.get_rng_state(), {}
    here, there = (images(example_clip, data, min_crop=min_crop, workers=workers) for workers in (0, 2))
    for epoch in (0, 1):
        for rows, one, other in zip(PLAN, here.batches(PLAN, epoch), there.batches(PLAN, epoch)):
            assert torch.equal(one, other) and one.shape == (25, 3, 64, 64)
            for row, picture in zip(rows.tolist(), one):
                assert torch.equal(pictures.setdefault((epoch, row), picture), picture)
    assert torch.equal(state, torch.random.get_rng_state())
    for row in PLAN[0].tolist():
        whole = example_clip.preprocess(data.load(row))
        assert (
            torch.equal(pictures[0, row], whole) == torch.equal(pictures[0, row], pictures[1, row]) == (min_crop == 1)
        )


def test_an_image_that_cannot_be_read_stops_training_with_its_path(example_clip):
    data = make_data(60, {7: BrokenImage("pictures/7.png is no image"), 9: UserError("no image at 9.png")})
    for workers, row, message in ((0, 7, "pictures/7.png is no image"), (1, 9, "no image at 9.png")):
        with pytest.raises(UserError, match=message):
            list(images(example_clip, data, workers=workers).batches([np.array([1, 2]), np.array([3, row])], 0))


def test_crops_and_processes_that_cannot_be_are_errors(example_clip):
    for train, settings, message in [
        ("text", {"min_crop": 0.8}, r"data\.min_crop is 0\.8, but with model\.train text .* embedded once"),
        ("both", {"min_crop": 0.0}, r"data\.min_crop is 0; it is a share"),
        ("both", {"workers": -1}, r"data\.workers is -1; it must be at least 0"),
    ]:
        with pytest.raises(UserError, match=message):
            images(example_clip, example("train", 6), train, **settings)
