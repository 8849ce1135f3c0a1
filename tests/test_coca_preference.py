"""CLIP-PO of a CoCa model: its decoder's log-likelihood counts beside the similarity, from the start on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_coca import build

from pc_clip.core import environment
from pc_clip.core.config.settings import ModelConfig
from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets
from pc_clip.models.clip import Clip
from pc_clip.train.loop import finetune


@pytest.fixture
def config(monkeypatch) -> FinetuneConfig:
    weights = build(Path("coca")).model.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, "coca/open_clip_model.safetensors")
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 40, "val": 8, "test": 8})
    monkeypatch.setattr(environment, "commit", lambda: None)
    found = FinetuneConfig(name="a", method="preference", device="cpu", model=ModelConfig(name="local-dir:coca"))
    found.data.dataset = "example_relations"
    found.train = TrainConfig(batch_size=8, steps=3, lr=1e-2, log_every=1, threads=1)
    found.preference = PreferenceConfig(captioning=0.5, beta=1.0)
    return found


@pytest.mark.parametrize(
    "train, crop, rank",
    [("text", 1.0, 0), ("both", 1.0, 0), ("both", 0.5, 0), ("text", 1.0, 2), ("text_blocks", 1.0, 0)],
)
def test_it_begins_at_log_2_and_learns_what_model_train_names(config, train, crop, rank):
    config.model.train, config.data.min_crop, config.model.lora_rank = train, crop, rank
    run = finetune(config)
    first, *_, last = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert abs(first - math.log(2)) < 1e-3 < abs(last - math.log(2))
    start, end = Clip.create(config.model.name).model.state_dict(), load_file(run / "model.safetensors")
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert ("text_decoder" in changed) == (train != "text_blocks") and ("visual" in changed) == (train == "both")


def test_without_captions_to_weigh_the_decoder_gets_no_adapters(config):
    config.preference.captioning, config.model.train, config.model.lora_rank = 0.0, "text", 2
    run = finetune(config)
    start, end = Clip.create(config.model.name).model.state_dict(), load_file(run / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and not any(name.startswith("text_decoder.") for name in changed)
    notes = json.loads((run / "environment.json").read_text())["notes"]
    assert f"adapters of rank 2 on {len(changed)} weights" in notes


def test_captions_are_not_weighed_without_images(config):
    config.data.embeddings = "some.safetensors"
    with pytest.raises(UserError, match="preference.captioning reads the images.*data.embeddings.*leave one of the tw"):
        finetune(config)


def test_other_models_have_no_captions_to_weigh(config):
    config.model = ModelConfig(name="example")
    with pytest.raises(UserError, match="no CoCa"):
        finetune(config)
