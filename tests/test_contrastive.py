"""CLIP's loss on captions, in random batches and in clusters: what is similar, what is logged, what a run remembers."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from interrupting import interrupted_and_continued
from safetensors.torch import load_file

from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig, SamplerConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data.embeddings import embed_images
from pc_clip.data.overlap import likely_false
from pc_clip.data.training_data import load_dataset
from pc_clip.evals import base_of
from pc_clip.models import loading
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.train.loop import finetune
from pc_clip.train.methods import contrastive


@pytest.fixture
def config(small_example) -> FinetuneConfig:
    """Three epochs of four steps each on the example's first scenes, in clusters of similar captions."""
    found = FinetuneConfig(name="a", method="contrastive", device="cpu")
    found.model.train, found.data.split = "text", "train"
    found.train = TrainConfig(
        batch_size=24, epochs=3, max_steps_per_epoch=4, lr=1e-3, optimizer="adamw", save_every=3, log_every=1, threads=1
    )
    found.sampler = SamplerConfig(kind="clusters", cluster_size=4)
    found.contrastive = ContrastiveConfig()
    return found


def make(config: FinetuneConfig, clip: Clip) -> contrastive.Method:
    return contrastive.Method(clip, load_dataset(config.data), config)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# -- what is similar -----------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [True, False])
def test_images_are_similar_by_the_mean_of_their_captions(config, example_clip, now):
    method, data = make(config, example_clip), load_dataset(config.data)
    found = method.embeddings("text", now)
    for row in (0, 7, 299):
        mean = example_clip.embed_texts(data.captions[row]).mean(0)
        assert torch.allclose(found[row], mean / mean.norm(), atol=1e-5)


def test_or_by_themselves_as_they_are_cached_or_by_a_tower_that_learns(config, example_clip):
    data = load_dataset(config.data)
    expected = torch.nn.functional.normalize(embed_images(example_clip, data).z, dim=-1)
    assert torch.equal(make(config, example_clip).embeddings("image", True), expected)
    config.model.train, clip = "both", Clip.create("example")
    method = make(config, clip)
    assert torch.allclose(method.embeddings("image", True), expected, atol=1e-5)
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(2.0)
    assert not torch.allclose(method.embeddings("image", True), expected, atol=1e-2)


def test_batches_are_similar_captions_and_so_harder_than_random_ones(config, example_clip):
    clustered = make(config, example_clip)
    config.sampler = SamplerConfig()
    at_random = make(config, example_clip)
    hard = {}
    for method in (clustered, at_random):
        with torch.no_grad():
            logs = [method(batch)[1] for batch in islice(method.loader(0), 4)]
        hard[method] = {name: np.mean([float(each[name]) for each in logs]) for name in logs[0]}
    for name in ("mean_negative", "hardest_negative", "likely_false_negatives"):
        assert hard[clustered][name] > 1.05 * hard[at_random][name]


# -- what is logged ------------------------------------------------------------------------------------


def test_hardness_is_the_mean_cosine_of_wrong_pairs_and_the_share_of_likely_false_ones(config, example_clip):
    method, data = make(config, example_clip), load_dataset(config.data)
    batch = next(method.loader(0))
    with torch.no_grad():
        _, logs = method(batch)
        text = torch.nn.functional.normalize(example_clip.encode_text(batch.tokens), dim=-1)
    image = torch.nn.functional.normalize(batch.images, dim=-1)
    cosines = [float(text[i] @ image[j]) for i in range(24) for j in range(24) if i != j]
    assert float(logs["mean_negative"]) == pytest.approx(np.mean(cosines), abs=1e-5)
    assert float(logs["hardest_negative"]) == pytest.approx(np.reshape(cosines, (24, 23)).max(1).mean(), abs=1e-5)
    told = [data.captions[data.ids.index(key)] for key in batch.ids]
    tokens = {tuple(example_clip.tokenizer([text])[0].tolist()): text for texts in told for text in texts}
    width = example_clip.context_length - batch.tokens.shape[1]
    said = [tokens[tuple(torch.nn.functional.pad(row, (0, width)).tolist())] for row in batch.tokens]
    assert all(text in texts for text, texts in zip(said, told))
    assert float(logs["likely_false_negatives"]) == pytest.approx(likely_false(said, told))
    assert likely_false(said, told) > 0


def test_both_are_in_the_log_of_a_run(config):
    found = rows(finetune(config))
    assert len(found) == 12
    assert all(
        -1 < row["mean_negative"] < row["hardest_negative"] < 1 and 0 <= row["likely_false_negatives"] <= 1
        for row in found
    )


# -- an epoch's batches depend on the weights at its beginning -------------------------------------------


def test_an_epoch_begins_when_all_steps_before_it_are_done(config, monkeypatch):
    """Batches are made ahead by a thread, but never beyond the epoch."""
    steps, begun, original = [], [], contrastive.Method.begin_epoch

    def begin(self, epoch):
        begun.append((epoch, len(steps)))
        return original(self, epoch)

    monkeypatch.setattr(contrastive.Method, "begin_epoch", begin)
    monkeypatch.setattr(contrastive.Method, "after_step", lambda self: steps.append(0))
    finetune(config)
    assert begun == [(0, 0), (1, 4), (2, 8)]


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("stop", [3, 4, 6, 8, 11])
def test_a_run_continued_within_an_epoch_or_between_two_ends_the_same(config, monkeypatch, stop, online):
    config.sampler.online, config.train.save_every = online, 1
    straight = weights(finetune(config))
    config.name = "b"
    assert same(straight, weights(interrupted_and_continued(config, stop, monkeypatch)))


def test_online_and_offline_part_after_the_first_epoch(config):
    plans, original = {}, contrastive.Method.begin_epoch

    def begin(self, epoch):
        original(self, epoch)
        plans[self.config.name, epoch] = self.sampler.plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive.Method, "begin_epoch", begin)
        for config.name, config.sampler.online in (("on", True), ("off", False)):
            finetune(config)
    assert (plans["on", 0] == plans["off", 0]).mean() > 0.9  # but for rounding
    assert (plans["on", 2] == plans["off", 2]).mean() < 0.9


def test_the_logit_scale_stays_at_a_hundred_or_below(config):
    clip = Clip.create("example")
    method = make(config, clip)
    clip.model.logit_scale.requires_grad_(True)
    with torch.no_grad():
        clip.model.logit_scale.fill_(7.0)
    method.after_step()
    assert clip.model.logit_scale.exp().item() == pytest.approx(100)


# -- from scratch --------------------------------------------------------------------------------------


@pytest.fixture
def scratch(config) -> FinetuneConfig:
    config.model.pretrained, config.model.train, config.sampler = SCRATCH, "both", SamplerConfig()
    config.train.steps = 6
    return config


def test_weights_from_scratch_are_drawn_by_the_seed(example_clip):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (Clip.create("example", SCRATCH, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(one, again) and not same(one, other)
    assert not torch.equal(one["visual.conv1.weight"], example_clip.model.state_dict()["visual.conv1.weight"])


def test_a_model_from_scratch_learns_its_batch_statistics_and_a_finetuned_one_keeps_its_own(scratch):
    name = "visual.bn1.running_mean"
    assert weights(finetune(scratch))[name].abs().max() > 1e-4  # zero at first
    scratch.name, scratch.model.pretrained = "b", None
    assert torch.equal(weights(finetune(scratch))[name], Clip.create("example").model.state_dict()[name])


def test_a_run_from_scratch_can_be_continued(scratch, monkeypatch):
    straight = weights(finetune(scratch))
    scratch.name = "b"
    assert same(straight, weights(interrupted_and_continued(scratch, 4, monkeypatch)))


def test_it_has_no_model_before_it_that_baselines_could_be_of(scratch):
    scratch.train.steps = 1
    clip = loading.load_model(finetune(scratch))
    assert clip.pretrained == SCRATCH
    assert base_of(clip) is None
    assert base_of(Clip.create("example")) is not None


def test_captions_are_needed(config, example_clip):
    data = load_dataset(config.data)
    with pytest.raises(UserError, match="method contrastive needs captions, and example has none"):
        contrastive.Method(example_clip, type(data)(**{**vars(data), "captions": None}), config)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_means_nothing_is_refused(config, example_clip, temperature):
    config.contrastive.temperature = temperature
    with pytest.raises(UserError, match="contrastive.temperature is .*; it must be above 0, or null"):
        make(config, example_clip)


def test_what_is_only_for_the_log_is_found_where_there_is_a_line_of_it(config, example_clip):
    config.train.log_every, config.train.epochs = 3, 2  # of eight steps
    found = [float(batch.likely_false) for epoch in (0, 1) for batch in make(config, example_clip).loader(epoch)]
    assert [np.isfinite(value) for value in found] == [(n + 1) % 3 == 0 or n == 7 for n in range(8)]


# -- the earlier name ------------------------------------------------------------------------------------


def test_the_earlier_name_is_told_of(config):
    config.method = "captions"
    with pytest.raises(UserError, match="method captions is called contrastive now; so is its group of settings"):
        finetune(config)


def test_a_run_by_the_earlier_name_is_known(config):
    config.sampler = SamplerConfig()
    path = finetune(config) / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["method"], settings["captions"] = "captions", settings.pop("contrastive")
    path.write_text(yaml.safe_dump(settings))
    written = (path.parent / "model.safetensors").stat().st_mtime_ns
    finetune(config)
    assert (path.parent / "model.safetensors").stat().st_mtime_ns == written
