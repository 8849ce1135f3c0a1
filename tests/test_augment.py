"""Random crops: drawn as torchvision draws them, by seed, epoch and row alone, and fitted as the model wants them."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from pc_clip.core.random import stream
from pc_clip.data.images import RandomCrop, crop_box
from pc_clip.models.clip import Clip

from pc_clip.models.torchvision_compat import torchvision  # isort: skip
from open_clip.transform import PreprocessCfg, image_transform_v2  # isort: skip


def clip_with(**settings):
    """A model of which only the transform is there."""
    config = PreprocessCfg(**settings)
    visual = SimpleNamespace(preprocess_cfg=vars(config))
    return Clip(SimpleNamespace(visual=visual), None, image_transform_v2(config, is_train=False), "none")


def gradient(width, height, mode="RGB"):
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(("height", "width", "share"), [(60, 80, 0.8), (200, 50, 0.5), (40, 300, 0.9), (3, 1, 0.01)])
def test_crops_are_distributed_as_torchvision_s(height, width, share):
    """Kolmogorov-Smirnov over 2,000 draws each of area, aspect and place. 200 x 50 needs many tries, 40 x 300 all."""
    rng, blank = np.random.default_rng(3), torch.empty(3, height, width)
    ours = np.array([crop_box(height, width, share, rng) for _ in range(2000)])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draw = torchvision.transforms.RandomResizedCrop.get_params
        theirs = np.array([draw(blank, [share, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    for value in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert ks_2samp(value(ours), value(theirs)).pvalue > 1e-4


def test_a_crop_depends_on_seed_epoch_and_row_and_on_nothing_else():
    clip, image = clip_with(size=32), gradient(80, 60)
    crop, before = RandomCrop.of(clip, 0.5, seed=3), torch.random.get_rng_state()
    assert torch.equal(crop(image, 7, 2), pickle.loads(pickle.dumps(crop))(image, 7, 2))
    others = crop(image, 8, 2), crop(image, 7, 3), RandomCrop.of(clip, 0.5, seed=4)(image, 7, 2)
    assert not any(torch.equal(crop(image, 7, 2), other) for other in others)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size, resize_mode", [(32, "shortest"), ((24, 40), "longest"), ((24, 40), "squash")])
def test_crops_have_the_model_s_size_and_normalisation(size, resize_mode):
    mean, std, shape = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (3, *np.broadcast_to(size, 2))
    crop = RandomCrop.of(clip_with(size=size, mean=mean, std=std, resize_mode=resize_mode), 0.5, 0)
    for mode in ("RGB", "L", "P", "RGBA"):
        pixels = crop(Image.new("RGB", (50, 70), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE), 1, 0)
        assert pixels.shape == shape and pixels.dtype == torch.float32
        expected = (torch.full((3,), 128 / 255) - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(pixels, expected[:, None, None].expand_as(pixels), atol=0.02)


@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_crops_are_of_the_right_part_by_the_model_s_interpolation(interpolation):
    clip = clip_with(size=16, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
    pixels = RandomCrop.of(clip, 0.3, 9)(gradient(200, 100), 4, 1)
    top, left, h, w = crop_box(100, 200, 0.3, stream(9, "crop", 1, 4))
    assert math.isclose(pixels[0].mean(), (left + w / 2) / 200, abs_tol=0.02)
    assert math.isclose(pixels[1].mean(), (top + h / 2) / 100, abs_tol=0.02)
