"""Data sets of Hugging Face on disk: saved folders and Parquet files, with captions or classes."""

import numpy as np
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data import differences
from pc_clip.data.registry import open_dataset
from pc_clip.interface import finetune, generate_diffs

datasets = pytest.importorskip("datasets")
COLOURS = ("red", "blue", "green", "red")


@pytest.fixture(scope="module")
def table():
    """Four pictures of one colour each, with a list of captions, a class and a column that is not read."""
    features = {
        "picture": datasets.Image(),
        "caption": datasets.Sequence(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["blue", "green", "red"]),
        "url": datasets.Value("string"),
    }
    rows = {
        "picture": [Image.new("RGB", (8, 8), colour) for colour in COLOURS],
        "caption": [[f"a {colour} square", f"a square that is {colour}"] for colour in COLOURS[:3]] + [[]],
        "label": [2, 0, 1, None],
        "url": ["https://example.org"] * 4,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("layout", ["saved", "splits", "parquet"])
def test_pictures_captions_and_classes_are_read(table, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    if layout == "parquet":
        root.mkdir()
        table.to_parquet(root / "train-00000-of-00001.parquet")
        table.select([0]).to_parquet(root / "test-00000-of-00001.parquet")
    else:
        (table if layout == "saved" else datasets.DatasetDict(train=table, test=table.select([0]))).save_to_disk(root)
    data = open_dataset("huggingface", root, "" if layout == "saved" else "train")
    assert data.captions[1] == ("a blue square", "a square that is blue") and data.captions[3] == ()
    assert [np.asarray(data.load(row))[0, 0].tolist() for row in (0, 1)] == [[255, 0, 0], [0, 0, 255]]
    (question,) = data.questions
    assert question.classes == ("blue", "green", "red") and question.rows.tolist() == [0, 1, 2]
    assert question.target.tolist() == [2, 0, 1]
    assert data.note == "columns that are not read: url; 1 images have no caption; 1 images have no class"


@pytest.mark.slow
def test_a_run_learns_from_one_and_sentences_are_written_about_it(table, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    table.save_to_disk("mine")
    flags = "--method contrastive --data.dataset huggingface --data.root mine --data.split null --data.workers 0"
    finetune.main([*flags.split(), "--train.steps", "2", "--train.batch_size", "2"])
    assert (tmp_path / "runs/example-captions/model.safetensors").is_file()
    assert "1 images of huggingface/mine have no caption and are left out" in caplog.text
    written = generate_diffs.main(
        ["--dataset", "huggingface", "--root", "mine", "--split", "null", "--n_images", "3", "--n_pairs", "3"]
    )
    named = {row.first for row in differences.read(written)} | {row.second for row in differences.read(written)}
    assert named == {"0", "1", "2"}  # of the image without a caption there is nothing to write


def test_other_folders_and_columns_are_user_errors(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict(train=table).save_to_disk("dict")
    table.select_columns(["caption", "label"]).save_to_disk("blind")
    table.select_columns(["picture", "url"]).save_to_disk("mute")
    table.save_to_disk("broken")
    (tmp_path / "broken/data-00000-of-00001.arrow").write_bytes(b"x")
    for name in ("empty", "parts", "torn"):
        (tmp_path / name).mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"parts/{split}-00000-of-00001.parquet")
    (tmp_path / "torn/train.parquet").write_bytes(b"x")
    wrong = []
    for root, split, message in [
        ("dict", "val", "has no split 'val'; it has train"),
        ("mute", "", "needs one column of images, and columns of captions"),
        ("blind", "", "needs one column of images"),
        ("mute", "train", "is one split; leave --split"),
        ("broken", "", "is not a complete folder of save_to_disk"),
        ("empty", "train", "has no Parquet files"),
        ("parts", "", "has no split ''; it has test, train"),
        ("parts", "tes", "has no split 'tes'; it has test, train"),
        ("torn", "", "is not complete Parquet"),
        ("nowhere", "", "huggingface is not at nowhere"),
    ]:
        with pytest.raises(UserError) as error:
            open_dataset("huggingface", root, split)
        wrong += [] if message in str(error.value) else [(root, message, str(error.value))]
    assert not wrong
