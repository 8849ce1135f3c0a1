"""model.start: training that begins with a checkpoint, by any method and in every way of training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import sample_differences
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pc_clip.core import cache
from pc_clip.core.config.train import ChangeConfig, FinetuneConfig, PairwiseConfig, SamplerConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data.registry import open_dataset
from pc_clip.models import loading
from pc_clip.models.caption_decoder import Shape
from pc_clip.models.change_model import ChangeClip, fresh
from pc_clip.models.clip import Clip
from pc_clip.models.vocabulary import PAD, Vocabulary
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change


@pytest.fixture(autouse=True)
def _small(small_example):
    pass


@pytest.fixture
def config() -> FinetuneConfig:
    """Two steps of method change by a small decoder."""
    found = FinetuneConfig(name="a", method="change", out="runs", device="cpu")
    found.data.dataset, found.data.split, found.model.train = "example_changes", "train", "both"
    found.change = ChangeConfig("caption", width=16, heads=2, layers=1, clip_rate=0.1, validation="none")
    found.train = TrainConfig(batch_size=8, steps=2, lr=1e-3, log_every=1, threads=1)
    return found


def captioner(path: Path, texts: list[str], shape: Shape) -> str:
    """A checkpoint with a decoder that knows the words of some texts."""
    clip = Clip.create("example_vit")
    clip = ChangeClip.of(clip, fresh(clip, None, seed=0))
    clip.change.add_decoder(Vocabulary.of(clip.tokenizer, texts), shape)
    loading.save_model(path, clip)
    return str(path)


def method(config: FinetuneConfig) -> change.Method:
    clip = loading.load_model(config.model.start) if config.model.start else Clip.create("example_vit")
    return change.Method(clip, open_dataset("example_changes", None, "train"), config)


# -- any method ----------------------------------------------------------------------------------------


def test_averaging_is_with_the_checkpoint_that_the_run_began_with():
    sample_differences.write(Path("d.jsonl"))
    config = FinetuneConfig(name="first", out="runs", device="cpu")
    config.data.split, config.data.differences, config.pairwise = "train", "d.jsonl", PairwiseConfig()
    config.train = TrainConfig(batch_size=8, steps=2, lr=1e-2, log_every=1, threads=1)
    config.model.start = str(finetune(config))
    for config.name, config.train.blend in (("whole", 1.0), ("half", 0.5)):
        finetune(config)
    start, whole, half = (load_file(f"runs/{name}/model.safetensors") for name in ("first", "whole", "half"))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.equal(start[name], whole[name])
    torch.testing.assert_close(half[name], (start[name] + whole[name]) / 2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pretrained": "scratch"}, "model.start and model.pretrained both say which weights"),
        ({"name": "example"}, "says that it is of example_vit, not example; leave --model.name out"),
    ],
)
def test_a_start_that_something_else_contradicts_is_refused(config, settings, message):
    config.model.start = captioner(Path("start.safetensors"), ["a"], Shape(1, 2, 16, 9))
    for name, value in settings.items():
        setattr(config.model, name, value)
    with pytest.raises(UserError, match=message):
        finetune(config)
    assert not Path("runs/a").exists()


def test_a_run_cannot_take_the_place_of_its_own_start(config):
    config.model.start = str(finetune(config))
    config.overwrite = True
    with pytest.raises(UserError, match="model.start runs/a lies in the run that would take its place"):
        finetune(config)
    assert Path("runs/a/model.safetensors").is_file()


def test_weights_for_pairs_that_nothing_describes_are_not_dropped():
    path = Path(captioner(Path("start.safetensors"), ["a"], Shape(1, 2, 16, 9)))
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["pc_clip"])
    del about["change"]
    save_file(weights, path, {"pc_clip": json.dumps(about)})
    with pytest.raises(UserError, match="has .* weights for pairs of images, but not what describes them"):
        loading.load_model(path)


# -- a decoder that learns on --------------------------------------------------------------------------


def test_a_decoder_that_learns_on_drops_what_the_settings_say(config):
    """A checkpoint holds weights alone, and a decoder made from it drops nothing by itself."""
    texts = [text for found in open_dataset("example_changes", None, "train").changes for text in found.sentences]
    config.model.start = captioner(Path("start.safetensors"), texts, Shape(1, 2, 16, 32))
    losses = []
    for config.change.dropout in (0.0, 0.5):
        made = method(config)
        batch = next(made.loader(0))
        losses.append([made(batch._replace(seed=seed))[0].item() for seed in (1, 1, 2)])
    (a, same, b), (c, d, e) = losses
    assert a == same == b
    assert c == d
    assert len({a, c, e}) == 3


def test_what_a_decoder_that_learns_on_cannot_say_is_told(config):
    config.model.start = captioner(Path("start.safetensors"), ["a red star"], Shape(1, 2, 24, 17))
    told = "; ".join(method(config).notes)
    distinct = {text for found in open_dataset("example_changes", None, "train").changes for text in found.sentences}
    assert "learns on, as it is: layers 1, heads 2, width 24, max_length 17" in told
    assert f"{len(distinct)} sentences have pieces of words that it does not know" in told


def test_sentences_that_are_cut_are_counted_however_long_they_may_be(config):
    data = open_dataset("example_changes", None, "train")
    long = dataclasses.replace(data.changes[0], sentences=("red " * 120,))
    config.change.max_length, config.train.batch_size = 100, 1  # longer than CLIP reads
    made = change.Method(Clip.create("example_vit"), dataclasses.replace(data, changes=(long,)), config)
    assert "1 sentences longer than 100 pieces of words, cut" in made.notes
    assert int((next(made.loader(0)).tokens != PAD).sum()) == 100


def test_two_entries_on_the_same_images_are_none_of_each_others_negatives(config):
    data = open_dataset("example_changes", None, "train")
    first = data.changes[0]
    twice = tuple(dataclasses.replace(first, sentences=(text,)) for text in first.sentences[:2])
    config.change.stage, config.train.batch_size = "retrieve", 2
    made = change.Method(Clip.create("example_vit"), dataclasses.replace(data, changes=twice), config)
    batch = next(made.loader(0))
    assert sorted(batch.number.tolist()) == [0, 1]
    assert [sorted(row) for row in batch.said.tolist()] == [[0, 1], [0, 1]]


# -- ways of training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, towers", [("retrieve", {"visual", "transformer"}), ("caption", {"visual"})])
def test_adapters_learn_in_the_towers_that_a_stage_reaches(config, stage, towers):
    config.change.stage, config.model.lora_rank, config.change.clip_rate = stage, 2, 1.0
    finetune(config)
    saved, start = load_file("runs/a/model.safetensors"), Clip.create("example_vit").model.state_dict()
    moved = {name for name in start if not torch.equal(saved[name], start[name])}
    assert {name.split(".")[0] for name in moved} - {"text_projection"} == towers
    assert ("visual.proj" in moved) == (stage == "retrieve")
    assert not any("lora" in name or "parametrizations" in name for name in saved)
    assert loading.load_model("runs/a").change.encoder.blocks == 6


def test_recomputing_keeps_less_and_gives_the_same_gradients():
    clip = Clip.create("example_vit")
    encoder = fresh(clip, None, seed=0).encoder
    pictures = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for recompute in (False, True):
        clip.model.set_grad_checkpointing(recompute)
        kept.append(0)

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = encoder(*pictures).square().mean()
        gradients.append(torch.autograd.grad(loss, clip.model.visual.conv1.weight)[0])
    assert kept[1] < kept[0] / 3
    torch.testing.assert_close(*gradients)


def test_kept_features_do_not_depend_on_the_decoder(config):
    config.change.freeze = True
    for config.change.width in (16, 32):
        method(config)
    assert len(list(cache.CACHE.glob("pairs-*"))) == 1


def test_settings_of_clusters_that_mean_nothing_are_told(config):
    config.sampler = SamplerConfig(cluster_size=4)
    assert any("sampler.cluster_size has no effect" in note for note in method(config).notes)


# -- said before the first epoch -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", change.STAGES)
def test_one_pair_chooses_no_epoch(config, stage):
    config.change.stage, config.change.validation, config.change.validate_on = stage, "val", 1
    with pytest.raises(UserError, match="example_changes/val gives 1 pairs with .* raise change.validate_on"):
        method(config)


def test_captions_that_cannot_be_scored_stop_a_run_before_it_begins(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)  # as if it were not installed
    config.change.validation = "val"
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        finetune(config)
    assert not Path("runs/a/config.yaml").exists()


def test_weights_are_not_averaged_where_new_ones_have_no_start(config):
    config.train.blend = 0.5
    with pytest.raises(UserError, match="leave train.blend out"):
        finetune(config)
