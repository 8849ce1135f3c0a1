"""Readers of labelled sets, on miniature trees in each set's own layout, whole and damaged; WebDatasets."""

import hashlib
import io
import json
import pickle
import random
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from pc_clip.core.errors import UserError
from pc_clip.core.paths import configs_folder
from pc_clip.data.captions import read_captions
from pc_clip.data.class_names import FOLDER, class_names
from pc_clip.data.classification import SPLIT_BY_US, split_rows
from pc_clip.data.registry import READERS, open_dataset, selection_split
from pc_clip.data.webdataset import find_tars, open_tar
from pc_clip.interface import finetune, generate_diffs
from pc_clip.models.torchvision_compat import torchvision


def picture(path, shade=0):
    """An image whose red says which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path, quality=95)
    return path


def write(path, content):
    """A text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
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


def cifar_tree(root, monkeypatch):
    """Python pickles as they are published, with the checksums torchvision knows changed to theirs."""
    data, folder, sums = torchvision.datasets.CIFAR10, root / "cifar-10-batches-py", {}
    folder.mkdir(parents=True)
    names = list(class_names("cifar10").display_names)[::-1]
    files = {f"data_batch_{n}": {"data": pixels([n, n + 100]), "labels": [n, 0]} for n in range(1, 6)}
    files |= {"test_batch": {"data": pixels([77]), "labels": [9]}, "batches.meta": {"label_names": names}}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for key in ("train_list", "test_list"):
        monkeypatch.setattr(data, key, [[name, sums[name]] for name, _ in getattr(data, key)])
    monkeypatch.setattr(data, "meta", data.meta | {"md5": sums["batches.meta"]})
    return folder


def pixels(values):
    """Rows of 3072 bytes: 1024 of red, of green, of blue. The red of each picture is its value."""
    rows = np.zeros((len(values), 3, 1024), dtype=np.uint8)
    rows[:, 0] = np.array(values)[:, None]
    return rows.reshape(len(values), 3072)


def mnist_tree(root):
    folder = root / "MNIST" / "raw"
    for part, labels in (("train", [3, 1, 3]), ("t10k", [7, 0])):
        images = np.arange(4 * len(labels), dtype=np.uint8).reshape(-1, 2, 2)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    return folder


def write_idx(path, array):
    """MNIST's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())


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


def webdataset_tree(root):
    write(root / "classnames.txt", "cat\nhot dog\ncow\n")
    write(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\n\nthe {c}\n")
    for n in range(11):  # more than ten: 10.tar comes after 9.tar
        ending, kind = (("jpg", "jpeg"), ("png", "png"), ("webp", "webp"))[n % 3]
        sample = {"cls": str(n % 3), ending: jpeg(20 * n, kind)}
        shard(root / "test" / f"{n}.tar", {f"s{2 * n + k:07}.{e}": c for k in (0, 1) for e, c in sample.items()})
    shard(root / "train" / "0.tar", {"s0000000.jpg": jpeg(9), "s0000000.cls": "2"})
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


# -- labelled sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_a_set_opens_by_name_and_its_fingerprint_follows_files_and_split(name, tmp_path, monkeypatch):
    path = tree(name, tmp_path, monkeypatch)
    data, splits = open_dataset(name, tmp_path), READERS[name].splits
    (question,) = data.questions
    assert READERS[name].state(tmp_path) == "found" and data.part == splits[-1]
    assert question.rows.tolist() == list(range(len(data))) and question.target.dtype == np.int64
    assert question.templates == ("This is a photo of a {}.",) and question.several == class_names(name).several
    own = {sentences: own for own, sentences in class_names(name).display_names.items()}
    if name != "flowers102":  # whose files are not in folders
        assert all(own[question.classes[k]].strip("/")[-9:] in key for key, k in zip(data.ids, question.target))
    assert data.load(0).mode == "RGB" and len(set(data.ids)) == len(data)
    assert open_dataset(name, READERS[name].folder(tmp_path)).ids == data.ids  # the archive's folder, named itself
    whole = "all" if "all" in splits else None
    before = {open_dataset(name, tmp_path, split).fingerprint for split in splits}
    path.write_bytes(path.read_bytes()[:80])
    changed = open_dataset(name, tmp_path, whole)
    assert len(before) == len(splits) and changed.fingerprint not in before
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} cannot be read as an image"):
        changed.load(next(n for n, key in enumerate(changed.ids) if str(path).endswith(key)))


def test_without_one_of_its_files_a_set_is_incomplete_and_says_which(tmp_path, monkeypatch):
    for name in TREES:
        for n, file in enumerate(READERS[name].files):
            root = tmp_path / name / str(n)
            tree(name, root, monkeypatch)
            for path in READERS[name].folder(root).glob(file.split("|")[0]):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lone = len(READERS[name].files) == 1
            message = r"is not at .*Fetch" if lone else rf"incomplete: no {re.escape(file)}\. Fetch"
            with pytest.raises(UserError, match=message):
                open_dataset(name, root)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path, monkeypatch):
    for name in ("cub", "flowers102", "food101"):
        path = tree(name, tmp_path, monkeypatch)
        path.unlink()
        with pytest.raises(UserError, match=rf"1 of the 3 pictures named in .* are absent, first .*{path.name}"):
            open_dataset(name, tmp_path)


def test_our_parts_are_disjoint_cover_everything_and_say_what_they_are(tmp_path, monkeypatch):
    for name in SPLIT_BY_US:
        tree(name, tmp_path / name, monkeypatch)
        train, test = (open_dataset(name, tmp_path / name, part) for part in ("train", "test"))
        everything = sorted((tmp_path / name).rglob("*.jpg"))
        assert len(train) + len(test) == len(everything) == len({*train.ids, *test.ids})
        assert len(test) == max(1, round(len(everything) / 10)) and selection_split(test) == "train"
        assert (train.label, test.label) == (f"{name}/train-90pct-seed0", f"{name}/test-10pct-seed0")
        assert "tenth" in train.note and "seed 0" in test.note


def test_the_split_is_the_same_on_every_machine():
    """The rows below were worked out once, from SHA-256 alone; they must never change."""
    assert split_rows([f"River/River_{n}.jpg" for n in range(40)], "test") == [1, 17, 30, 38]


@given(st.sets(st.text("abc/.", min_size=1, max_size=6), min_size=1, max_size=60), st.randoms())
def test_the_split_does_not_depend_on_the_order_of_the_images(ids, shuffler):
    ids = sorted(ids)
    shuffled = ids[:]
    shuffler.shuffle(shuffled)
    parts = {part: {ids[row] for row in split_rows(ids, part)} for part in ("train", "test", "all")}
    assert parts == {part: {shuffled[row] for row in split_rows(shuffled, part)} for part in parts}
    assert parts["train"] | parts["test"] == parts["all"] == set(ids) and not parts["train"] & parts["test"]


def known(name, root, split):
    data = open_dataset(name, root, split)
    question = data.questions[0]
    return question.graded, {key: question.classes[k] for key, k in zip(data.ids, question.target)}


def test_awa2_joins_animals_and_predicates_by_name(tmp_path):
    """Renumbered, and with the lines in another order, all says the same; the rows alone in another order do not."""
    folder = awa2_tree(tmp_path / "one")
    graded, answers = before = known("awa2", tmp_path / "one", "all")
    assert graded["big"] == {"antelope": 0, "grizzly bear": 1, "Persian cat": 0}
    assert answers["grizzly+bear/grizzly+bear_10002.jpg"] == "grizzly bear" and len(answers) == 12
    renumbered = {name: (n, *AWA2[name][1:]) for n, name in zip((2, 3, 1), AWA2)}
    awa2_tree(tmp_path / "two", renumbered, ("fast", "black", "big"))
    assert known("awa2", tmp_path / "two", "all") == before
    for file in ("classes.txt", "predicates.txt", "predicate-matrix-binary.txt"):
        lines = (folder / file).read_text().splitlines(True)
        write(folder / file, "".join(lines[::-1]))
        assert (known("awa2", tmp_path / "one", "all") == before) == (file != "predicate-matrix-binary.txt")


def test_cub_captions_are_written_trained_on_and_split_by_class(tmp_path, tiny, small_runs, monkeypatch):
    """Reed's text_c10/CLASS/IMAGE.txt: the captions' images are the data set's, by name."""
    monkeypatch.chdir(tmp_path)
    cub_tree(Path("data/cub"))
    for image in open_dataset("cub", split="train").ids + open_dataset("cub", split="test").ids:
        text = "".join(f"a bird number {n} of {image[:3]}\n" for n in range(10))
        write(Path("data/cub/text_c10") / Path(image).with_suffix(".txt"), text)
    captions = read_captions("data/cub/text_c10")
    assert {len(texts) for _, texts in captions.values()} == {10} and len(captions) == len(BIRDS)
    write(Path("data/cub/trainvalclasses.txt"), f"{CUB[1]}\n{CUB[2]}\n")
    birds = open_dataset("cub", split="trainvalclasses")
    assert {name.split("/")[0] for name in birds.ids} == {CUB[1], CUB[2]} and len(birds.ids) == 4
    assert len(birds.questions[0].classes) == 2

    written = generate_diffs.main(
        ["--dataset", "cub", "--split", "trainvalclasses", "--captions", "data/cub/text_c10", "--name", "cub"]
    )
    config = configs_folder() / "pc_clip_cub.yaml"
    argv = ["--config", str(config), "--model.name", tiny, "--model.pretrained", "", "--data.differences", str(written)]
    run = finetune.main([*argv, "--train.batch_size", "4", "--train.steps", "2", "--device", "cpu"])
    log = json.loads((run / "environment.json").read_text())
    assert "captions" in log["data"]
    write(Path("data/cub/testclasses.txt"), "999.Dodo\n")
    with pytest.raises(UserError, match="testclasses.txt lists 999.Dodo, which classes.txt does not have"):
        open_dataset("cub", split="testclasses")
    with pytest.raises(UserError, match="holds no captions; a folder of them is CUB's text_c10"):
        read_captions("data/cub/CUB_200_2011/images")


def test_karpathys_splits_of_coco(tmp_path):
    image = {"filepath": "val2014", "sentences": [{"raw": " A dog. "}, {"raw": "One dog"}]}
    images = [image | {"filename": f"COCO_{n}.jpg", "cocoid": n, "split": split} for n, split in
              ((7, "test"), (8, "val"), (9, "test"))]  # fmt: skip
    path = tmp_path / "annotations/dataset_coco.json"
    write(path, json.dumps({"images": images, "dataset": "coco"}))
    for n in (7, 9):
        picture(tmp_path / "val2014" / f"COCO_{n}.jpg", n)
    data = open_dataset("coco", tmp_path, "karpathy_test")
    assert (data.ids, data.captions) == (["7", "9"], [("A dog.", "One dog")] * 2)
    assert list(read_captions(path)) == ["7", "8", "9"]
    with pytest.raises(UserError, match="no images of the split 'restval'"):
        open_dataset("coco", tmp_path, "karpathy_restval")


def test_cub_joins_birds_and_attributes_by_number_and_name(tmp_path):
    cub_tree(tmp_path / "one")
    graded, answers = before = known("cub", tmp_path / "one", "train")
    assert graded["has_size::small_(5_-_9_in)"] == dict(zip(class_names("cub").say(CUB), (0.5, 0.25, 0.0)))
    assert len(answers) == 3 and set(answers.values()) == set(class_names("cub").say(CUB))
    cub_tree(tmp_path / "two", seed=3, attributes="../attributes.txt")
    assert known("cub", tmp_path / "two", "train") == before


def test_files_that_do_not_fit_are_an_error_with_the_file(tmp_path):
    for name, file, old, new, message in [
        ("awa2", "predicate-matrix-binary.txt", "0 1 0\n", "", "has 2 rows, which do not go with the numbers of 3"),
        ("awa2", "predicate-matrix-binary.txt", "0 1 0", "0 1", "cannot be read|are not 0 or 1"),
        ("awa2", "predicate-matrix-binary.txt", "0 1 0", "0 2 0", "values that are not 0 or 1"),
        ("awa2", "classes.txt", "antelope", "grizzly+bear", "has grizzly.bear in two lines"),
        ("awa2", "classes.txt", "antelope", "ox", "images of '(antelope|ox)' are in one alone"),
        ("awa2", "predicates.txt", "       2\tbig", "big", "cannot be read|a number and a name in each line"),
        ("cub", "classes.txt", "1 001", "4 001", "image 1 is 001.*has the label 1"),
        ("cub", "image_class_labels.txt", "1 1", "1 2", "image 1 is 001.*has the label 2"),
        ("cub", "train_test_split.txt", "1 1\n", "", "image 1 is .* nan .0 or 1. in train_test_split"),
        ("cub", "train_test_split.txt", "1 1\n", "1 x\n", "image 1 is .* x .0 or 1. in train_test_split"),
        ("cub", "images.txt", "1 001", "2 001", "has 2 in two lines"),
    ]:
        folder = (awa2_tree if name == "awa2" else cub_tree)(tmp_path)
        assert old in (folder / file).read_text()
        write(folder / file, (folder / file).read_text().replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            open_dataset(name, tmp_path)


def test_a_class_of_sun397_or_eurosat_without_images_is_an_error(tmp_path):
    shutil.rmtree(sun397_tree(tmp_path) / "c")
    with pytest.raises(UserError, match="no images of '/c/casino/indoor'"):
        open_dataset("sun397", tmp_path)
    (eurosat_tree(tmp_path) / "Forest").mkdir()
    with pytest.raises(UserError, match="eurosat at .* Forest"):
        open_dataset("eurosat", tmp_path)


def test_flowers_and_food_have_their_official_splits(tmp_path, monkeypatch):
    folder = flowers102_tree(tmp_path, monkeypatch)
    data = open_dataset("flowers102", tmp_path)
    assert data.ids == [f"jpg/image_{n:05}.jpg" for n in (5, 1, 3)]
    assert data.questions[0].target.tolist() == [2, 76, 101]
    (folder / "setid.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"flowers102 at .* is damaged"):
        open_dataset("flowers102", tmp_path)
    food101_tree(tmp_path)
    data = open_dataset("food101", tmp_path)
    assert {key: data.questions[0].classes[k] for key, k in zip(data.ids, data.questions[0].target)} == {
        "images/pizza/2.jpg": "pizza", "images/cup_cakes/1.jpg": "cupcakes", "images/cup_cakes/9.jpg": "cupcakes",
    }  # fmt: skip


def test_cifar_and_mnist_are_read_as_they_are_published(tmp_path, monkeypatch):
    folder = cifar_tree(tmp_path, monkeypatch)
    train, test = open_dataset("cifar10", tmp_path, "train"), open_dataset("cifar10", tmp_path)
    assert (train.label, len(train), test.label, test.ids) == ("cifar10/train", 10, "cifar10/test", ["0"])
    assert train.questions[0].target.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert train.questions[0].classes == tuple(list(class_names("cifar10").display_names)[::-1])
    assert train.load(3).getpixel((5, 5)) == (102, 0, 0) and train.fingerprint != test.fingerprint
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cifar10 at .* is damaged"):
        open_dataset("cifar10", tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"incomplete: no data_batch_3\. Fetch"):
        open_dataset("cifar10", tmp_path)
    folder = mnist_tree(tmp_path)
    data = open_dataset("mnist", tmp_path)
    question = data.questions[0]
    assert [question.classes[k] for k in question.target] == ["7", "0"] and data.load(1).getpixel((1, 1)) == (7, 7, 7)
    assert question.several == ('a photo of the number: "{}".',)
    (folder / "t10k-labels-idx1-ubyte").write_bytes((folder / "train-labels-idx1-ubyte").read_bytes())
    with pytest.raises(UserError, match="2 images and 3 labels"):
        open_dataset("mnist", tmp_path)


# -- WebDatasets -----------------------------------------------------------------------------------------


def test_a_webdataset_is_read_in_shard_order(tmp_path):
    webdataset_tree(tmp_path)
    data = open_dataset("webdataset", tmp_path)
    (question,) = data.questions
    assert data.label == f"webdataset/{tmp_path.name}-test" and len(data) == 22
    assert data.ids[0] == "0/s0000000.jpg" and data.ids[-1] == "10/s0000021.png"
    assert question.classes == ("cat", "hot dog", "cow") and question.several == ("a photo of a {}.", "the {}")
    assert question.target.tolist() == [n % 3 for n in range(11) for _ in (0, 1)]
    assert [data.load(row).getpixel((2, 2))[0] for row in (6, 20)] == pytest.approx([60, 200], abs=4)
    (tmp_path / "test" / "10.tar").unlink()
    with pytest.raises(UserError, match="has 10 tar files, and .*nshards.txt says '11'"):
        open_dataset("webdataset", tmp_path)


def test_a_webdataset_for_retrieval_has_captions(tmp_path):
    write(tmp_path / "dataset_type.txt", "retrieval")
    shard(tmp_path / "test" / "0.tar", {"a.jpg": jpeg(9), "a.txt": "A  cat\n\nOne cat\n"})
    assert open_dataset("webdataset", tmp_path).captions == [("A cat", "One cat")]
    (tmp_path / "dataset_type.txt").unlink()  # img2dataset writes none, and no classnames.txt
    assert open_dataset("webdataset", tmp_path).captions == [("A cat", "One cat")]
    shard(tmp_path / "test" / "0.tar", {"a.jpg": jpeg(9), "a.txt": "a café".encode("latin-1")})
    with pytest.raises(UserError, match=r"0\.tar.a\.txt is not UTF-8 text"):
        open_dataset("webdataset", tmp_path)


def test_a_damaged_tar_file_is_never_read_as_if_it_ended_there(tmp_path):
    path = webdataset_tree(tmp_path) / "train" / "0.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    for damaged in (
        content[: second.offset - 512],  # cut in data
        content[: second.offset + 100],  # cut in a header
        content[: second.offset_data + 512],  # no end
        content[: second.offset] + bytes(512) + content[second.offset :],  # zeros in the middle
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"0\.tar is cut short or no tar file"):
            open_dataset("webdataset", tmp_path, "train")


def test_what_does_not_go_together_in_a_webdataset_is_an_error(tmp_path):
    webdataset_tree(tmp_path)
    for members, message in [
        ({"a.jpg": jpeg(1)}, r"0\.tar lacks a\.cls; it has a\.jpg"),
        ({"a.cls": "1"}, r"lacks the image of a"),
        ({"a.jpg": jpeg(1), "a.cls": "3"}, r"a\.jpg has the label '3'; .* names 0 to 2"),
    ]:
        shard(tmp_path / "train" / "0.tar", members)
        with pytest.raises(UserError, match=message):
            open_dataset("webdataset", tmp_path, "train")
    with pytest.raises(UserError, match="no split 'val'; splits found there: test, train"):
        open_dataset("webdataset", tmp_path, "val")


def test_incomplete_webdataset_samples_are_skipped_on_request(tmp_path):
    write(tmp_path / "dataset_type.txt", "retrieval")
    members = {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "b.txt": "a dog", "c.txt": "a cat", "d.jpg": jpeg(3), "d.txt": " "}
    shard(tmp_path / "test" / "0.tar", members)
    with pytest.raises(UserError, match=r"lacks a\.txt; it has a\.jpg\. --data\.missing skip"):
        open_dataset("webdataset", tmp_path)
    data = open_dataset("webdataset", tmp_path, missing="skip")
    assert data.ids == ["0/b.jpg"] and data.captions == [("a dog",)]
    assert data.note.startswith("3 samples without a picture or a text are left out, first: ")


def test_tars_in_the_root_are_embedded_and_skipped_images_counted(tmp_path, caplog):
    path = shard(tmp_path / "00000.tar", {"a.jpg": jpeg(1), "b.txt": "x", "c.left.jpg": jpeg(2)})
    assert find_tars(tmp_path, None) == (tmp_path.name, [path]) and open_tar(path).ids == ["00000/a.jpg"]
    assert "1 images are passed over, first c.left.jpg" in caplog.text
    with pytest.raises(
        UserError, match="no split 'test'.*to embed the tar files in the folder itself, --data.split null"
    ):
        open_dataset("webdataset", tmp_path)


# -- class names -----------------------------------------------------------------------------------------


def test_every_class_has_one_display_name():
    counts = {"cifar10": 10, "cifar100": 100, "mnist": 10, "eurosat": 10, "sun397": 397, "flowers102": 102,
              "food101": 101, "cub": 200, "awa2": 50}  # fmt: skip
    assert {path.stem: len(class_names(path.stem).display_names) for path in FOLDER.glob("*.yaml")} == counts
    for name in counts:
        names = class_names(name)
        assert names.source and names.several and all(prompt.count("{}") == 1 for prompt in names.several)
        assert len(set(names.display_names.values())) == len(names.display_names), name
        assert all(
            isinstance(text, str) and text.strip() == text for pair in names.display_names.items() for text in pair
        )
    with pytest.raises(UserError, match=r"cub\.yaml has no name for 'emu' \(1 of 1 classes\)"):
        class_names("cub").say(["emu"])
