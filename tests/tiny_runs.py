"""Small finetuning runs: a tiny CLIP, settings for each method, and what is read from a run's folder."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest
import sample_differences
import torch
from safetensors.torch import load_file, save_file

from pc_clip.core import environment
from pc_clip.core.config.settings import ModelConfig
from pc_clip.core.config.train import METHODS, ChangeConfig, FinetuneConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.data import example_sets, tokens
from pc_clip.models.clip import SCRATCH
from pc_clip.models.loading import create_model
from pc_clip.train import loop
from pc_clip.train.loop import finetune

import open_clip  # isort: skip

DATASETS = {"preference": "example_relations", "change": "example_changes"}
RESNET = {"image_size": 32, "patch_size": None, "width": 8, "layers": [1, 1, 1, 1]}
VIT = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}

_get_tokenizer, _identity = functools.cache(open_clip.get_tokenizer), functools.cache(tokens.identity)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Few scenes, no process of git a run, and CLIP's tokenizer built and named once: these would take most time."""
    patch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 96, "val": 24, "test": 24})
    patch.setattr(example_sets, "CHANGES_SIZES", {"train": 48, "val": 16, "test": 16})
    patch.setattr(environment, "commit", lambda: None)
    patch.setattr(open_clip, "get_tokenizer", _get_tokenizer)
    patch.setattr(tokens, "identity", _identity)


def tiny_clip(folder: Path, copied: Path | None = None, **parts: dict) -> str:
    """The name of a tiny CLIP with random weights, which are kept in a folder. parts: vision_cfg, text_cfg.

    copied: a folder of further files, of a Hugging Face text tower for instance.
    """
    shutil.copytree(copied, folder) if copied else folder.mkdir()
    model = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT} | parts
    transform = {"mean": [0.5] * 3, "std": [0.25] * 3}
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": transform})
    weights = create_model(f"local-dir:{folder}", SCRATCH).model.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def put(config: FinetuneConfig, settings: dict[str, object]) -> FinetuneConfig:
    """A copy in which settings, GROUP.NAME or NAME, have other values."""
    config = copy.deepcopy(config)
    for setting, value in settings.items():
        group, _, name = setting.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value)
    return config


def settings(method: str, model: str, **train) -> FinetuneConfig:
    """Six steps of a method, saved after every second, in the folder runs/a."""
    config = FinetuneConfig(name="a", method=method, device="cpu", model=ModelConfig(name=model, train="text"))
    config.data.dataset, config.data.split = DATASETS.get(method, "example"), "train"
    usual = {"batch_size": 8, "steps": 6, "lr": 1e-3, "save_every": 2, "log_every": 1, "threads": 1}
    config.train = TrainConfig(**usual | train)
    setattr(config, method, METHODS[method]())
    if method == "pairwise":
        sample_differences.write(Path("d.jsonl"))
        config.data.differences = "d.jsonl"
    if method == "change":
        config.model.train = "both"
        config.change = ChangeConfig("caption", width=16, heads=2, layers=1, clip_lr_scale=0.1, validation="none")
    return config


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model.safetensors")


def start(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    return create_model(config.model.name).model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(run: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> set[str]:
    """The names of the weights that a run has changed."""
    return {name for name in before if not torch.equal(run[name], before[name])}


def rows(run: Path | str, name: str = "metrics") -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run) / f"{name}.jsonl").read_text().splitlines()]


def attempt(config: FinetuneConfig) -> str:
    """How a run ends: done, interrupted, or the error."""
    try:
        finetune(config)
        return "done"
    except KeyboardInterrupt:
        return "interrupted"
    except UserError as error:
        return str(error)


def interrupt(config: FinetuneConfig, step: int) -> None:
    """Run until a batch of that step is asked for; what was saved before is kept."""
    original = loop.batches

    def interrupted(method, done, total, device):
        for n, batch in enumerate(original(method, done, total, device), start=done):
            if n == step:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)


def assert_resume_is_exact(config: FinetuneConfig, *stops: int) -> None:
    """A run that is interrupted at some steps and continued each time ends as a straight one, bit for bit."""
    config.name = "straight"
    straight = weights(finetune(config))
    config.name = "resumed"
    for step in stops:
        interrupt(config, step)
        config.resume = True
    assert same(straight, weights(finetune(config)))
