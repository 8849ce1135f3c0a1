"""Fixtures: a clean working folder for every test, small data, a tiny model without training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import hypothesis
import tiny_runs
import torch
from accelerate.state import AcceleratorState

from pc_clip.data import example_sets
from pc_clip.example import scenes
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)
hypothesis.settings.register_profile("shared machine", deadline=None, max_examples=50)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Each test works in a folder of its own: runs, results and caches never meet. accelerate starts anew."""
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def small_example(monkeypatch):
    """The embedded example with few scenes, for tests that only need it to run."""
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 300, "val": 60, "test": 80})
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", {"train": 64, "val": 20, "test": 24})


@pytest.fixture
def small_runs(monkeypatch):
    """A world in which finetuning takes half a second."""
    tiny_runs.make_small(monkeypatch)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The name of a tiny CLIP with random weights: towers of two layers, 16 wide."""
    return tiny_runs.tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory) -> str:
    """The same with a convolutional image tower, which has batch statistics."""
    return tiny_runs.tiny_clip(tmp_path_factory.mktemp("models") / "resnet", vision_cfg=tiny_runs.RESNET)


@pytest.fixture(scope="session")
def example_clip() -> Clip:
    """The shipped model. Tests must not change its weights."""
    return create_model("example")


@pytest.fixture
def coco_folder(tmp_path) -> Path:
    """A miniature COCO tree: 12 pictures of scenes, two captions each."""
    from pc_clip.example.world import captions, scene

    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(12):
        name = f"{i:012d}.jpg"
        scenes.draw(scene("val", i)).save(root / "val2017" / name)
        images.append({"id": i, "file_name": name})
        annotations += [{"image_id": i, "id": 10 * i + k, "caption": c} for k, c in enumerate(captions("val", i)[:2])]
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return root
