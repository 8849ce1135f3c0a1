"""Differences written by a captioner of changes: which pairs, what it says of them, and what is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from writing_runs import meta

from pc_clip.core.config.write import ChangeWriterConfig, GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import differences
from pc_clip.data.pairs import captions
from pc_clip.data.registry import open_dataset
from pc_clip.example.changes import TEMPLATES
from pc_clip.interface import finetune, generate_diffs
from pc_clip.models import loading
from pc_clip.models.caption_decoder import Shape
from pc_clip.models.change_model import ChangeClip, fresh
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model
from pc_clip.models.vocabulary import Vocabulary
from pc_clip.write import captioner, generate
from pc_clip.write.captioner import ChangeWriter, judge, says_no_change

TEXTS = ["the red star turned blue", "the green ring moved to the left", "a small square appeared"]


def untrained(seed: int = 0) -> Clip:
    """A captioner that says different things of different pairs, none of them sensible."""
    clip = create_model("example_vit")
    clip = ChangeClip.of(clip, fresh(clip, 2, seed=seed))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        clip.change.add_decoder(Vocabulary.of(clip.tokenizer, TEXTS), Shape(1, 2, 8, 9))
        for parameter in clip.change.decoder.parameters():
            torch.nn.init.normal_(parameter)
        clip.change.decoder.place *= 0.1  # what is there says more than where it is: pairs get sentences of their own
        clip.change.decoder.which *= 0.1
    clip.change.eval()
    return clip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    clip = untrained()
    loading.save_model(folder / "captioner.safetensors", clip)
    loading.save_model(folder / "other.safetensors", untrained(seed=1))
    clip.change.decoder = clip.change.vocabulary = None
    loading.save_model(folder / "retrieve.safetensors", clip)
    loading.save_model(folder / "plain.safetensors", create_model("example_vit"))
    return folder


@pytest.fixture
def config(runs, small_example) -> GenerateConfig:
    options = ChangeWriterConfig(checkpoint=str(runs / "captioner.safetensors"), batch_size=10)
    return GenerateConfig(name="said", writer="change", dataset="example_changes", change=options)


def said_by(runs: Path, data, beams: int = 1) -> list[str]:
    clip = loading.load_model(runs / "captioner.safetensors")
    return [caption.text for caption in captions(clip, data, beams=beams)]


# -- what is written -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_the_picture_after_is_the_first_and_the_sentence_is_the_captioners(config, runs, beams):
    config.change.beams = beams
    data = open_dataset("example_changes", split="train")
    sentences = said_by(runs, data, beams)
    expected = [(c.after, c.before, text) for c, text in zip(data.changes, sentences) if text]
    path = generate.generate(config)
    assert differences.read(path) == expected
    assert len(set(sentences)) > 5
    counts = meta(path)["counts"]
    assert (counts["kept"], sum(counts.values())) == (len(expected), 64)


def test_what_the_data_set_says_itself(config):
    config.change = ChangeWriterConfig(references=True)
    data = open_dataset("example_changes", split="train")
    sentences = {(c.after, c.before): c.sentences for c in data.changes if c.kind != "none"}
    rows = differences.read(generate.generate(config))
    assert {(d.first, d.second) for d in rows} == set(sentences)
    assert all(d.text in sentences[d.first, d.second] for d in rows)
    assert len({sentences[d.first, d.second].index(d.text) for d in rows}) > 1  # not always the first of several
    config.seed, config.name = 1, "other"
    assert differences.read(generate.generate(config)) != rows


def own_changes(root, rows):
    """A data set of (before, after, sentence); the names of its pictures are letters."""
    for name in {name for row in rows for name in row[:2]}:
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    lines = [json.dumps({"before": f"{a}.png", "after": f"{b}.png", "sentence": text}) for a, b, text in rows]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return {"dataset": "changes", "root": str(root)}


def test_duplicate_pairs_pool_their_reference_sentences(config, tmp_path):
    rows = [(a, "i", text) for text in ("it left", "it is gone") for a in "abcdefgh"]
    config = dataclasses.replace(config, change=ChangeWriterConfig(references=True), **own_changes(tmp_path, rows))
    listed = differences.read(generate.generate(config))
    assert [(d.first, d.second) for d in listed] == [("i.png", f"{a}.png") for a in "abcdefgh"]
    assert {d.text for d in listed} == {"it left", "it is gone"}


@pytest.mark.slow
def test_both_orders_shows_the_captioner_the_pictures_the_other_way_round(config, runs):
    config.both_orders = True
    data = open_dataset("example_changes", split="train")
    turned = tuple(dataclasses.replace(c, before=c.after, after=c.before) for c in data.changes)
    forth, back = said_by(runs, data), said_by(runs, dataclasses.replace(data, changes=turned))
    both = [
        row
        for c, a, b in zip(data.changes, forth, back)
        for row in ((c.after, c.before, a), (c.before, c.after, b))
        if row[2]
    ]
    assert differences.read(generate.generate(config)) == both
    assert forth != back


def test_both_orders_of_a_data_set_that_has_both_are_written_once(config, tmp_path):
    own_changes(tmp_path, [(a, b, "it left") for a, b in ("ab", "ba", "bc")])
    config.both_orders = True
    rows = captioner.pairs(open_dataset("changes", tmp_path, "train"), config)
    assert rows == [("b.png", "a.png"), ("a.png", "b.png"), ("c.png", "b.png"), ("b.png", "c.png")]


def test_some_pairs_are_drawn_by_seed(config):
    data = open_dataset("example_changes", split="train")
    drawn = [captioner.pairs(data, dataclasses.replace(config, n_pairs=20, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 20
    with pytest.raises(UserError, match="65 pairs were asked for, but example_changes/train has 64"):
        generate.generate(dataclasses.replace(config, n_pairs=65))


# -- interrupted, asked again --------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_the_checkpoints_content_that_counts(config, runs, tmp_path, monkeypatch):
    path = generate.generate(config)
    copy = tmp_path / "moved.safetensors"
    copy.write_bytes((runs / "captioner.safetensors").read_bytes())
    config.change = dataclasses.replace(config.change, checkpoint=str(copy), batch_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(ChangeWriter, "stream", lambda self, jobs: pytest.fail("it wrote again"))
        assert generate.generate(config) == path
    clip = loading.load_model(copy)
    assert meta(path)["settings"]["checkpoint"] == meta(path)["writer"]["weights"] == clip.weights_hash()
    config.change.checkpoint = str(runs / "other.safetensors")
    with pytest.raises(UserError, match="written with other settings"):
        generate.generate(config)


# -- sentences that say nothing ------------------------------------------------------------------------


def test_sentences_that_say_that_nothing_changed_are_dropped_and_counted(config, monkeypatch):
    sentences = ["the red star turned blue", "nothing changed", "", "the two scenes are the same"]
    monkeypatch.setattr(ChangeWriter, "stream", lambda self, jobs: ((n, sentences[n % 4]) for n in range(len(jobs))))
    path = generate.generate(config)
    assert meta(path)["counts"] == {"no_change": 32, "kept": 16, "empty": 16}
    assert {d.text for d in differences.read(path)} == {sentences[0]}
    rejected = [json.loads(line) for line in path.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert {row["raw"] for row in rejected} == set(sentences[1:])


def test_ways_to_say_that_nothing_changed_and_what_only_sounds_like_it():
    nothing = [
        *TEMPLATES["none"],
        "There is no difference between the two pictures.",
        "i see no visible differences",
        "no change has occurred",
        "nothing in the second picture appears to have changed",
        "nothing was modified",
        "the scene is the same as before",
        "both images look exactly the same",
        "the two scenes seem identical",
        "The scene didn't change.",
        "the pictures do not differ",
        "none",
    ]
    something = [
        "the red star is gone",
        "there is nothing on the table now",
        "no cars are left in the lot",
        "nothing changed but the red ball",
        "the images are the same except that a car is missing",
        "the ball is the same colour as the cube now",
        "the picture is the same size and the man has gone",
        "two people are not in the same place",
        "nothing else changed",
        "all the people left",
    ]
    assert [text for text in nothing if not says_no_change(text)] == []
    assert [text for text in something if says_no_change(text)] == []
    assert judge(" nothing\n") == (None, "no_change") and judge("\n") == (None, "empty")
    assert judge(something[0]) == (something[0], "kept")


# -- as a user runs it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_from_what_the_captioner_wrote(runs, small_example):
    captioner = ["--writer", "change", "--change.checkpoint", str(runs / "captioner.safetensors")]
    path = generate_diffs.main([*captioner, "--dataset", "example_changes"])
    assert path == Path("llm_diffs/example_changes_change.jsonl")
    assert sum(meta(path)["counts"].values()) == 64
    data = ["--data.dataset", "example_changes", "--data.differences", str(path)]
    train = ["--train.steps", "2", "--train.batch_size", "8", "--train.lr", "1e-4", "--name", "learnt"]
    plain = ["--model.name", "example_vit", "--pairwise.mirror", "false", "--retain.texts", "0"]
    finetune.main(["--method", "pairwise", *plain, *data, *train])
    start, learnt = create_model("example_vit"), loading.load_model("runs/learnt")
    assert learnt.name == start.name
    assert learnt.image_tower_hash() == start.image_tower_hash()
    assert learnt.weights_hash() != start.weights_hash()


def test_what_cannot_be_is_refused(config, runs):
    cases = [
        ({"change": {"references": True, "checkpoint": "x"}}, "leave change.checkpoint"),
        ({"change": {"references": True}, "dataset": "example"}, "says nothing of pairs of images"),
        ({"change": {}}, "--change.checkpoint '' cannot write of pairs of images; give"),
        ({"change": {"checkpoint": "runs/absent"}}, "no checkpoint at runs/absent"),
        ({"change": {"checkpoint": str(runs / "retrieve.safetensors")}}, "cannot write of pairs of images; give"),
        ({"change": {"checkpoint": str(runs / "plain.safetensors")}}, "cannot write of pairs of images; give"),
        ({"change": {"checkpoint": "x", "beams": 0}}, "change.beams is 0; it must be at least 1"),
        ({"task": "rank"}, "writes for --task pairs; --task is rank"),
        ({"captions": "some.json"}, "--captions has no effect in --task pairs --writer change"),
        ({"n_images": 9}, "--n_images has no effect on example_changes/train, which has pairs of its own"),
        ({"writer": "rules", "dataset": "example"}, "--change has no effect in --task pairs --writer rules"),
    ]
    for settings, message in cases:
        change = ChangeWriterConfig(**settings.pop("change")) if "change" in settings else config.change
        with pytest.raises(UserError, match=message):
            generate.generate(dataclasses.replace(config, **{"change": change, **settings}))
    assert not Path("llm_diffs").exists()
