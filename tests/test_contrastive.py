"""CLIP's loss on captions, in random batches and in clusters: what is similar, what is logged, what scratch means."""

import dataclasses

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import same, weights

from pc_clip.core.config.train import FinetuneConfig, SamplerConfig
from pc_clip.core.errors import UserError
from pc_clip.data.embeddings import embed_images
from pc_clip.data.overlap import false_negative_rate
from pc_clip.data.training_data import load_dataset
from pc_clip.evals import base_of
from pc_clip.models import loading
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model
from pc_clip.train.loop import finetune
from pc_clip.train.methods import contrastive

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    """Three epochs of four steps each, in clusters of similar captions."""
    config = tiny_runs.settings("contrastive", tiny, batch_size=24, steps=None, epochs=3, max_steps_per_epoch=4)
    config.sampler = SamplerConfig(kind="clusters", cluster_size=4)
    return config


def make(config: FinetuneConfig, clip: Clip) -> contrastive.Method:
    return contrastive.Method(clip, load_dataset(config.data), config)


# -- what is similar -----------------------------------------------------------------------------------


def test_images_are_similar_by_the_mean_of_their_captions(config, example_clip):
    data = load_dataset(config.data)
    actual = make(config, example_clip).embeddings("text", now=True)
    for row in (0, 7, 95):
        mean = example_clip.embed_texts(data.captions[row]).mean(0)
        assert torch.allclose(actual[row], mean / mean.norm(), atol=1e-5)


def test_images_are_similar_by_cached_or_current_embeddings(config):
    clip = create_model(config.model.name)
    expected = torch.nn.functional.normalize(embed_images(clip, load_dataset(config.data)).z, dim=-1)
    assert torch.equal(make(config, clip).embeddings("image", True), expected)
    config.model.train = "both"
    method = make(config, clip)
    assert torch.allclose(method.embeddings("image", True), expected, atol=1e-5)
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(20.0)
    assert not torch.allclose(method.embeddings("image", True), expected, atol=1e-2)


# -- what is logged ------------------------------------------------------------------------------------


def test_hardness_is_the_negatives_cosine_and_false_negative_rate(config, example_clip):
    method, data = make(config, example_clip), load_dataset(config.data)
    batch = next(method.loader(0))
    with torch.no_grad():
        _, logs = method(batch)
        text = torch.nn.functional.normalize(example_clip.encode_text(batch.tokens), dim=-1)
    image = torch.nn.functional.normalize(batch.images, dim=-1)
    cosines = [float(text[i] @ image[j]) for i in range(24) for j in range(24) if i != j]
    assert float(logs["mean_negative"]) == pytest.approx(np.mean(cosines), abs=1e-5)
    assert float(logs["hardest_negative"]) == pytest.approx(np.reshape(cosines, (24, 23)).max(1).mean(), abs=1e-5)
    captions = [data.captions[data.ids.index(key)] for key in batch.ids]
    text_of = {tuple(example_clip.tokenizer([text])[0].tolist()): text for texts in captions for text in texts}
    width = example_clip.context_length - batch.tokens.shape[1]
    drawn = [text_of[tuple(torch.nn.functional.pad(row, (0, width)).tolist())] for row in batch.tokens]
    assert all(text in texts for text, texts in zip(drawn, captions))
    assert float(logs["false_negative_rate"]) == pytest.approx(false_negative_rate(drawn, captions))


# -- an epoch's batches depend on the weights at its beginning -------------------------------------------


@pytest.mark.slow
def test_online_uses_the_epochs_weights_offline_the_starts(config, monkeypatch):
    """Batches are made ahead by a thread, but never beyond the epoch."""
    plans, steps, begun, original = {}, [], [], contrastive.Method.begin_epoch

    def begin(self, epoch):
        begun.append((epoch, len(steps)))
        original(self, epoch)
        plans[self.config.name, epoch] = self.sampler.plan

    monkeypatch.setattr(contrastive.Method, "begin_epoch", begin)
    monkeypatch.setattr(contrastive.Method, "after_step", lambda self: steps.append(0))
    config.train.lr, config.train.log_every = 1e-2, 5
    for config.name, config.sampler.online in (("on", True), ("off", False)):
        run = finetune(config)
    assert begun == [(0, 0), (1, 4), (2, 8), (0, 12), (1, 16), (2, 20)]
    assert (plans["on", 0] == plans["off", 0]).mean() > 0.9  # but for rounding
    assert (plans["on", 2] == plans["off", 2]).mean() < 0.9
    log = tiny_runs.rows(run)
    assert [row["step"] for row in log] == [5, 10, 12]
    assert all(0 <= row["false_negative_rate"] <= 1 for row in log)  # found where there is a line of it


def test_the_logit_scale_stays_at_a_hundred_or_below(config):
    clip = create_model(config.model.name)
    method = make(config, clip)
    clip.model.logit_scale.requires_grad_(True)
    with torch.no_grad():
        clip.model.logit_scale.fill_(7.0)
    method.after_step()
    assert clip.model.logit_scale.exp().item() == pytest.approx(100)


# -- from scratch --------------------------------------------------------------------------------------


def test_weights_from_scratch_are_drawn_by_the_seed(tiny):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (create_model(tiny, SCRATCH, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(one, again) and not same(one, other)


@pytest.mark.slow
def test_batch_statistics_are_learnt_from_scratch_only(config, tiny_resnet):
    """And it has no model before it that baselines could be of."""
    config.model.name, config.model.train, config.sampler, config.train.epochs = tiny_resnet, "both", SamplerConfig(), 1
    name, run = "visual.bn1.running_mean", finetune(config)
    assert torch.equal(weights(run)[name], create_model(tiny_resnet).model.state_dict()[name])
    assert base_of(loading.load_model(run)) is not None
    config.name, config.model.pretrained = "scratch", SCRATCH
    run = finetune(config)
    assert weights(run)[name].abs().max() > 1e-4  # zero at first
    assert loading.load_model(run).pretrained == SCRATCH and base_of(loading.load_model(run)) is None


def test_what_cannot_be_learnt_from_or_divided_by_is_refused(config, example_clip):
    data = load_dataset(config.data)
    with pytest.raises(UserError, match="method contrastive needs captions, and example has none"):
        contrastive.Method(example_clip, dataclasses.replace(data, captions=None), config)
    config.contrastive.temperature = 0.0
    with pytest.raises(UserError, match="contrastive.temperature is .*; it must be above 0, or null"):
        make(config, example_clip)
