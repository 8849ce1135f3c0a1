"""Method change: its two losses, what learns, the best epoch, a start to go on from, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_runs import rows, same, weights

from pc_clip.core.config.train import ChangeConfig, FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets
from pc_clip.data import pairs as image_pairs
from pc_clip.data.dataset import Dataset, with_changes
from pc_clip.data.download import file_digest
from pc_clip.data.registry import open_dataset
from pc_clip.models import loading
from pc_clip.models.change_model import PREFIX
from pc_clip.models.loading import create_model
from pc_clip.models.vocabulary import END, PAD
from pc_clip.train import loop, losses
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    """Two epochs of three steps of the second stage, by a small decoder; the best is chosen on six pairs."""
    config = tiny_runs.settings("change", tiny, steps=None, epochs=2, max_steps_per_epoch=3)
    config.change.validation, config.change.validate_on = "val", 6
    return config


def pairs() -> Dataset:
    return open_dataset("example_changes", None, "train")


def method(config: FinetuneConfig, data: Dataset | None = None) -> change.Method:
    return change.Method(create_model(config.model.name), data or pairs(), config)


# -- losses --------------------------------------------------------------------------------------------


def test_texts_that_are_said_of_a_pair_are_none_of_its_negatives():
    torch.manual_seed(0)
    pair, text = torch.randn(4, 6), torch.randn(4, 6)
    number = torch.tensor([0, 1, 2, 1])  # pairs 1 and 3 came with the same sentence
    sentences = torch.tensor([[0, -1], [1, 2], [2, -1], [1, -1]])  # and what pair 2 came with is said of pair 1 too
    z = 7.0 * F.normalize(pair, dim=-1) @ F.normalize(text, dim=-1).T
    against_pair = {0: [0, 1, 2, 3], 1: [0, 1], 2: [0, 1, 2, 3], 3: [0, 2, 3]}  # texts that each pair is asked about
    against_text = {0: [0, 1, 2, 3], 1: [0, 1, 2], 2: [0, 2, 3], 3: [0, 2, 3]}
    expected = -sum(
        z[n, n] - z[n, among].logsumexp(0) + z[n, n] - z[others, n].logsumexp(0)
        for n, among, others in ((n, against_pair[n], against_text[n]) for n in range(4))
    ) / (2 * 4)
    torch.testing.assert_close(losses.info_nce_of_several(pair, text, sentences, number, 7.0), expected)
    alone = losses.info_nce_of_several(pair, text, sentences[:, :0], number, 7.0)
    torch.testing.assert_close(alone, losses.info_nce(pair, text, 1 / 7.0))


@pytest.mark.parametrize("smoothing, several", [(0.0, 1), (0.1, 3)])
def test_a_sentences_loss_is_the_mean_over_its_tokens(config, smoothing, several):
    """Of several sentences on a pair each is as if it were alone."""
    config.change.dropout, config.change.label_smoothing, config.change.sentences = 0.0, smoothing, several
    made = method(config)
    batch = next(made.loader(0))
    loss, logs = made(batch)
    total, count, right = 0.0, 0, 0
    seen = made.change.encoder(batch.before, batch.after)
    for n, sentences in enumerate(batch.tokens.tolist()):
        assert len(sentences) == several
        for sentence in sentences:
            words = [word for word in sentence if word != PAD]
            for k in range(1, len(words)):
                guess = made.change.decoder(torch.tensor([words[:k]]), seen[n : n + 1])[0, -1].log_softmax(-1)
                total -= (1 - smoothing) * guess[words[k] - END] + smoothing * guess.mean()
                count, right = count + 1, right + int(guess.argmax() + END == words[k])
    torch.testing.assert_close(loss, total / count)
    assert float(logs["words_right"]) == pytest.approx(right / count)


# -- batches -------------------------------------------------------------------------------------------


def test_batches_have_both_images_and_one_of_the_pairs_own_sentences(config):
    data = pairs()
    pair_of, row = {pair.before: pair for pair in data.changes}, {key: n for n, key in enumerate(data.ids)}
    for config.change.stage in change.STAGES:
        made = method(config)
        batch = next(made.loader(0))
        for n, key in enumerate(batch.ids):
            torch.testing.assert_close(batch.before[n], made.clip.preprocess(data.load(row[key])))
            torch.testing.assert_close(batch.after[n], made.clip.preprocess(data.load(row[pair_of[key].after])))
            if config.change.stage == "caption":
                sentence = made.change.vocabulary.decode(batch.tokens[n, 0].tolist()[1:])
            else:
                sentence = made.texts.distinct[batch.number[n]]
                others = {made.texts.distinct[k] for k in batch.positives[n].tolist() if k >= 0}
                assert others == set(pair_of[key].sentences)
            assert sentence in pair_of[key].sentences


def test_sentences_are_redrawn_each_epoch_and_equal_after_resume(config):
    made = method(config)
    first, again, second = (list(made.loader(epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) and a.ids == b.ids and a.seed == b.seed for a, b in zip(first, again))
    assert [b.ids for b in first] != [b.ids for b in second]
    assert [(b.ids, b.seed) for b in made.loader(0, skip=2)] == [(b.ids, b.seed) for b in first[2:]]


def test_several_sentences_of_a_pair_are_distinct(config):
    data = pairs()
    few = tuple(dataclasses.replace(c, sentences=c.sentences[: 1 + n % 3]) for n, c in enumerate(data.changes))
    config.change.sentences = 2
    made = method(config, dataclasses.replace(data, changes=few))
    sentences_of = {pair.before: pair.sentences for pair in few}
    for batch in made.loader(0):
        for key, tokens in zip(batch.ids, batch.tokens):
            drawn = [made.change.vocabulary.decode(row.tolist()[1:]) for row in tokens if (row != PAD).any()]
            assert len(drawn) == len(set(drawn)) == min(2, len(sentences_of[key]))
            assert set(drawn) <= set(sentences_of[key])


def test_two_entries_on_the_same_images_are_none_of_each_others_negatives(config):
    data = pairs()
    twice = tuple(dataclasses.replace(data.changes[0], sentences=(text,)) for text in data.changes[0].sentences[:2])
    config.change.stage, config.change.validation, config.train.batch_size = "retrieve", "none", 2
    batch = next(method(config, dataclasses.replace(data, changes=twice)).loader(0))
    assert sorted(batch.number.tolist()) == [0, 1]
    assert [sorted(row) for row in batch.positives.tolist()] == [[0, 1], [0, 1]]


# -- what learns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", change.STAGES)
def test_each_stage_trains_what_its_loss_reaches(config, stage):
    config.change.stage = stage
    made = method(config)
    learn = made.trainable()
    loss, _ = made(next(made.loader(0)))
    gradients = dict(zip(learn, torch.autograd.grad(loss, list(learn.values()), allow_unused=True)))
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert ("visual.proj" in learn) == (stage == "retrieve")
    assert made.rate("visual.conv1.weight") == 0.1 and made.rate(f"{PREFIX}encoder.before") == 1.0


def test_clips_own_weights_learn_at_their_share_of_the_rate(config):
    config.train.steps, config.train.schedule, config.change.validation = 1, "constant", "none"
    name, moved = "visual.transformer.resblocks.0.mlp.c_fc.weight", []
    for config.name, config.change.clip_lr_scale in (("a", 0.1), ("b", 0.0)):
        moved.append((weights(finetune(config))[name] - tiny_runs.start(config)[name]).abs().median())
    assert moved == [pytest.approx(1e-4, rel=0.05), 0]  # Adam's first step is the learning rate


def test_a_frozen_encoder_is_asked_once_and_only_the_decoder_learns(config, monkeypatch):
    config.change.dropout, config.change.freeze = 0.0, True
    made = method(config)
    assert {name.split(".")[1] for name in made.trainable()} == {"decoder"}
    batch = next(made.loader(0))
    loss, _ = made(batch)
    config.change.freeze = False
    other = method(config)
    torch.testing.assert_close(loss, other(next(other.loader(0)))[0], atol=2e-3, rtol=2e-3)  # kept in half precision
    config.change.freeze, config.change.width = True, 32  # whatever the decoder is
    with monkeypatch.context() as patch:
        patch.setattr(image_pairs, "seen_by_encoder", None)  # what is kept is found again, and not made
        assert torch.equal(next(method(config).loader(0)).seen, batch.seen)
    clip = create_model(config.model.name)
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(1.5)
    assert not torch.equal(next(change.Method(clip, pairs(), config).loader(0)).seen, batch.seen)


# -- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(config) -> Path:
    """A run of the first stage, with aligned_tokens."""
    first = copy.deepcopy(config)
    first.name, first.train.steps = "adapted", 2
    first.change = dataclasses.replace(config.change, stage="retrieve", aligned_tokens=True, validation="none")
    config.model.start = "runs/adapted"
    return finetune(first)


@pytest.mark.slow
def test_the_second_stage_goes_on_with_the_encoder_of_its_start(config, adapted):
    first = loading.load_model(adapted)
    assert first.change.decoder is None and first.change.encoder.counterpart.abs().sum() > 0
    for config.name, config.change.freeze in (("frozen", True), ("learning", False)):
        run = finetune(config)
        second = loading.load_model(run)
        assert second.change.decoder is not None
        assert same(first.change.encoder.state_dict(), second.change.encoder.state_dict()) == config.change.freeze
    about = json.loads((run / "environment.json").read_text())["data"]
    assert about["start"] == file_digest(adapted / "model.safetensors", "sha256")[:16]
    path = adapted / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="learnt from other data: its start have changed since"):
        finetune(config)


def test_a_start_with_another_encoder_is_refused(config, adapted):
    config.change.aligned_tokens = False
    with pytest.raises(UserError, match="was trained with change.aligned_tokens True; leave it out"):
        finetune(config)


@pytest.mark.slow
def test_the_best_epoch_is_kept_not_the_last(config, monkeypatch):
    figures, kept, after = iter([0.3, 0.7, 0.5]), [], loop.BestCheckpoint.after

    def keeping(self, step, validate):
        kept.append({name: p.detach().clone() for name, p in self.parameters.items()})
        after(self, step, validate)

    monkeypatch.setattr(change.Method, "validate", lambda self: {"cider": next(figures)})
    monkeypatch.setattr(loop.BestCheckpoint, "after", keeping)
    config.train.epochs = 3
    saved = weights(finetune(config))
    assert [(row["step"], row["cider"]) for row in rows("runs/a", "validation")] == [(3, 0.3), (6, 0.7), (9, 0.5)]
    assert [all(torch.equal(saved[n], p) for n, p in each.items()) for each in kept] == [False, True, False]


def test_a_run_whose_validation_pairs_have_changed_is_not_continued(config, monkeypatch):
    tiny_runs.interrupt(config, 4)
    config.resume = True
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", example_sets.CHANGES_SIZES | {"val": 15})
    with pytest.raises(UserError, match="learnt from other data: its validation have changed"):
        finetune(config)


def test_validation_is_never_on_what_is_learnt_from_nor_on_test(config):
    config.change.validation = ""
    data = method(config).validation
    assert data.part == "val" and len(data.changes) == 6
    config.change.validation = "train"
    with pytest.raises(UserError, match="change.validation train is what is learnt from"):
        method(config)
    Path("spot/images").mkdir(parents=True)
    for name in ("1", "1_2", "2", "2_2"):
        Image.new("RGB", (32, 32)).save(f"spot/images/{name}.png")
    entries = [{"img_id": key, "sentences": [f"the {what} left"]} for key in "12" for what in ("car", "man")]
    Path("spot/train.json").write_text(json.dumps(entries))
    config.data.dataset, config.data.root, config.data.split = "spot_the_diff", "spot", "train"
    config.change.validation, config.train.batch_size = "reformat_train", 2  # the same pairs, listed in another way
    with pytest.raises(UserError, match="change.validation reformat_train is what is learnt from"):
        method(config, open_dataset("spot_the_diff", "spot", "train"))


def test_files_of_your_own_are_learnt_from_and_chosen_on(config):
    Path("mine").mkdir()
    for n in range(8):
        Image.new("RGB", (32, 32), (30 * n,) * 3).save(f"mine/{n}.png")
    lines = [{"before": f"{n}.png", "after": f"{n + 4}.png", "sentence": f"thing {n} left"} for n in range(4)]
    for name, some in (("pairs", lines), ("others", lines[::-1])):
        Path(f"mine/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    config.data.dataset, config.data.split, config.train.batch_size = "changes", "mine/pairs.jsonl", 2
    config.change.validate_on, data = None, open_dataset("changes", None, "mine/pairs.jsonl")
    for config.change.validation, chosen in (("none", None), ("", None), ("mine/others.jsonl", "mine/others.jsonl")):
        made = method(config, data)
        assert (made.validation and made.validation.part) == chosen
        assert ("no validation pairs: the last epoch is kept" in made.notes) == (chosen is None)
    finetune(config)
    assert len(rows("runs/a", "validation")) == 2


@pytest.mark.slow
def test_sentences_are_learnt(config):
    """A few pairs by heart: their own sentences are then written, and by beams too."""
    config.train = dataclasses.replace(config.train, batch_size=6, steps=150, lr=1e-2, log_every=50, optimizer="adamw")
    config.train.schedule, config.train.save_every, config.train.max_steps_per_epoch = "cosine", 200, None
    config.change = ChangeConfig(
        "caption", width=32, heads=2, layers=1, clip_lr_scale=0.1, dropout=0.0, validation="none"
    )
    data = with_changes(pairs(), range(6))
    one = tuple(dataclasses.replace(c, sentences=c.sentences[:1]) for c in data.changes)
    data = dataclasses.replace(data, changes=one)
    clip = loading.load_model(loop._run(config, Path("runs/a"), data))
    for beams in (1, 3):
        assert [f.text for f in change.captions(clip, data, beams=beams)] == [c.sentences[0] for c in one]


# -- what it refuses -----------------------------------------------------------------------------------

REFUSED = [
    ({"data.dataset": "example"}, "needs pairs of images with sentences, and example has none"),
    ({"change.stage": "both"}, "change.stage"),
    ({"change.stage": "retrieve", "change.freeze": True}, "does not take change.freeze: stage retrieve is there"),
    ({"model.train": "text"}, "model.train text leaves the image tower as it is"),
    ({"change.dropout": 1.0}, "change.dropout is 1.0; it is a share"),
    ({"change.clip_lr_scale": -1.0}, "change.clip_lr_scale is -1.0"),
    ({"change.validate_on": 0}, "change.validate_on"),
    ({"change.validate_on": 1}, "example_changes/val gives 1 pairs with"),
    ({"change.intra_layers": 6}, "change.intra_layers is 6"),
    ({"change.sentences": 0}, "change.sentences"),
    ({"change.stage": "retrieve", "change.sentences": 2}, "does not take change.sentences: in stage retrieve"),
    ({"change.freeze": True, "train.batch_size": 4000}, "4000"),
    ({"data.min_crop": 0.5}, "data.min_crop: both images are read whole"),
    ({"data.embeddings": "z"}, "does not take data.embeddings"),
    ({"sampler.kind": "clusters"}, "does not take sampler.kind"),
    ({"model.name": "example"}, "the image tower of example is a ModifiedResNet"),
    ({"train.blend": 0.5}, "does not take train.blend"),
    ({"model.start": "nowhere"}, "no checkpoint at nowhere"),
]


@pytest.mark.slow
def test_what_does_not_fit_is_told_before_anything_is_encoded_or_written(config, monkeypatch):
    monkeypatch.setattr(change, "frozen_tokens", lambda *_, **__: pytest.fail("encoded"))
    bad = []
    for settings, message in REFUSED:
        pattern = tiny_runs.attempt(tiny_runs.put(config, settings))
        bad += [f"{settings}: {pattern}"] if message not in pattern else []
        assert not Path("runs/a/config.yaml").exists(), settings
    assert not bad, "\n".join(bad)
