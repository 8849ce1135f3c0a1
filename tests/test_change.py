"""Method change: its two losses, what learns, the best epoch, runs that are continued, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interrupting import interrupted_and_continued, stop_at
from PIL import Image
from safetensors.torch import load_file

from pc_clip.core import cache
from pc_clip.core.config.train import ChangeConfig, FinetuneConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets, pairs
from pc_clip.data.dataset import Dataset, with_changes
from pc_clip.data.download import file_digest
from pc_clip.data.registry import open_dataset
from pc_clip.models import loading
from pc_clip.models.change_model import PREFIX
from pc_clip.models.clip import Clip
from pc_clip.models.vocabulary import END, PAD
from pc_clip.train import loop, losses, optim
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change


@pytest.fixture(autouse=True)
def _small(small_example):
    pass


@pytest.fixture
def config() -> FinetuneConfig:
    """Two epochs of three steps of the second stage, by a small decoder."""
    found = FinetuneConfig(name="a", method="change", out="runs", device="cpu")
    found.data.dataset, found.data.split, found.model.train = "example_changes", "train", "both"
    found.change = ChangeConfig("caption", width=16, heads=2, layers=1, clip_rate=0.1, validate_on=6)
    found.train = TrainConfig(batch_size=8, epochs=2, max_steps_per_epoch=3, lr=1e-3, log_every=1, threads=1)
    return found


def method(config: FinetuneConfig, data: Dataset | None = None) -> change.Method:
    return change.Method(Clip.create("example_vit"), data or open_dataset("example_changes", None, "train"), config)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/a/{name}.jsonl").read_text().splitlines()]


# -- losses --------------------------------------------------------------------------------------------


def test_texts_that_are_said_of_a_pair_are_none_of_its_negatives():
    torch.manual_seed(0)
    pair, text = torch.randn(4, 6), torch.randn(4, 6)
    number = torch.tensor([0, 1, 2, 1])  # pairs 1 and 3 came with the same sentence
    said = torch.tensor([[0, -1], [1, 2], [2, -1], [1, -1]])  # and what pair 2 came with is said of pair 1 too
    z = 7.0 * F.normalize(pair, dim=-1) @ F.normalize(text, dim=-1).T
    against_pair = {0: [0, 1, 2, 3], 1: [0, 1], 2: [0, 1, 2, 3], 3: [0, 2, 3]}  # texts that each pair is asked about
    against_text = {0: [0, 1, 2, 3], 1: [0, 1, 2], 2: [0, 2, 3], 3: [0, 2, 3]}
    expected = -sum(
        z[n, n] - z[n, among].logsumexp(0) + z[n, n] - z[others, n].logsumexp(0)
        for n, among, others in ((n, against_pair[n], against_text[n]) for n in range(4))
    ) / (2 * 4)
    found = losses.info_nce_of_several(pair, text, said, number, 7.0)
    torch.testing.assert_close(found, expected)
    none = said[:, :0]
    torch.testing.assert_close(
        losses.info_nce_of_several(pair, text, none, number, 7.0), losses.info_nce(pair, text, 1 / 7.0)
    )


@pytest.mark.parametrize("smoothing, several", [(0.0, 1), (0.2, 1), (0.1, 3)])
def test_the_loss_of_a_sentence_is_the_mean_over_its_words_and_end(config, smoothing, several):
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


def test_batches_have_both_images_and_one_of_the_pairs_own_sentences(config):
    for config.change.stage in change.STAGES:
        made = method(config)
        data = open_dataset("example_changes", None, "train")
        of = {found.before: found for found in data.changes}
        row = {key: n for n, key in enumerate(data.ids)}
        for batch in made.loader(0):
            for n, key in enumerate(batch.ids):
                torch.testing.assert_close(batch.before[n], made.clip.preprocess(data.load(row[key])))
                torch.testing.assert_close(batch.after[n], made.clip.preprocess(data.load(row[of[key].after])))
                if config.change.stage == "caption":
                    said = made.change.vocabulary.decode(batch.tokens[n, 0].tolist()[1:])
                else:
                    said = made.texts.distinct[batch.number[n]]
                    told = {made.texts.distinct[k] for k in batch.said[n].tolist() if k >= 0}
                    assert told == set(of[key].sentences)
                assert said in of[key].sentences


def test_sentences_are_drawn_anew_each_epoch_and_the_same_for_a_run_that_is_continued(config):
    made = method(config)
    first, again, second = (list(made.loader(epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) and a.ids == b.ids and a.seed == b.seed for a, b in zip(first, again))
    assert [b.ids for b in first] != [b.ids for b in second]
    assert [(b.ids, b.seed) for b in made.loader(0, skip=2)] == [(b.ids, b.seed) for b in first[2:]]


def test_several_sentences_of_a_pair_are_different_ones_and_no_more_than_there_are(config):
    data = open_dataset("example_changes", None, "train")
    few = tuple(dataclasses.replace(c, sentences=c.sentences[: 1 + n % 3]) for n, c in enumerate(data.changes))
    config.change.sentences = 2
    made = change.Method(Clip.create("example_vit"), dataclasses.replace(data, changes=few), config)
    of = {found.before: found.sentences for found in few}
    for batch in made.loader(0):
        for key, tokens in zip(batch.ids, batch.tokens):
            said = [made.change.vocabulary.decode(row.tolist()[1:]) for row in tokens if (row != PAD).any()]
            assert len(said) == len(set(said)) == min(2, len(of[key]))
            assert set(said) <= set(of[key])


# -- what learns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", change.STAGES)
def test_each_stage_trains_what_its_loss_reaches(config, stage):
    config.change.stage = stage
    made = method(config)
    learn = made.trainable()
    loss, _ = made(next(made.loader(0)))
    found = dict(zip(learn, torch.autograd.grad(loss, list(learn.values()), allow_unused=True)))
    assert all(g is not None for g in found.values()), [n for n, g in found.items() if g is None]
    assert ("visual.proj" in found) == (stage == "retrieve")
    assert made.rate("visual.conv1.weight") == 0.1
    assert made.rate(f"{PREFIX}encoder.before") == 1.0


def test_clips_own_weights_learn_at_their_share_of_the_rate(config):
    config.train.steps, config.train.schedule, config.change.validation = 1, "constant", "none"
    finetune(config)
    saved, start = load_file("runs/a/model.safetensors"), Clip.create("example_vit").model.state_dict()
    moved = (
        saved["visual.transformer.resblocks.0.mlp.c_fc.weight"]
        - start["visual.transformer.resblocks.0.mlp.c_fc.weight"]
    )
    assert moved.abs().median() == pytest.approx(1e-4, rel=0.05)  # Adam's first step is the learning rate
    config.name, config.change.clip_rate = "b", 0.0
    finetune(config)
    assert torch.equal(load_file("runs/b/model.safetensors")["visual.conv1.weight"], start["visual.conv1.weight"])


def test_a_frozen_encoder_is_asked_once_and_only_the_decoder_learns(config, monkeypatch):
    config.change.freeze, config.change.dropout = True, 0.0
    made = method(config)
    assert {name.split(".")[1] for name in made.trainable()} == {"decoder"}
    batch = next(made.loader(0))
    loss, _ = made(batch)
    config.change.freeze = False
    other = method(config)
    expected, _ = other(next(other.loader(0)))
    torch.testing.assert_close(loss, expected, atol=2e-3, rtol=2e-3)  # what it sees is kept in half precision
    config.change.freeze = True
    monkeypatch.setattr(pairs, "seen_by_encoder", None)  # what is kept is found again, and not made
    again = method(config)
    assert torch.equal(next(again.loader(0)).seen, batch.seen)


def test_kept_features_are_those_of_these_very_weights(config):
    config.change.freeze = True
    method(config)
    data, clip = open_dataset("example_changes", None, "train"), Clip.create("example_vit")
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(1.5)
    change.Method(clip, data, config)
    assert len(list(cache.CACHE.glob("pairs-*"))) == 2


def test_what_is_refused_is_refused_before_anything_is_encoded(config, monkeypatch):
    monkeypatch.setattr(change, "frozen_tokens", lambda *_, **__: pytest.fail("encoded"))
    config.change.freeze, config.change.validation = True, "train"
    with pytest.raises(UserError, match="is what is learnt from"):
        finetune(config)
    config.change.validation, config.train.batch_size = "none", 4000
    with pytest.raises(UserError, match="4000"):
        finetune(config)


# -- runs ----------------------------------------------------------------------------------------------


def test_two_stages_one_after_the_other(config):
    config.name, config.change.stage = "adapted", "retrieve"
    adapted = finetune(config)
    config.name, config.change.stage, config.model.start = "captioned", "caption", str(adapted)
    captioned = finetune(config)
    first, second = loading.load_model(adapted), loading.load_model(captioned)
    assert first.change.decoder is None
    assert second.change.decoder is not None
    start = json.loads(Path("runs/captioned/environment.json").read_text())["data"]["start"]
    assert start == file_digest(adapted / "model.safetensors", "sha256")[:16]
    assert torch.equal(first.model.text_projection, second.model.text_projection)
    config.name, config.change.freeze = "frozen", True
    third = loading.load_model(finetune(config))
    one, other = first.change.encoder.state_dict(), third.change.encoder.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)  # it began with the adapted encoder
    assert not torch.equal(one["before"], second.change.encoder.before)


def test_the_best_epoch_is_kept_not_the_last(config, monkeypatch):
    figures = iter([0.3, 0.7, 0.5])
    monkeypatch.setattr(change.Method, "validate", lambda self: {"cider": next(figures)})
    config.train.epochs = 3
    kept = []
    write = loop.Best.after

    def after(self, step, validate):
        kept.append({name: p.detach().clone() for name, p in self.parameters.items()})
        write(self, step, validate)

    monkeypatch.setattr(loop.Best, "after", after)
    finetune(config)
    assert [(row["step"], row["cider"]) for row in rows("validation")] == [(3, 0.3), (6, 0.7), (9, 0.5)]
    saved = load_file("runs/a/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept[1].items())
    assert not all(torch.equal(saved[name], value) for name, value in kept[2].items())


def test_validation_is_never_on_what_is_learnt_from_nor_on_test(config):
    data = method(config).validation
    assert data.part == "val"
    assert len(data.changes) == 6
    config.change.validation = "train"
    with pytest.raises(UserError, match="change.validation train is what is learnt from"):
        method(config)


@pytest.mark.parametrize("learnt, chosen", [("reformat_train", "train"), ("train", "reformat_train")])
def test_validation_pairs_that_are_learnt_from_are_known_when_listed_in_another_way(config, learnt, chosen):
    Path("spot/images").mkdir(parents=True)
    for name in ("1", "1_2", "2", "2_2"):
        Image.new("RGB", (32, 32)).save(f"spot/images/{name}.png")
    entries = [{"img_id": key, "sentences": [f"the {what} left"]} for key in "12" for what in ("car", "man")]
    Path("spot/train.json").write_text(json.dumps(entries))
    config.data.dataset, config.data.root, config.data.split = "spot_the_diff", "spot", learnt
    config.change.validation, config.train.batch_size = chosen, 2
    with pytest.raises(UserError, match=f"change.validation {chosen} is what is learnt from"):
        method(config, open_dataset("spot_the_diff", "spot", learnt))


def own(folder: str, *names: str) -> None:
    """Files of your own, NAME.jsonl with four pairs each."""
    Path(folder).mkdir(parents=True)
    for n in range(8):
        Image.new("RGB", (32, 32), (30 * n,) * 3).save(f"{folder}/{n}.png")
    lines = [{"before": f"{n}.png", "after": f"{n + 4}.png", "sentence": f"thing {n} left"} for n in range(4)]
    for name in names:
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = lines[::-1]


def test_files_of_your_own_are_learnt_from_and_chosen_on(config):
    """Also where pairs of the usual name lie about, which have nothing to do with a file named by its path."""
    own("data/changes", "train", "val")
    own("elsewhere", "pairs", "others")
    config.data.dataset, config.data.split, config.model.name = "changes", "elsewhere/pairs.jsonl", "example_vit"
    config.train.batch_size, config.change.validate_on = 2, None
    for asked, chosen in (("", None), ("none", None), ("elsewhere/others.jsonl", "elsewhere/others.jsonl")):
        config.change.validation = asked
        config.name = config.name + "a"
        finetune(config)
        found = method(config, open_dataset("changes", None, config.data.split)).validation
        assert (found and found.part) == chosen
    config.data.root, config.data.split, config.change.validation = "data/changes", "train", ""
    assert method(config, open_dataset("changes", "data/changes", "train")).validation.part == "val"
    Path("data/changes/val.jsonl").unlink()
    config.name = "b"
    with pytest.raises(UserError, match="changes/train has no val beside it .* --change.validation none"):
        finetune(config)


def test_without_validation_the_last_epoch_is_kept(config):
    config.change.validation = "none"
    finetune(config)
    assert not Path("runs/a/validation.jsonl").exists()
    assert "no validation pairs: the last epoch is kept" in Path("runs/a/environment.json").read_text()


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_that_is_continued_is_the_same(config, monkeypatch, step):
    """Dropout included; at step 3 an epoch ends."""
    config.change.dropout, config.train.save_every = 0.3, 1
    config.name = "straight"
    finetune(config)
    config.name = "a"
    interrupted_and_continued(config, step, monkeypatch)
    one, other = (load_file(f"runs/{name}/model.safetensors") for name in ("straight", "a"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows("validation") == [
        json.loads(line) for line in Path("runs/straight/validation.jsonl").read_text().splitlines()
    ]


def test_a_run_whose_start_has_changed_is_not_continued(config):
    config.name, config.change.stage, config.train.steps = "adapted", "retrieve", 1
    config.model.start = str(finetune(config))
    config.name, config.change.stage = "a", "caption"
    finetune(config)
    path = Path("runs/adapted/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="learnt from other data: its start have changed since"):
        finetune(config)


def test_a_run_whose_validation_pairs_have_changed_is_not_continued(config, monkeypatch):
    with pytest.MonkeyPatch.context() as context:
        stop_at(context, 4)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    config.resume = True
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", example_sets.CHANGES_SIZES | {"val": 19})
    with pytest.raises(UserError, match="chose its best epoch on other validation data"):
        finetune(config)


def test_sentences_are_learnt(config):
    """A few pairs by heart: their own sentences are then written, and by beams too."""
    config.train = TrainConfig(
        batch_size=6, steps=120, lr=5e-3, schedule="cosine", log_every=50, threads=1, optimizer="adamw"
    )
    config.change = ChangeConfig("caption", width=32, heads=2, layers=1, clip_rate=0.1, dropout=0.0, validation="none")
    data = with_changes(open_dataset("example_changes", None, "train"), range(6))
    one = dataclasses.replace(
        data, changes=tuple(dataclasses.replace(c, sentences=c.sentences[:1]) for c in data.changes)
    )
    loop._run(config, Path("runs/a"), one)
    clip = loading.load_model("runs/a")
    for beams in (1, 3):
        said = [found.text for found in change.captions(clip, one, beams=beams)]
        assert said == [c.sentences[0] for c in one.changes]


# -- what it refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data.dataset": "example"}, "needs pairs of images with sentences, and example has none"),
        ({"change.stage": "both"}, "change.stage"),
        ({"change.stage": "retrieve", "change.freeze": True}, "change.freeze keeps the encoder as it is"),
        ({"model.train": "text"}, "model.train text leaves the image tower as it is"),
        ({"change.dropout": 1.0}, r"change.dropout is 1.0; it is a share"),
        ({"change.label_smoothing": -0.1}, "change.label_smoothing is -0.1"),
        ({"change.clip_rate": -1.0}, "change.clip_rate is -1.0"),
        ({"change.validate_on": 0}, "change.validate_on"),
        ({"change.intra_layers": 6}, "change.intra_layers is 6"),
        ({"change.sentences": 0}, "change.sentences"),
        ({"change.stage": "retrieve", "change.sentences": 2}, "change.sentences is for stage caption"),
        ({"data.min_crop": 0.5}, "reads both images whole, as they are; leave data.min_crop out"),
        ({"data.embeddings": "z"}, "leave data.embeddings out"),
        ({"sampler.kind": "clusters"}, "takes its pairs at random"),
        ({"model.name": "example"}, "the image tower of example is a ModifiedResNet"),
        ({"train.warmup_share": 1.0}, "train.warmup_share is 1"),
        ({"train.warmup_share": 0.1, "train.warmup_steps": 3}, "in the place of train.warmup_steps"),
        ({"model.start": "nowhere"}, "no checkpoint at nowhere"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(config, settings, message):
    for name, value in settings.items():
        group, option = name.split(".")
        setattr(getattr(config, group), option, value)
    with pytest.raises(UserError, match=message):
        finetune(config)
    assert not Path("runs/a/config.yaml").exists()


@pytest.mark.parametrize(
    "setting, there, asked", [("intra_layers", 2, 4), ("counterparts", True, False), ("counterparts", None, True)]
)
def test_a_start_with_another_encoder_is_refused(config, setting, there, asked):
    config.change.stage, config.train.steps = "retrieve", 1
    setattr(config.change, setting, there)
    config.model.start = str(finetune(config))
    config.name, config.change = "b", dataclasses.replace(config.change, stage="caption", **{setting: asked})
    with pytest.raises(UserError, match=f"was trained with change.{setting} {there or False}; leave it out"):
        finetune(config)


def test_a_run_goes_on_with_the_encoder_of_its_start(config):
    config.change.stage, config.change.counterparts, config.train.steps = "retrieve", True, 2
    config.model.start = str(finetune(config))
    begun = loading.load_model(config.model.start).change.encoder.counterpart
    assert begun.abs().sum() > 0  # it learns, though it begins as zero
    for config.name, config.change.freeze in (("frozen", True), ("b", False)):
        config.change = dataclasses.replace(config.change, stage="caption", counterparts=None)
        found = loading.load_model(finetune(config)).change.encoder.counterpart
        assert torch.equal(found, begun) == config.change.freeze


def test_warm_up_as_a_share_of_all_steps():
    train = TrainConfig(lr=1.0, schedule="cosine", warmup_share=0.1)
    found = [optim.learning_rate(train, step, 10, 100) for step in range(100)]
    assert found[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert found == [
        optim.learning_rate(dataclasses.replace(train, warmup_share=0.0, warmup_steps=10), s, 10, 100)
        for s in range(100)
    ]
