"""Readers: what they give on miniatures in each layout, and what they say when something is missing."""

import csv
import errno
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pc_clip.core.config.settings import DataConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets, registry
from pc_clip.data.captions import read_captions, read_coco_captions, read_simclip_tsv
from pc_clip.data.dataset import BrokenImage, read_image
from pc_clip.data.registry import open_dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.data.webdataset import find_tars, open_tar
from pc_clip.example import scenes, world
from pc_clip.example.captions import parse
from pc_clip.interface import finetune, run
from pc_clip.models.torchvision_compat import torchvision

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "coco_mini"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not part of the project")


def picture(path, colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).convert(mode).save(path)
    return path


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


# -- the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split, said",
    [
        ("cifar01", None, r"unknown data set 'cifar01'.*Did you mean .*'cifar10'"),
        ("something", None, r"unknown data set 'something'.*Known: .*example.*mnist.*tsv"),
        ("exmple", None, r"Did you mean 'example'"),
        ("example", "tset", r"no split 'tset'.*Did you mean 'test'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one(name, split, said):
    with pytest.raises(UserError, match=said):
        open_dataset(name, split=split)


@pytest.mark.parametrize("name", [name for name, reader in registry.READERS.items() if reader.root])
def test_a_data_set_that_is_not_there_says_where_it_was_looked_for_and_what_to_fetch(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name} is not at .*nowhere\. (Fetch|Put) .*--root"):
        open_dataset(name, tmp_path / "nowhere")


def listed(capsys):
    """What `python -m pc_clip datasets` says of each set: its line, and the text below it."""
    registry.main([])
    blocks, name = {}, ""
    for line in capsys.readouterr().out.splitlines()[1:]:
        name = name if line.startswith(" ") else line.split()[0]
        blocks.setdefault(name, []).append(line)
    return {name: (lines[0], " ".join(" ".join(lines[1:]).split())) for name, lines in blocks.items()}


def test_the_list_says_which_are_found_and_what_to_fetch(tmp_path, capsys):
    write(tmp_path / "data" / "coco" / "annotations" / "captions_mini.json", COCO)
    (tmp_path / "data" / "images").mkdir()
    picture(tmp_path / "data" / "awa2" / "JPEGImages" / "ox" / "1.jpg")
    found = listed(capsys)
    assert found.keys() == registry.READERS.keys()
    states = {name: line.split()[1] for name, (line, _) in found.items()}
    assert {name for name, state in states.items() if state == "found"} == {
        "example",
        "example_relations",
        "example_changes",
        "coco",
        "folder",
    }
    assert {name for name, state in states.items() if state == "incomplete"} == {"awa2"}
    assert "no classes.txt, predicates.txt, predicate-matrix-binary.txt Fetch it" in found["awa2"][1]
    for name, (line, below) in found.items():
        reader = registry.READERS[name]
        assert reader.size in line and f"licence: {reader.licence}" in below
        assert (reader.root or "embedded") in line and (reader.fetch in below) == (states[name] != "found")


def test_the_columns_of_the_list_stand_below_one_another(capsys):
    registry.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    for title, cells in (("looked for in", [r.root or "(embedded)" for r in registry.READERS.values()]),
                         ("size", [r.size for r in registry.READERS.values()])):  # fmt: skip
        column = lines[0].index(title)
        assert [line[column : column + len(cell)] for line, cell in zip(lines[1:], cells)] == cells
    assert max(map(len, lines)) < 100


def test_a_root_without_a_data_set_to_download_is_an_error():
    with pytest.raises(UserError, match="--root goes with --download"):
        registry.main(["--root", "somewhere"])


@pytest.mark.parametrize(
    "name, part, chosen",
    [("example", "test", "val"), ("example", "val", "train"), ("cifar10", "test", "train"), ("cifar10", "train", None),
     ("awa2", "test", "train"), ("awa2", "all", None), ("flowers102", "test", "val"), ("folder", "", None),
     ("spot_the_diff", "train", "val"), ("spot_the_diff", "reformat_train", "reformat_val"),
     ("spot_the_diff", "reformat_val", "reformat_train"), ("changes", "mine", "val"), ("no reader", "test", None)],
)  # fmt: skip
def test_settings_are_chosen_on_images_that_are_not_reported_on(name, part, chosen):
    data = registry.Dataset(name, f"{part}-renamed", [], print, "", part=part)
    assert registry.held_out(data) == chosen


# -- the embedded example ------------------------------------------------------------------------------


def test_splits_of_the_example_share_no_scene_and_no_id():
    shown = {split: [world.scene(split, n) for n in range(300)] for split in ("train", "val", "test")}
    assert len(set().union(*shown.values())) == 900
    assert len(set().union(*(example_sets.example(split, 20).ids for split in shown))) == 60


def test_the_example_is_the_same_every_time_and_a_prefix_of_a_longer_one():
    one, same, longer = (
        example_sets.example("val", 12),
        example_sets.example("val", 12),
        example_sets.example("val", 30),
    )
    world.scene.cache_clear()
    again = example_sets.example("val", 12)
    for other in (same, longer, again):
        assert other.ids[:12] == one.ids and other.captions[:12] == one.captions
        assert all(one.load(n) == other.load(n) for n in range(12))
    assert one.fingerprint == same.fingerprint == again.fingerprint != longer.fingerprint
    assert one.fingerprint != example_sets.example("test", 12).fingerprint


def test_opening_the_example_gives_the_whole_split():
    data = open_dataset("example")
    assert data.label == "example/test" and len(data) == len(data.captions) == example_sets.EXAMPLE_SIZES["test"]
    assert len(set(data.ids)) == len(data)
    assert data.load(3) == scenes.draw(world.scene("test", 3)) and data.load(3).mode == "RGB"


def test_questions_about_the_example_have_true_answers():
    data = example_sets.example("val", 400)
    assert {q.name for q in data.questions} == world.CLASSES.keys()
    for question in data.questions:
        assert question.rows.dtype == question.target.dtype == np.int64
        assert set(question.target.tolist()) == set(range(len(question.classes))), question.name
        asked = dict(zip(question.rows.tolist(), question.target.tolist()))
        for row in range(400):
            scene = world.scene("val", row)
            said = {key: value for text in data.captions[row] for key, value in parse(text).items()}
            if question.name == "count":
                assert asked[row] + 1 == len(scene.things)
            elif question.name in said:
                assert question.classes[asked[row]] == said[question.name]  # as the captions have it
            elif question.name not in ("background", "position"):
                looks = {getattr(thing, question.name) for thing in scene.things}
                assert row not in asked or {question.classes[asked[row]]} == looks


def test_attributes_of_the_example_order_its_scenes():
    data = example_sets.example("val", 400)
    values = {attribute.name: attribute.value for attribute in data.attributes}
    assert values.keys() == {"size", "background", "count"}
    shown = [world.scene("val", row) for row in range(400)]
    assert values["background"].tolist() == [s.level for s in shown]
    assert values["count"].tolist() == [len(s.things) for s in shown]
    for scene, size in zip(shown, values["size"]):
        assert math.isnan(size) != scene.alike
        assert math.isnan(size) or min(t.radius for t in scene.things) <= size <= max(t.radius for t in scene.things)


@pytest.mark.parametrize("name", ["size", "background", "count"])
def test_a_clear_difference_is_one_that_words_can_tell(name):
    data = example_sets.example("val", 400)
    attribute = next(a for a in data.attributes if a.name == name)
    assert {attribute.more, attribute.less} == set(world.COMPARATIVES[name])
    question = next(q for q in data.questions if q.name == name)
    value, target = attribute.value[question.rows], question.target
    by_class = [value[(target == c) & ~np.isnan(value)] for c in range(3)]
    assert by_class[0].max() < by_class[1].min() and by_class[1].max() < by_class[2].min()
    assert max(np.ptp(values) for values in by_class) <= attribute.gap < by_class[2].min() - by_class[0].max()


# -- captions ------------------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 5, "file_name": "5.jpg"}, {"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"image_id": 5, "caption": "A dog.\n"},
        {"image_id": 9, "caption": " A  cat. "},
        {"image_id": 5, "caption": "One dog"},
        {"image_id": 9, "caption": "  "},
    ],
}


def test_coco_captions_come_by_image_and_without_needless_space(tmp_path):
    found = read_coco_captions(write(tmp_path / "c.json", COCO))
    assert found == {"9": ("9.jpg", ("A cat.",)), "5": ("5.jpg", ("A dog.", "One dog"))}


def test_half_a_surrogate_pair_in_a_caption_can_be_written_again(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(COCO | {"annotations": [{"image_id": 5, "caption": "A dog \ud83d."}]}))
    assert read_coco_captions(tmp_path / "c.json")["5"][1][0].encode("utf-8") == b"A dog ?."


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"images": [', r"c\.json is not JSON.*fetch it again"),
        ("[]", r"c\.json is no COCO captions file"),
        ({"annotations": []}, r'"images" and "annotations"'),
        (COCO | {"annotations": []}, r"c\.json holds no captions: 3 images, 0 annotations"),
        (COCO | {"annotations": [{"image_id": 5, "caption": " "}]}, "holds no captions"),
        (
            COCO | {"annotations": [{"image_id": 5, "bbox": [0, 0, 1, 1], "category_id": 3}]},
            r"without captions.*instances",
        ),
        (COCO | {"annotations": [{"image_id": 1, "caption": "A horse."}]}, "holds no captions"),
    ],
)
def test_a_file_that_holds_no_coco_captions_is_an_error_that_says_why(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        read_coco_captions(write(tmp_path / "c.json", content))


@pytest.mark.parametrize(
    "change",
    [
        {"annotations": [{"caption": "A dog."}]},
        {"annotations": ["A dog."]},
        {"images": [{"id": 5}]},
        {"images": ["5.jpg"]},
    ],
    ids=str,
)
def test_a_damaged_entry_of_a_coco_file_is_an_error_with_its_path(tmp_path, change):
    with pytest.raises(UserError, match=r"c\.json"):
        read_coco_captions(write(tmp_path / "c.json", COCO | change))


def test_missing_captions_files_are_errors_with_their_path(tmp_path):
    for name in ("absent.json", "absent.tsv"):
        with pytest.raises(UserError, match=name):
            read_captions(tmp_path / name)


def test_a_table_is_read_by_its_columns(tmp_path):
    text = 'caption1\tid\timage\tcaption2\nA "big" dog\t7\ta.jpg\t\n\t8\tb.jpg\t A  cat \n\t9\tc.jpg\t\nNA\t\td.jpg\n'
    assert read_captions(write(tmp_path / "t.tsv", text)) == {
        "7": ("a.jpg", ('A "big" dog',)),
        "8": ("b.jpg", ("A cat",)),
        "d.jpg": ("d.jpg", ("NA",)),
    }


SAID = [
    'A sign that says "STOP"',
    '"STOP" it says',
    'It says "STOP"',
    '"a" and "b"',
    '"',
    '""',
    "5' 2\"",
    "plain",
    '"all"',
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_table_that_pandas_wrote_has_the_captions_it_was_given(tmp_path, quoting):
    table = pd.DataFrame({"image": [f"{n}.jpg" for n in range(len(SAID))], "caption1": SAID, "caption2": SAID[::-1]})
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False, quoting=quoting)
    found = read_simclip_tsv(tmp_path / "t.tsv")
    assert [texts for _, texts in found.values()] == list(zip(SAID, SAID[::-1]))
    assert [file for file, _ in found.values()] == table["image"].tolist()


def test_quotes_that_no_writer_put_there_stay(tmp_path):
    said = ['"Hello" and "bye"', '"unfinished', 'unfinished"', 'a "big" dog', '"']
    write(tmp_path / "t.tsv", "\ufeffimage\tcaption1\r\n" + "".join(f"{n}\t{text}\r\n" for n, text in enumerate(said)))
    assert [texts for _, (texts,) in read_simclip_tsv(tmp_path / "t.tsv").values()] == said


@pytest.mark.parametrize("rest", ["", "\t", "\t "])
def test_a_missing_caption_is_never_nan(tmp_path, rest):
    path = write(tmp_path / "t.tsv", f"image\tcaption1\tcaption2\na.jpg\tA dog\tOne dog\nb.jpg\tA cat{rest}\n")
    assert read_simclip_tsv(path) == {"a.jpg": ("a.jpg", ("A dog", "One dog")), "b.jpg": ("b.jpg", ("A cat",))}


@pytest.mark.parametrize(
    "text, said",
    [
        ("image,caption1\na.jpg,A dog\n", r"found image,caption1 \(one column: separate them by tabs\)"),
        ("picture\tcaption1\na.jpg\tA dog\n", r"found picture, caption1"),
        ("image\ttext\na.jpg\tA dog\n", r"caption1, caption2.*found image, text"),
        ("image\tcaption1\na.jpg\t\n", r"t\.tsv holds no captions: 1 rows"),
        ("image\tcaption1\n", r"t\.tsv holds no captions: 0 rows"),
        ("image\tcaption1\na.jpg\tA dog\n\nb.jpg\tA cat\tOne cat\n", r"t\.tsv, line 4: 3 fields, but .* 2 columns"),
        ("image\tcaption1\na.jpg\tA dog\tOne dog\n", r"t\.tsv, line 2: 3 fields"),
        ("image\tcaption1\na.jpg\tA dog\n\tA cat\n", r"t\.tsv, line 3: no image is named, in 'A cat'"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_that_says_why(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_simclip_tsv(write(tmp_path / "t.tsv", text))


@pytest.mark.parametrize(
    "content",
    [b"", b"image\tcaption1\na.jpg\tA dog\nb.jpg\tA\tcat\n", "image\tcaption1\na.jpg\tcafé\n".encode("latin-1")],
    ids=["empty", "a field too many", "Latin-1"],
)
def test_a_damaged_table_is_an_error_with_its_path(tmp_path, content):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.tsv"):
        read_simclip_tsv(tmp_path / "t.tsv")


def test_a_tab_at_the_end_of_each_row_shifts_no_column(tmp_path):
    path = write(tmp_path / "t.tsv", "image\tcaption1\tcaption2\na.jpg\tA dog\tOne dog\t\nb.jpg\tA cat\tOne cat\t\n")
    try:
        assert [file for file, _ in read_simclip_tsv(path).values()] == ["a.jpg", "b.jpg"]
    except UserError as error:
        assert "t.tsv" in str(error)


def test_two_rows_about_one_image_lose_no_caption(tmp_path):
    path = write(tmp_path / "t.tsv", "image\tcaption1\na.jpg\tA dog\na.jpg\tOne dog\n")
    try:
        assert read_simclip_tsv(path) == {"a.jpg": ("a.jpg", ("A dog", "One dog"))}
    except UserError as error:
        assert "a.jpg" in str(error)


@real_data
def test_the_captions_of_coco_as_published():
    found = read_captions(DATA / "captions_val2017.json")
    assert len(found) == 5000 and sum(len(texts) for _, texts in found.values()) == 25014
    assert found["139"][0] == "000000000139.jpg"
    assert all(text == " ".join(text.split()) != "" for _, texts in found.values() for text in texts)


@real_data
def test_the_table_of_simclip_as_published():
    path = DATA / "simclip_example.tsv"
    found = read_captions(path)
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert len(found) == len(lines) >= 4 and all(len(texts) == 5 for _, texts in found.values())
    assert found["391895"][0] == "000000391895.jpg"
    assert found["391895"][1][0] == "A man with a red helmet on a small moped on a dirt road."


# -- COCO's pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", ["annotations", "."])
@pytest.mark.parametrize("pictures", ["mini", "images/mini", "images", "."])
def test_coco_is_read_in_any_of_its_layouts(tmp_path, annotations, pictures):
    write(tmp_path / annotations / "captions_mini.json", COCO)
    picture(tmp_path / pictures / "9.jpg", (200, 0, 0)), picture(tmp_path / pictures / "5.jpg", (0, 0, 200))
    data = open_dataset("coco", tmp_path, "mini")
    assert (data.ids, data.captions) == (["9", "5"], [("A cat.",), ("A dog.", "One dog")])
    assert [np.asarray(data.load(n)).mean((0, 1)).argmax() for n in (0, 1)] == [0, 2]
    assert data.label == "coco/mini" and data.note == ""


def test_absent_pictures_are_an_error_or_left_out_and_counted(tmp_path):
    write(tmp_path / "annotations" / "captions_mini.json", COCO)
    picture(tmp_path / "mini" / "5.jpg")
    with pytest.raises(UserError, match=r"1 of the 2 pictures .*9\.jpg.*--data\.missing skip"):
        open_dataset("coco", tmp_path, "mini")
    data = open_dataset("coco", tmp_path, "mini", missing="skip")
    assert data.ids == ["5"] and data.captions == [("A dog.", "One dog")]
    assert data.load(0).size == (8, 6)
    assert data.note.startswith("1 pictures") and "captions_mini.json" in data.note


def test_without_any_picture_there_is_nothing_to_skip(tmp_path):
    write(tmp_path / "annotations" / "captions_mini.json", COCO)
    with pytest.raises(UserError, match=r"2 of the 2 pictures"):
        open_dataset("coco", tmp_path, "mini", missing="skip")


def test_another_word_than_error_or_skip_is_refused(tmp_path):
    write(tmp_path / "annotations" / "captions_mini.json", COCO)
    picture(tmp_path / "mini" / "5.jpg")
    with pytest.raises(UserError, match="Error"):
        open_dataset("coco", tmp_path, "mini", missing="Error")


def test_a_split_without_a_captions_file_names_those_that_have_one(tmp_path):
    write(tmp_path / "annotations" / "captions_val2017.json", COCO)
    write(tmp_path / "captions_mini.json", COCO)
    write(tmp_path / "annotations" / "instances_train2017.json", COCO)
    with pytest.raises(UserError, match=r"no captions_train2017\.json; splits found there: mini, val2017"):
        open_dataset("coco", tmp_path, "train2017")


def test_the_fingerprint_of_coco_follows_its_pictures(tmp_path):
    write(tmp_path / "captions_mini.json", COCO)
    for name in ("5.jpg", "9.jpg"):
        picture(tmp_path / "mini" / name)
    before = open_dataset("coco", tmp_path, "mini").fingerprint
    assert open_dataset("coco", tmp_path, "mini").fingerprint == before
    noise().save(tmp_path / "mini" / "5.jpg")
    assert open_dataset("coco", tmp_path, "mini").fingerprint != before


@real_data
def test_the_photographs_of_coco_at_hand_are_opened():
    data = open_dataset("coco", DATA, "val2017", missing="skip")
    assert len(data) == len(list((DATA / "val2017").glob("*.jpg"))) == 283 and "4717 pictures" in data.note
    assert all(4 < len(texts) < 8 for texts in data.captions)
    assert min(data.load(0).size) == 256


# -- SimCLIP's table -------------------------------------------------------------------------------------

TABLE = "image\tcaption1\tcaption2\n9.jpg\tA cat.\tNA\n5.jpg\tnan\t\n"


@pytest.mark.parametrize("ending", ["tsv", "csv", "txt", "TSV"])
@pytest.mark.parametrize("pictures", ["mini", "images/mini", "images", "."])
def test_a_table_is_opened_with_its_pictures_where_coco_s_may_be(tmp_path, pictures, ending):
    write(tmp_path / f"mini.{ending}", TABLE)
    picture(tmp_path / pictures / "9.jpg", (200, 0, 0)), picture(tmp_path / pictures / "5.jpg", (0, 0, 200))
    data = open_dataset("tsv", tmp_path, "mini")
    assert (data.ids, data.captions) == (["9.jpg", "5.jpg"], [("A cat.", "NA"), ("nan",)])  # words, not gaps
    assert [np.asarray(data.load(n)).mean((0, 1)).argmax() for n in (0, 1)] == [0, 2]
    assert (data.label, data.part, data.note) == ("tsv/mini", "mini", "")


def test_a_table_that_lies_elsewhere_is_named_by_its_path_in_place_of_a_split(tmp_path):
    table = write(tmp_path / "lists" / "of mine.tsv", TABLE)
    for name in ("9.jpg", "5.jpg"):
        picture(tmp_path / "pictures" / name)
    data = open_dataset("tsv", tmp_path / "pictures", str(table))
    assert data.label.startswith("tsv/of mine-") and len(data) == 2 and data.load(1).size == (8, 6)
    relative = open_dataset("tsv", tmp_path / "pictures", "lists/of mine.tsv")
    assert (relative.label, relative.fingerprint) == (data.label, data.fingerprint)
    trained_on = load_dataset(DataConfig(dataset="tsv", root=str(tmp_path / "pictures"), split=str(table)))
    assert trained_on.fingerprint == data.fingerprint


def test_two_tables_of_one_name_have_labels_of_their_own_and_the_root_s_has_its_name(tmp_path):
    for place in ("photos.tsv", "photos.csv", "two/photos.tsv", "far/photos.tsv"):
        write(tmp_path / "root" / place, TABLE)
    for name in ("9.jpg", "5.jpg"):
        picture(tmp_path / "root" / "photos" / name)
    named = ("photos", "photos.tsv", "root/photos.tsv")
    assert {open_dataset("tsv", "root", split).label for split in named} == {"tsv/photos"}
    others = [open_dataset("tsv", "root", split).label for split in ("photos.csv", "two/photos", "root/far/photos.tsv")]
    assert len({"tsv/photos", *others}) == 4 and all(re.fullmatch(r"tsv/photos-[0-9a-f]{6}", one) for one in others)


def test_a_table_of_whole_paths_needs_no_folder_and_a_folder_that_is_named_has_to_be_there(tmp_path):
    path = picture(tmp_path / "far" / "a.png", (50, 0, 0))
    write(tmp_path / "mine.TSV", f"image\tcaption1\n{path}\ta\n")
    assert open_dataset("tsv", split="mine.TSV").load(0).getpixel((0, 0))[0] == 50
    with pytest.raises(UserError, match=r"tsv is not at nowhere\."):
        open_dataset("tsv", "nowhere", "mine.TSV")
    with pytest.raises(UserError, match=r"tsv is not at data/tsv\."):
        open_dataset("tsv", split="yours.tsv")


def test_a_table_may_name_its_pictures_by_whole_paths(tmp_path):
    paths = [picture(tmp_path / "far" / "away" / f"{n}.png", (n, 0, 0)) for n in (50, 90)]
    write(tmp_path / "t" / "train.tsv", "image\tcaption1\n" + "".join(f"{p}\ta\n" for p in paths))
    data = open_dataset("tsv", tmp_path / "t", "train")
    assert [data.load(n).getpixel((0, 0))[0] for n in (0, 1)] == [50, 90]


def test_absent_pictures_of_a_table_are_an_error_or_left_out_and_counted(tmp_path):
    write(tmp_path / "mini.tsv", TABLE)
    picture(tmp_path / "5.jpg")
    with pytest.raises(UserError, match=r"1 of the 2 pictures in .*mini\.tsv .*first 9\.jpg.*--data\.missing skip"):
        open_dataset("tsv", tmp_path, "mini")
    data = open_dataset("tsv", tmp_path, "mini", missing="skip")
    assert data.captions == [("nan",)] and data.note == "1 pictures named in mini.tsv are absent and left out"
    kept = open_dataset("tsv", tmp_path, "mini", missing="keep")
    assert len(kept) == 2 and kept.note == "1 pictures named in mini.tsv are absent"
    with pytest.raises(UserError, match=r"no image at .*9\.jpg"):
        kept.load(0)


def test_a_split_without_a_table_names_those_that_are_there_and_the_other_way(tmp_path):
    write(tmp_path / "val.tsv", TABLE)
    write(tmp_path / "mini.txt", TABLE)
    with pytest.raises(UserError, match=r"no test\.tsv; tables found there: mini, val\. .*--data\.split FILE\.tsv"):
        open_dataset("tsv", tmp_path)
    for split, file in (
        ("far/away.tsv", "far/away.tsv"),
        ("foo.csv", "foo.csv"),
        ("FOO.TSV", "FOO.TSV"),
        ("v1.5", "v1.5.tsv"),
    ):
        with pytest.raises(UserError, match=rf"no {re.escape(file)}; tables"):
            open_dataset("tsv", tmp_path, split)


@real_data
def test_the_table_of_simclip_as_published_is_trained_on_and_evaluated(tmp_path):
    """Its own four pictures are not at hand: scenes stand in for them."""
    table = DATA / "simclip_example.tsv"
    for n, (file, _) in enumerate(read_captions(table).values()):
        path = tmp_path / "pictures" / file
        path.parent.mkdir(exist_ok=True)
        scenes.draw(world.scene("val", n)).save(path)
    where = ["--root", "pictures", "--split", str(table)]
    argv = [f"--data.{where[0][2:]}", where[1], f"--data.{where[2][2:]}", where[3], "--data.dataset", "tsv"]
    argv += ["--method", "contrastive", "--model.name", "example", "--model.train", "both", "--train.batch_size", "2"]
    trained = finetune.main(["--config", str(write(tmp_path / "c.yaml", "name: mine\n")), *argv, "--train.steps", "2"])
    run.main(["--dataset", "tsv", *where, "--mode", "retrieve", "--checkpoint", str(trained)])
    (result,) = Path("results").rglob("retrieve-*.json")
    assert json.loads(result.read_text())["n"] in (4, 20)


# -- folders -------------------------------------------------------------------------------------------


def test_a_folder_of_folders_has_a_question_about_its_classes(tmp_path):
    for name in ("hot_dog/b.png", "hot_dog/a.JPG", "cat/deep/c.png", "cat/.hidden.png"):
        picture(tmp_path / name)
    write(tmp_path / "cat" / "notes.txt", "not an image")
    data = open_dataset("folder", tmp_path)
    assert data.ids == ["cat/deep/c.png", "hot_dog/a.JPG", "hot_dog/b.png"]
    (question,) = data.questions
    assert question.classes == ("cat", "hot dog")
    assert (question.rows.tolist(), question.target.tolist()) == ([0, 1, 2], [0, 1, 1])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16"])
def test_a_folder_without_folders_has_no_question_and_gives_rgb(tmp_path, mode):
    picture(tmp_path / "a.png", mode="RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        Image.fromarray(np.full((6, 8), 300, dtype=np.uint16)).save(tmp_path / "a.png")
    data = open_dataset("folder", tmp_path)
    assert data.ids == ["a.png"] and data.questions == () and data.captions is None
    assert data.load(0).mode == "RGB" and data.load(0).size == (8, 6)


def test_images_beside_folders_are_opened_without_classes_and_the_note_names_one(tmp_path):
    picture(tmp_path / "cat" / "a.png"), picture(tmp_path / "loose.png")
    data = open_dataset("folder", tmp_path)
    assert data.ids == ["cat/a.png", "loose.png"] and data.questions == ()
    assert re.search(r"in folders and beside them \(loose\.png\), so no classes", data.note)
    (tmp_path / "loose.png").unlink()
    assert open_dataset("folder", tmp_path).note == ""


def test_class_folders_that_are_links_are_read_and_links_in_a_circle_are_not(tmp_path):
    picture(tmp_path / "far" / "b.png"), picture(tmp_path / "set" / "cat" / "a.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "again").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "tiger").symlink_to("cat")
    data = open_dataset("folder", tmp_path / "set")
    assert data.ids == ["cat/a.png", "dog/b.png", "tiger/a.png"]
    assert data.questions[0].classes == ("cat", "dog", "tiger") and data.load(1).size == (8, 6)


def test_a_folder_that_may_not_be_read_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    for name in ("cat/a.png", "dog/b.png", "lost+found/c.png"):
        picture(tmp_path / name)
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) in ("dog", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dog cannot be read \(Permission denied\)"):
        open_dataset("folder", tmp_path)
    (tmp_path / "dog" / "b.png").unlink(), (tmp_path / "dog").rmdir()
    assert open_dataset("folder", tmp_path).ids == ["cat/a.png"]


def test_a_split_that_is_not_there_or_not_named_says_how_to_name_it(tmp_path):
    picture(tmp_path / "val" / "cat" / "a.png")
    with pytest.raises(UserError, match=r"for none, --split null \(--data\.split null\)"):
        open_dataset("folder", tmp_path, "train")
    with pytest.raises(UserError, match=r"say which with --split \(--data\.split\), as val"):
        open_dataset("folder", tmp_path)


def test_a_folder_without_images_is_an_error_with_the_known_endings(tmp_path):
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match=r"holds no images.*\.png"):
        open_dataset("folder", tmp_path)


@pytest.mark.parametrize("name", ["odd.png", ".thumbnails"])
def test_only_visible_files_are_images(tmp_path, name):
    picture(tmp_path / "a.png")
    (tmp_path / name).mkdir(parents=True)
    if name != "odd.png":
        picture(tmp_path / ".thumbnails" / "a.png")
    assert open_dataset("folder", tmp_path).ids == ["a.png"]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_a_damaged_image_opens_or_is_an_error_with_its_path(tmp_path, kind):
    buffer, path, rng = io.BytesIO(), tmp_path / f"damaged.{kind}", random.Random(0)
    noise().save(buffer, kind)
    path.write_bytes(buffer.getvalue())
    assert read_image(path).size == (24, 20)
    refused = 0
    for trial in range(60):
        content = bytearray(buffer.getvalue())
        if trial % 2:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(min(len(content), 100))] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        try:
            assert read_image(path).mode == "RGB"
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "cannot be read" in str(error)
    assert refused > 10


def test_an_image_that_vanished_is_an_error_with_its_path(tmp_path):
    path = picture(tmp_path / "a.png")
    data = open_dataset("folder", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"no image at .*a\.png") as caught:
        data.load(0)
    assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_only_what_was_read_and_does_not_decode_is_a_broken_image(tmp_path, monkeypatch, number):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    with pytest.raises(BrokenImage, match=r"a\.png cannot be read as an image \(it is cut short, or no image\)"):
        read_image(path)

    def fail(self, *_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "open", fail), monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"a\.png cannot be read \({os.strerror(number)}\)") as caught:
        read_image(path)
    assert not isinstance(caught.value, BrokenImage)


def test_memory_that_was_not_there_is_no_fault_of_the_image(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")

    def fail(self, mode):
        raise OSError("out of memory when reading image file")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError, match=r"a\.png"):
        read_image(path)


# -- WebDatasets whose images are to be embedded, or have been -------------------------------------------


def png(n):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (n, 20, 30)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, members):
    """A tar file. A member whose content is text is a link to what it says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def starts(path):
    """Where the headers of a tar file's members begin, and where the end does."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar] + [tar.offset]


@pytest.mark.parametrize(
    "harm",
    [
        lambda tar, at: tar[: at[5]],
        lambda tar, at: tar[: at[5] + 200],
        lambda tar, at: tar[: at[5] + 600],
        lambda tar, at: tar[: at[-1]],
        lambda tar, at: tar[: at[5] + 10] + bytes([tar[at[5] + 10] ^ 1]) + tar[at[5] + 11 :],
        lambda tar, at: tar[: at[-2] + 10] + bytes([tar[at[-2] + 10] ^ 1]) + tar[at[-2] + 11 :],
        lambda tar, at: tar[: at[5]] + bytes(len(tar) - at[5]),
        lambda tar, at: tar[: at[5]] + bytes(512) + tar[at[5] + 512 :],
        lambda tar, at: tar + tar,
        lambda tar, at: tar[:100],
        lambda tar, at: b"",
    ],
    ids=[
        "at a boundary", "in a header", "in data", "before the end", "a bit of a header", "of the last",
        "zeros to the end", "zeros for a header", "twice", "in the first header", "empty",
    ],
)  # fmt: skip
def test_a_damaged_tar_file_is_never_read_as_if_it_ended_there(tmp_path, harm):
    path = write_tar(tmp_path / "0.tar", [(f"s{n}.png", png(n)) for n in range(12)])
    good = path.read_bytes()
    assert len(open_tar(path)) == 12
    path.write_bytes(harm(good, starts(path)))
    with pytest.raises(UserError, match=r"0\.tar is cut short or no tar file \(.*\); fetch it again"):
        open_tar(path)


def test_a_tar_file_cut_anywhere_before_its_end_is_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", [(f"s{n}.png", png(n)) for n in range(3)])
    good, end = path.read_bytes(), starts(path)[-1]
    for size in range(0, end, 37):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match="cut short or no tar file"):
            open_tar(path)
    for zeros in (512, 1024, 10240, 10752):  # as several programs end a tar file
        path.write_bytes(good[:end] + bytes(zeros))
        assert len(open_tar(path)) == 3


def test_a_tar_file_that_cannot_be_read_is_no_damaged_one(tmp_path):
    with pytest.raises(UserError, match=r"0\.tar cannot be read \(No such file or directory\)"):
        open_tar(tmp_path / "0.tar")


def test_a_tar_file_that_vanishes_or_shrinks_after_it_was_opened_breaks_no_image(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("b.png", png(2))])
    data, good = open_tar(path), path.read_bytes()
    path.write_bytes(good[: starts(path)[1] + 520])
    assert data.load(0).size == (16, 16)
    with pytest.raises(UserError, match=r"0\.tar has become shorter") as shorter:
        data.load(1)
    path.unlink()
    with pytest.raises(UserError, match=r"no file at .*0\.tar") as gone:
        data.load(0)
    path.mkdir()
    with pytest.raises(UserError, match=r"0\.tar cannot be read \(Is a directory\)") as folder:
        data.load(0)
    assert not any(isinstance(caught.value, BrokenImage) for caught in (shorter, gone, folder))


def test_images_that_the_layout_does_not_know_are_counted(tmp_path, caplog):
    names = ["a.b.png", "photo 1.5.png", "ok.png", "k.png", "._ok.png", "ok.json", "d.e/f.png"]
    path = write_tar(tmp_path / "0.tar", [*((name, png(1)) for name in names), ("k.jpg", png(2)), ("l.png", "ok.png")])
    assert open_tar(path).ids == ["0/ok.png", "0/k.png", "0/d.e/f.png"]
    assert re.search(r"0\.tar: 4 images are passed over, first a\.b\.png", caplog.text)
    caplog.clear()
    write_tar(path, [("ok.png", png(1)), ("ok.json", b"{}")])
    assert open_tar(path).ids == ["0/ok.png"] and not caplog.text


def test_a_name_that_comes_twice_says_what_to_do(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.png", png(2))])
    with pytest.raises(UserError, match=r"two members a\.png; write the tar again with each name once"):
        open_tar(path)


@pytest.mark.parametrize("split", [None, ""])
def test_tar_files_in_the_root_are_found_without_a_split_and_named_with_one(tmp_path, split):
    write_tar(tmp_path / "laion" / "0.tar", [("a.png", png(1))])
    assert find_tars(tmp_path / "laion", split) == ("laion", [tmp_path / "laion" / "0.tar"])
    with pytest.raises(UserError, match=r"no split 'train'; its tar files lie in .*laion itself: --data\.split null"):
        find_tars(tmp_path / "laion", "train")
    write_tar(tmp_path / "laion" / "val" / "0.tar", [("a.png", png(1))])
    assert find_tars(tmp_path / "laion", "val")[0] == "laion-val"


def test_with_embeddings_a_webdataset_has_the_captions_of_a_file(tmp_path):
    write_tar(tmp_path / "w" / "train" / "0.tar", [("a.png", png(1)), ("b.png", png(2))])
    write(tmp_path / "c.jsonl", '{"image": "0/b.png", "text": "a dog"}\n{"image": "0/a.png", "text": "a cat"}\n')
    where = {"dataset": "webdataset", "root": str(tmp_path / "w"), "embeddings": "e/index.json"}
    plain = load_dataset(DataConfig(**where))
    assert plain.captions is None and plain.ids == []
    said = load_dataset(DataConfig(**where, captions=str(tmp_path / "c.jsonl")))
    assert dict(zip(said.ids, said.captions)) == {"0/b.png": ("a dog",), "0/a.png": ("a cat",)}
    assert said.fingerprint == plain.fingerprint and said.label == "webdataset/w-train"


def test_with_embeddings_a_webdataset_for_retrieval_keeps_its_own_captions(tmp_path):
    write_tar(tmp_path / "w" / "train" / "0.tar", [("a.png", png(1)), ("a.txt", b"a cat\n")])
    write(tmp_path / "w" / "dataset_type.txt", "retrieval")
    data = load_dataset(DataConfig(dataset="webdataset", root=str(tmp_path / "w"), embeddings="e/index.json"))
    assert (data.ids, data.captions) == (["0/a.png"], [("a cat",)])


# -- CIFAR ---------------------------------------------------------------------------------------------


def write_cifar(monkeypatch, root, kind, files):
    """Python pickles as they are published, with the checksums torchvision knows changed to theirs."""
    data = getattr(torchvision.datasets, kind)
    folder, sums = root / data.base_folder, {}
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for key in ("train_list", "test_list"):
        monkeypatch.setattr(data, key, [[name, sums[name]] for name, _ in getattr(data, key)])
    monkeypatch.setattr(data, "meta", data.meta | {"md5": sums[data.meta["filename"]]})


def pixels(values):
    """Rows of 3072 bytes: 1024 of red, of green, of blue. The red of each picture is its value."""
    rows = np.zeros((len(values), 3, 1024), dtype=np.uint8)
    rows[:, 0] = np.array(values)[:, None]
    return rows.reshape(len(values), 3072)


def test_cifar10_is_read_in_its_own_layout(tmp_path, monkeypatch):
    files = {f"data_batch_{n}": {"data": pixels([n, n + 100]), "labels": [n, 0]} for n in range(1, 6)}
    files |= {"test_batch": {"data": pixels([77]), "labels": [9]}}
    names = list(registry.class_names("cifar10").said)
    write_cifar(monkeypatch, tmp_path, "CIFAR10", files | {"batches.meta": {"label_names": names[::-1]}})
    train, test = open_dataset("cifar10", tmp_path, "train"), open_dataset("cifar10", tmp_path)
    assert (train.label, len(train), test.label, test.ids) == ("cifar10/train", 10, "cifar10/test", ["0"])
    assert train.questions[0].target.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert train.questions[0].classes == tuple(names[::-1]) and len(train.questions[0].several) > 3
    assert (train.part, test.part) == ("train", "test")
    assert train.load(3).getpixel((5, 5)) == (102, 0, 0) and test.load(0).getpixel((0, 31)) == (77, 0, 0)
    assert train.fingerprint != test.fingerprint


def test_cifar100_is_read_by_its_fine_classes(tmp_path, monkeypatch):
    names = list(registry.class_names("cifar100").said)
    files = {
        "train": {"data": pixels([1, 2]), "fine_labels": [99, 4], "coarse_labels": [0, 1]},
        "test": {"data": pixels([3]), "fine_labels": [50], "coarse_labels": [2]},
        "meta": {"fine_label_names": names, "coarse_label_names": names[:20]},
    }
    write_cifar(monkeypatch, tmp_path, "CIFAR100", files)
    (question,) = open_dataset("cifar100", tmp_path, "train").questions
    assert [question.classes[n] for n in question.target] == [names[99], names[4]]
    assert question.classes[names.index("aquarium_fish")] == "aquarium fish"
    assert open_dataset("cifar100", tmp_path, "test").load(0).getpixel((0, 0)) == (3, 0, 0)


@pytest.mark.parametrize("name, folder", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_a_folder_without_cifar_in_it_says_what_to_fetch(tmp_path, name, folder):
    with pytest.raises(UserError, match=rf"{name} is not at .*tar\.gz.*{folder}"):
        open_dataset(name, tmp_path)


def test_a_damaged_or_absent_file_of_cifar_is_an_error(tmp_path, monkeypatch):
    names = list(registry.class_names("cifar10").said)
    files = {f"data_batch_{n}": {"data": pixels([n]), "labels": [n]} for n in range(1, 6)}
    files |= {"test_batch": {"data": pixels([77]), "labels": [9]}, "batches.meta": {"label_names": names}}
    write_cifar(monkeypatch, tmp_path, "CIFAR10", files)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"cifar-10-batches-py is damaged"):
        open_dataset("cifar10", tmp_path)
    damaged.unlink()
    with pytest.raises(UserError, match=r"incomplete: no data_batch_3\. Fetch"):
        open_dataset("cifar10", tmp_path)


def test_a_class_of_cifar_without_a_name_is_an_error_that_names_it(tmp_path, monkeypatch):
    files = {f"data_batch_{n}": {"data": pixels([n]), "labels": [n]} for n in range(1, 6)}
    names = [*list(registry.class_names("cifar10").said)[:9], "lorry"]
    files |= {"test_batch": {"data": pixels([77]), "labels": [9]}, "batches.meta": {"label_names": names}}
    write_cifar(monkeypatch, tmp_path, "CIFAR10", files)
    with pytest.raises(UserError, match=r"cifar10\.yaml has no name for 'lorry' \(1 of 10 classes\)"):
        open_dataset("cifar10", tmp_path)


# -- MNIST ---------------------------------------------------------------------------------------------


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, packed=False):
    """Two digits to train on, one to test; the brightness of each picture says which it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, labels, shade in (("train", [7, 0], 100), ("t10k", [9], 200)):
        images = np.array([np.full((28, 28), shade + n) for n in range(len(labels))], dtype=np.uint8)
        images[:, 0, 27] = 0
        for name, array in (("images-idx3", images), ("labels-idx1", np.array(labels, dtype=np.uint8))):
            path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["MNIST/raw", "raw", "."])
def test_mnist_is_read_as_it_is_published_and_as_torchvision_keeps_it(tmp_path, inner, packed):
    write_mnist(tmp_path / inner, packed)
    train, test = open_dataset("mnist", tmp_path, "train"), open_dataset("mnist", tmp_path)
    assert (train.label, train.ids, test.label, len(test)) == ("mnist/train", ["0", "1"], "mnist/test", 1)
    (question,) = train.questions
    assert question.classes == tuple("0123456789") and question.target.tolist() == [7, 0]
    assert question.several == ('a photo of the number: "{}".',)
    assert test.questions[0].target.tolist() == [9] and train.fingerprint != test.fingerprint
    assert train.load(1).mode == "RGB" and train.load(1).size == (28, 28)
    assert train.load(1).getpixel((3, 9)) == (101,) * 3 and train.load(1).getpixel((27, 0)) == (0, 0, 0)


def test_mnist_is_the_same_as_torchvision_reads_it(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    theirs, ours = torchvision.datasets.MNIST(tmp_path, train=True), open_dataset("mnist", tmp_path, "train")
    assert [ours.questions[0].target[n] for n in (0, 1)] == [theirs[n][1] for n in (0, 1)]
    assert all(ours.load(n) == theirs[n][0].convert("RGB") for n in (0, 1))


@pytest.mark.parametrize(
    "name, harm, said",
    [
        ("t10k-images-idx3-ubyte", lambda b: b[:-1], r"images-idx3-ubyte is damaged, or no file of MNIST; fetch it"),
        ("t10k-images-idx3-ubyte", lambda b: b"", "damaged"),
        ("t10k-images-idx3-ubyte", lambda b: b[:3] + b"\1" + b[4:], "damaged"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", r"labels-idx1-ubyte has the label 10"),
        ("t10k-labels-idx1-ubyte", lambda b: idx(np.zeros(2, np.uint8)), r"has 1 images and .* 2 labels"),
        ("t10k-labels-idx1-ubyte.gz", lambda b: b[:-9], r"labels-idx1-ubyte\.gz is damaged"),
        ("t10k-labels-idx1-ubyte.gz", lambda b: b"no gzip", r"labels-idx1-ubyte\.gz is damaged"),
    ],
)
def test_a_damaged_file_of_mnist_is_an_error_with_its_path(tmp_path, name, harm, said):
    path = write_mnist(tmp_path / "MNIST" / "raw", name.endswith(".gz")) / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=said):
        open_dataset("mnist", tmp_path)


def test_mnist_without_one_of_its_files_is_incomplete_and_says_what_to_fetch(tmp_path):
    (write_mnist(tmp_path / "MNIST" / "raw") / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"incomplete: no t10k-labels-idx1-ubyte.*Fetch it: .*--download mnist"):
        open_dataset("mnist", tmp_path)
