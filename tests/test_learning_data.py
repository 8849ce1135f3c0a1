"""What a run learns from: data sets mixed together, and pictures that do not decode."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_dataset_layouts import write_idx

from pc_clip.core.config.settings import DataConfig, EmbedConfig, MixConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets, training_data
from pc_clip.data.embed import embed
from pc_clip.data.registry import open_dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.interface import finetune, run

SHADES = range(20, 140, 20)


def tsv(root, shades=SHADES, split="train"):
    """Pictures in shades of red, each with a caption that says which."""
    folder = Path(root) / split
    folder.mkdir(parents=True, exist_ok=True)
    for shade in shades:
        path = folder / f"{shade}.png"
        if not path.exists():  # a file that is written again is another one
            Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)
    rows = "".join(f"{shade}.png\tred {shade}\n" for shade in shades)
    (Path(root) / f"{split}.tsv").write_text(f"image\tcaption1\n{rows}")
    return DataConfig(dataset="tsv", root=str(root))


def mnist(root="data/mnist", n=40):
    """Digits 0 to 9 in turn, whose brightness is their number."""
    folder = Path(root) / "MNIST" / "raw"
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.repeat(np.arange(n, dtype=np.uint8), 16).reshape(n, 4, 4))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)


def red(data, row):
    return data.load(row).getpixel((0, 0))[0]


def folder(root, colours=(250, 240)):
    """Two images a class, "hot dog" and "cat"; nothing is said of them."""
    for name, shade in zip(("hot_dog", "cat"), colours):
        for n in range(2):
            path = Path(root) / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (shade + n, 0, 0)).save(path)


# -- mixing --------------------------------------------------------------------------------------------


def test_mixed_in_images_follow_with_class_captions():
    config = tsv("main")
    mnist()
    config.mix = [MixConfig("mnist", 15, caption="A MNIST digit of {}")]
    data, plain = load_dataset(config), load_dataset(tsv("main"))
    assert data.ids[:6] == plain.ids and data.captions[:6] == plain.captions and len(data) == 21
    assert [red(data, row) for row in range(6)] == list(SHADES)
    for row in range(6, 21):
        number = int(data.ids[row].removeprefix("mnist:"))
        assert red(data, row) == number and data.captions[row] == (f"A MNIST digit of {number % 10}",)
    assert len(set(data.ids)) == 21 and data.ids[6:] != [f"mnist:{n}" for n in range(15)]
    assert data.label == "tsv/train" and data.note == "15 images of mnist/train mixed in"
    folder("others")
    config.mix = [MixConfig("folder", 4, root="others", caption="a picture of a {}")]
    captions = dict(zip(load_dataset(config).ids, load_dataset(config).captions))
    assert captions["folder:hot_dog/1.png"] == ("a picture of a hot dog",)


def test_mixed_in_images_are_seeded_and_nested():
    mnist()

    def drawn(n, seed):
        data = load_dataset(tsv("main") if not n else mixing(n), seed)
        return set(data.ids[6:]), data.fingerprint

    def mixing(n):
        config = tsv("main")
        config.mix = [MixConfig("mnist", n)]
        return config

    assert drawn(10, 0) == drawn(10, 0)
    assert drawn(10, 0)[0] != drawn(10, 1)[0] and drawn(10, 0)[0] < drawn(20, 0)[0]
    assert len({drawn(n, seed)[1] for n, seed in ((0, 0), (10, 0), (10, 1), (20, 0))}) == 4


def test_mixed_in_captions_are_kept_and_ids_do_not_collide(small_example):
    config = DataConfig(mix=[MixConfig("example", 5, split="test"), MixConfig("example", 4, split="val")])
    data, val = load_dataset(config), open_dataset("example", split="val")
    own = dict(zip([f"example-2:{key}" for key in val.ids], val.captions))
    assert len(data) == 309 == len(set(data.ids)) == len(data.captions)
    assert all(key.startswith("example:test-") for key in data.ids[300:305])
    for row in range(305, 309):
        assert data.captions[row] == own[data.ids[row]]
        assert data.load(row) == val.load(val.ids.index(data.ids[row].removeprefix("example-2:")))
    assert data.note == "5 images of example/test mixed in; 4 images of example/val mixed in"
    plain = load_dataset(DataConfig())  # what is known of the own images stays, and of the others nothing is said
    for ours, theirs in zip(data.questions, plain.questions):
        assert np.array_equal(ours.rows, theirs.rows) and np.array_equal(ours.target, theirs.target)
    for ours, theirs in zip(data.attributes, plain.attributes):
        assert np.array_equal(ours.value[:300], theirs.value, equal_nan=True)
        assert ours.value.shape == (309,) and np.isnan(ours.value[300:]).all()


def test_what_cannot_be_mixed_in_is_an_error_in_words():
    config = tsv("main")
    mnist()
    Path("flat").mkdir()
    shutil.copy("main/train/20.png", "flat/a.png")
    cases = [
        ([MixConfig("mnits", 5)], r"unknown data set 'mnits'.*Did you mean 'mnist'"),
        ([MixConfig("mnist", 41)], r"data\.mix asks for 41 images of mnist/train, which has 40"),
        ([MixConfig("mnist", 0)], r"data\.mix asks for 0 images of mnist/train"),
        ([MixConfig("mnist", 5, caption="a digit")], r"caption 'a digit' needs exactly one \{\}"),
        ([MixConfig("mnist", 5), MixConfig("mnist", 3, root="./data/mnist/")], r"names mnist/train, which is learnt"),
        ([MixConfig("tsv", 2, root="./main/")], r"names tsv/train, which is learnt from already"),
        ([MixConfig("folder", 1, root="flat")], r"nothing is known of the images of folder.*neither captions"),
        ([MixConfig("coco", 5)], r"coco is not at data/coco"),
    ]
    for config.mix, message in cases:
        with pytest.raises(UserError, match=message):
            load_dataset(config)


def test_settings_that_do_not_go_together_are_refused():
    folder("pictures")
    mix = [MixConfig("mnist", 3)]
    cases = [
        (DataConfig(embeddings="e.safetensors", mix=mix), r"data\.embeddings holds one data set's images"),
        (DataConfig(embeddings="e.safetensors", broken="skip"), r"leave data\.broken skip out"),
        (DataConfig(dataset="folder", root="pictures", mix=mix), r"has none; name a file of them"),
        (DataConfig(broken="skp"), r"data\.broken is 'skp'\. Did you mean 'skip'"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            load_dataset(config)
    for settings in ({"mix": mix}, {"min_crop": 0.8}, {"broken": "skip"}, {"embeddings": "e.safetensors"}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(settings))}"):
            embed(EmbedConfig(data=DataConfig(**settings)))


def test_an_id_that_is_taken_already_is_an_error():
    config = tsv("main")
    mnist()
    table = Path("main/train.tsv")
    table.write_text("id\timage\tcaption1\n" + "".join(f"mnist:{n}\t20.png\tred\n" for n in range(40)))
    config.mix = [MixConfig("mnist", 1)]
    with pytest.raises(UserError, match=r"tsv/train has images that are called like some of data\.mix"):
        load_dataset(config)


# -- pictures that do not decode -----------------------------------------------------------------------


def harm(path, keep=40):
    Path(path).write_bytes(Path(path).read_bytes()[:keep])


def test_broken_pictures_are_left_out_and_counted_when_that_is_asked_for():
    config = tsv("main")
    harm("main/train/60.png"), harm("main/train/100.png")
    whole = load_dataset(config)
    assert len(whole) == 6 and whole.note == ""
    config.broken, config.workers = "skip", 1
    data = load_dataset(config)
    assert data.ids == ["20.png", "40.png", "80.png", "120.png"] and red(data, 2) == 80
    assert data.captions[3] == ("red 120",) and data.fingerprint != whole.fingerprint
    assert data.note.startswith("2 broken pictures are left out, first: main/train/60.png cannot be read as an image")


def test_sentences_about_a_picture_that_is_left_out_are_dropped_and_counted(capsys, caplog):
    config = tsv("main")
    sentences = [
        {"first": f"{a}.png", "second": f"{b}.png", "text": f"The first image is {a}, the second is {b}."}
        for a, b in [(20, 40), (40, 60), (60, 80), (100, 120), (80, 20)]
    ]
    Path("d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in sentences))
    argv = ["--data.dataset", "tsv", "--data.root", config.root, "--data.differences", "d.jsonl", "--model.name"]
    argv += ["example", "--train.steps", "1", "--train.batch_size", "2"]
    harm("main/train/60.png"), Path("main/train/100.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 6 pictures named in .* are absent"):
        finetune.main(argv)
    with caplog.at_level(logging.INFO):
        finetune.main([*argv, "--data.missing", "skip", "--data.broken", "skip"])
    assert "3 pairs dropped, because a picture of theirs is absent or broken" in caplog.text + capsys.readouterr().out
    scores = ["--dataset", "tsv", "--root", config.root, "--difference.sentences", "d.jsonl", "--mode", "difference"]
    scores += ["--model.name", "example"]
    Path("main/train/60.png").unlink()
    results = run.main([*scores, "--split", "train", "--missing", "skip"])
    assert (results[0]["n"], results[0]["details"]["left_out"]) == (2, 3)


def test_broken_images_are_searched_once_per_file_state(monkeypatch):
    config = tsv("main")
    config.broken = "skip"
    harm("main/train/60.png")
    looked, look = [], training_data.broken_images

    def count(data, *how):
        looked.append(len(data))
        return look(data, *how)

    monkeypatch.setattr(training_data, "broken_images", count)
    first = load_dataset(config)
    assert 6 in looked
    looked.clear()
    again = load_dataset(config)
    assert (again.ids, again.note) == (first.ids, first.note) and sum(looked) <= 1  # one for its path
    harm("main/train/120.png")
    assert load_dataset(config).note.startswith("2 broken") and 6 in looked


def test_another_version_of_pillow_looks_again(monkeypatch):
    config = tsv("main")
    config.broken = "skip"
    path = Path("main/train/60.png")
    content = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"x" * len(content))
    os.utime(path, ns=(stamp, stamp))
    assert len(load_dataset(config)) == 5
    path.write_bytes(content)  # as if another version could decode it: neither its size nor its time tells
    os.utime(path, ns=(stamp, stamp))
    monkeypatch.setattr(PIL, "__version__", "999.0")
    assert len(load_dataset(config)) == 6


def test_nothing_is_left_out_where_all_decode_and_something_must_be_left():
    config = tsv("main")
    config.broken = "skip"
    data = load_dataset(config)
    assert len(data) == 6 and data.note == "" and data.fingerprint == load_dataset(tsv("main")).fingerprint
    for shade in SHADES:
        harm(f"main/train/{shade}.png")
    with pytest.raises(UserError, match=r"none of the 6 pictures of tsv/train can be used: main/train/20\.png cannot"):
        load_dataset(config)


def test_what_the_disk_does_not_give_is_never_left_out():
    config = tsv("main")
    config.broken = "skip"
    path = Path("main/train/80.png")
    harm("main/train/20.png")
    path.unlink()
    path.symlink_to("80.png")  # a link to itself: not absent, not readable
    with pytest.raises(UserError, match=r"80\.png"):
        load_dataset(config)


def test_a_broken_picture_stops_training_or_is_skipped(tmp_path, caplog, capsys, tiny):
    caplog.set_level(logging.INFO)
    config = tsv("main")
    harm("main/train/60.png")
    Path("c.yaml").write_text("name: mine\nmethod: contrastive\n")
    argv = ["--config", "c.yaml", "--data.dataset", "tsv", "--data.root", config.root, "--train.batch_size", "5"]
    argv += ["--model.name", tiny, "--model.train", "both", "--train.epochs", "1", "--train.lr", "1e-4"]
    with pytest.raises(UserError, match=r"main/train/60\.png cannot be read as an image"):
        finetune.main([*argv, "--train.batch_size", "6"])
    run_folder = finetune.main([*argv, "--data.broken", "skip", "--name", "without"])
    assert (run_folder / "model.safetensors").is_file()
    message = f"python run.py --dataset tsv --root {config.root} --checkpoint {run_folder}"
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_crops_are_learnt_from_and_processes_change_no_bit_of_the_result(monkeypatch, tiny):
    monkeypatch.setitem(example_sets.EXAMPLE_SIZES, "train", 40)
    Path("c.yaml").write_text("method: contrastive\nmodel:\n  train: both\ndata:\n  min_crop: 0.5\n")
    argv = ["--config", "c.yaml", "--train.batch_size", "16", "--train.steps", "3", "--train.lr", "1e-3"]
    argv += ["--model.name", tiny]
    ways = {"here": [], "two": ["--data.workers", "2"], "whole": ["--data.min_crop", "1"]}
    here, two, whole = (
        load_file(finetune.main([*argv, "--name", name, *flags]) / "model.safetensors") for name, flags in ways.items()
    )
    assert all(torch.equal(weights, two[name]) for name, weights in here.items())  # over two epochs
    assert not all(torch.equal(weights, whole[name]) for name, weights in here.items())
