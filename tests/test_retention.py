"""What keeps the start's knowledge beside any method: which captions and images, at which cost; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import put

from pc_clip.core.errors import UserError
from pc_clip.data.training_data import load_dataset
from pc_clip.models.loading import create_model
from pc_clip.train import losses, methods
from pc_clip.train.loop import finetune
from pc_clip.train.methods.base import BaseMethod
from pc_clip.train.retention import Retention

ALL = {"retain.texts": 2.0, "retain.images": 3.0, "retain.similarities": 5.0, "retain.contrastive": 7.0}


def retaining(method: str, tiny: str, settings: dict[str, object]) -> BaseMethod:
    """A method with what it retains, as the loop makes it."""
    config = put(tiny_runs.settings(method, tiny), {"model.train": "both", "retain.batch": 4} | settings)
    data = load_dataset(config.data)
    made = methods.find(method).Method(create_model(config.model.name), data, config)
    made.retention = Retention(made, data)
    return made


def test_the_divergence_of_similarities_is_that_of_two_softmaxes():
    text, image, text_start, image_start = torch.randn(4, 5, 3, dtype=torch.double).unbind()
    total = 0.0
    for a, b, c, d in ((text, image, text_start, image_start), (image, text, image_start, text_start)):
        for n in range(5):
            now = F.softmax(F.cosine_similarity(a[n], b, dim=-1) / 0.1, 0)
            start = F.softmax(F.cosine_similarity(c[n], d, dim=-1) / 0.1, 0)
            total += (start * (start / now).log()).sum().item() / 10
    actual = losses.similarity_divergence(text, image, text_start, image_start, 0.1)
    assert actual.item() == pytest.approx(total, rel=1e-4)
    assert losses.similarity_divergence(text, image, 2 * text, image, 0.1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["pairwise", "contrastive", "preference", "change"])
def test_nothing_is_lost_at_the_start_and_each_term_is_weighed(method, tiny):
    stage = {"change.stage": "retrieve"} if method == "change" else {}
    made = retaining(method, tiny, ALL | stage)
    batch = next(made.loader(0))
    with torch.no_grad():
        alone, (total, logs) = made.loss(batch.method_batch)[0], made(batch)
    for name in ("texts", "images", "similarities"):
        assert logs[f"retain_{name}"].item() == pytest.approx(0, abs=1e-5)
    assert total.item() == pytest.approx(alone.item() + 7 * logs["retain_contrastive"].item(), abs=1e-3)
    with torch.no_grad():
        made.model.visual.conv1.weight.mul_(-1)
        made.model.token_embedding.weight.mul_(-1)
        total, logs = made(batch)
        terms = [ALL[f"retain.{name}"] * logs[f"retain_{name}"] for name in made.retention.weights]
        assert min(terms[:3]) > 1e-4
        torch.testing.assert_close(total, made.loss(batch.method_batch)[0] + sum(terms))


def test_each_caption_comes_with_an_image_that_it_was_written_for(tiny):
    made = retaining("preference", tiny, {"retain.contrastive": 1.0, "retain.captions": 30})
    ordinary = load_dataset(put(made.config, {"data.dataset": "example"}).data)
    retention = made.retention
    assert len(retention.texts.distinct) == 30
    for text, row in zip(retention.texts.distinct, retention.image_rows):
        assert text in ordinary.captions[row]
    rows = np.array([3, 0])
    pixels = next(iter(retention.read([rows], 0)))
    expected = torch.stack([made.clip.preprocess(ordinary.load(row)) for row in retention.image_rows[rows]])
    torch.testing.assert_close(pixels, expected)


def test_no_caption_is_its_own_negative(tiny):
    settings = {"retain.contrastive": 1.0, "retain.captions": 30, "retain.batch": 30}
    drawn = retaining("preference", tiny, settings).retention.draw(np.random.default_rng(0))
    assert len(set(drawn)) == 30


def test_retention_uses_cached_embeddings_and_repeats_bit_for_bit(tiny):
    settings = {"retain.similarities": 1.0, "retain.batch": 4, "preference.per_image": 2}
    config = put(tiny_runs.settings("preference", tiny), settings)
    once = tiny_runs.weights(finetune(config))
    assert {"retain_similarities", "loss"} <= tiny_runs.rows("runs/a")[0].keys()
    tiny_runs.interrupt(put(config, {"name": "b"}), 4)
    again = tiny_runs.weights(finetune(put(config, {"name": "b", "resume": True})))
    assert tiny_runs.same(once, again)


def test_what_a_frozen_tower_makes_stays_and_that_is_noted(tiny):
    made = retaining("preference", tiny, ALL | {"model.train": "text"})
    assert list(made.retention.weights) == ["texts", "similarities", "contrastive"]
    assert "retain.images has no effect: that tower is frozen, and what it makes stays" in made.notes


def test_weights_rise_over_a_share_of_the_steps(tiny):
    made = retaining("preference", tiny, {"retain.texts": 1.0, "retain.ramp": 0.5, "train.steps": 8})
    assert [batch.ordinary.ramp for batch in made.loader(0)][:8] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert next(made.loader(0, 3)).ordinary.ramp == 0.75


REFUSED = [
    ("preference", {"retain.texts": 1.0, "retain.ramp": 2.0}, "retain.ramp is 2.0"),
    ("preference", {"retain.texts": -1.0}, "retain.texts is -1.0; it is a weight"),
    ("preference", {"retain.texts": 1.0, "retain.batch": 0}, "retain.batch is 0"),
    ("preference", {"retain.contrastive": 1.0, "retain.batch": 1}, "retain.batch is 1; it must be at least 2"),
    (
        "preference",
        {"retain.contrastive": 1.0, "retain.batch": 4, "retain.captions": 3},
        "retain.batch is 4, and there are 3 ordinary captions",
    ),
    ("preference", {"retain.similarities": 1.0, "retain.temperature": 0.0}, "retain.temperature is 0.0"),
    ("preference", {"retain.images": 1.0, "model.train": "text"}, "retain.images: that tower is frozen"),
    ("change", {"retain.texts": 1.0}, "retain.texts: that tower is frozen"),
    ("preference", {"retain.texts": 1.0, "retain.dataset": "example_relations"}, "has none; name a data set that has"),
    ("preference", {"preference.per_image": 3}, "preference.per_image 3 does not divide train.batch_size 8"),
]


@pytest.mark.parametrize(("method", "settings", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_retained_is_refused(method, settings, message, tiny):
    with pytest.raises(UserError, match=message):
        retaining(method, tiny, settings)
