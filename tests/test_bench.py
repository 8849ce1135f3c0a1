"""The benchmarks: both sides of a comparison compute the same, and the house is measured as it stands."""

import sys
from pathlib import Path

import open_clip
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import size
import step as steps

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture
def model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return steps.roughened(open_clip.CLIP(**CONFIG))


def test_the_published_step_and_ours_have_one_loss_and_one_gradient(model):
    batch = steps.batch(model, 12, 0)
    published = steps.published(model, update=False)
    loss, exact = published(*batch), steps.gradient(model, published, batch)
    assert exact.norm() > 0.01
    for recompute in (False, True):
        ours = steps.ours(model, bf16=False, recompute=recompute, update=False)
        assert ours(*batch) == pytest.approx(loss, abs=1e-5)
        assert (steps.gradient(model, ours, batch) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.slow
def test_no_module_of_the_package_lies_on_a_circle_of_imports():
    height, circle = size.floors(size.imports(size.modules()))
    assert (height > 5, circle) == (True, [])
