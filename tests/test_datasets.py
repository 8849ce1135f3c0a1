"""The table of data sets, captions, folders of images, and what makes an image."""

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SHARED
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data import registry
from pc_clip.data.captions import read_captions, read_coco_captions
from pc_clip.data.dataset import BrokenImage, Dataset, read_image
from pc_clip.data.registry import open_dataset
from pc_clip.example import world

REAL = SHARED / "coco_mini"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not part of the project")


def picture(path, colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).convert(mode).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# -- the table -------------------------------------------------------------------------------------------


def test_what_is_not_known_or_not_there_says_what_to_do(tmp_path, capsys):
    for name, split, said in [
        ("cifar", None, "unknown data set 'cifar'. Did you mean 'cifar10'"),
        ("cifar10", "tset", "cifar10 has no split 'tset'. Did you mean 'test'"),
        ("example", "all", "example has no split 'all'"),
    ]:
        with pytest.raises(UserError, match=said):
            open_dataset(name, split=split)
    for name, reader in registry.READERS.items():
        if reader.root:
            with pytest.raises(UserError, match=f"{name} is not at nowhere. (Fetch|Put) .*--root"):
                open_dataset(name, "nowhere")
    with pytest.raises(UserError, match="missing is 'ignore'"):
        open_dataset("coco", missing="ignore")
    (tmp_path / "data" / "cub").mkdir(parents=True)
    registry.main([])
    listed = capsys.readouterr().out
    assert "cub                   incomplete  data/cub" in listed and "wget -c http://images.cocodataset.org" in listed
    assert all(f"\n{name} " in listed for name in registry.READERS)


@pytest.mark.parametrize(
    "name, part, chosen",
    [("example", "test", "val"), ("example", "val", "train"), ("cifar10", "train", None), ("awa2", "all", None),
     ("flowers102", "test", "val"), ("folder", "", None), ("spot_the_diff", "reformat_train", "reformat_val"),
     ("changes", "mine", "val"), ("no reader", "test", None)],
)  # fmt: skip
def test_settings_are_chosen_on_images_that_are_not_reported_on(name, part, chosen):
    assert registry.held_out(Dataset(name, f"{part}-renamed", [], print, "", part=part)) == chosen


def test_the_example_has_true_answers_and_splits_apart(small_example):
    data, again = open_dataset("example", split="val"), open_dataset("example", split="val")
    assert data.fingerprint == again.fingerprint and data.ids[0] == "val-00000"
    assert not {*data.ids} & {*open_dataset("example", split="test").ids}
    for question in data.questions:
        scenes = [world.scene("val", row) for row in question.rows]
        assert [world.answer(question.name, scene) for scene in scenes] == question.target.tolist()


# -- captions --------------------------------------------------------------------------------------------


def coco(ids, annotations):
    images = [{"id": key, "file_name": f"{n}.jpg"} for n, key in enumerate(ids)]
    return {"images": images, "annotations": [{"image_id": key, "caption": text} for key, text in annotations]}


def test_coco_captions_come_by_image_whatever_form_its_id_has_and_all_are_counted(tmp_path):
    annotations = [(5, "A  dog.\n"), ("000000000005", "One dog"), (9.0, "A cat."), (9, " "), (7, "gone"), (5, "\ud83d")]
    path = write(tmp_path / "c.json", "\ufeff" + json.dumps(coco(["9", 5, 3], annotations)))
    captions = read_coco_captions(path)
    assert captions == {"9": ("0.jpg", ("A cat.",)), "5": ("1.jpg", ("A dog.", "One dog", "?"))}
    assert captions.note == (
        "c.json: 1 captions are empty; 1 annotations are of images that it does not list; "
        "1 of 3 images have no caption; left out"
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", r"is not JSON"),
        ([1], 'needs the lists "images" and "annotations"'),
        (coco([1, 1.0], []), "two images have the id 1, 0.jpg and 1.jpg"),
        (coco([1], [(1, None)]), "entry 0 of annotations lacks image_id or caption"),
        (coco([1], [(None, "a")]), "entry 0 of annotations lacks"),
        (
            {"images": [{"id": 1, "file_name": None}], "annotations": []},
            "entry 0 of images needs",
        ),
        ({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}, "COCO's instances file"),
        (coco([1], [(1, " ")]), r"holds no captions \(1 captions are empty"),
    ],
)
def test_a_file_that_holds_no_coco_captions_says_why_in_a_line(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as raised:
        read_captions(write(tmp_path / "c.json", content))
    assert "\n" not in str(raised.value) and str(tmp_path / "c.json") in str(raised.value)


SAID = ['A sign that says "STOP"', '"STOP" it says', '"a" and "b"', '"', '""', "5' 2\"", "plain", '"all"', "two\nlines"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_table_that_pandas_wrote_has_the_captions_it_was_given(tmp_path, quoting):
    table = pd.DataFrame({"image": [f"{n}.jpg" for n in range(len(SAID))], "caption1": SAID, "caption2": SAID[::-1]})
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False, quoting=quoting)
    spaced = [" ".join(text.split()) for text in SAID]
    assert read_captions(tmp_path / "t.tsv") == {
        file: (file, texts) for file, texts in zip(table["image"], zip(spaced, spaced[::-1]))
    }


def test_quotes_that_no_writer_put_there_stay(tmp_path):
    said = ['"Hello" and "bye"', '"unfinished', 'unfinished"', 'a "big" dog', '"']
    write(tmp_path / "t.tsv", "\ufeffimage\tcaption1\r\n" + "".join(f"{n}\t{text}\r\n" for n, text in enumerate(said)))
    assert [texts for _, (texts,) in read_captions(tmp_path / "t.tsv").values()] == said


def test_a_table_is_read_by_its_columns_and_nan_is_no_caption(tmp_path):
    text = (
        "caption\tid\timage\tcaption2\tcaption_id\nA dog\t7\ta.jpg\t\t70\n\t8\tb.jpg\t A  cat \nnan\t9\tc.jpg\t\t71\t\n"
    )
    captions = read_captions(write(tmp_path / "t.tsv", text))
    assert captions == {"7": ("a.jpg", ("A dog",)), "8": ("b.jpg", ("A cat",))}
    assert captions.note == "t.tsv: 1 of 3 images have no caption; left out"


@pytest.mark.parametrize(
    "text, said",
    [
        ("image,caption1\na.jpg,A dog\n", r"found image,caption1 \(one column: separate them by tabs\)"),
        ("image\tcaption_id\na.jpg\tA dog\n", r"caption1, caption2.*found image, caption_id"),
        ("image\tcaption1\na.jpg\t\n", r"t\.tsv holds no captions"),
        ("", r"t\.tsv is no tab-separated table: it is empty"),
        ("image\tcaption1\na.jpg\tA dog\n\nb.jpg\tA cat\tOne cat\n", r"t\.tsv, line 4: 3 fields, but .* 2 columns"),
        ("image\tcaption1\na.jpg\tA dog\n\tA cat\n", r"t\.tsv, line 3: no image is named, in 'A cat'"),
        ("image\tcaption1\na.jpg\tA dog\na.jpg\tA cat\n", r"line 3: a second row for 'a\.jpg'"),
        ('image\tcaption1\na.jpg\t"A\ndog"\nb.jpg\t"A cat\n', r"line 3: one field only; is a quote before it"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_that_says_why(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_captions(write(tmp_path / "t.tsv", text))


def test_rewritten_captions_are_a_json_a_line(tmp_path):
    lines = [{"image": "a", "text": "A  dog"}, {"image": 7, "text": "A cat"}, {"image": "a", "text": " "}]
    captions = read_captions(write(tmp_path / "c.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert captions == {"a": ("", ("A dog",)), "7": ("", ("A cat",))} and "1 captions are empty" in captions.note
    for line in ('{"image": "a", "text": null}', "{", "[1]"):
        with pytest.raises(UserError, match=r"c\.jsonl, line 1: wanted JSON with image and text, found"):
            read_captions(write(tmp_path / "c.jsonl", line))
    (tmp_path / "c.jsonl").write_bytes('{"image": "a", "text": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.jsonl is no UTF-8 text"):
        read_captions(tmp_path / "c.jsonl")


@pytest.mark.parametrize("pictures", ["mini", "images/mini", "images", "."])
def test_captions_are_opened_with_their_pictures_or_count_those_absent(tmp_path, pictures):
    write(tmp_path / "annotations" / "captions_mini.json", coco([4, 5], [(4, "A dog"), (5, "A cat")]))
    write(tmp_path / "mini.TSV", "image\tcaption1\n0.jpg\tA dog\n1.jpg\tA cat\n")
    for n in (0, 1):
        picture(tmp_path / pictures / f"{n}.jpg", (100 * n, 0, 0))
    for name, ids in (("coco", ["4", "5"]), ("tsv", ["0.jpg", "1.jpg"])):
        data = open_dataset(name, tmp_path, "mini")
        assert (data.ids, data.captions, data.note) == (ids, [("A dog",), ("A cat",)], "")
        assert data.load(1).getpixel((2, 2))[0] == pytest.approx(100, abs=4) and data.label == f"{name}/mini"
    before = data.fingerprint
    (tmp_path / pictures / "1.jpg").unlink()
    for name in ("coco", "tsv"):
        with pytest.raises(UserError, match=r"1 of the 2 pictures in .*first 1\.jpg.*--data\.missing skip \(--missing"):
            open_dataset(name, tmp_path, "mini")
        data = open_dataset(name, tmp_path, "mini", missing="skip")
        assert len(data) == 1 and data.fingerprint != before and data.note.endswith("are absent and left out")
        assert len(open_dataset(name, tmp_path, "mini", missing="keep")) == 2
        with pytest.raises(UserError, match="found there: mini"):
            open_dataset(name, tmp_path, "train")


def test_a_table_that_lies_elsewhere_is_named_by_its_path(tmp_path):
    place = picture(tmp_path / "far" / "a.png", (50, 0, 0))
    for folder in ("mine", "yours"):
        write(tmp_path / folder / "t.tsv", f"image\tcaption1\n{place}\tA dog\n")
    one, other = open_dataset("tsv", split="mine/t.tsv"), open_dataset("tsv", split="yours/t.tsv")
    assert one.load(0).getpixel((0, 0)) == (50, 0, 0) and one.label != other.label
    assert open_dataset("tsv", tmp_path / "mine", "t").label == "tsv/t"


@real_data
def test_the_published_captions_and_photographs():
    captions = read_captions(REAL / "captions_val2017.json")
    assert len(captions) == 5000 and sum(len(texts) for _, texts in captions.values()) == 25014 and not captions.note
    assert all(len(texts) == 5 for _, texts in read_captions(REAL / "simclip_example.tsv").values())
    data = open_dataset("coco", REAL, "val2017", missing="skip")
    assert len(data) == 283 and data.load(0).mode == "RGB" and "4717 pictures" in data.note


# -- folders of images -----------------------------------------------------------------------------------


def test_a_folder_of_folders_has_a_question_about_its_classes(tmp_path):
    for name in ("pets/hot_dog/a.png", "pets/hot_dog/deep/b.JFIF", "pets/cat/c.ppm", "pets/cat/.thumb.png"):
        picture(tmp_path / "x.png").replace(tmp_path / "y.png")
        picture((tmp_path / name).with_suffix(".png")).rename(tmp_path / name)
    (tmp_path / "y.png").unlink()
    write(tmp_path / "pets" / "cat" / "notes.txt", "x")
    data = open_dataset("folder", tmp_path)  # the one folder in it is entered
    (question,) = data.questions
    assert data.ids == ["cat/c.ppm", "hot_dog/a.png", "hot_dog/deep/b.JFIF"] and question.target.tolist() == [0, 1, 1]
    assert question.classes == ("cat", "hot dog") and data.label == f"folder/{tmp_path.name}"
    assert data.note == "1 other files are not read (.txt)"
    fingerprint = data.fingerprint
    picture(tmp_path / "pets" / "loose.png")
    data = open_dataset("folder", tmp_path)
    assert data.questions == () and "in folders and beside them" in data.note and data.fingerprint != fingerprint


def test_a_split_is_a_folder_in_any_case_that_has_to_be_named(tmp_path):
    for name in ("Train/cat/a.png", "Train/dog/b.png", "Test/cat/c.png"):
        picture(tmp_path / "set" / name)
    data = open_dataset("folder", tmp_path, "train")
    assert (data.ids, data.part, data.questions[0].classes) == (["cat/a.png", "dog/b.png"], "train", ("cat", "dog"))
    with pytest.raises(UserError, match=r"has a folder a split \(Test, Train\); say which with --split"):
        open_dataset("folder", tmp_path)
    with pytest.raises(UserError, match="there is no folder .* for the split 'dev'"):
        open_dataset("folder", tmp_path, "dev")


def test_folders_that_would_be_read_wrongly_are_refused(tmp_path):
    for name in ("a/hot_disc/a.png", "a/hot disc/a.png", "b/cat/a.png", "b/bird/x.txt", "c/cat/a.png", "d/x.txt"):
        (picture if name.endswith("png") else lambda path: write(path, "x"))(tmp_path / name)
    os.symlink(tmp_path / "c", tmp_path / "c" / "cat" / "back")
    for root, said in {
        "a": "two folders of .* are both the class 'hot disc'",
        "b": "no images in the class folders bird; fill or remove",
        "c": "the link .*back leads back",
        "d": r"holds no images \(.*\.avif.*\.jpg",
    }.items():
        with pytest.raises(UserError, match=said):
            open_dataset("folder", tmp_path / root)


def test_pictures_of_more_than_8_bits_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(2, axis=0)
    kinds = {
        "16 bits.png": (ramp * 65535).astype(np.uint16),
        "shares.tif": ramp,
        "depths.tif": ramp * 40 - 20,
        "counts.tif": (ramp * 10**6).astype(np.int32),
    }
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / name)
        grey = np.asarray(read_image(tmp_path / name))
        assert grey.shape == (2, 64, 3)
        np.testing.assert_allclose(grey[0, :, 0], ramp[0] * 255, atol=1.01, err_msg=name)
    Image.fromarray(ramp * np.nan).save(tmp_path / "nan.tif")
    with pytest.raises(BrokenImage, match="values that are no numbers"):
        read_image(tmp_path / "nan.tif")
    for mode in ("L", "P", "RGBA", "1"):
        assert read_image(picture(tmp_path / f"{mode}.png", mode=mode)).mode == "RGB"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_only_what_was_read_and_does_not_decode_is_a_broken_image(tmp_path, monkeypatch, number):
    path = picture(tmp_path / "a.png")
    whole = path.read_bytes()
    for content in (b"no image", whole[:40], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(BrokenImage, match=r"a\.png cannot be read as an image"):
            read_image(path)

    def fail(self, *_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"a\.png cannot be read \({os.strerror(number)}\)") as caught:
        read_image(path)
    assert not isinstance(caught.value, BrokenImage)


def test_memory_that_was_not_there_is_no_fault_of_the_image(tmp_path, monkeypatch):
    def fail(self, mode):
        raise OSError("out of memory when reading image file")

    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError, match=r"a\.png"):
        read_image(path)
