"""Differences learnt from captions alone: in the place of the images, or of further images that nobody has."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import put, weights

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.training_data import load_dataset
from pc_clip.models.loading import create_model
from pc_clip.train import methods, run_folder
from pc_clip.train.loop import finetune
from pc_clip.train.methods.base import BaseMethod
from pc_clip.train.retention import Retention

pytestmark = pytest.mark.usefixtures("small_runs")
CAPTIONS = {7: ["a red bus", "a bus on a road"], 8: ["two cats"], 9: ["a kite in the sky"]}


@pytest.fixture
def config(tiny):
    """Three images of which only captions are known, and two sentences about them, besides the example's."""
    write_json(
        Path("alone.json"),
        {
            "images": [{"id": key, "file_name": f"{key}.jpg"} for key in CAPTIONS],
            "annotations": [{"image_id": key, "caption": text} for key, texts in CAPTIONS.items() for text in texts],
        },
    )
    more = [("7", "8", "a red bus", "two cats"), ("9", "7", "a kite", "a bus")]
    lines = [
        to_line(Difference(i, j, f"The first image shows {a}, while the second shows {b}.")) for i, j, a, b in more
    ]
    Path("alone.jsonl").write_text("".join(lines))
    return put(
        tiny_runs.settings("pairwise", tiny),
        {"pairwise.mirror": True, "retain.texts": 1.0, "retain.batch": 2},
    )


def make(config) -> BaseMethod:
    return methods.find("pairwise").Method(create_model(config.model.name), load_dataset(config.data), config)


def mean_embedding(clip, texts) -> torch.Tensor:
    return F.normalize(clip.embed_texts(list(texts)).mean(0), dim=-1)


def test_caption_targets_are_the_starts_and_read_no_image(config, monkeypatch):
    config = put(config, {"pairwise.target": "captions", "retain.texts": 0.0})
    data = load_dataset(config.data)
    unseen = dataclasses.replace(data, load=lambda row: pytest.fail("a picture was read"))
    method = methods.find("pairwise").Method(create_model(config.model.name), unseen, config)
    batch = next(method.loader(0))
    captions = dict(zip(data.ids, data.captions))
    for n, pair in enumerate(batch.ids):
        i, j = pair.split("|")
        first, second = (mean_embedding(method.clip, captions[key]) for key in (i, j))
        made = batch.images[batch.first[n]] - batch.images[batch.second[n]]
        torch.testing.assert_close(made, first - second, atol=1e-5, rtol=1e-4)
    before = create_model(config.model.name).model.state_dict()
    changed = {name for name, value in weights(finetune(config)).items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("visual.") for name in changed)


def test_further_sentences_are_about_captions_and_the_others_stay_about_images(config):
    alone = make(config)
    both = put(config, {"pairwise.captioned_differences": "alone.jsonl", "pairwise.captions": "alone.json"})
    method = make(both)
    assert len(method.pairs) == len(alone.pairs) + 2
    assert (method.pairs[:-2] == alone.pairs).all()
    torch.testing.assert_close(method.images.z[: len(alone.images.z)], alone.images.z)
    assert [[method.images.ids[row] for row in pair] for pair in method.pairs[-2:]] == [
        ["captions:7", "captions:8"], ["captions:9", "captions:7"],
    ]  # fmt: skip
    expected = mean_embedding(method.clip, CAPTIONS[7])
    torch.testing.assert_close(method.images.z[method.pairs[-2, 0]], expected, atol=1e-5, rtol=1e-4)
    text, mirrored = method.texts.batch(method.text_rows[-2])
    sentences = method.clip.tokenize([
        "The first image shows a red bus, while the second shows two cats.",
        "The second image shows a red bus, while the first shows two cats.",
    ])  # fmt: skip
    assert torch.equal(torch.stack([text, mirrored]), method.clip.trim(sentences))
    assert "a red bus" in Retention(method, load_dataset(both.data)).texts.distinct

    run = finetune(both)
    about = json.loads((run / "environment.json").read_text())["data"]
    assert {"pairwise.captions", "pairwise.captioned_differences"} <= about.keys()
    Path("alone.jsonl").write_text(Path("alone.jsonl").read_text().replace("a kite", "a kite and a bird"))
    with pytest.raises(UserError, match="learnt from other data"):
        run_folder.check_data(run, run_folder.hashes(load_dataset(both.data), both))


def test_what_cannot_be_learnt_so_is_said(config):
    for settings, message in [
        ({"pairwise.target": "texts"}, "pairwise.target is 'texts'"),
        ({"pairwise.captions": "alone.json"}, "go together"),
        ({"pairwise.target": "captions", "model.train": "both"}, "reads no image"),
        (
            {
                "model.train": "both",
                "pairwise.captions": "alone.json",
                "pairwise.captioned_differences": "alone.jsonl",
            },
            "embedded once",
        ),
        ({"pairwise.captions": "none.json", "pairwise.captioned_differences": "alone.jsonl"}, "none.json"),
    ]:
        with pytest.raises(UserError, match=message):
            make(put(config, settings))
