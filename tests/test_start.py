"""model.start: training that begins with a checkpoint, by any method and in every way of training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import weights

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.data.registry import open_dataset
from pc_clip.models import loading
from pc_clip.models.caption_decoder import Shape
from pc_clip.models.change_model import ChangeClip, fresh
from pc_clip.models.loading import create_model
from pc_clip.models.vocabulary import PAD, Vocabulary
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    """Two steps of method change by a small decoder."""
    return tiny_runs.settings("change", tiny, steps=2)


def captioner(config: FinetuneConfig, texts: list[str], shape: Shape) -> str:
    """A checkpoint with a decoder that knows the words of some texts."""
    clip = create_model(config.model.name)
    clip = ChangeClip.of(clip, fresh(clip, None, seed=0))
    clip.change.add_decoder(Vocabulary.of(clip.tokenizer, texts), shape)
    loading.save_model(Path("start.safetensors"), clip)
    return "start.safetensors"


def method(config: FinetuneConfig) -> change.Method:
    clip = loading.load_model(config.model.start) if config.model.start else create_model(config.model.name)
    return change.Method(clip, open_dataset("example_changes", None, "train"), config)


def sentences() -> list[str]:
    return [text for pair in open_dataset("example_changes", None, "train").changes for text in pair.sentences]


# -- any method ----------------------------------------------------------------------------------------


def test_averaging_is_with_the_checkpoint_that_the_run_began_with(tiny):
    config = tiny_runs.settings("pairwise", tiny, steps=2, lr=1e-2)
    config.model.start = str(finetune(config))
    config.overwrite = True
    with pytest.raises(UserError, match="model.start runs/a lies in the run that would take its place"):
        finetune(config)
    config.model.lora_rank = 2  # what adapters add is halved, too
    for config.name, config.train.blend in (("whole", 1.0), ("half", 0.5)):
        finetune(config)
    start, whole, half = (weights(f"runs/{name}") for name in ("a", "whole", "half"))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.equal(start[name], whole[name])
    torch.testing.assert_close(half[name], (start[name] + whole[name]) / 2)


def test_a_start_that_something_else_contradicts_is_refused(config):
    config.model.name = "example_vit"
    config.model.start = captioner(config, ["a"], Shape(1, 2, 16, 9))
    config.model.pretrained = "scratch"
    with pytest.raises(UserError, match="model.start and model.pretrained both say which weights"):
        finetune(config)
    config.model.pretrained, config.model.name = None, "example"
    with pytest.raises(UserError, match="says that it is of example_vit, not example; leave --model.name out"):
        finetune(config)
    assert not Path("runs/a").exists()


def test_weights_for_pairs_that_nothing_describes_are_not_dropped(config):
    path = Path(captioner(config, ["a"], Shape(1, 2, 16, 9)))
    content = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["pc_clip"])
    del about["change"]
    save_file(content, path, {"pc_clip": json.dumps(about)})
    with pytest.raises(UserError, match=r"does not fit .*Unexpected key.*change\.decoder"):
        loading.load_model(path)


# -- a decoder that learns on --------------------------------------------------------------------------


def test_a_decoder_that_learns_on_drops_what_the_settings_say(config):
    """A checkpoint holds weights alone, and a decoder made from it drops nothing by itself."""
    config.model.start, actual = captioner(config, sentences(), Shape(1, 2, 16, 32)), []
    for config.change.dropout in (0.0, 0.5):
        made = method(config)
        batch = next(made.loader(0))
        actual.append([made(batch._replace(seed=seed))[0].item() for seed in (1, 1, 2)])
    (a, same, b), (c, again, d) = actual
    assert a == same == b and c == again and len({a, c, d}) == 3


def test_what_a_decoder_cannot_say_or_cuts_is_counted(config):
    config.model.start = captioner(config, ["a red star"], Shape(1, 2, 24, 17))
    notes = "; ".join(method(config).notes)
    assert "learns on, as it is: layers 1, heads 2, width 24, max_length 17" in notes
    assert f"{len(set(sentences()))} sentences have subwords outside the vocabulary" in notes
    data = open_dataset("example_changes", None, "train")
    long = dataclasses.replace(data.changes[0], sentences=("red " * 120,))
    config.model.start, config.change.max_length, config.train.batch_size = "", 100, 1  # longer than CLIP reads
    made = change.Method(create_model(config.model.name), dataclasses.replace(data, changes=(long,)), config)
    assert "1 sentences longer than 100 subwords, cut" in made.notes
    assert int((next(made.loader(0)).tokens != PAD).sum()) == 100


# -- ways of training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, towers", [("retrieve", {"visual", "transformer"}), ("caption", {"visual"})])
def test_adapters_learn_in_the_towers_that_a_stage_reaches(config, stage, towers):
    config.change.stage, config.model.lora_rank, config.change.clip_lr_scale = stage, 2, 1.0
    saved = weights(finetune(config))
    moved = tiny_runs.changed(saved, tiny_runs.start(config))
    assert {name.split(".")[0] for name in moved} - {"text_projection"} == towers
    assert ("visual.proj" in moved) == (stage == "retrieve")
    assert not any("lora" in name or "parametrizations" in name for name in saved)
    assert loading.load_model("runs/a").change.encoder.blocks == 2


def test_recomputing_keeps_less_and_gives_the_same_gradients():
    clip = create_model("example_vit")
    encoder = fresh(clip, None, seed=0).encoder
    pictures = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for recompute in (False, True):
        clip.model.set_grad_checkpointing(recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            loss = encoder(*pictures).square().mean()
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, clip.model.visual.conv1.weight)[0])
    assert kept[1] < kept[0] / 3
    torch.testing.assert_close(*gradients)


def test_captions_that_cannot_be_scored_stop_a_run_before_it_begins(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)  # as if it were not installed
    config.change.validation = "val"
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        finetune(config)
    assert not Path("runs/a/config.yaml").exists()
