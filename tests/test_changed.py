"""Readers of changes on miniatures in the published layouts, and what they say of damaged ones."""

import json
import os
import re

import pytest
from conftest import SHARED
from test_dataset_layouts import picture, write

from pc_clip.core.errors import UserError
from pc_clip.data.changes import NoSplit
from pc_clip.data.dataset import Change
from pc_clip.data.registry import READERS, open_dataset, selection_split


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
    write(
        folder / "change_captions.json",
        {f"CLEVR_default_{n:06}.png": sentences for n, (_, sentences, _) in CLEVR.items()},
    )
    write(
        folder / "no_change_captions.json",
        {f"CLEVR_default_{n:06}.png": sentences for n, (_, _, sentences) in CLEVR.items()},
    )
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


PUBLISHED = {  # in one of its layouts: the split that is read, changes, ids
    "clevr_change": (
        {"inner": "clevr_change/data"}, "val",
        [Change("CLEVR_default_000002.png", "CLEVR_semantic_000002.png", ("the cylinder moved",), "move"),
         Change("CLEVR_default_000002.png", "CLEVR_nonsemantic_000002.png", ("there is no change",), "none")],
        [20, 21, 22],
    ),
    "spot_the_diff": (
        {"annotations": "data/annotations", "pictures": "resized_images"}, "reformat_train",
        [Change("76", "76_2", ("there are no differences", "the bus left")),
         Change("9", "9_2", ("the car is gone", "a man is there"))],
        [76, 77, 9, 10],
    ),
    "image_editing_request": (
        {"annotations": "dataset/adobe", "valid": "valid"}, "val",
        [Change("Zhopped.com_p8_p8.jpg", "Zhopped.com_p8_wC.jpg", ("remove the people",)),
         Change("Zhopped.com_p8_p8.jpg", "Zhopped.com_p8_bt.png", ("Brighten it", "more light"))],
        [0, 40, 80],
    ),
    "changes": (
        {}, "train",
        [Change("a.png", "deep/b.png", ("a hat was added", "now there is a hat"), "add"),
         Change("deep/b.png", "a.png", ("the hat is gone",))],
        [0, 100],
    ),
}  # fmt: skip
# a picture; images of the split in all, changes in all, and those with both pictures when it is gone
ONE_PICTURE = {
    "clevr_change": ("data/nsc_images/CLEVR_nonsemantic_000000.png", 6, 4, 3),
    "spot_the_diff": ("images/9_2.png", 4, 3, 2),
    "image_editing_request": ("images/Zhopped.com_p8_bt.png", 3, 2, 1),
}


@pytest.mark.parametrize("name", TREES)
def test_a_set_is_read_as_it_is_published(tmp_path, name):
    layout, split, changes, red = PUBLISHED[name]
    TREES[name](tmp_path, **layout)
    data = open_dataset(name, tmp_path, split)
    assert data.changes == tuple(changes) and READERS[name].state(tmp_path) == "found"
    assert all(abs(shade - wanted) < 5 for shade, wanted in zip(shades(data), red, strict=True))
    assert data.ids == list(dict.fromkeys(key for change in changes for key in (change.before, change.after)))
    assert (data.label, data.part, data.note) == (f"{name}/{split}", split, "")


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_a_missing_picture_is_an_error_or_counted(tmp_path, name):
    TREES[name](tmp_path)
    file, images, changes, shown = ONE_PICTURE[name]
    before = open_dataset(name, tmp_path, "train").fingerprint
    os.utime(tmp_path / file, (1, 1))
    assert open_dataset(name, tmp_path, "train").fingerprint != before
    (tmp_path / file).unlink()
    message = rf"1 of the {images} pictures named in .*json are absent, first .*{file}\. Unpack .*skip"
    with pytest.raises(UserError, match=message):
        open_dataset(name, tmp_path, "train")
    data = open_dataset(name, tmp_path, "train", missing="skip")
    assert len(data.changes) == shown and len(shades(data)) == len(data)
    assert f"{changes - shown} of {changes} changes are left out for want of a picture" in data.note
    kept = open_dataset(name, tmp_path, "train", missing="keep")
    assert (len(kept.changes), len(kept)) == (changes, images) and kept.note.endswith("json are absent")


def test_own_change_files_may_use_absolute_paths(tmp_path):
    places = [str(picture(tmp_path / "far" / f"{n}.png", n)) for n in (50, 90)]
    line = json.dumps({"before": places[0], "after": places[1], "sentence": "é\u2028x"}, ensure_ascii=False)
    (tmp_path / "mine.JSONL").write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n".encode())
    data = open_dataset("changes", split="mine.JSONL")  # data/changes need not be there
    assert shades(data) == [50, 90] and data.changes[0].sentences == ("é x",)
    assert re.fullmatch(r"changes/mine-[0-9a-f]{6}", data.label) and selection_split(data) is None
    lines_tree(tmp_path / "mine")
    assert selection_split(open_dataset("changes", tmp_path / "mine", "train")) == "val"
    with pytest.raises(NoSplit, match=r"has no val\.jsonl; found there: train\. One that lies elsewhere"):
        open_dataset("changes", tmp_path / "mine", "val")


def test_duplicates_and_empty_sentences_are_dropped_and_counted(tmp_path):
    spot_tree(tmp_path)
    wordless = {"img_id": "5", "sentences": [""]}
    write(tmp_path / "train.json", json.dumps([*SPOT, SPOT[1], wordless, {"img_id": 9, "sentences": ["a \ud83d"]}]))
    data = open_dataset("spot_the_diff", tmp_path, "train")  # nobody needs the pictures of 5
    assert [change.sentences for change in data.changes][2:] == [("the bus left",), ("a ?",)]
    assert data.note == (
        "1 of 6 changes in train.json have no words and are left out; "
        "1 of 6 changes in train.json are there twice and taken once"
    )
    write(tmp_path / "train.json", [wordless])
    with pytest.raises(
        UserError, match=r"train\.json tells of no change with words and both pictures; it has 1 entries"
    ):
        open_dataset("spot_the_diff", tmp_path, "train")


def test_a_damaged_file_is_named_with_the_place(tmp_path):
    for name, file, content, message in [
        ("spot_the_diff", "train.json", "[", "is not JSON"),
        ("spot_the_diff", "train.json", {}, "must hold a list, found"),
        ("spot_the_diff", "train.json", [SPOT[0], {"img_id": 1}], "entry 2 must be an object with img_id, sentences"),
        ("spot_the_diff", "train.json", [{"img_id": " ", "sentences": ["x"]}], "entry 1: img_id must name an image"),
        ("spot_the_diff", "train.json", [{"img_id": 1, "sentences": "x"}], "entry 1: sentences must be a list"),
        ("changes", "train.jsonl", '\n{"before": "a.png"}', "line 2 must be an object with before, after"),
        ("changes", "train.jsonl", "{\n", "line 1 is not JSON"),
        ("changes", "train.jsonl", {"before": "a", "after": "b"}, 'line 1: wanted either "sentences" or "sentence"'),
        ("changes", "train.jsonl", {"before": "a", "after": "b", "sentence": " "}, "no change with words"),
        ("changes", "train.jsonl", "\n", "tells of no change"),
        ("clevr_change", "splits.json", {"train": 3}, "needs a list of numbers of scenes for 'train'"),
        ("clevr_change", "splits.json", {"train": [5]}, "CLEVR_default_000005.png: sentences must be a list"),
        ("clevr_change", "type_mapping.json", {"a": ["000007.png"], "b": ["000007.png"]}, "names a scene twice"),
    ]:
        root = tmp_path / file / message[:9]
        TREES[name](root)
        write(root / "data" / file if name == "clevr_change" else root / file, content)
        with pytest.raises(UserError, match=message) as raised:
            open_dataset(name, root, "train")
        assert file in str(raised.value) or "change_captions" in str(raised.value)


def test_scenes_without_a_kind_are_counted(tmp_path):
    write(clevr_tree(tmp_path) / "type_mapping.json", {"color": ["000007.png"]})
    data = open_dataset("clevr_change", tmp_path, "train")
    assert [change.kind for change in data.changes] == ["color", "none", "", "none"]
    assert data.note == "1 of 2 scenes have no kind in type_mapping.json"


@pytest.mark.skipif(not (SHARED / "spot_the_diff").is_dir(), reason="the real data are not part of the project")
def test_joined_the_published_test_split_has_the_references_of_clip4idcs_evaluation():
    data = open_dataset("spot_the_diff", SHARED / "spot_the_diff", "reformat_test", missing="keep")
    file = json.loads((SHARED / "spot_the_diff" / "spot_total_change_captions_reformat.json").read_text())
    references = {}
    for annotation in file["annotations"]:
        if annotation["caption"]:
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    assert {f"{change.before}.png": list(change.sentences) for change in data.changes} == references
