"""Encoding: only broken images are ever left out, and the model comes back as it was."""

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
from pc_clip.data.encoding import Options, encode, pixels
from pc_clip.data.example_sets import example
from pc_clip.data.images import Reader, broken_images
from pc_clip.data.registry import open_dataset
from pc_clip.models.clip import Clip
from pc_clip.train.methods._batches import Images


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


SKIP = Options(batch_size=3, broken="skip")
IN_WORKERS = Options(batch_size=3, workers=1, broken="skip")


def of_the_machine(number):
    return OSError(number, os.strerror(number), "pictures/2.png")


@pytest.mark.parametrize("options", [SKIP, IN_WORKERS])
def test_broken_images_are_left_out_and_named(clip, options):
    faults = {2: BrokenImage("pictures/2.png is no image"), 5: ZeroDivisionError(), 6: OSError("broken data stream")}
    found = encode(clip, make_data(8, faults), options)
    assert torch.equal(found.z, truth([0, 1, 3, 4, 7]))
    assert found.ids == [f"image {n}" for n in (0, 1, 3, 4, 7)]
    assert found.left_out == ["image 2", "image 5", "image 6"]


@pytest.mark.parametrize("options", [SKIP, IN_WORKERS])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (of_the_machine(errno.ESTALE), "image 2 of some/train cannot be read .*mend that"),
        (of_the_machine(errno.EIO), "image 2 of some/train cannot be read .*Input/output error"),
        (of_the_machine(errno.EMFILE), "image 2 of some/train cannot be read .*Too many open files"),
        (MemoryError(), "image 2 of some/train cannot be read .*MemoryError"),
        (UserError("no file at 0.tar"), "no file at 0.tar"),
    ],
)
def test_what_is_no_fault_of_the_image_stops_whatever_is_left_out(clip, options, fault, said):
    with pytest.raises(UserError, match=said) as caught:
        encode(clip, make_data(4, {1: BrokenImage("no image"), 2: fault}), options)
    assert not isinstance(caught.value, BrokenImage)


def test_an_image_that_the_transform_cannot_take_is_named_and_can_be_left_out(clip):
    def preprocess(image):
        if image.getpixel((0, 0))[0] == 2:
            raise ValueError("height and width must be > 0")
        return to_tensor(image)

    clip.preprocess = preprocess
    with pytest.raises(BrokenImage, match=r"image 1 of some/train cannot be read \(ValueError: height"):
        encode(clip, make_data(3), Options())
    assert encode(clip, make_data(3), SKIP).left_out == ["image 1"]


def test_pixels_stop_at_any_image_that_cannot_be_read(clip):
    assert torch.cat(list(pixels(clip, make_data(5), 2, 0)))[:, :, 0, 0].tolist() == truth(range(5)).tolist()
    with pytest.raises(BrokenImage, match="no image"):
        list(pixels(clip, make_data(5, {3: BrokenImage("no image")}), 2, 0))


@pytest.mark.parametrize("training", [True, False])
def test_images_are_encoded_in_evaluation_mode_and_the_model_comes_back_as_it_was(clip, training):
    clip.model.train(training)
    assert torch.equal(encode(clip, make_data(7), Options(batch_size=3)).z, truth(range(7)))
    assert clip.model.training == clip.model.visual.training == training


@pytest.mark.parametrize("training", [True, False])
def test_after_an_error_too_the_model_is_as_it_was(clip, training):
    clip.model.train(training)
    with pytest.raises(BrokenImage):
        encode(clip, make_data(7, {4: BrokenImage("no image")}), Options(batch_size=3))
    assert clip.model.training == clip.model.visual.training == training


def test_nothing_but_broken_images_gives_no_rows(clip):
    found = encode(clip, make_data(2, {0: BrokenImage("no image"), 1: BrokenImage("no image")}), SKIP)
    assert found.z.shape == (0, 3) and found.ids == [] and len(found.left_out) == 2


def test_batches_are_counted_with_what_they_leave_out(clip):
    seen = []
    encode(clip, make_data(8, {1: BrokenImage("no image")}), SKIP, seen.append)
    assert seen == [3, 3, 2]


# -- broken images beforehand --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_all_that_is_broken_is_found_without_a_model(workers):
    faults = {2: BrokenImage("pictures/2.png is no image"), 70: ZeroDivisionError()}
    seen = []
    found = broken_images(make_data(90, faults), workers, seen.append)
    assert list(found) == [2, 70] and str(found[2]) == "pictures/2.png is no image" and sum(seen) == 90
    with pytest.raises(UserError, match="Input/output error"):
        broken_images(make_data(9, faults | {4: of_the_machine(errno.EIO)}), workers)


# -- epochs of training --------------------------------------------------------------------------------


def marked(image, row, epoch):
    """What is known of an image where it is transformed."""
    return torch.tensor([image.getpixel((0, 0))[0] - 1, row, epoch, os.getpid()])


def rows_of(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, n) for n in sizes]


def children():
    return {process.pid for process in multiprocessing.active_children()}


def gone(processes, within=10):
    end = time.monotonic() + within
    while children() & processes and time.monotonic() < end:
        time.sleep(0.01)
    return not children() & processes


@pytest.fixture
def reader(request):
    found = Reader(make_data(200), marked, request.param)
    yield found
    found.close()


both_ways = pytest.mark.parametrize("reader", [0, 2], indirect=True)


@both_ways
def test_batches_come_in_order_whatever_their_sizes_and_rows(reader):
    for epoch in (0, 1, 5):
        rows = rows_of(3, 100, 0, 32, 33, 1)
        found = list(reader.batches(iter(rows), epoch))
        assert [batch.rows.tolist() for batch in found] == [some.tolist() for some in rows]
        for some, batch in zip(rows, found):
            assert len(batch.pixels) == len(some)
            assert all(m[:3] == [row, row, epoch] for row, m in zip(some.tolist(), batch.pixels.tolist()))


@both_ways
def test_rows_are_asked_for_as_they_are_needed_and_not_many_before(reader):
    asked = []

    def rows():  # without end
        for n in itertools.count():
            asked.append(n)
            yield np.full(32, n)

    coming = reader.batches(rows())
    for n in range(8):
        assert next(coming).pixels[0, 0] == n
        assert len(asked) <= n + 1 + 2 * reader.workers
    coming.close()


def test_processes_stay_for_the_next_epoch_and_are_ended_by_one_that_is_left():
    reader = Reader(make_data(200), marked, 2)
    before = children()
    used = [{m[3] for batch in reader.batches(rows_of(64, 64), n) for m in batch.pixels.tolist()} for n in range(3)]
    assert used[0] == used[1] == used[2] == children() - before and len(used[0]) == 2
    plan = rows_of(64, 64)
    for _ in zip(plan, reader.batches(plan, 3)):  # which never asks for the end
        pass
    assert used[0] <= children()
    left = reader.batches(rows_of(64, 64, 64, 64, 64, 64), 4)
    next(left)
    left.close()
    assert gone(used[0])
    assert len(list(reader.batches(rows_of(64), 5))) == 1  # others take their place
    now = children() - before
    reader.close()
    assert gone(now)


def test_two_epochs_at_a_time_do_not_meddle():
    reader = Reader(make_data(200), marked, 1)
    plan = rows_of(40, 40, 40)
    found = list(zip(reader.batches(plan, 1), reader.batches(plan, 2)))
    reader.close()
    for some, pair in zip(plan, found):
        for epoch, batch in zip((1, 2), pair):
            assert batch.pixels[:, 1].tolist() == some.tolist() and set(batch.pixels[:, 2].tolist()) == {epoch}


def test_a_process_that_dies_is_an_error_in_words(monkeypatch):
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # seconds until it looks who is alive, in place of 5
    reader = Reader(make_data(200), marked, 1)
    coming = reader.batches(rows_of(*[32] * 50))
    (worker,) = {m[3] for m in next(coming).pixels.tolist()}
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a process that reads images has died.*--data\.workers"):
        list(coming)


def test_ctrl_c_in_the_terminal_does_not_end_the_processes():
    reader = Reader(make_data(200), marked, 1)
    coming = reader.batches(rows_of(*[32] * 9))
    (worker,) = {m[3] for m in next(coming).pixels.tolist()}
    os.kill(worker, signal.SIGINT)
    assert len(list(coming)) == 8
    reader.close()


def test_a_thread_may_start_processes_beside_a_main_thread_that_computes(tmp_path):
    """Where a forked one does not always live: it may inherit a lock that is held for ever."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.png")
    data, found = open_dataset("folder", tmp_path), []
    thread = threading.Thread(target=lambda: found.append(broken_images(data, 1)), daemon=True)
    thread.start()
    while thread.is_alive():
        torch.randn(32, 32).softmax(-1)
        time.sleep(0.001)
    assert list(found[0]) == [0] and "a.png cannot be read as an image" in str(found[0][0])


# -- what methods are given ----------------------------------------------------------------------------


def images(clip, data, train="both", **settings):
    return Images(clip, data, FinetuneConfig(seed=3, model=ModelConfig(train=train), data=DataConfig(**settings)))


def whole(clip, data, rows):
    return torch.stack([clip.preprocess(data.load(int(row))) for row in rows])


PLAN = [np.random.default_rng(n).permutation(60)[:25] for n in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_the_same_from_processes_as_from_here(example_clip, workers):
    data = example("train", 60)
    found = images(example_clip, data, workers=workers)
    state = torch.random.get_rng_state()
    for epoch in (0, 1):
        for rows, batch in zip(PLAN, found.batches(PLAN, epoch)):
            assert torch.equal(batch, whole(example_clip, data, rows))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_crop_depends_neither_on_the_processes_nor_on_its_batch(example_clip):
    data = example("train", 60)
    here, there = (images(example_clip, data, min_crop=0.7, workers=workers) for workers in (0, 2))
    crops = {}
    for epoch in (0, 1):
        for rows, one, other in zip(PLAN, here.batches(PLAN, epoch), there.batches(PLAN, epoch)):
            assert torch.equal(one, other) and one.shape == (25, 3, 64, 64)
            for row, crop in zip(rows.tolist(), one):
                assert torch.equal(crops.setdefault((epoch, row), crop), crop)
            assert not torch.equal(one, whole(example_clip, data, rows))  # which are whole
    assert not any(torch.equal(crops[0, row], crops[1, row]) for row in PLAN[0].tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_stops_training_with_its_path(example_clip, workers):
    data = make_data(60, {7: BrokenImage("pictures/7.png is no image"), 9: UserError("no image at 9.png")})
    found = images(example_clip, data, workers=workers)
    for row, said in ((7, "pictures/7.png is no image"), (9, "no image at 9.png")):
        with pytest.raises(UserError, match=said):
            list(found.batches([np.array([1, 2]), np.array([3, row])], 0))
    assert len(list(found.batches([np.array([1, 2])], 0))) == 1
    found.reader.close()


def test_cached_embeddings_are_given_by_rows(example_clip):
    found = images(example_clip, example("train", 60), train="text")
    batches = list(found.batches(iter(PLAN), 0))
    assert all(torch.equal(z, found.z[torch.from_numpy(rows)]) for z, rows in zip(batches, PLAN)) and len(batches) == 3


@pytest.mark.parametrize(
    ("train", "settings", "said"),
    [
        ("text", {"min_crop": 0.8}, r"data\.min_crop is 0\.8, but with model\.train text .* embedded once"),
        ("text", {"min_crop": 1.5}, r"data\.min_crop is 1\.5; it is a share"),
        ("both", {"min_crop": 0.0}, r"data\.min_crop is 0; it is a share"),
        ("both", {"workers": -1}, r"data\.workers is -1; it must be at least 0"),
    ],
)
def test_crops_and_processes_that_cannot_be_are_errors(example_clip, train, settings, said):
    with pytest.raises(UserError, match=said):
        images(example_clip, example("train", 6), train, **settings)
