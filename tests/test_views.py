"""The images of statements, and boxes of them."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Question, Statement
from pc_clip.data.views import located, match


def gradient(row: int) -> Image.Image:
    """10 x 6: red is the column, green the line, blue the image."""
    columns, lines = np.meshgrid(np.arange(10), np.arange(6))
    return Image.fromarray(np.stack([columns, lines, np.full_like(columns, row)], axis=2).astype(np.uint8))


def made(*ids: str) -> Dataset:
    question = Question("q", ("x",), np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64))
    return Dataset("made", "test", list(ids), gradient, "f", captions=[("a",) for _ in ids], questions=(question,))


def about(*images: str) -> list[Statement]:
    return [Statement(image, f"text {n}", "other") for n, image in enumerate(images)]


def test_a_view_holds_the_pixels_it_names_and_travels_to_another_process():
    boxes = {
        "b": ((0, 0, 1), (9, 5, 1)),
        "b@box=-3,-2,4,2": ((0, 0, 1), (3, 1, 1)),
        "b@box=2,1,5,3": ((2, 1, 1), (4, 2, 1)),
        "b@box=7,4,99,99": ((7, 4, 1), (9, 5, 1)),
    }
    data = pickle.loads(pickle.dumps(located(about(*boxes), made("a", "b")).data))
    assert data.ids == list(boxes) and (data.captions, data.questions) == (None, ())
    for row, corners in enumerate(boxes.values()):
        image = data.load(row)
        assert (image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))) == corners


def test_other_views_have_another_fingerprint_and_the_whole_data_set_its_own():
    data = made("a", "b")
    names = [["a"], ["b"], ["a@box=0,0,2,2"], ["a@box=0,0,2,3"], ["a", "b"]]
    fingerprints = [located(about(*each), data).data.fingerprint for each in names]
    assert len(set(fingerprints)) == len(names) and fingerprints[-1] == data.fingerprint


def test_a_view_of_another_form_or_of_nothing_is_refused_by_name():
    for how in ("box=1,2,3", "box=0.5,0,2,2", "box=", "box=3,0,3,2", "box=-5,0,0,2"):
        with pytest.raises(UserError, match=f"no view: 'b@{how}'"):
            located(about(f"b@{how}"), made("a", "b"))
    with pytest.raises(UserError, match=r"'b@box=10,0,12,2'.*10 pixels wide and 6 high"):
        located(about("b@box=10,0,12,2"), made("a", "b")).data.load(0)


def test_an_image_is_found_by_id_without_ending_and_by_cocos_number():
    ids = ["val/000000000139.jpg", "cats/cat.JPG", "v1.5", "a@2x.png", "285", "deep/cats/007.jpg"]
    rows = {
        "val/000000000139.jpg": 0, "000000000139": 0, "139": 0, "0139.png": 0, "COCO_val2014_000000000139.jpg": 0,
        "1139": None, "cat": 1, "cats/cat.png": 1, "my/pets/cats/cat.JPG": 1, "elsewhere/cat.png": None, "v1.5": 2,
        "v1": None, "a@2x": 3, "a": None, "000000000285.jpg": 4, "val2014/COCO_val2014_000000000285.jpg": 4,
        "train/000000000139.jpg": None, "dogs/007.jpg": None, "cats/007.jpg": 5, "7": 5, "dogs/285.jpg": None,
    }  # fmt: skip
    for name, row in rows.items():
        actual = match(about(name, ids[1]), ids)
        assert (actual.rows.tolist(), actual.absent) == (([row, 1], 0) if row is not None else ([1], 1)), name


def test_an_ambiguous_image_name_is_an_error_only_if_used():
    data = made("x/1.jpg", "y/1.jpg", "y/2.jpg", "07.jpg", "7.jpg")
    assert located(about("2", "x/1.jpg", "7.jpg"), data).data.ids == ["x/1.jpg", "y/2.jpg", "7.jpg"]
    for name, one, other in (("1.png", "x/1.jpg", "y/1.jpg"), ("7", "07.jpg", "7.jpg")):
        with pytest.raises(UserError, match=f"'{name}' may be '{one}' or '{other}' of made/test"):
            located(about(name), data)


def test_statements_find_their_images_and_each_view_is_there_once():
    statements = [
        Statement("c", "1", "x"),
        Statement("nowhere", "2", "x"),
        Statement("a.jpg@box=0,0,2,2", "3", "x"),
        Statement("a", "4", "4", rejected_image="c"),
        Statement("a", "5", "5", rejected_image="nowhere"),
        Statement("a@box=0,0,2,2", "6", "x"),
    ]
    actual = located(statements, made("a", "b", "c"))
    assert actual.data.ids == ["a", "a@box=0,0,2,2", "c"]
    assert [s.text for s in actual.statements] == ["1", "3", "4", "6"]
    assert (actual.rows.tolist(), actual.others.tolist(), actual.absent) == ([2, 1, 0, 1], [2, 1, 2, 1], 2)
    assert actual.rows.dtype == actual.others.dtype == np.int64


def test_embeddings_of_a_view_are_found_under_its_own_name_alone():
    actual = match(about("b@box=0,0,2,2", "a", "b", "a@box=0,0,2,2"), ["a", "b@box=0,0,2,2"])
    assert actual.rows.tolist() == [1, 0] and actual.absent == 2


def test_where_no_image_is_there_the_error_shows_both_kinds_of_ids():
    with pytest.raises(UserError, match=r"none of the 2 statements.*made/test.*'x\.jpg'.*'a'"):
        located(about("x.jpg", "y.jpg"), made("a", "b"))
    with pytest.raises(UserError, match="none of the 0 statements"):
        match([], ["a"])
