"""Readers on miniature trees in each set's own layout, whole and damaged; class names; downloads, from this machine."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import random
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


from PIL import Image
from scipy.io import savemat

from pc_clip.core.errors import UserError
from pc_clip.data import hash_split, registry as listing
from pc_clip.data.class_text import class_names
from pc_clip.data.registry import READERS, download, held_out, open_dataset, state
from pc_clip.models.torchvision_compat import torchvision

SPLIT_BY_US = ("eurosat", "sun397", "awa2")


def picture(path, shade=0):
    """An image whose red says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path, quality=95)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# -- the trees -----------------------------------------------------------------------------------------

AWA2 = {  # class -> (number, value of each predicate, images)
    "grizzly+bear": (1, {"black": 0, "big": 1, "fast": 0}, 4),
    "antelope": (2, {"black": 0, "big": 0, "fast": 1}, 5),
    "persian+cat": (3, {"black": 1, "big": 0, "fast": 0}, 3),
}


def awa2_tree(root, classes=AWA2, predicates=("black", "big", "fast")):
    folder = root / "Animals_with_Attributes2"
    by_number = sorted(classes, key=lambda name: classes[name][0])
    write(folder / "classes.txt", "".join(f"{n:8}\t{name}\n" for n, name in enumerate(by_number, 1)))
    write(folder / "predicates.txt", "".join(f"{n:8}\t{name}\n" for n, name in enumerate(predicates, 1)))
    rows = [" ".join(str(classes[name][1][p]) for p in predicates) for name in by_number]
    write(folder / "predicate-matrix-binary.txt", "\n".join(rows) + "\n")
    for name, (_, _, count) in classes.items():
        for n in range(count):
            path = folder / "JPEGImages" / name / f"{name}_{10001 + n}.jpg"
            if not path.exists():
                picture(path, 40 * n)
    return folder


CUB = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "009.Brewer_Blackbird"]
BIRDS = [(1, 0, 1), (2, 0, 0), (3, 1, 0), (4, 2, 1), (5, 2, 0), (6, 1, 1)]  # image, class, is_train
SEEN = {"has_bill_shape::dagger": [12.5, 0, 100], "has_size::small_(5_-_9_in)": [50, 25, 0]}  # per cent a class


def cub_tree(root, seed=None, attributes="attributes/attributes.txt"):
    """seed: the lines of every file in another order, numbers kept."""
    folder = root / "CUB_200_2011"
    names = {image: f"{CUB[k]}/{CUB[k][4:]}_{image:04}_{796111 - image}.jpg" for image, k, _ in BIRDS}

    def put(name, lines):
        random.Random(f"{seed}{name}").shuffle(lines) if seed is not None else None
        write(folder / name, "".join(f"{line}\n" for line in lines))

    put("images.txt", [f"{image} {names[image]}" for image, _, _ in BIRDS])
    put("image_class_labels.txt", [f"{image} {k + 1}" for image, k, _ in BIRDS])
    put("train_test_split.txt", [f"{image} {train}" for image, _, train in BIRDS])
    put("classes.txt", [f"{k} {name}" for k, name in enumerate(CUB, 1)])
    put(attributes, [f"{k} {name}" for k, name in enumerate(SEEN, 1)])
    table = "".join(" ".join(f"{values[k]:f}" for values in SEEN.values()) + "\n" for k in range(3))
    write(folder / "attributes" / "class_attribute_labels_continuous.txt", table)
    for image, name in names.items():
        if not (folder / "images" / name).exists():
            picture(folder / "images" / name, 40 * image)
    return folder


def eurosat_tree(root):
    for name, count in (("SeaLake", 12), ("AnnualCrop", 9), ("River", 9)):
        for n in range(1, count + 1):
            picture(root / "2750" / name / f"{name}_{n}.jpg", n)
    return root / "2750"


SUN = ["/a/abbey", "/c/casino/indoor", "/c/casino/outdoor", "/t/temple/east_asia"]


def sun397_tree(root, classes=("/a/abbey", "/c/casino/indoor", "/t/temple/east_asia")):
    folder = root / "SUN397"
    write(folder / "ClassName.txt", "".join(f"{name}\n" for name in classes))
    for k, name in enumerate(classes):
        for n in range(7):
            picture(folder / name[1:] / f"sun_{'abcdefg'[n]}{k}xyz.jpg", 10 * n + k)
    return folder


def flowers102_tree(root, monkeypatch, labels=(77, 1, 102, 77, 3), trnid=(4, 2), valid=(2, 4), tstid=(5, 1, 3)):
    folder = root / "flowers-102"
    for n in range(1, len(labels) + 1):
        picture(folder / "jpg" / f"image_{n:05}.jpg", 20 * n)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    ids = {"trnid": trnid, "valid": valid, "tstid": tstid}
    savemat(folder / "setid.mat", {k: np.array([v], dtype=np.uint16) for k, v in ids.items()})
    data = torchvision.datasets.Flowers102
    sums = {"label": "imagelabels.mat", "setid": "setid.mat"}
    changed = {k: (n, hashlib.md5((folder / n).read_bytes()).hexdigest()) for k, n in sums.items()}
    monkeypatch.setattr(data, "_file_dict", data._file_dict | changed)
    return folder


FOOD = {"train": {"pizza": ["pizza/5", "pizza/11"], "cup_cakes": ["cup_cakes/7"]},
        "test": {"pizza": ["pizza/2"], "cup_cakes": ["cup_cakes/1", "cup_cakes/9"]}}  # fmt: skip


def food101_tree(root, food=FOOD):
    folder = root / "food-101"
    for part, classes in food.items():
        write(folder / "meta" / f"{part}.json", json.dumps(classes))
        for images in classes.values():
            for name in images:
                picture(folder / "images" / f"{name}.jpg", 20 * int(name.split("/")[1]))
    return folder


def jpeg(shade, kind="jpeg"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def add(tar, name, content):
    content = content.encode() if isinstance(content, str) else content
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def webdataset_tree(root, nshards=True):
    write(root / "classnames.txt", "cat\nhot dog\ncow\n")
    write(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\n\nthe {c}\n")
    for n in range(11):  # more than ten: 10.tar comes after 9.tar
        ending, kind = (("jpg", "jpeg"), ("png", "png"), ("webp", "webp"))[n % 3]
        shard(
            root / "test" / f"{n}.tar",
            {f"s{2 * n + k:07}.{e}": c for k in (0, 1) for e, c in (("cls", str(n % 3)), (ending, jpeg(20 * n, kind)))},
        )
    shard(root / "train" / "0.tar", {"s0000000.jpg": jpeg(9), "s0000000.cls": "2"})
    if nshards:
        write(root / "test" / "nshards.txt", "11\n"), write(root / "train" / "nshards.txt", "1\n")
    return root


def tree(name, root, monkeypatch):
    """The miniature of a set, and one of the images of its default split."""
    if name == "awa2":
        return awa2_tree(root) / "JPEGImages" / "antelope" / "antelope_10002.jpg"
    if name == "cub":
        return cub_tree(root) / "images" / CUB[1] / "Laysan_Albatross_0003_796108.jpg"
    if name == "flowers102":
        return flowers102_tree(root, monkeypatch) / "jpg" / "image_00003.jpg"
    if name == "food101":
        return food101_tree(root) / "images" / "cup_cakes" / "9.jpg"
    folder = (eurosat_tree if name == "eurosat" else sun397_tree)(root)
    return folder / open_dataset(name, root).ids[0]


TREES = ["awa2", "cub", "eurosat", "flowers102", "food101", "sun397"]


# -- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_a_set_opens_with_names_people_say_and_the_prompt_of_the_paper(name, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    data = open_dataset(name, tmp_path)
    (question,) = data.questions
    assert state(name, tmp_path) == "found"
    assert data.part == READERS[name].splits[-1]
    assert question.rows.tolist() == list(range(len(data))) and question.target.dtype == np.int64
    assert question.templates == ("This is a photo of a {}.",) and question.several == class_names(name).several
    assert set(question.classes) <= set(class_names(name).said.values())
    assert data.load(0).mode == "RGB" and len(set(data.ids)) == len(data)


@pytest.mark.parametrize("name", TREES)
def test_the_folder_of_the_archive_may_be_named_itself(name, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    inner = READERS[name].layout.folder(tmp_path)
    assert inner != tmp_path
    assert open_dataset(name, inner).ids == open_dataset(name, tmp_path).ids


@pytest.mark.parametrize("name", TREES)
def test_an_image_that_cannot_be_read_is_an_error_with_its_path(name, tmp_path, monkeypatch):
    path = tree(name, tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes()[:80])
    data = open_dataset(name, tmp_path, "all" if name == "awa2" else None)
    row = next(n for n, key in enumerate(data.ids) if str(path).endswith(key))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} cannot be read as an image"):
        data.load(row)


@pytest.mark.parametrize("name", TREES)
def test_the_fingerprint_follows_the_files_and_the_split(name, tmp_path, monkeypatch):
    path = tree(name, tmp_path, monkeypatch)
    splits = READERS[name].splits
    before = {open_dataset(name, tmp_path, split).fingerprint for split in splits}
    assert len(before) == len(splits)
    whole = "all" if "all" in splits else None  # awa2's test part may not hold the file that is changed
    last = open_dataset(name, tmp_path, whole).fingerprint
    assert last in before
    path.write_bytes(path.read_bytes() + b" ")
    assert open_dataset(name, tmp_path, whole).fingerprint != last


@pytest.mark.parametrize("name, file", [(name, file) for name in TREES for file in READERS[name].layout.files])
def test_without_one_of_its_files_a_set_is_incomplete_and_says_which(name, file, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    folder = READERS[name].layout.folder(tmp_path)
    absent = file.split("|")[0]
    for path in folder.glob(absent):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if len(READERS[name].layout.files) == 1:
        said = rf"{name} is not at {re.escape(str(tmp_path))}\. Fetch"
    else:
        said = rf"{name} at .* is incomplete: no {re.escape(file)}\. Fetch"
    assert state(name, tmp_path).startswith("incomplete: no ")
    with pytest.raises(UserError, match=said):
        open_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["awa2", "cub"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00", b"one two three\n", b"1\n"])
def test_a_text_file_that_is_empty_or_something_else_is_an_error_with_its_path(name, content, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    folder = READERS[name].layout.folder(tmp_path)
    texts = [f.split("|")[0] for f in READERS[name].layout.files if f.endswith(".txt")]
    assert len(texts) > 2
    for file in texts:
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(folder / file))):
            open_dataset(name, tmp_path)
        (folder / file).write_bytes(kept)
    open_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["cub", "flowers102", "food101"])
def test_images_that_are_listed_but_absent_are_counted_and_the_first_is_named(name, tmp_path, monkeypatch):
    path = tree(name, tmp_path, monkeypatch)
    path.unlink()
    with pytest.raises(UserError, match=rf"1 of the 3 images that .* lists are absent, first {re.escape(str(path))}"):
        open_dataset(name, tmp_path)


# -- the split we make ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT_BY_US)
def test_our_parts_are_disjoint_cover_everything_and_say_what_they_are(name, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    train, test = (open_dataset(name, tmp_path, part) for part in ("train", "test"))
    everything = sorted(p for p in tmp_path.rglob("*.jpg"))
    assert len(train) + len(test) == len(everything) == len({*train.ids, *test.ids})
    assert len(test) == max(1, round(len(everything) / 10))
    assert (train.label, test.label) == (f"{name}/train-90pct-seed0", f"{name}/test-10pct-seed0")
    assert "tenth" in train.note and "seed 0" in test.note
    assert (train.part, test.part) == ("train", "test")


def test_the_whole_of_awa2_is_no_split_of_ours(tmp_path):
    awa2_tree(tmp_path)
    data = open_dataset("awa2", tmp_path, "all")
    assert held_out(data) is None and held_out(open_dataset("awa2", tmp_path)) == "train"
    assert (data.label, data.note, len(data)) == ("awa2/all", "", 12)


def test_the_split_is_the_same_on_every_machine():
    """The rows below were worked out once, from SHA-256 alone; they must never change."""
    ids = [f"River/River_{n}.jpg" for n in range(40)]
    by_hand = sorted(ids, key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())[:4]
    assert [ids[row] for row in hash_split.split_rows(ids, "test")] == sorted(by_hand, key=ids.index)
    assert hash_split.split_rows(ids, "test") == [1, 17, 30, 38]


@given(st.sets(st.text("abc/.", min_size=1, max_size=6), min_size=1, max_size=60), st.randoms(), st.integers(0, 3))
def test_the_split_does_not_depend_on_the_order_of_the_images(ids, shuffler, seed):
    ids = sorted(ids)
    shuffled = ids[:]
    shuffler.shuffle(shuffled)
    parts = {part: {ids[row] for row in hash_split.split_rows(ids, part, seed)} for part in ("train", "test", "all")}
    assert parts == {p: {shuffled[row] for row in hash_split.split_rows(shuffled, p, seed)} for p in parts}
    assert parts["train"] | parts["test"] == parts["all"] == set(ids) and not parts["train"] & parts["test"]
    assert parts["test"] and abs(len(parts["test"]) - len(ids) / 10) <= max(0.5, 1 - len(ids) / 10)


# -- AwA2 ----------------------------------------------------------------------------------------------


def known_of_awa2(root):
    data = open_dataset("awa2", root, "all")
    question = data.questions[0]
    answers = {key: question.classes[k] for key, k in zip(data.ids, question.target)}
    return question.graded, answers


def test_awa2_says_by_name_what_each_animal_has(tmp_path):
    awa2_tree(tmp_path)
    graded, answers = known_of_awa2(tmp_path)
    assert graded == {
        "black": {"antelope": 0, "grizzly bear": 0, "Persian cat": 1},
        "big": {"antelope": 0, "grizzly bear": 1, "Persian cat": 0},
        "fast": {"antelope": 1, "grizzly bear": 0, "Persian cat": 0},
    }
    assert answers["grizzly+bear/grizzly+bear_10002.jpg"] == "grizzly bear" and len(answers) == 12
    data = open_dataset("awa2", tmp_path, "all")
    assert data.load(data.ids.index("antelope/antelope_10005.jpg")).getpixel((2, 2))[0] == pytest.approx(160, abs=3)


@pytest.mark.parametrize("numbers", [(1, 2, 3), (2, 3, 1), (3, 2, 1), (1, 3, 2)])
@pytest.mark.parametrize("predicates", [("black", "big", "fast"), ("fast", "black", "big")])
def test_classes_and_predicates_in_another_order_change_nothing(tmp_path, numbers, predicates):
    awa2_tree(tmp_path / "one")
    renumbered = {name: (n, *AWA2[name][1:]) for n, name in zip(numbers, AWA2)}
    awa2_tree(tmp_path / "two", renumbered, predicates)
    assert known_of_awa2(tmp_path / "one") == known_of_awa2(tmp_path / "two")


def test_the_number_says_which_row_is_a_class_s_not_the_line(tmp_path):
    folder = awa2_tree(tmp_path)
    before = known_of_awa2(tmp_path)
    for file in ("classes.txt", "predicates.txt"):
        lines = (folder / file).read_text().splitlines(True)
        write(folder / file, "".join(lines[::-1]))
    assert known_of_awa2(tmp_path) == before


def test_permuting_the_rows_of_the_matrix_alone_does_change_what_is_said(tmp_path):
    """So the tests above would see a reader that joins by position."""
    folder = awa2_tree(tmp_path)
    before = read_predicates(folder)
    rows = (folder / "predicate-matrix-binary.txt").read_text().splitlines(True)
    write(folder / "predicate-matrix-binary.txt", "".join(rows[::-1]))
    assert read_predicates(folder) != before


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("predicate-matrix-binary.txt", "0 1 0\n0 0 1\n", r"binary\.txt has 2 lines; .*classes\.txt has 3 names"),
        ("predicate-matrix-binary.txt", "0 1\n0 0\n1 1\n", r"line 1 has 2 numbers; .*predicates\.txt has 3 names"),
        ("predicate-matrix-binary.txt", "0 1 0\n0 0 1\n1 0\n", r"line 3 has 2 numbers"),
        ("predicate-matrix-binary.txt", "0 1 0\n0 x 1\n1 0 0\n", r"line 2: could not convert"),
        ("predicate-matrix-binary.txt", "0 1 0\n0 2 1\n1 0 0\n", r"line 2: 2 is not between 0 and 1"),
        ("predicate-matrix-binary.txt", "0 1 0\n0 nan 1\n1 0 0\n", r"line 2: nan is not between"),
        ("predicate-matrix-binary.txt", "0 1 0\n0 0.5 1\n1 0 0\n", r"antelope, big is 0\.5, neither 0 nor 1"),
        ("classes.txt", "1 grizzly+bear\n2 antelope\n", r"binary\.txt has 3 lines; .*classes\.txt has 2 names"),
        ("classes.txt", "1 grizzly+bear\n2 antelope\n4 persian+cat\n", r"classes\.txt has 3 names but none with .* 3"),
        ("classes.txt", "1 grizzly+bear\n2 antelope\n2 persian+cat\n", r"line 3: 2 stands already in line 2"),
        ("classes.txt", "1 grizzly+bear\n2 antelope\n3 antelope\n", r"line 3: antelope stands already in line 2"),
        ("classes.txt", "1 grizzly+bear\n2 antelope\n3 ox\n", r"persian\+cat is a folder of images, but .* no class"),
        ("predicates.txt", "1 black\n2 big\n3 big\n", r"predicates\.txt line 3: big stands already in line 2"),
        ("predicates.txt", "1 black\n2\n3 big\n", r"predicates\.txt line 2: expected a number and a name, found '2'"),
    ],
)
def test_files_of_awa2_that_do_not_fit_are_an_error_with_file_and_line(tmp_path, file, text, said):
    write(awa2_tree(tmp_path) / file, text)
    with pytest.raises(UserError, match=said):
        open_dataset("awa2", tmp_path)


def test_a_class_of_awa2_without_images_or_without_a_name_is_an_error(tmp_path):
    folder = awa2_tree(tmp_path)
    shutil.rmtree(folder / "JPEGImages" / "antelope")
    with pytest.raises(UserError, match=r"classes\.txt line 2 names antelope, but .*antelope holds no images"):
        open_dataset("awa2", tmp_path)
    (folder / "JPEGImages" / "antelope").mkdir()
    write(folder / "JPEGImages" / "antelope" / "notes.txt", "no image")
    with pytest.raises(UserError, match="holds no images"):
        open_dataset("awa2", tmp_path)
    awa2_tree(tmp_path / "other", {"unicorn": (1, {"black": 0, "big": 1, "fast": 1}, 2)})
    with pytest.raises(UserError, match=r"awa2\.yaml has no name for 'unicorn'"):
        open_dataset("awa2", tmp_path / "other")


# -- CUB -----------------------------------------------------------------------------------------------


def test_cub_is_read_by_its_official_split_with_what_people_saw(tmp_path):
    cub_tree(tmp_path)
    train, test = open_dataset("cub", tmp_path, "train"), open_dataset("cub", tmp_path)
    assert (train.label, test.label, len(train), len(test)) == ("cub/train", "cub/test", 3, 3)
    assert not set(train.ids) & set(test.ids)
    (question,) = test.questions
    assert question.classes == ("black-footed albatross", "Laysan albatross", "Brewer's blackbird")
    answers = {int(key.split("_")[-2]): question.classes[k] for key, k in zip(test.ids, question.target)}
    assert answers == {2: "black-footed albatross", 3: "Laysan albatross", 5: "Brewer's blackbird"}
    assert question.graded == {
        "has_bill_shape::dagger": {
            "black-footed albatross": 0.125, "Laysan albatross": 0.0, "Brewer's blackbird": 1.0,
        },
        "has_size::small_(5_-_9_in)": {
            "black-footed albatross": 0.5, "Laysan albatross": 0.25, "Brewer's blackbird": 0.0,
        },
    }  # fmt: skip
    for row, key in enumerate(test.ids):
        assert test.load(row).getpixel((2, 2))[0] == pytest.approx(40 * int(key.split("_")[-2]), abs=3)


@pytest.mark.parametrize("seed", range(4))
def test_lines_in_another_order_change_nothing(tmp_path, seed):
    cub_tree(tmp_path / "one"), cub_tree(tmp_path / "two", seed)
    for part in ("train", "test"):
        one, two = (open_dataset("cub", tmp_path / name, part) for name in ("one", "two"))
        assert one.ids == two.ids and one.questions[0].graded == two.questions[0].graded
        assert one.questions[0].target.tolist() == two.questions[0].target.tolist()


@pytest.mark.parametrize("place", ["attributes/attributes.txt", "attributes.txt", "../attributes.txt"])
def test_the_names_of_the_attributes_are_found_where_people_have_them(tmp_path, place):
    cub_tree(tmp_path, attributes=place)
    assert (tmp_path / "CUB_200_2011" / place).is_file() and state("cub", tmp_path) == "found"
    assert open_dataset("cub", tmp_path).questions[0].graded.keys() == SEEN.keys()


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("images.txt", "3 002", "7 002", r"images\.txt line 3 has the number 7, which is not in .*class_labels\.txt"),
        ("image_class_labels.txt", "6 2\n", "", r"images\.txt line 6 has the number 6, which is not in .*labels\.txt"),
        ("image_class_labels.txt", "6 2\n", "6 2\n8 2\n", r"labels\.txt line 7 has the number 8, .* in .*images\.t"),
        ("train_test_split.txt", "2 0\n", "", r"images\.txt line 2 has the number 2, .* in .*train_test_split\.txt"),
        ("train_test_split.txt", "2 0\n", "2 yes\n", r"train_test_split\.txt line 2: 'yes' is neither 0 nor 1"),
        ("image_class_labels.txt", "3 2\n", "3 4\n", r"labels\.txt line 3: 4 is no number of .*classes\.txt"),
        ("image_class_labels.txt", "3 2\n", "3 1\n", r"images\.txt line 3 puts 002\.\S+ into another .* line 3"),
        ("classes.txt", "2 002.Laysan", "2 002.Lazy", r"images\.txt line 3 puts 002\.Laysan"),
        ("classes.txt", "3 009", "4 009", r"classes\.txt has 3 names but none with the number 3"),
        ("classes.txt", "bird\n", "bird\n4 013.Bobolink\n", r"classes\.txt line 4: 013\.Bobolink has no images in"),
        ("images.txt", "Albatross_0002_796109", "Albatross_0001_796110", r"line 2: 001\.\S+ stands already in line 1"),
        ("attributes/attributes.txt", "2 has_size::small_(5_-_9_in)\n", "", r"line 1 has 2 numbers; .*\.txt has 1 n"),
        ("attributes/attributes.txt", "1 has", "2 has", r"attributes\.txt line 2: 2 stands already in line 1"),
        ("attributes/class_attribute_labels_continuous.txt", "100.0", "100.1", r"line 3: 100\.1 is not between"),
        ("attributes/class_attribute_labels_continuous.txt", "\n100.000000", " 5\n5", r"line 2 has 3 numbers"),
    ],
)  # fmt: skip
def test_files_of_cub_that_do_not_fit_are_an_error_with_file_and_line(tmp_path, file, old, new, said):
    path = cub_tree(tmp_path) / file
    text = path.read_text()
    assert text.count(old) == 1
    write(path, text.replace(old, new))
    with pytest.raises(UserError, match=said):
        open_dataset("cub", tmp_path)


def test_a_part_of_cub_without_images_is_an_error(tmp_path):
    folder = cub_tree(tmp_path)
    write(folder / "train_test_split.txt", "".join(f"{image} 1\n" for image, _, _ in BIRDS))
    with pytest.raises(UserError, match=r"train_test_split\.txt puts no image into test"):
        open_dataset("cub", tmp_path)


# -- EuroSAT and SUN397 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eurosat", "sun397"])
def test_a_class_is_that_of_the_folder(name, tmp_path, monkeypatch):
    tree(name, tmp_path, monkeypatch)
    for part in ("train", "test"):
        data = open_dataset(name, tmp_path, part)
        (question,) = data.questions
        own = [key.rpartition("/")[0] for key in data.ids]
        prefix = "/" if name == "sun397" else ""
        assert [question.classes[k] for k in question.target] == [class_names(name).said[prefix + o] for o in own]
    assert "East Asian temple" in question.classes if name == "sun397" else "sea or lake" in question.classes


def test_eurosat_is_found_where_torchvision_puts_it(tmp_path):
    eurosat_tree(tmp_path / "eurosat")
    assert len(open_dataset("eurosat", tmp_path, "train")) == 27


def test_what_does_not_belong_to_eurosat_is_an_error(tmp_path):
    folder = eurosat_tree(tmp_path)
    (folder / "Forest").mkdir()
    with pytest.raises(UserError, match=r"no valid file for the classes Forest.*Unpack"):
        open_dataset("eurosat", tmp_path)
    picture(folder / "Forest" / "Forest_1.jpg")
    picture(folder / "Glacier" / "Glacier_1.jpg")
    with pytest.raises(UserError, match=r"eurosat\.yaml has no name for 'Glacier'"):
        open_dataset("eurosat", tmp_path)


@pytest.mark.parametrize(
    "classes, said",
    [
        ("/a/abbey\n/c/casino/indoor\n", r"has images of 'temple/east_asia', which is no class of .*ClassName\.txt"),
        ("/a/abbey\n/c/casino/indoor\n/t/temple/east_asia\n/t/tower\n", r"ClassName\.txt line 4: tower has no images"),
        ("/a/abbey\n\n/c/casino/indoor\n/t/temple/east_asia\n", r"ClassName\.txt line 2: a blank line has no images"),
        ("", r"has images of .*, which is no class of"),
    ],
)
def test_class_names_of_sun397_that_do_not_fit_are_an_error(tmp_path, classes, said):
    write(sun397_tree(tmp_path) / "ClassName.txt", classes)
    with pytest.raises(UserError, match=said):
        open_dataset("sun397", tmp_path)


def test_a_list_of_classes_that_is_no_text_is_an_error(tmp_path):
    (sun397_tree(tmp_path) / "ClassName.txt").write_bytes(b"/a/abbey\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"ClassName\.txt is no text"):
        open_dataset("sun397", tmp_path)


def test_a_renamed_folder_says_what_it_must_be_called(tmp_path):
    sun397_tree(tmp_path).rename(tmp_path / "sun")
    with pytest.raises(UserError, match=r"sun must be called SUN397"):
        open_dataset("sun397", tmp_path / "sun")


# -- Flowers and food ------------------------------------------------------------------------------------


def test_flowers_have_their_official_splits_and_names_by_label(tmp_path, monkeypatch):
    flowers102_tree(tmp_path, monkeypatch)
    parts = {part: open_dataset("flowers102", tmp_path, part) for part in ("train", "val", "test")}
    assert {part: data.ids for part, data in parts.items()} == {
        "train": ["jpg/image_00004.jpg", "jpg/image_00002.jpg"],
        "val": ["jpg/image_00002.jpg", "jpg/image_00004.jpg"],
        "test": ["jpg/image_00005.jpg", "jpg/image_00001.jpg", "jpg/image_00003.jpg"],
    }
    (question,) = parts["test"].questions
    assert [question.classes[k] for k in question.target] == ["Canterbury bells", "passion flower", "blackberry lily"]
    assert parts["test"].load(0).getpixel((2, 2))[0] == pytest.approx(100, abs=3)


@pytest.mark.parametrize("file", ["setid.mat", "imagelabels.mat"])
def test_a_damaged_mat_file_is_an_error(tmp_path, monkeypatch, file):
    path = flowers102_tree(tmp_path, monkeypatch) / file
    for content in (path.read_bytes()[:-20], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file}.* is damaged: its checksum is wrong"):
            open_dataset("flowers102", tmp_path)


def test_flowers_without_a_label_or_with_one_too_many_are_an_error(tmp_path, monkeypatch):
    flowers102_tree(tmp_path / "a", monkeypatch, tstid=(9, 1))
    with pytest.raises(UserError, match=r"setid\.mat puts image 9 into test, but .*imagelabels\.mat has no label"):
        open_dataset("flowers102", tmp_path / "a")
    flowers102_tree(tmp_path / "b", monkeypatch, labels=(103, 1, 2, 3, 4))
    with pytest.raises(UserError, match=r"imagelabels\.mat has the label 103; there are 102"):
        open_dataset("flowers102", tmp_path / "b")


def test_food_has_its_official_split(tmp_path):
    food101_tree(tmp_path)
    train, test = open_dataset("food101", tmp_path, "train"), open_dataset("food101", tmp_path)
    assert sorted(train.ids) == ["images/cup_cakes/7.jpg", "images/pizza/11.jpg", "images/pizza/5.jpg"]
    (question,) = test.questions
    answers = {key: question.classes[k] for key, k in zip(test.ids, question.target)}
    assert answers == {
        "images/pizza/2.jpg": "pizza", "images/cup_cakes/1.jpg": "cupcakes", "images/cup_cakes/9.jpg": "cupcakes",
    }  # fmt: skip


@pytest.mark.parametrize(
    "part, content, said",
    [
        ("test", '{"pizza": ["pizza/2"', r"test\.json is not JSON"),
        ("test", "[]", r"test\.json must say for each class"),
        ("test", '{"pizza": [], "cup_cakes": ["cup_cakes/1"]}', r"test\.json must say for each class"),
        ("test", '{"pizza": ["cup_cakes/2"], "cup_cakes": ["cup_cakes/1"]}', r"counts cup_cakes/2 among .* of pizza"),
        ("test", '{"pizza": ["pizza/2"]}', r"cup_cakes is in train\.json or test\.json alone"),
        ("train", '{"pizza": ["pizza/2"], "cup_cakes": ["cup_cakes/7"]}', r"pizza/2 is in train\.json and in test"),
        ("test", "\xff", r"test\.json is not JSON"),
    ],
)
def test_lists_of_food_that_do_not_fit_are_an_error(tmp_path, part, content, said):
    path = food101_tree(tmp_path) / "meta" / f"{part}.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=said):
        open_dataset("food101", tmp_path)


# -- WebDatasets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nshards", [True, False])
def test_a_webdataset_is_read_where_it_is_in_the_order_of_its_shards(tmp_path, nshards):
    root = webdataset_tree(tmp_path / "wds_pets", nshards)
    data = open_dataset("webdataset", root)
    (question,) = data.questions
    assert (data.label, data.part, len(data)) == ("webdataset/wds_pets-test", "test", 22)
    assert question.classes == ("cat", "hot dog", "cow") and question.several == ("a photo of a {}.", "the {}")
    assert question.target.tolist() == [n % 3 for n in range(11) for _ in (0, 1)]
    assert [data.load(2 * n + 1).getpixel((2, 2))[0] for n in range(11)] == pytest.approx(
        [20 * n for n in range(11)], abs=3
    )
    assert len(open_dataset("webdataset", root, "train")) == 1
    assert data.fingerprint == open_dataset("webdataset", root).fingerprint
    shard(root / "test" / "3.tar", {"a.jpg": jpeg(1), "a.cls": "0", "b.jpg": jpeg(1), "b.cls": "0"})
    assert data.fingerprint != open_dataset("webdataset", root).fingerprint


@pytest.mark.filterwarnings("ignore:.*shardshuffle")  # webdataset's, about CLIP_benchmark
def test_a_webdataset_reads_what_clip_benchmark_reads(tmp_path):
    """The same images and labels, in the same order, from shards that its own library wrote."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    wds = pytest.importorskip("webdataset")
    write(tmp_path / "classnames.txt", "cat\ndog\n"), write(tmp_path / "test" / "nshards.txt", "2\n")
    write(tmp_path / "zeroshot_classification_templates.txt", "a {c}\n")
    with wds.ShardWriter(str(tmp_path / "test" / "%d.tar"), maxcount=3, verbose=0) as sink:
        for n in range(5):
            sink.write({"__key__": f"s{n:07}", "png": jpeg(9 * n, "png"), "cls": n % 2})
    theirs = list(builder.build_wds_dataset("any", np.asarray, "test", str(tmp_path)))
    data = open_dataset("webdataset", tmp_path)
    assert [int(label) for _, label in theirs] == data.questions[0].target.tolist()
    assert all(np.array_equal(image, np.asarray(data.load(n))) for n, (image, _) in enumerate(theirs))


def test_what_a_webdataset_holds_besides_is_passed_over(tmp_path):
    root = webdataset_tree(tmp_path)
    members = {
        "__meta__": "x", "deep/a.b/s1.JPG": jpeg(5), "deep/a.b/s1.Cls": "1", "deep/a.b/s1.json": "{}",
        "note": "no ending", "lonely.json": "{}", ".hidden.jpg": "no image",
    }  # fmt: skip
    shard(root / "train" / "0.tar", members)
    shard(root / "train" / "1.tar", {"x.jpg": "beyond nshards.txt, as CLIP_benchmark has it"})
    data = open_dataset("webdataset", root, "train")
    assert data.ids == ["0/deep/a.b/s1.JPG"] and data.questions[0].target.tolist() == [1]


def test_a_webdataset_for_retrieval_has_captions(tmp_path):
    root = webdataset_tree(tmp_path)
    write(root / "dataset_type.txt", "retrieval\n")
    shard(root / "train" / "0.tar", {"s0.jpg": jpeg(5), "s0.txt": "A  dog.\n\nOne dog\n"})
    data = open_dataset("webdataset", root, "train")
    assert data.captions == [("A dog.", "One dog")] and data.questions == ()
    shard(root / "train" / "0.tar", {"s0.jpg": jpeg(5), "s0.txt": "\n"})
    with pytest.raises(UserError, match=r"0\.tar: s0\.jpg has no caption"):
        open_dataset("webdataset", root, "train")


@pytest.mark.parametrize("keep", [0, 300, 512, 700, 1100])
def test_a_shard_that_is_cut_short_is_an_error_with_its_path(tmp_path, keep):
    root = webdataset_tree(tmp_path)
    path = root / "test" / "4.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"test/4\.tar (is cut short or no tar file|lacks)"):
        open_dataset("webdataset", root)


@pytest.mark.parametrize(
    "members, said",
    [
        ({"s1.jpg": jpeg(5)}, r"0\.tar lacks s1\.cls; it has s1\.jpg"),
        ({"s1.cls": "1"}, r"0\.tar lacks the image of s1 \(webp, png, jpg, jpeg\); it has s1\.cls"),
        ({"s1.jpg": jpeg(5), "s1.cls": "3"}, r"0\.tar: s1\.jpg has the label '3'; .*classnames\.txt names 0 to 2"),
        ({"s1.jpg": jpeg(5), "s1.cls": "cat"}, r"has the label 'cat'"),
        ({"s1.jpg": jpeg(5), "s1.cls": "-1"}, r"has the label '-1'"),
        ({"s1.jpg": jpeg(5), "s1.cls": b"\xff"}, r"0\.tar is cut short or no tar file"),
        ({"note": "x"}, r"hold no images"),
    ],
)
def test_samples_that_are_not_whole_are_an_error(tmp_path, members, said):
    root = webdataset_tree(tmp_path)
    shard(root / "train" / "0.tar", members)
    with pytest.raises(UserError, match=said):
        open_dataset("webdataset", root, "train")


def test_a_member_that_comes_twice_is_an_error(tmp_path):
    root = webdataset_tree(tmp_path)
    with tarfile.open(root / "train" / "0.tar", "w") as tar:
        for content in (jpeg(1), jpeg(2)):
            add(tar, "s1.jpg", content)
    with pytest.raises(UserError, match=r"0\.tar has two members s1\.jpg"):
        open_dataset("webdataset", root, "train")


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("classnames.txt", None, r"no class names at .*classnames\.txt"),
        ("classnames.txt", "cat\n\ncow\n", r"classnames\.txt line 2 is blank"),
        ("classnames.txt", "", r"classnames\.txt line 1 is blank"),
        (
            "zeroshot_classification_templates.txt",
            "a {c}\na photo\n",
            r"templates\.txt line 2: a prompt needs {c} once",
        ),
        ("zeroshot_classification_templates.txt", "a {c} of {d}\n", r"line 1: a prompt needs"),
        ("dataset_type.txt", "multilabel\n", r"dataset_type\.txt is 'multilabel'\. .*classification, retrieval"),
        ("test/nshards.txt", "many\n", r"nshards\.txt must hold the number of shards, found 'many'"),
        ("test/nshards.txt", "0\n", r"nshards\.txt must hold the number"),
        ("test/nshards.txt", "13\n", r"2 of the 13 shards that .*nshards\.txt counts are absent, first 11\.tar"),
    ],
)
def test_files_beside_the_shards_that_do_not_fit_are_an_error(tmp_path, file, content, said):
    root = webdataset_tree(tmp_path)
    (root / file).unlink(missing_ok=True)
    if content is not None:
        write(root / file, content)
    with pytest.raises(UserError, match=said):
        open_dataset("webdataset", root)


def test_a_webdataset_needs_no_prompts_of_its_own_but_the_split_asked_for(tmp_path):
    root = webdataset_tree(tmp_path)
    (root / "zeroshot_classification_templates.txt").unlink()
    assert open_dataset("webdataset", root).questions[0].several == ()
    with pytest.raises(UserError, match=r"no split 'val'; splits found there: test, train"):
        open_dataset("webdataset", root, "val")


def test_an_image_in_a_shard_that_cannot_be_read_is_an_error_with_shard_and_name(tmp_path):
    root = webdataset_tree(tmp_path)
    shard(root / "train" / "0.tar", {"s1.jpg": jpeg(5)[:70], "s1.cls": "0"})
    data = open_dataset("webdataset", root, "train")
    with pytest.raises(UserError, match=r"0\.tar: s1\.jpg cannot be read as an image"):
        data.load(0)
    (root / "train" / "0.tar").unlink()
    with pytest.raises(UserError, match=r"no file at .*0\.tar"):
        data.load(0)


# -- class names -------------------------------------------------------------------------------------------

NAMED = {"awa2": 50, "cifar10": 10, "cifar100": 100, "cub": 200, "eurosat": 10, "flowers102": 102, "food101": 101,
         "sun397": 397}  # fmt: skip


@pytest.mark.parametrize("name, count", NAMED.items())
def test_every_class_has_one_name_that_people_say(name, count):
    names = class_names(name)
    said = list(names.said.values())
    assert len(said) == len({s.lower() for s in said}) == count
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z' -]*[A-Za-z]", s) and "  " not in s for s in said)
    assert names.source.endswith(".") and len(names.source) > 40
    assert 4 <= len(names.several) <= 8 and len(set(names.several)) == len(names.several)
    assert all(template.count("{}") == 1 for template in names.several)


def test_the_names_are_of_the_classes_the_sets_have():
    assert list(class_names("flowers102").said) == torchvision.datasets.Flowers102.classes
    said = {name: class_names(name).said for name in NAMED}
    assert all(re.fullmatch(r"\d{3}\.\w+", own) for own in said["cub"])
    assert [int(own[:3]) for own in said["cub"]] == list(range(1, 201))
    assert all(own[1] == own[3] and own.startswith("/") for own in said["sun397"])
    assert said["sun397"]["/c/casino/indoor"] == "indoor casino"
    assert said["cub"]["001.Black_footed_Albatross"] == "black-footed albatross"
    assert said["awa2"]["grizzly+bear"] == "grizzly bear" and said["eurosat"]["AnnualCrop"] == "annual crop land"


@pytest.mark.parametrize("theirs, ours, order", [("flowers", "flowers102", list), ("eurosat", "eurosat", sorted)])
def test_the_names_are_as_many_as_clip_benchmark_has_and_most_say_the_same(theirs, ours, order):
    package = pytest.importorskip("clip_benchmark.datasets")
    path = Path(package.__file__).parent / "en_classnames.json"
    listed = json.loads(path.read_text())[theirs]
    names = class_names(ours).say(order(class_names(ours).said))
    words = [set(re.findall("[a-z]+", a.lower())) & set(re.findall("[a-z]+", b.lower())) for a, b in zip(names, listed)]
    assert len(names) == len(listed) and sum(map(bool, words)) >= 0.95 * len(names) - 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("source: x\ntemplates: [a {}]\n", "needs source, templates and classes"),
        ("- 1\n", "needs source, templates and classes"),
        ("source: [x\n", "needs source, templates and classes"),
        ("source: x\ntemplates: [a photo]\nclasses: {a: b}\n", "'a photo' needs exactly one {}"),
        ('source: x\ntemplates: ["a {}"]\nclasses: {no: b}\n', "'False: b' is no pair of names"),
    ],
)
def test_a_file_of_names_that_cannot_be_used_is_an_error(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr("pc_clip.data.classnames.FOLDER", tmp_path)
    with pytest.raises(UserError, match=said):
        class_names(write(tmp_path / "odd.yaml", text).stem)
    with pytest.raises(UserError, match=r"no class names at .*absent\.yaml"):
        class_names("absent")


# -- downloads ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A web server on this machine for the folder `www`; `asked` are the files it was asked for."""
    folder, asked = tmp_path / "www", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path[1:])
            super().do_GET()

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{served.server_address[1]}", asked
    served.shutdown()
    served.server_close()


def pack(source, path):
    """All that is in a folder, as a .zip or a .tgz."""
    shutil.make_archive(str(path.parent / path.stem), "zip" if path.suffix == ".zip" else "gztar", source)
    made = path.parent / f"{path.stem}{'.zip' if path.suffix == '.zip' else '.tar.gz'}"
    made.rename(path) if made != path else None
    shutil.rmtree(source)


def md5(path):
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("name, file", [("awa2", "AwA2-data.zip"), ("cub", "CUB_200_2011.tgz"), ("sun397", "SUN.tgz")])
def test_a_set_is_downloaded_once_unpacked_and_opened(name, file, tmp_path, server, monkeypatch):
    folder, address, asked = server
    tree(name, tmp_path / "made", monkeypatch)
    pack(tmp_path / "made", folder / file)
    archive = Archive(f"{address}/{file}", ARCHIVES[name][0].makes, md5(folder / file), (folder / file).stat().st_size)
    monkeypatch.setitem(ARCHIVES, name, (archive,))
    root = tmp_path / "data" / name
    assert state(name, root) == "not found"
    assert download(name, root) == root == download(name, root)
    assert state(name, root) == "found" and open_dataset(name, root).ids
    assert asked == [file]
    assert not [p for p in root.rglob("*") if p.suffix in (".zip", ".tgz", ".partial")]  # nothing is left over


def test_flowers_are_downloaded_with_the_files_that_are_not_packed(tmp_path, server, monkeypatch):
    folder, address, asked = server
    made = flowers102_tree(tmp_path / "made", monkeypatch)
    for file in ("setid.mat", "imagelabels.mat"):
        shutil.move(made / file, folder / file)
    pack(made, folder / "102flowers.tgz")
    served = tuple(Archive(f"{address}/{a.name}", a.makes, md5(folder / a.name)) for a in ARCHIVES["flowers102"])
    monkeypatch.setitem(ARCHIVES, "flowers102", served)
    listing.main(["--download", "flowers102"])
    assert sorted(asked) == ["102flowers.tgz", "imagelabels.mat", "setid.mat"]
    assert len(open_dataset("flowers102")) == 3  # from data/flowers102, where the list says


def test_mnist_is_downloaded_and_read_packed_as_it_is(tmp_path, server, monkeypatch):
    folder, address, asked = server
    for archive in ARCHIVES["mnist"]:
        images = "images" in archive.name
        content = bytes((0, 0, 8, 3 if images else 1)) + (1).to_bytes(4, "big")
        content += ((2).to_bytes(4, "big") * 2 + bytes((1, 2, 3, 4))) if images else b"\5"
        (folder / archive.name).write_bytes(gzip.compress(content))
    served = tuple(Archive(f"{address}/{a.name}", a.makes, md5(folder / a.name)) for a in ARCHIVES["mnist"])
    monkeypatch.setitem(ARCHIVES, "mnist", served)
    assert download("mnist") == download("mnist") == Path("data/mnist")
    assert sorted(asked) == sorted(a.name for a in served) and state("mnist") == "found"
    data = open_dataset("mnist")
    assert data.questions[0].target.tolist() == [5] and data.load(0).getpixel((1, 1)) == (4, 4, 4)


def test_a_wrong_checksum_unpacks_nothing(tmp_path, server, monkeypatch):
    folder, address, _ = server
    awa2_tree(tmp_path / "made")
    pack(tmp_path / "made", folder / "a.zip")
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/a.zip", "Animals_with_Attributes2", f"md5:{'0' * 32}"),))
    with pytest.raises(UserError, match="md5"):
        download("awa2", tmp_path / "data")
    assert not (tmp_path / "data" / "Animals_with_Attributes2").exists()


@pytest.mark.parametrize("file", ["a.zip", "a.tgz"])
def test_a_damaged_archive_leaves_nothing_and_is_fetched_again(file, tmp_path, server, monkeypatch):
    folder, address, asked = server
    awa2_tree(tmp_path / "made")
    pack(tmp_path / "made", folder / file)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/{file}", "Animals_with_Attributes2"),))
    with pytest.raises(UserError, match=rf"{file} was damaged .* the same command fetches it again"):
        download("awa2", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    (folder / file).write_bytes(whole)
    download("awa2", tmp_path / "data")
    assert asked == [file, file] and len(open_dataset("awa2", tmp_path / "data", "all")) == 12


def evil(path, name, link=False):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link else 0o100644) << 16
            archive.writestr("good/a.txt", "good")
            archive.writestr(info, "/etc/passwd" if link else "bad")
    else:
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "good/a.txt", "good")
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)


@pytest.mark.parametrize("file", ["a.zip", "a.tgz"])
@pytest.mark.parametrize("name, link", [("../escaped.txt", False), ("good/../../../escaped.txt", False), ("l", True)])
def test_an_archive_that_would_write_elsewhere_is_refused_and_unpacks_nothing(
    file, name, link, tmp_path, server, monkeypatch
):
    folder, address, _ = server
    evil(folder / file, name, link)
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/{file}", "good"),))
    with pytest.raises(UserError, match=rf"{file} is not unpacked: .*not the archive it should be"):
        download("awa2", tmp_path / "data" / "awa2")
    assert not list(tmp_path.rglob("escaped.txt"))
    assert [p.name for p in (tmp_path / "data" / "awa2").iterdir()] == [file]


def test_an_absolute_name_in_a_zip_is_refused(tmp_path, server, monkeypatch):
    folder, address, _ = server
    evil(folder / "a.zip", str(tmp_path / "escaped.txt"))
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/a.zip", "good"),))
    with pytest.raises(UserError, match="lies outside the folder"):
        download("awa2", tmp_path / "data")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_an_incomplete_copy_is_not_overwritten(tmp_path, server, monkeypatch):
    """Neither where it has the archive's own name, nor where only a part of what the archive holds is there."""
    folder, address, asked = server
    awa2_tree(tmp_path / "made")
    pack(tmp_path / "made", folder / "a.zip")
    mine = write(tmp_path / "data" / "Animals_with_Attributes2" / "classes.txt", "mine")
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/a.zip", "Animals_with_Attributes2"),))
    with pytest.raises(UserError, match=r"incomplete: no predicates.*move it away"):
        download("awa2", tmp_path / "data")
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/a.zip", "something_else"),))
    with pytest.raises(UserError, match=r"Animals_with_Attributes2 is there already, but not whole; move it away"):
        download("awa2", tmp_path / "data")
    assert mine.read_text() == "mine" and asked == ["a.zip"]


def test_an_archive_of_something_else_is_an_error(tmp_path, server, monkeypatch):
    folder, address, _ = server
    evil(folder / "a.tgz", "good/b.txt")
    monkeypatch.setitem(ARCHIVES, "awa2", (Archive(f"{address}/a.tgz", "Animals_with_Attributes2"),))
    with pytest.raises(UserError, match=r"a\.tgz does not hold Animals_with_Attributes2"):
        download("awa2", tmp_path / "data")


@pytest.mark.parametrize("name, said", [("folder", "cannot be downloaded. Put"), ("awa1", "Did you mean 'awa2'")])
def test_what_cannot_be_downloaded_is_an_error(name, said):
    with pytest.raises(UserError, match=said):
        download(name)


def test_each_address_leads_to_what_its_reader_looks_for():
    """Checked against torchvision's own constants where it has them; no address is called here."""
    known = torchvision.datasets
    for name, kind in (("cifar10", known.CIFAR10), ("cifar100", known.CIFAR100)):
        (archive,) = ARCHIVES[name]
        assert (archive.url, archive.digest, archive.makes) == (kind.url, f"md5:{kind.tgz_md5}", kind.base_folder)
    for name, url, sum_ in (
        ("sun397", known.SUN397._DATASET_URL, known.SUN397._DATASET_MD5),
        ("food101", known.Food101._URL, known.Food101._MD5),
    ):
        assert (ARCHIVES[name][0].url, ARCHIVES[name][0].digest) == (url, f"md5:{sum_}")
    assert [(a.name, a.digest) for a in ARCHIVES["mnist"]] == [(n, f"md5:{s}") for n, s in known.MNIST.resources]
    assert {a.url.removesuffix(a.name) for a in ARCHIVES["mnist"]} <= set(known.MNIST.mirrors)
    flowers = known.Flowers102
    assert {(a.url, a.digest) for a in ARCHIVES["flowers102"]} == {
        (f"{flowers._download_url_prefix}{file}", f"md5:{sum_}") for file, sum_ in flowers._file_dict.values()
    }
    for name, archives in ARCHIVES.items():
        assert READERS[name].root and f"--download {name}" in READERS[name].fetch
        assert all(archive.makes.split("/")[0] in READERS[name].fetch for archive in archives)
        for archive in archives:
            assert re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}|None", str(archive.digest))
