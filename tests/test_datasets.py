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
from test_dataset_layouts import write

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


# -- the table -------------------------------------------------------------------------------------------


def test_what_is_not_known_or_not_there_says_what_to_do(tmp_path, capsys):
    for name, split, message in [
        ("cifar", None, "unknown data set 'cifar'. Did you mean 'cifar10'"),
        ("cifar10", "tset", "cifar10 has no split 'tset'. Did you mean 'test'"),
        ("example", "all", "example has no split 'all'"),
    ]:
        with pytest.raises(UserError, match=message):
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
    assert "cub                   not found   data/cub" in listed and "wget -c http://images.cocodataset.org" in listed
    assert all(f"\n{name} " in listed for name in registry.READERS)


def test_settings_are_chosen_on_images_that_are_not_reported_on():
    for name, part, chosen in [
        ("example", "test", "val"), ("example", "val", "train"), ("cifar10", "train", None), ("awa2", "all", None),
        ("flowers102", "test", "val"), ("folder", "", None), ("spot_the_diff", "reformat_train", "reformat_val"),
        ("changes", "mine", "val"), ("no reader", "test", None),
    ]:  # fmt: skip
        assert registry.selection_split(Dataset(name, f"{part}-renamed", [], print, "", part=part)) == chosen, name


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


def test_coco_captions_are_joined_by_any_form_of_id(tmp_path):
    annotations = [(5, "A  dog.\n"), ("000000000005", "One dog"), (9.0, "A cat."), (9, " "), (7, "gone"), (5, "\ud83d")]
    path = write(tmp_path / "c.json", "\ufeff" + json.dumps(coco(["9", 5, 3], annotations)))
    captions = read_coco_captions(path)
    assert captions == {"9": ("0.jpg", ("A cat.",)), "5": ("1.jpg", ("A dog.", "One dog", "?"))}
    assert captions.note == (
        "c.json: 1 annotations are of images that it does not list; 1 captions are empty; "
        "1 of 3 images have no caption; left out"
    )


def test_a_file_that_holds_no_captions_says_why_in_a_line(tmp_path):
    for name, content, message in [
        ("c.json", "[", r"is not JSON"),
        ("c.json", [1], "must hold an object"),
        ("c.json", {}, "not a COCO captions file: it must be an object with images, annotations"),
        ("c.json", coco([1, 1.0], []), "entry 1 of images needs an id that no other image has, found 1.0"),
        ("c.json", coco([1], [(1, None)]), "entry 0 of annotations: caption must be a text"),
        ("c.json", coco([1], [(None, "a")]), "entry 0 of annotations needs an image_id"),
        ("c.json", {"images": [{"id": 1, "file_name": None}], "annotations": []}, "entry 0 of images: file_name must"),
        ("c.json", {"images": [], "annotations": [{"image_id": 1, "bbox": []}]}, r"captions_\*.json is wanted"),
        ("c.json", coco([1], [(1, " ")]), r"holds no captions \(1 captions are empty"),
        ("t.tsv", "picture,caption1\na.jpg,A dog\n", r"needs a column of pictures .* found picture, caption1"),
        ("t.tsv", "image\tcaption_id\na.jpg\tA dog\n", r"columns of captions .*found image, caption_id"),
        ("t.tsv", "image\tcaption1\na.jpg\t\n", r"holds no captions"),
        ("t.tsv", "", r"is not a table .*, or it is empty"),
        ("t.parquet", "x", r"is not a complete Parquet file"),
        ("t.tsv", "image\tcaption1\na\tA dog\n\nb\tA cat\tOne cat\n", r", line 4: 3 fields, but .* 2 columns"),
        ("t.tsv", "image\tcaption1\na.jpg\tA dog\n\tA cat\n", r", line 3: image must name an image"),
        ("t.tsv", "id\timage\tcaption\n1\ta.jpg\tA dog\n1\tb.jpg\tA cat\n", r"line 3: the id '1' is that of another"),
        ("t.tsv", 'image\tcaption1\na.jpg\t"A\ndog"\nb.jpg\t"A cat\n', r"line 3: one field only; is a quote"),
        ("t.jsonl", {"image": "a", "text": None}, "line 1: text must be a text"),
        ("t.jsonl", "{", "line 1 is not JSON"),
        ("t.jsonl", [1], "line 1 must be an object with image, text"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            read_captions(write(tmp_path / name, content))
        assert "\n" not in str(raised.value) and str(tmp_path / name) in str(raised.value)
    (tmp_path / "c.jsonl").write_bytes('{"image": "a", "text": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.jsonl is not UTF-8 text"):
        read_captions(tmp_path / "c.jsonl")


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
    sentences = ['"Hello" and "bye"', '"unfinished', 'unfinished"', 'a "big" dog', '"']
    write(
        tmp_path / "t.tsv",
        "\ufeffimage\tcaption1\r\n" + "".join(f"{n}\t{text}\r\n" for n, text in enumerate(sentences)),
    )
    assert [texts for _, (texts,) in read_captions(tmp_path / "t.tsv").values()] == sentences


def test_a_table_is_read_by_its_columns_and_nan_is_no_caption(tmp_path):
    text = (
        "caption\tid\timage\tcaption2\tcaption_id\nA dog\t7\ta.jpg\t\t70\n\t8\tb.jpg\t A  cat \nnan\t9\tc.jpg\t\t71\t\n"
    )
    captions = read_captions(write(tmp_path / "t.tsv", text))
    assert captions == {"7": ("a.jpg", ("A dog",)), "8": ("b.jpg", ("A cat",))}
    assert captions.note == "t.tsv: 1 of 3 images have no caption; left out"


def test_tables_of_other_programs_are_read_by_their_columns(tmp_path):
    sentences = {"a.jpg": ("a.jpg", ("A dog, asleep", "One dog")), "b.jpg": ("b.jpg", ("A cat",))}
    rows = [("a.jpg", "A dog, asleep"), ("b.jpg", "A cat"), ("a.jpg", "One dog")]
    table = pd.DataFrame(rows, columns=["filepath", "title"]).assign(width=3)  # open_clip's names, a row a caption
    table.to_csv(tmp_path / "comma.csv", index=False)
    table.to_csv(tmp_path / "excel.csv", sep=";", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("comma.csv", "excel.csv", "t.parquet"):
        assert read_captions(tmp_path / name) == sentences, name
    wide = pd.DataFrame([("a.jpg", "A dog", None), ("b.jpg", None, None)], columns=["image", "caption1", "caption2"])
    wide.to_parquet(tmp_path / "wide.parquet")
    assert read_captions(tmp_path / "wide.parquet") == {"a.jpg": ("a.jpg", ("A dog",))}


def test_rewritten_captions_are_a_json_a_line(tmp_path):
    lines = [{"image": "a", "text": "A  dog"}, {"image": 7, "text": "A cat"}, {"image": "a", "text": " "}]
    captions = read_captions(write(tmp_path / "c.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert captions == {"a": ("", ("A dog",)), "7": ("", ("A cat",))} and "1 captions are empty" in captions.note


@pytest.mark.parametrize("pictures", ["mini", "images/mini", "images", "."])
def test_captions_are_opened_with_their_pictures_or_count_those_absent(tmp_path, pictures):
    write(tmp_path / "annotations" / "captions_mini.json", coco([4, 5], [(4, "A dog"), (5, "A cat")]))
    write(tmp_path / "mini.tsv", "image\tcaption1\n0.jpg\tA dog\n1.jpg\tA cat\n")
    for n in (0, 1):
        picture(tmp_path / pictures / f"{n}.jpg", (100 * n, 0, 0))
    for name, ids in (("coco", ["4", "5"]), ("tsv", ["0.jpg", "1.jpg"])):
        data = open_dataset(name, tmp_path, "mini")
        assert (data.ids, data.captions, data.note) == (ids, [("A dog",), ("A cat",)], "")
        assert data.load(1).getpixel((2, 2))[0] == pytest.approx(100, abs=4) and data.label == f"{name}/mini"
    before = data.fingerprint
    (tmp_path / pictures / "1.jpg").unlink()
    for name in ("coco", "tsv"):
        with pytest.raises(UserError, match=r"1 of the 2 pictures named in .*1\.jpg.*--data\.missing skip \(--missing"):
            open_dataset(name, tmp_path, "mini")
        data = open_dataset(name, tmp_path, "mini", missing="skip")
        assert len(data) == 1 and data.fingerprint != before and data.note.endswith("are absent and left out")
        assert len(open_dataset(name, tmp_path, "mini", missing="keep")) == 2
        with pytest.raises(UserError, match="found there: mini"):
            open_dataset(name, tmp_path, "train")


def test_a_table_of_classes_is_a_classification(tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    table = tmp_path / "birds.csv"
    table.write_text("filepath,label\na.png,grey_owl\nb.png,robin\nc.png,robin\n")
    data = open_dataset("tsv", tmp_path, "birds")
    (question,) = data.questions
    assert (question.classes, question.target.tolist(), data.captions) == (("grey owl", "robin"), [0, 1, 1], None)
    with pytest.raises(UserError, match="holds classes and no captions"):
        read_captions(table)
    table.write_text("filepath,label,title\na.png,owl,An owl\nb.png,robin,\n")
    data = open_dataset("tsv", tmp_path, "birds")
    assert (data.captions, len(data.questions)) == ([("An owl",), ()], 1)
    table.write_text("filepath,label\na.png,owl\na.png,robin\n")
    with pytest.raises(UserError, match="'a.png' is of the class 'robin' here and of 'owl' above"):
        open_dataset("tsv", tmp_path, "birds")


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
    for name in ("hot_dog/a.png", "hot_dog/deep/b.JFIF", "cat/c.ppm", "cat/.thumb.png"):
        picture((tmp_path / name).with_suffix(".png")).rename(tmp_path / name)
    write(tmp_path / "cat" / "notes.txt", "x")
    data = open_dataset("folder", tmp_path)
    (question,) = data.questions
    assert data.ids == ["cat/c.ppm", "hot_dog/a.png", "hot_dog/deep/b.JFIF"] and question.target.tolist() == [0, 1, 1]
    assert question.classes == ("cat", "hot dog") and data.label == f"folder/{tmp_path.name}"
    assert data.note == "1 other files are not read (.txt)"
    fingerprint = data.fingerprint
    picture(tmp_path / "loose.png")
    data = open_dataset("folder", tmp_path)
    assert data.questions == () and "in folders and beside them" in data.note and data.fingerprint != fingerprint
    alone = open_dataset("folder", tmp_path / "hot_dog" / "deep" / "..")
    assert len(alone) == 2 and alone.questions == ()
    picture(tmp_path / "pets" / "all" / "cat" / "a.png")
    alone = open_dataset("folder", tmp_path / "pets")
    assert alone.questions == () and "in folders of all alone, so no classes" in alone.note


def test_folders_that_would_be_read_wrongly_are_refused(tmp_path):
    for name in ("a/hot_disc/a.png", "a/hot disc/a.png", "b/cat/a.png", "b/bird/x.txt", "c/cat/a.png", "d/x.txt",
                 "e/Train/cat/a.png", "e/Train/dog/b.png", "e/Test/cat/c.png"):  # fmt: skip
        (picture if name.endswith("png") else lambda path: write(path, "x"))(tmp_path / name)
    os.symlink(tmp_path / "c", tmp_path / "c" / "cat" / "back")
    for root, split, message in [
        ("a", None, "two folders of .* are both the class 'hot disc'"),
        ("b", None, "no images in the class folders bird; fill or remove"),
        ("c", None, "back leads to .*, which is read already; remove the link"),
        ("d", None, r"holds no images \(.*\.avif.*\.jpg"),
        ("e", None, r"has a folder a split \(Test, Train\); say which with --split"),
        ("e", "dev", "there is no folder .* for the split 'dev'"),
    ]:
        with pytest.raises(UserError, match=message):
            open_dataset("folder", tmp_path / root, split)
    data = open_dataset("folder", tmp_path / "e", "Train")
    assert (data.ids, data.part, data.questions[0].classes) == (["cat/a.png", "dog/b.png"], "Train", ("cat", "dog"))


def test_cocos_annotations_are_not_a_class_of_its_folder(tmp_path):
    for name in ("train2017/1.png", "val2017/2.png"):
        picture(tmp_path / name)
    write(tmp_path / "annotations/captions_val2017.json", "{}")
    assert open_dataset("folder", tmp_path).ids == ["train2017/1.png", "val2017/2.png"]


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
    with pytest.raises(BrokenImage, match="values that are not numbers"):
        read_image(tmp_path / "nan.tif")
    for mode in ("L", "P", "RGBA", "1"):
        assert read_image(picture(tmp_path / f"{mode}.png", mode=mode)).mode == "RGB"


def test_only_what_was_read_and_does_not_decode_is_a_broken_image(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    whole = path.read_bytes()
    for content in (b"no image", whole[:40], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(BrokenImage, match=r"a\.png cannot be read as an image"):
            read_image(path)
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError, match=r"a\.png cannot be read \(Input/output error\)") as caught:
            read_image(path)
        assert not isinstance(caught.value, BrokenImage)
    without = OSError("out of memory when reading image file")
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: (_ for _ in ()).throw(without))
    with pytest.raises(MemoryError, match=r"a\.png"):
        read_image(path)


def test_a_name_that_is_no_utf_8_is_shown_with_its_bytes(tmp_path):
    picture(tmp_path / "a" / "x.jpg")
    os.rename(tmp_path / "a" / "x.jpg", os.fsencode(tmp_path / "a") + b"/caf\xe9.jpg")
    data = open_dataset("folder", tmp_path / "a")
    assert data.ids == ["caf\\xe9.jpg"] and data.load(0).size == (8, 6)


def test_pictures_of_ones_own_are_turned_as_their_exif_says_and_counted(tmp_path):
    (tmp_path / "own").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter to be seen as it was taken
    Image.new("RGB", (20, 10), "red").save(tmp_path / "own" / "a.jpg", exif=exif)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "own" / "b.jpg")
    data = registry.open_dataset("folder", tmp_path / "own")
    assert [data.load(row).size for row in (0, 1)] == [(10, 20), (20, 10)]
    assert data.note == "1 pictures are turned upright, as their EXIF says (--data.upright, --upright)"
    stored = registry.open_dataset("folder", tmp_path / "own", upright=False)
    assert stored.load(0).size == (20, 10) and not stored.note and stored.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="data.upright .* turns pictures in files, and example/val has none"):
        registry.open_dataset("example", split="val", upright=True)
