"""Readers of changes: what they give on miniatures in the published layouts, and what they say of damaged ones."""

import json
import os
import re
import shutil

import pytest
from conftest import SHARED
from PIL import Image

from pc_clip.core.config.settings import DataConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Change, Dataset
from pc_clip.data.registry import READERS, held_out, open_dataset, state
from pc_clip.data.training_data import load_dataset
from pc_clip.interface import run

REAL = SHARED / "spot_the_diff"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real data are not part of the project")


def picture(path, shade=0):
    """An image whose red says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path, quality=95)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def shades(data):
    return [data.load(row).getpixel((0, 0))[0] for row in range(len(data))]


# -- the trees -----------------------------------------------------------------------------------------

CLEVR = {  # number -> its kind, sentences on the change, sentences where there is none
    7: ("color", ["the small  ball turned red", "someone painted the ball"], ["no change was made"]),
    0: ("drop", ["the cube is gone"], ["nothing has changed", "the scene is the same"]),
    2: ("move", ["the cylinder moved"], ["there is no change"]),
    11: ("add", ["a cube has been added"], ["the two scenes seem identical"]),
}
CLEVR_SPLITS = {"train": [7, 0], "val": [2], "test": [11]}
CLEVR_FOLDERS = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}


def clevr_tree(root, inner="data", shown=CLEVR):
    folder = root / inner
    write(folder / "splits.json", CLEVR_SPLITS)
    write(folder / "change_captions.json", {f"CLEVR_default_{n:06}.png": said for n, (_, said, _) in CLEVR.items()})
    write(folder / "no_change_captions.json", {f"CLEVR_default_{n:06}.png": said for n, (_, _, said) in CLEVR.items()})
    kinds = {kind: [f"{n:06}.png"] for n, (kind, _, _) in CLEVR.items()}
    write(folder / "type_mapping.json", {**kinds, "material": ["000555.png"]})
    for n in shown:
        for k, (place, which) in enumerate(CLEVR_FOLDERS.items()):
            picture(folder / place / f"CLEVR_{which}_{n:06}.png", 10 * n + k)
    return folder


SPOT = [
    {"img_id": "76", "sentences": ["there are no differences"]},
    {"img_id": "9", "sentences": ["the car is gone", "a man is there"]},
    {"img_id": "76", "sentences": ["the bus  left"]},
]


def spot_tree(root, annotations=".", pictures="images", ending=".png"):
    for n, split in enumerate(("train", "val", "test")):
        write(root / annotations / f"{split}.json", SPOT[: 3 - n])
    for key in (76, 9):
        picture(root / pictures / f"{key}{ending}", key)
        picture(root / pictures / f"{key}_2{ending}", key + 1)
    return root


EDITS = [
    {"img0": "Zhopped.com_p8_p8.jpg", "img1": "Zhopped.com_p8_wC.jpg", "sents": ["remove the people"], "uid": "Z_84"},
    {"img0": "Zhopped.com_p8_p8.jpg", "img1": "Zhopped.com_p8_bt.png", "sents": ["Brighten it ", "more light"]},
]


def edits_tree(root, annotations=".", pictures="images", valid="valid"):
    for split in ("train", valid, "test"):
        write(root / annotations / f"{split}.json", EDITS)
    for n, name in enumerate(("p8_p8.jpg", "p8_wC.jpg", "p8_bt.png")):
        picture(root / pictures / f"Zhopped.com_{name}", 40 * n)
    return root


LINES = [
    {"before": "a.png", "after": "deep/b.png", "sentences": ["a hat was added", "now there is a hat"], "kind": "add"},
    {"before": "deep/b.png", "after": "a.png", "sentence": " the hat   is gone"},
]


def lines_tree(root, name="train.jsonl", lines=LINES):
    for n, file in enumerate(("a.png", "deep/b.png")):
        picture(root / file, 100 * n)
    return write(root / name, "".join(json.dumps(line) + "\n" for line in lines))


TREES = {
    "clevr_change": clevr_tree,
    "spot_the_diff": spot_tree,
    "image_editing_request": edits_tree,
    "changes": lines_tree,
}


# -- each set as it is published -----------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["data", ".", "clevr_change/data"])
def test_clevr_change_has_two_pairs_a_scene_where_it_is_unpacked(tmp_path, inner):
    clevr_tree(tmp_path, inner)
    data = open_dataset("clevr_change", tmp_path, "train")
    first, second = "CLEVR_default_000007.png", "CLEVR_default_000000.png"
    assert data.changes == (
        Change(first, "CLEVR_semantic_000007.png", ("the small ball turned red", "someone painted the ball"), "color"),
        Change(first, "CLEVR_nonsemantic_000007.png", ("no change was made",), "none"),
        Change(second, "CLEVR_semantic_000000.png", ("the cube is gone",), "drop"),
        Change(second, "CLEVR_nonsemantic_000000.png", ("nothing has changed", "the scene is the same"), "none"),
    )
    assert data.ids == [f"CLEVR_{which}_{n:06}.png" for n in (7, 0) for which in CLEVR_FOLDERS.values()]
    assert shades(data) == [70, 71, 72, 0, 1, 2]
    assert (data.label, data.part, data.note, data.judge) == ("clevr_change/train", "train", "", None)
    assert [open_dataset("clevr_change", tmp_path, split).changes[0].kind for split in ("val", "test")] == [
        "move",
        "add",
    ]


@pytest.mark.parametrize("annotations", [".", "annotations", "data/annotations"])
@pytest.mark.parametrize("pictures", ["images", "resized_images", "."])
def test_spot_the_diff_has_a_change_an_entry(tmp_path, annotations, pictures):
    spot_tree(tmp_path, annotations, pictures)
    data = open_dataset("spot_the_diff", tmp_path, "train")
    assert data.changes == (
        Change("76", "76_2", ("there are no differences",)),
        Change("9", "9_2", ("the car is gone", "a man is there")),
        Change("76", "76_2", ("the bus left",)),
    )
    assert data.ids == ["76", "76_2", "9", "9_2"] and shades(data) == [76, 77, 9, 10]
    assert (data.label, data.note) == ("spot_the_diff/train", "")
    assert len(open_dataset("spot_the_diff", tmp_path).changes) == 1  # test


def test_pictures_of_spot_the_diff_may_be_jpegs(tmp_path):
    spot_tree(tmp_path, pictures="resized_images", ending=".jpg")
    assert abs(shades(open_dataset("spot_the_diff", tmp_path, "train"))[1] - 77) < 5


def test_the_sentences_of_a_pair_of_spot_the_diff_may_be_one_change(tmp_path):
    spot_tree(tmp_path)
    data = open_dataset("spot_the_diff", tmp_path, "reformat_train")
    assert data.changes == (
        Change("76", "76_2", ("there are no differences", "the bus left")),
        Change("9", "9_2", ("the car is gone", "a man is there")),
    )
    assert data.label == data.part.join(("spot_the_diff/", "")) == "spot_the_diff/reformat_train"
    assert data.fingerprint != open_dataset("spot_the_diff", tmp_path, "train").fingerprint
    joined = [{"img_id": "9", "sentences": ["only here"]}]  # the file that CLIP4IDC's script makes goes first
    write(tmp_path / "reformat_train.json", joined)
    assert open_dataset("spot_the_diff", tmp_path, "reformat_train").changes == (Change("9", "9_2", ("only here",)),)


@pytest.mark.parametrize("annotations", [".", "data", "dataset", "dataset/adobe"])
@pytest.mark.parametrize("valid", ["valid", "val"])
def test_image_editing_request_is_read_in_any_of_its_layouts(tmp_path, annotations, valid):
    edits_tree(tmp_path, annotations, valid=valid)
    data = open_dataset("image_editing_request", tmp_path, "train")
    before, one, other = (f"Zhopped.com_{name}" for name in ("p8_p8.jpg", "p8_wC.jpg", "p8_bt.png"))
    assert data.changes == (
        Change(before, one, ("remove the people",)),
        Change(before, other, ("Brighten it", "more light")),
    )
    assert data.ids == [before, one, other]
    assert all(abs(shade - 40 * n) < 5 for n, shade in enumerate(shades(data)))
    asked = [open_dataset("image_editing_request", tmp_path, split) for split in ("val", "valid")]
    assert [(a.label, a.part) for a in asked] == [("image_editing_request/val", "val")] * 2
    assert held_out(open_dataset("image_editing_request", tmp_path)) == "val"


def test_a_file_of_one_s_own_names_its_pictures_from_its_own_folder(tmp_path):
    lines_tree(tmp_path / "mine")
    data = open_dataset("changes", tmp_path / "mine", "train")
    assert data.changes == (
        Change("a.png", "deep/b.png", ("a hat was added", "now there is a hat"), "add"),
        Change("deep/b.png", "a.png", ("the hat is gone",)),
    )
    assert data.ids == ["a.png", "deep/b.png"] and shades(data) == [0, 100]
    assert (data.label, data.part, data.note) == ("changes/train", "train", "")


def test_what_belongs_with_a_file_that_was_named_by_its_path_is_not_guessed(tmp_path):
    lines_tree(tmp_path / "mine")
    assert held_out(open_dataset("changes", tmp_path / "mine", "train")) == "val"
    assert held_out(open_dataset("changes", None, str(tmp_path / "mine" / "train.jsonl"))) is None


def test_a_file_that_lies_elsewhere_is_named_by_its_path_and_has_a_label_of_its_own(tmp_path):
    lines_tree(tmp_path / "mine", "pairs.jsonl")
    named = open_dataset("changes", tmp_path / "mine", "pairs")
    data = open_dataset("changes", split="mine/pairs.jsonl")  # data/changes need not be there
    assert data.changes == named.changes and shades(data) == [0, 100]
    assert re.fullmatch(r"changes/pairs-[0-9a-f]{6}", data.label) and named.label == "changes/pairs"
    assert open_dataset("changes", "mine", "mine/pairs.jsonl").label == "changes/pairs"
    shutil.copytree("mine", "yours")
    assert open_dataset("changes", split="yours/pairs.jsonl").label != data.label
    trained_on = load_dataset(DataConfig(dataset="changes", split="mine/pairs.jsonl"))
    assert trained_on.changes == data.changes and trained_on.fingerprint == data.fingerprint


def test_a_file_may_name_pictures_by_whole_paths_in_any_line_ending_and_after_a_mark_of_its_bytes(tmp_path):
    places = [str(picture(tmp_path / "far" / f"{n}.png", n)) for n in (50, 90)]
    line = json.dumps({"before": places[0], "after": places[1], "sentence": "é\u2028x"}, ensure_ascii=False)
    (tmp_path / "mine.JSONL").write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n".encode())
    data = open_dataset("changes", split="mine.JSONL")
    assert shades(data) == [50, 90] and data.changes[0].sentences == ("é x",)


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_found_and_every_image_that_a_change_names_is_there_once(tmp_path, name):
    TREES[name](tmp_path)
    data = open_dataset(name, tmp_path, "train")
    assert state(name, tmp_path) == "found" and isinstance(data, Dataset)
    assert sorted(data.ids) == sorted({key for change in data.changes for key in (change.before, change.after)})
    assert data.name == name and data.captions is None and data.questions == () and READERS[name].splits[0] == "train"


def test_the_readers_are_reached_from_the_command_line(tmp_path):
    spot_tree(tmp_path / "spot")
    with pytest.raises(UserError, match="cannot be measured on spot_the_diff/test"):
        run.main(["--dataset", "spot_the_diff", "--root", "spot", "--mode", "zeroshot", "--model.name", "example"])


# -- what the fingerprint follows ----------------------------------------------------------------------

EDITED = {
    "clevr_change": ("data/change_captions.json", "the cube is gone", "the ball is gone"),
    "spot_the_diff": ("train.json", "the car is gone", "the van is gone"),
    "image_editing_request": ("train.json", "more light", "less light"),
    "changes": ("train.jsonl", "now there is a hat", "now there is a cap"),
}
ONE_PICTURE = {
    "clevr_change": "data/nsc_images/CLEVR_nonsemantic_000000.png",
    "spot_the_diff": "images/9_2.png",
    "image_editing_request": "images/Zhopped.com_p8_bt.png",
    "changes": "deep/b.png",
}


@pytest.mark.parametrize("name", TREES)
def test_the_fingerprint_follows_sentences_and_pictures(tmp_path, name):
    TREES[name](tmp_path)
    before = open_dataset(name, tmp_path, "train").fingerprint
    assert open_dataset(name, tmp_path, "train").fingerprint == before
    file, said, now = EDITED[name]
    text = (tmp_path / file).read_text()
    assert said in text
    write(tmp_path / file, text.replace(said, now))
    assert open_dataset(name, tmp_path, "train").fingerprint != before
    write(tmp_path / file, text)
    assert open_dataset(name, tmp_path, "train").fingerprint == before
    os.utime(tmp_path / ONE_PICTURE[name], (1, 1))
    assert open_dataset(name, tmp_path, "train").fingerprint != before


def test_the_fingerprint_follows_the_kinds(tmp_path):
    folder = clevr_tree(tmp_path)
    before = open_dataset("clevr_change", tmp_path, "val").fingerprint
    write(folder / "type_mapping.json", {"color": ["000002.png"]})
    assert open_dataset("clevr_change", tmp_path, "val").fingerprint != before


# -- pictures that are not there -----------------------------------------------------------------------

PAIR = {  # of ONE_PICTURE: what it is compared with, images in all, and the changes that are left without it
    "clevr_change": ("CLEVR_default_000000.png", 6, 3, 4),
    "spot_the_diff": ("9", 4, 2, 3),
    "image_editing_request": ("Zhopped.com_p8_p8.jpg", 3, 1, 2),
}


@pytest.mark.parametrize("name", PAIR)
def test_an_absent_picture_is_named_with_the_one_that_lost_its_pair(tmp_path, name):
    TREES[name](tmp_path)
    (tmp_path / ONE_PICTURE[name]).unlink()
    pair, total, left, changes = PAIR[name]
    said = rf"1 of the {total} pictures named in .*json are absent, first .*{ONE_PICTURE[name]}, so that {pair} has no "
    with pytest.raises(UserError, match=said + r"pair\. Unpack .*--data\.missing skip"):
        open_dataset(name, tmp_path, "train")
    data = open_dataset(name, tmp_path, "train", missing="skip")
    assert len(data.changes) == left and len(shades(data)) == len(data)
    assert f"1 pictures named in {data.note.split()[4]} are absent, and {changes - left} of {changes} " in data.note
    kept = open_dataset(name, tmp_path, "train", missing="keep")
    assert len(kept.changes) == changes and len(kept) == total and kept.note.endswith("are absent")
    with pytest.raises(UserError, match=rf"no image at .*{ONE_PICTURE[name]}"):
        shades(kept)


def test_the_pictures_of_a_file_of_one_s_own_are_looked_for_from_its_folder(tmp_path):
    lines_tree(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 .*first .*a\.png, so that deep/b\.png has no pair\. Put them"):
        open_dataset("changes", tmp_path, "train")


@pytest.mark.parametrize("name, get", [("clevr_change", "clevr_change.tar.gz"), ("spot_the_diff", "resized_images"),
                                       ("image_editing_request", "images"), ("changes", "Put them where")])  # fmt: skip
def test_without_any_picture_all_are_counted_and_there_is_nothing_to_skip(tmp_path, name, get):
    TREES[name](tmp_path)
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        path.unlink()
    total = len(open_dataset(name, tmp_path, "train", missing="keep"))
    for missing in ("error", "skip"):
        with pytest.raises(UserError, match=rf"{total} of the {total} pictures .*{re.escape(get)}") as raised:
            open_dataset(name, tmp_path, "train", missing=missing)
        assert "has no pair" not in str(raised.value)


# -- words -----------------------------------------------------------------------------------------------


def test_an_entry_that_is_there_twice_is_taken_once_and_one_without_words_is_left_out(tmp_path):
    spot_tree(tmp_path)
    entries = [
        *SPOT,
        SPOT[1],
        {"img_id": "5", "sentences": [""]},
        {"img_id": "9", "sentences": ["", "the car is gone"]},
    ]
    write(tmp_path / "train.json", entries)
    data = open_dataset("spot_the_diff", tmp_path, "train")  # nobody needs the pictures of 5
    assert [change.sentences for change in data.changes][2:] == [("the bus left",), ("the car is gone",)]
    assert data.note == (
        "1 of 6 changes in train.json have no words and are left out; "
        "1 of 6 changes in train.json are there twice and taken once"
    )
    write(tmp_path / "train.json", [{"img_id": "5", "sentences": ["", " "]}] * 2)
    with pytest.raises(UserError, match=r"train\.json tells of no change: 2 entries, none with a word"):
        open_dataset("spot_the_diff", tmp_path, "train")


def test_half_a_surrogate_pair_does_not_stay(tmp_path):
    spot_tree(tmp_path)
    write(tmp_path / "test.json", '[{"img_id": 76, "sentences": ["a \\ud83d smile"]}]')
    (change,) = open_dataset("spot_the_diff", tmp_path, "test").changes
    assert change == Change("76", "76_2", ("a ? smile",))


# -- damaged files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        ("[{", r"train\.json is not JSON \(.*fetch it again"),
        (b"\xff\xfe[]", r"train\.json is not JSON"),
        ({"img_id": "76"}, r"train\.json must hold a list, found \{"),
        ([], r"train\.json is empty; fetch it again"),
        ([*SPOT, "9"], r"train\.json, entry 4 must be an object with img_id, sentences, found '9'"),
        ([*SPOT, {"img_id": "9"}], r"train\.json, entry 4 has no sentences: \{\"img_id\": \"9\"\}"),
        ([{"images": []}], r"entry 1 has no img_id, sentences"),
        ([*SPOT, {"img_id": "9", "sentences": []}], r"entry 4: sentences is empty; say what changed"),
        ([{"img_id": "9", "sentences": "the car"}], r"entry 1: sentences must be a list of texts, found 'the car'"),
        ([{"img_id": "9", "sentences": [None]}], r"entry 1: sentences must be a list of texts"),
        ([{"img_id": " ", "sentences": ["x"]}], r"entry 1: img_id must name an image, found ' '"),
        ([{"img_id": True, "sentences": ["x"]}], r"entry 1: img_id must name an image, found 'True'"),
    ],
)
def test_a_damaged_list_is_told_with_file_and_entry(tmp_path, content, said):
    spot_tree(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "train.json").write_bytes(content)
    else:
        write(tmp_path / "train.json", content)
    with pytest.raises(UserError, match=said):
        open_dataset("spot_the_diff", tmp_path, "train")


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"img0": "a.jpg", "sents": ["x"]}, r"train\.json, entry 3 has no img1: "),
        ({"img0": 4.5, "img1": "b.jpg", "sents": ["x"]}, r"entry 3: img0 must name an image, found '4\.5'"),
        ({"img0": "a.jpg", "img1": "b.jpg", "sents": {}}, r"entry 3: sents must be a list of texts, found '\{\}'"),
    ],
)
def test_a_damaged_entry_of_image_editing_request_is_told(tmp_path, entry, said):
    edits_tree(tmp_path)
    write(tmp_path / "train.json", [*EDITS, entry])
    with pytest.raises(UserError, match=said):
        open_dataset("image_editing_request", tmp_path, "train")


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", r"train\.jsonl, line 3 is not JSON \(.* at column \d+\); mend or remove it"),
        ("[]", r'line 3: wanted \{"before", "after", "sentences"\}, found \[\]'),
        ('{"before": "a.png", "sentence": "x"}', r'line 3: wanted \{"before", "after", "sentences"\}'),
        ('{"before": "a.png", "after": "b.png"}', r'line 3: wanted either "sentences" or "sentence", found before, '),
        (
            '{"before": "a.png", "after": "b.png", "sentence": "x", "sentences": ["x"]}',
            r'line 3: wanted either "sentences" or "sentence", found before, after, sentence, sentences',
        ),
        ('{"before": 1.5, "after": "b.png", "sentence": "x"}', r"line 3: before must name an image, found '1\.5'"),
        ('{"before": "a.png", "after": "", "sentence": "x"}', r"line 3: after must name an image, found ''"),
        ('{"before": "a.png", "after": "b.png", "sentence": 3}', r"line 3: sentence must be a text, found '3'"),
        ('{"before": "a.png", "after": "b.png", "sentence": " "}', r"line 3 has no sentence with a word in it"),
        ('{"before": "a.png", "after": "b.png", "sentences": []}', r"line 3: sentences is empty"),
        ('{"before": "a.png", "after": "b.png", "sentences": "x"}', r"line 3: sentences must be a list of texts"),
        (
            '{"before": "a.png", "after": "b.png", "sentence": "x", "kind": 1}',
            r"line 3: kind must be a text, found '1'",
        ),
    ],
)
def test_a_line_that_is_no_change_is_told_with_its_number(tmp_path, line, said):
    path = lines_tree(tmp_path)
    write(path, path.read_text() + line)
    with pytest.raises(UserError, match=said):
        open_dataset("changes", tmp_path, "train")


@pytest.mark.parametrize(
    "content, said",
    [
        (b" \n", r"train\.jsonl is empty; write a line of JSON"),
        (b"\xff\xfe", r"train\.jsonl is not UTF-8 text \(.* at byte 0\)"),
    ],
)
def test_an_empty_file_and_one_of_bytes_are_told(tmp_path, content, said):
    lines_tree(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_dataset("changes", tmp_path, "train")


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("splits.json", [1], r"splits\.json must hold an object, found \[1\]"),
        ("splits.json", {"val": [2]}, r"splits\.json has no split 'train'; it has val"),
        ("splits.json", {"train": []}, r"splits\.json: train must be a list of numbers of images, found '\[\]'"),
        ("splits.json", {"train": [7, "0"]}, r"splits\.json: train must be a list of numbers .*but one is '0'"),
        ("splits.json", {"train": [7, 3]}, r"change_captions\.json has no sentences for CLEVR_default_000003\.png, w"),
        ("no_change_captions.json", {"CLEVR_default_000007.png": ["x"]}, r"/no_change_captions\.json has no sentences"),
        ("change_captions.json", {"CLEVR_default_000007.png": []}, r"/change_captions\.json: CLEVR_default_000007"),
        ("change_captions.json", {"CLEVR_default_000007.png": "x"}, r"CLEVR_default_000007\.png must be a list of"),
        ("change_captions.json", {}, r"change_captions\.json is empty"),
        ("type_mapping.json", {"color": "000007.png"}, r"type_mapping\.json: color must be a list of names as 0"),
        ("type_mapping.json", {"color": [7]}, r"type_mapping\.json: color must be .*but one is '7'"),
        ("type_mapping.json", {"add": ["000007.png"], "drop": ["000007.png"]}, r"000007\.png is said to be add and dr"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_clevr_change_is_told(tmp_path, file, content, said):
    folder = clevr_tree(tmp_path)
    write(folder / file, content)
    with pytest.raises(UserError, match=said):
        open_dataset("clevr_change", tmp_path, "train")


def test_scenes_without_a_kind_are_counted(tmp_path):
    folder = clevr_tree(tmp_path)
    write(folder / "type_mapping.json", {"color": ["000007.png"]})
    data = open_dataset("clevr_change", tmp_path, "train")
    assert [change.kind for change in data.changes] == ["color", "none", "", "none"]
    assert data.note == "1 of 2 scenes have no kind in type_mapping.json"


# -- files that are not there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["splits.json", "change_captions.json", "no_change_captions.json", "type_mapping.json"]
)
def test_a_file_of_clevr_change_that_is_not_there_is_named_with_what_to_fetch(tmp_path, file):
    (clevr_tree(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=rf"incomplete: no {file}\. Fetch clevr_change\.tar\.gz"):
        open_dataset("clevr_change", tmp_path)
    assert state("clevr_change", tmp_path) == f"incomplete: no {file}"


@pytest.mark.parametrize("name", ["clevr_change", "spot_the_diff", "image_editing_request"])
def test_an_empty_folder_says_what_to_fetch(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is not at .*Fetch .*github\.com/.*--root"):
        open_dataset(name, tmp_path)


def test_a_split_without_a_file_names_those_that_have_one(tmp_path):
    (spot_tree(tmp_path / "spot") / "test.json").unlink()
    for split in ("test", "reformat_test"):
        with pytest.raises(UserError, match=rf"no {split}\.json; splits found there: train, val$"):
            open_dataset("spot_the_diff", tmp_path / "spot", split)
    (edits_tree(tmp_path / "edits") / "valid.json").unlink()
    with pytest.raises(UserError, match=r"no valid\.json; splits found there: train, test$"):
        open_dataset("image_editing_request", tmp_path / "edits", "val")
    lines_tree(tmp_path / "mine")
    for split, file in (("dev", "dev.jsonl"), ("far/dev.jsonl", "far/dev.jsonl"), ("v1.5", "v1.5.jsonl")):
        with pytest.raises(UserError, match=rf"no {file}; files found there: train\. .*--data\.split FILE\.jsonl"):
            open_dataset("changes", tmp_path / "mine", split)
    with pytest.raises(UserError, match=r"changes is not at data/changes\. Put "):
        open_dataset("changes", split="far/dev.jsonl")


@pytest.mark.parametrize("name", ["clevr_change", "spot_the_diff", "image_editing_request"])
def test_an_unknown_split_is_refused(tmp_path, name):
    TREES[name](tmp_path)
    with pytest.raises(UserError, match=rf"{name} has no split 'tset'\. Did you mean"):
        open_dataset(name, tmp_path, "tset")


# -- the annotations of Spot-the-Diff as published ---------------------------------------------------------


@real_data
@pytest.mark.parametrize("split, entries, wordless, pairs", [
    ("train", 9524, 47, 8566), ("val", 1634, 6, 1493), ("test", 1404, 7, 1270),
])  # fmt: skip
def test_the_published_annotations_of_spot_the_diff_are_read(split, entries, wordless, pairs):
    data = open_dataset("spot_the_diff", REAL, split, missing="keep")
    listed = json.loads((REAL / f"{split}.json").read_text())
    assert len(listed) == entries and len({entry["img_id"] for entry in listed}) == pairs
    assert len(data.changes) == entries - wordless
    said = {(entry["img_id"], tuple(filter(None, entry["sentences"]))) for entry in listed}
    assert {(change.before, change.sentences) for change in data.changes} == {entry for entry in said if entry[1]}
    assert data.note.startswith(f"{wordless} of {entries} changes in {split}.json have no words and are left out; ")
    assert len(data) == 2 * len({change.before for change in data.changes}) and not any(c.kind for c in data.changes)
    with pytest.raises(UserError, match=rf"{len(data)} of the {len(data)} pictures .*Unpack resized_images"):
        open_dataset("spot_the_diff", REAL, split)


@real_data
def test_joined_the_test_split_has_the_references_of_clip4idc_s_evaluation():
    data = open_dataset("spot_the_diff", REAL, "reformat_test", missing="keep")
    file = json.loads((REAL / "spot_total_change_captions_reformat.json").read_text())
    references = {}
    for annotation in file["annotations"]:
        if annotation["caption"]:
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    assert {f"{change.before}.png": list(change.sentences) for change in data.changes} == references
    assert [f"{change.before}.png" for change in data.changes] == list(references)
