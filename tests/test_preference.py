"""CLIP-PO: which of two texts or images is preferred, what the start thought of it; each against a slow way."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import rows

from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig, SamplerConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets
from pc_clip.data.embeddings import Embeddings, save_embeddings
from pc_clip.data.training_data import load_dataset
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model
from pc_clip.train.loop import finetune
from pc_clip.train.methods import preference

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture
def config(tiny, monkeypatch) -> FinetuneConfig:
    """Two texts of the embedded example an image. Training is for 25 steps, at which each loss has learnt a little."""
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 40, "val": 10, "test": 20})
    config = tiny_runs.settings("preference", tiny, batch_size=16, steps=25, lr=3e-3, optimizer="adamw")
    config.preference.beta = 1.0
    return config


@pytest.fixture
def clip(config) -> Clip:
    return create_model(config.model.name)


def make(config: FinetuneConfig, clip: Clip) -> preference.Method:
    return preference.Method(clip, load_dataset(config.data), config)


def table(*statements: dict, name: str = "own.jsonl") -> list[str]:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in statements))
    return [name]


@torch.no_grad()
def slow_log_odds(clip: Clip, config: FinetuneConfig) -> list[float]:
    """Log-odds statement by statement, with open_clip's own encoders."""
    data, odds = load_dataset(config.data), []
    for s in data.statements:
        pixels = clip.preprocess(data.load(data.ids.index(s.image)))[None]
        image = F.normalize(clip.model.encode_image(pixels), dim=-1)
        texts = F.normalize(clip.model.encode_text(clip.tokenizer([s.preferred, s.rejected])), dim=-1)
        log_p = (clip.model.logit_scale.exp() * image @ texts.T).log_softmax(-1)[0]
        odds.append(float(log_p[0] - log_p[1]))
    return odds


# -- the reference -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_what_the_start_thinks_statement_by_statement(config, clip):
    expected = slow_log_odds(clip, config)
    for config.model.train in ("text", "both"):
        assert make(config, clip).reference.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("train, crop, precision", [("text", 1.0, "no"), ("both", 1.0, "bf16"), ("both", 0.5, "bf16")])
def test_dpo_begins_at_log_2_and_ipo_at_its_margin_squared(config, clip, train, crop, precision):
    """Also where each step sees crops of its own, and a frozen copy of the model has to look at the very same.

    In bf16 log-odds are rounded by a few hundredths: only where both sides are made alike do they agree.
    """
    config.model.train, config.data.min_crop, config.train.precision = train, crop, precision
    for loss, beta, expected in (("dpo", 0.1, math.log(2)), ("ipo", 5.0, 0.1**2)):
        config.preference = PreferenceConfig(loss, beta)
        method = make(config, clip)
        batch = next(method.loader(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            actual, logs = method(batch)
        assert actual.item() == pytest.approx(expected, rel=2e-3)
        assert logs["moved"].item() == pytest.approx(0, abs=1e-4)


def test_a_frozen_copy_stays_where_the_model_began(config, clip):
    config.model.train, config.data.min_crop = "both", 0.5
    method = make(config, clip)
    batch = next(method.loader(0))
    names = method.trainable().keys()
    assert "visual.conv1.weight" in names and not any(name.startswith("logit_") for name in names)  # a constant here
    with torch.no_grad():
        before = method.score(method.frozen, batch).log_odds
        for parameter in clip.model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(method.score(method.frozen, batch).log_odds, before)
    assert not any(name.startswith("frozen") for name, _ in method.named_parameters())


# -- what is learnt ------------------------------------------------------------------------------------


VARIANTS = {
    "dpo": {},
    "ipo": {"loss": "ipo", "beta": 0.1},
    "reward": {"loss": "reward"},
    "contrastive": {"loss": "contrastive"},
    "reference-free": {"reference_free": True, "label_smoothing": 0.1},
    "unit scale": {"logit_scale": 1.0, "beta": 30.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_each_loss_makes_what_holds_preferred(config, name):
    """What any loss has to learn in a few steps: of all images one kind of text is preferred to another."""
    ids = load_dataset(config.data).ids
    config.data.statements = table(
        *({"image": key, "preferred": f"{n} cats", "rejected": f"{n} dogs"} for n, key in enumerate(ids))
    )
    config.preference = PreferenceConfig(**{"beta": 1.0} | VARIANTS[name])
    log = rows(finetune(config))
    actual = [row["accuracy"] for row in log]
    assert np.mean(actual[-4:]) > max(0.9, np.mean(actual[:2])), actual
    assert ("moved" in log[0]) == (name in ("dpo", "ipo", "unit scale"))  # others need no reference


@pytest.mark.slow
def test_ranking_data_prefers_images(config):
    """One text and two images: the text is brought nearer to the first."""
    ids, text = load_dataset(config.data).ids, "a sentence"
    config.data.statements = table(
        *({"caption": text, "preferred_image": key, "rejected_image": ids[-1]} for key in ids[:24])
    )
    actual = [row["loss"] for row in rows(finetune(config))]
    assert np.mean(actual[-3:]) < np.mean(actual[:3]), actual
    config.preference.loss = "contrastive"
    with pytest.raises(UserError, match="contrastive needs texts that are rejected, and these are images"):
        make(config, create_model(config.model.name))


def test_of_false_statements_the_contradiction_is_preferred(config, clip):
    method = make(config, clip)
    data = load_dataset(config.data)
    false = [s for s in data.statements if not s.true]
    assert f"{len(false)} statements are false: what contradicts them is preferred" in method.notes
    texts = np.array(method.texts.distinct)
    preferred = {(method.images.ids[i], text) for i, text in zip(method.image[:, 0], texts[method.text[:, 0]])}
    assert all((s.image, s.contradiction) in preferred for s in false)
    assert set(method.images.ids) == {s.image for s in data.statements}


def test_a_text_that_another_image_rejects_is_known_to_be_the_same(config, clip):
    """Of two images one prefers what the other rejects; test_losses.py has what becomes of such negatives."""
    ids, texts = load_dataset(config.data).ids[:2], ("on the left", "on the right")
    config.data.statements = table(
        {"image": ids[0], "preferred": texts[0], "rejected": texts[1]},
        {"image": ids[1], "preferred": texts[1], "rejected": texts[0]},
    )
    config.preference.loss, config.train.batch_size = "contrastive", 2
    (image, preferred, rejected), other = next(make(config, clip).loader(0)).numbers.tolist()
    assert other == [1 - image, rejected, preferred] and preferred != rejected


# -- the data ------------------------------------------------------------------------------------------


def test_statements_without_their_image_are_left_out_and_counted(config, clip):
    there, absent = load_dataset(config.data).ids[3], {"image": "none", "preferred": "a", "rejected": "b"}
    config.data.statements = table(
        *[{"image": there, "preferred": f"a {n}", "rejected": "b"} for n in range(20)], absent
    )
    method = make(config, clip)
    assert method.notes == ["1 of 21 statements are left out: example_relations/train lacks their image"]
    assert method.images.ids == [there]


def test_tied_preferences_are_dropped_and_counted(config, clip):
    """Texts that differ in capitals, or after the context's end; images of which one is a copy of the other.

    The images are given as a file of embeddings.
    """
    ids, long = load_dataset(config.data).ids, "a " * 100
    config.data.embeddings, config.train.batch_size = "z.safetensors", 2
    z = torch.randn(len(ids), clip.embed_dim, generator=torch.Generator().manual_seed(0))
    z[1] = z[0]
    save_embeddings(Path("z.safetensors"), Embeddings(z, ids), {"image_tower": clip.image_tower_hash()})
    ties = [
        {"image": ids[0], "preferred": "a dog", "rejected": "A DOG"},
        {"image": ids[0], "preferred": long + "cat", "rejected": long + "dog"},
        {"caption": "a dog", "preferred_image": ids[0], "rejected_image": ids[1]},
    ]
    rest = [
        {"image": ids[2], "preferred": "a dog", "rejected": "a cat"},
        {"caption": "a dog", "preferred_image": ids[0], "rejected_image": ids[2]},
    ]
    config.data.statements = table(ties[0], rest[0], *ties[1:], rest[1])
    method = make(config, clip)
    assert any(note.startswith("3 of 5 statements are left out: the model reads the same") for note in method.notes)
    assert [ids[row] for row in method.image[:, 0]] == [ids[2], ids[0]] and len(method.reference) == 2
    batch = next(method.loader(0))
    assert torch.allclose(batch.images[batch.image[:, 0]], z[[ids.index(key) for key in batch.ids]])
    config.data.statements = table(*ties, name="ties.jsonl")
    with pytest.raises(UserError, match="nothing can be learnt from any of the 3 statements: the model reads the same"):
        make(config, clip)


def test_preferences_can_come_in_clusters(config):
    config.train.steps = 6
    for config.name, similarity in (("a", "text"), ("b", "image")):
        config.sampler = SamplerConfig(kind="clusters", similarity=similarity, cluster_size=4)
        assert len(rows(finetune(config))) == 6


def test_other_statements_are_other_data(config):
    row = {"image": load_dataset(config.data).ids[0], "preferred": "a", "rejected": "b"}
    config.data.statements, config.train.steps = table(*[row] * 16), 1
    finetune(config)
    table(*[row | {"rejected": "c"}] * 16)
    with pytest.raises(UserError, match="learnt from other data: its statements have changed since"):
        finetune(config)


REFUSED = [
    ({"loss": "dop"}, "preference.loss"),
    ({"beta": 0.0}, "preference.beta is 0.0; it must be above 0"),
    ({"label_smoothing": 0.5}, "preference.label_smoothing is 0.5; it is a share"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "preference.label_smoothing means nothing for preference.loss ipo"),
    ({"loss": "reward", "captioning": 0.5}, "preference.captioning means nothing for preference.loss reward"),
]


def test_settings_that_mean_nothing_are_refused(config, clip):
    for options, message in REFUSED:
        config.preference = PreferenceConfig(**options)
        with pytest.raises(UserError, match=message):
            make(config, clip)
    config.preference, config.model.pretrained = PreferenceConfig(), SCRATCH
    with pytest.raises(UserError, match="preference.loss dpo starts from what a model knows, and model.pretr"):
        finetune(config)
    assert not Path("runs/a/config.yaml").exists()
    data = dataclasses.replace(load_dataset(config.data), statements=())
    with pytest.raises(UserError, match="example_relations/train has none; name --data.statements"):
        preference.Method(clip, data, config)
