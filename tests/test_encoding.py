"""Encoding: only broken images are ever left out, and the model comes back as it was."""

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pc_clip.clip import Clip
from pc_clip.datasets import Dataset
from pc_clip.datasets.dataset import BrokenImage
from pc_clip.encoding import Options, encode, pixels
from pc_clip.errors import UserError


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
