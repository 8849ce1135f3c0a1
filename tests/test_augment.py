"""Random crops: drawn as torchvision draws them, by seed, epoch and row alone, and fitted as the model wants them."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from pc_clip.core.errors import UserError
from pc_clip.data.augment import RandomCrop, crop_box
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


@pytest.mark.parametrize(("height", "width", "share"), [(60, 80, 0.8), (60, 80, 0.08), (200, 50, 0.5), (40, 300, 0.9)])
def test_crops_are_distributed_as_torchvision_s(height, width, share):
    """Kolmogorov-Smirnov over 2,000 draws each of area, aspect and place. 200 x 50 needs many tries, 40 x 300 all."""
    rng = np.random.default_rng(3)
    ours = np.array([crop_box(height, width, share, rng) for _ in range(2000)])
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draw = torchvision.transforms.RandomResizedCrop.get_params
        theirs = np.array([draw(blank, [share, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    of = {
        "top": lambda b: b[:, 0], "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3], "aspect": lambda b: b[:, 3] / b[:, 2],
    }  # fmt: skip
    for name, value in of.items():
        assert ks_2samp(value(ours), value(theirs)).pvalue > 1e-4, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 1), (1, 9), (2, 500), (37, 41)])
def test_a_crop_lies_within_the_image_whatever_its_shape(height, width):
    rng = np.random.default_rng(0)
    for share in (0.01, 0.5, 1.0):
        for _ in range(50):
            top, left, h, w = crop_box(height, width, share, rng)
            assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h * w > 0


def test_areas_are_between_the_share_and_all_of_the_image():
    rng = np.random.default_rng(1)
    areas = [h * w / 1e6 for _, _, h, w in (crop_box(1000, 1000, 0.8, rng) for _ in range(2000))]
    assert 0.798 < min(areas) < 0.81 and 0.95 < max(areas) <= 1
    assert all(3 / 4 - 0.01 < w / h < 4 / 3 + 0.01 for _, _, h, w in (crop_box(90, 90, 0.1, rng) for _ in range(200)))


def test_a_crop_depends_on_seed_epoch_and_row_and_on_nothing_else():
    clip, image = clip_with(size=32), gradient(80, 60)
    crop = RandomCrop.of(clip, 0.5, seed=3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(crop(image, 7, 2), crop(image, 7, 2))
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert torch.equal(crop(image, 7, 2), pickle.loads(pickle.dumps(crop))(image, 7, 2))
    others = crop(image, 8, 2), crop(image, 7, 3), RandomCrop.of(clip, 0.5, seed=4)(image, 7, 2)
    assert not any(torch.equal(crop(image, 7, 2), other) for other in others)


@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_crops_have_the_model_s_size_and_normalisation(size, resize_mode, mode):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    clip = clip_with(size=size, mean=mean, std=std, resize_mode=resize_mode)
    image = Image.new("RGB", (50, 70), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE)
    found = RandomCrop.of(clip, 0.5, 0)(image, 1, 0)
    assert found.shape == (3, *((size, size) if isinstance(size, int) else size)) and found.dtype == torch.float32
    for channel in range(3):
        expected = torch.tensor((128 / 255 - mean[channel]) / std[channel])
        assert torch.allclose(found[channel], expected, atol=0.02)


def test_the_whole_image_where_the_crop_is_all_of_it_is_the_model_s_own_transform():
    """A square of the size that the tower takes: nothing to fit, so that both must agree in each pixel."""
    clip, image = clip_with(size=48), gradient(48, 48)
    crop = RandomCrop.of(clip, 1.0, 0)
    whole = next(n for n in range(200) if crop_box(48, 48, 1.0, np.random.default_rng([0, 6, 0, n]))[2:] == (48, 48))
    assert torch.equal(crop(image, whole, 0), clip.preprocess(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crops_are_of_the_right_part_by_the_model_s_interpolation(interpolation):
    clip = clip_with(size=16, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
    found = RandomCrop.of(clip, 0.3, 9)(gradient(200, 100), 4, 1)
    top, left, h, w = crop_box(100, 200, 0.3, np.random.default_rng([9, 6, 1, 4]))
    assert math.isclose(found[0].mean(), (left + w / 2) / 200, abs_tol=0.02)
    assert math.isclose(found[1].mean(), (top + h / 2) / 100, abs_tol=0.02)
    assert math.isclose(found[0, 8, 15] - found[0, 8, 0], w / 200 * 15 / 16, abs_tol=0.02)


def test_bilinear_and_bicubic_differ():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    one, other = (RandomCrop.of(clip_with(size=32, interpolation=i), 0.5, 0) for i in ("bicubic", "bilinear"))
    assert not torch.equal(one(image, 0, 0), other(image, 0, 0))


@pytest.mark.parametrize("share", [0, -0.1, 1.01, 8])
def test_a_share_that_is_none_is_an_error(share):
    with pytest.raises(UserError, match=r"data\.min_crop is .*above 0 and at most 1"):
        RandomCrop.of(clip_with(size=8), share, 0)
