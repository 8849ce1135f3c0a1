"""Views of images, and the images of statements."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Question, Statement
from pc_clip.data.views import located, match, views


def gradient(row: int) -> Image.Image:
    """10 x 6: red is the column, green the line, blue the image."""
    columns, lines = np.meshgrid(np.arange(10), np.arange(6))
    return Image.fromarray(np.stack([columns, lines, np.full_like(columns, row)], axis=2).astype(np.uint8))


def made(*ids: str) -> Dataset:
    question = Question("q", ("x",), np.arange(len(ids)), np.zeros(len(ids), dtype=np.int64))
    captions = [("a caption",) for _ in ids]
    known = (Statement(ids[0], "a", "b"),)
    return Dataset("made", "test", list(ids), gradient, "f", captions=captions, questions=(question,), statements=known)


def corners(image: Image.Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first and the last pixel."""
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


def about(*images: str) -> list[Statement]:
    return [Statement(image, f"text {n}", "other") for n, image in enumerate(images)]


# -- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("b", (0, 0, 1), (9, 5, 1)),
        ("b@flip", (9, 0, 1), (0, 5, 1)),
        ("b@box=2,1,5,3", (2, 1, 1), (4, 2, 1)),
        ("b@box=2,1,5,3+flip", (4, 1, 1), (2, 2, 1)),
        ("b@crop=0.5,0,1,0.5", (5, 0, 1), (9, 2, 1)),
        ("b@crop=0.5,0,1,.5+flip", (9, 0, 1), (5, 2, 1)),
        ("b@box=-3,-2,4,2", (0, 0, 1), (3, 1, 1)),
        ("b@box=7,4,99,99", (7, 4, 1), (9, 5, 1)),
        ("b@crop=-0.5,-1,0.2,2", (0, 0, 1), (1, 5, 1)),
        ("b@crop=0.999,0.999,1,1", (9, 5, 1), (9, 5, 1)),
    ],
)
def test_a_view_holds_the_pixels_it_names(name, first, last):
    assert corners(views(made("a", "b"), [name]).load(0)) == (first, last)


def test_views_are_in_the_order_of_their_names_and_know_nothing_else():
    found = views(made("a", "b"), ["b", "a@flip", "b"])
    assert found.ids == ["b", "a@flip", "b"]
    assert [found.load(n).getpixel((0, 0)) for n in range(3)] == [(0, 0, 1), (9, 0, 0), (0, 0, 1)]
    assert (found.captions, found.questions, found.attributes, found.statements) == (None, (), (), ())


def test_other_views_have_another_fingerprint_and_the_whole_data_set_its_own():
    data = made("a", "b")
    names = [["a"], ["b"], ["b", "a"], ["a@flip"], ["a@box=0,0,2,2"], ["a@box=0,0,2,3"], ["a", "b"]]
    assert len({views(data, each).fingerprint for each in names}) == len(names)
    assert views(data, ["a@flip"]).fingerprint == views(data, ["a@flip"]).fingerprint
    assert views(data, ["a", "b"]).fingerprint == data.fingerprint


def test_a_view_travels_to_another_process():
    found = pickle.loads(pickle.dumps(views(made("a", "b"), ["b@box=2,1,5,3+flip"])))
    assert corners(found.load(0)) == ((4, 1, 1), (2, 2, 1))


@pytest.mark.parametrize(
    "name",
    [
        "b@box=1,2,3", "b@box=1,2,3,4,5", "b@box=0.5,0,2,2", "b@box=a,b,c,d", "b@box=", "b@box", "b@crop=0,0,nan,1",
        "b@box=0,0,2,2+flop", "b@box=0,0,2,2+flip+flip", "b@flip+box=0,0,2,2", "b@bax=0,0,2,2", "b@box=3,0,3,2",
        "b@box=3,0,1,2", "b@crop=0.5,0,0.5,1", "b@box=-5,0,0,2", "b@crop=1,0,2,1", "b@crop=0,-1,1,0", "b@box=0,0,2,2 ",
    ],
)  # fmt: skip
def test_a_view_of_another_form_is_refused_by_name(name):
    with pytest.raises(UserError) as error:
        views(made("a", "b"), [name])
    assert repr(name) in str(error.value)


def test_a_box_beside_the_picture_is_an_error_that_says_how_large_the_picture_is():
    found = views(made("a", "b"), ["b@box=10,0,12,2"])
    with pytest.raises(UserError, match=r"'b@box=10,0,12,2'.*10 pixels wide and 6 high"):
        found.load(0)


def test_an_image_that_is_not_there_is_named_with_an_id_that_is():
    with pytest.raises(UserError, match=r"made/test has no image 'c'.*'c@flip'.*'a'"):
        views(made("a", "b"), ["c@flip"])


# -- ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        ("val/000000000139.jpg", 0),
        ("000000000139.jpg", 0),
        ("000000000139", 0),
        ("139", 0),
        ("0139.png", 0),
        ("COCO_val2014_000000000139.jpg", 0),
        ("1139", None),
        ("COCO_val2014_000000001139.jpg", None),
        ("cat", 1),
        ("elsewhere/cat.png", 1),
        ("cats/cat.JPG", 1),
        ("v1.5", 2),
        ("v1", None),
        ("a@2x.png", 3),
        ("a@2x", 3),
        ("a", None),
        ("285", 4),
        ("000000000285.jpg", 4),
    ],
)
def test_an_image_is_found_by_id_by_stem_and_by_cocos_number(asked, row):
    ids = ["val/000000000139.jpg", "cats/cat.JPG", "v1.5", "a@2x.png", "285"]
    found = match(about(asked, ids[1]), ids)
    assert found.absent == (row is None)
    if row is not None:
        assert found.rows.tolist() == [row, 1]


def test_two_images_of_one_stem_are_an_error_only_for_who_asks_for_it():
    data = made("x/1.jpg", "y/1.jpg", "y/2.jpg", "07.jpg", "7.jpg")
    assert located(about("2", "x/1.jpg", "7"), data).data.ids == ["x/1.jpg", "y/2.jpg", "7.jpg"]
    with pytest.raises(UserError, match=r"'1\.png' may be 'x/1\.jpg' or 'y/1\.jpg' of made/test"):
        located(about("2", "1.png"), data)
    with pytest.raises(UserError, match=r"'007' may be '07\.jpg' or '7\.jpg'"):
        located(about("007"), data)


# -- statements --------------------------------------------------------------------------------------------


def test_statements_find_their_images_and_each_view_is_there_once():
    statements = [
        Statement("c", "1", "x"),
        Statement("nowhere", "2", "x"),
        Statement("a.jpg@flip", "3", "x"),
        Statement("a", "4", "4", instead="c"),
        Statement("a", "5", "5", instead="nowhere"),
        Statement("a@flip", "6", "x"),
        Statement("c.png", "7", "x"),
        Statement("a@crop=0,0,.5,.50", "8", "x"),
        Statement("a@crop=0,0,0.5,0.5", "9", "x"),
    ]
    found = located(statements, made("a", "b", "c"))
    assert found.data.ids == ["a", "a@crop=0.0,0.0,0.5,0.5", "a@flip", "c"]
    assert [s.text for s in found.statements] == ["1", "3", "4", "6", "7", "8", "9"]
    assert found.rows.tolist() == [3, 2, 0, 2, 3, 1, 1]
    assert found.others.tolist() == [3, 2, 3, 2, 3, 1, 1]
    assert found.rows.dtype == found.others.dtype == np.int64
    assert found.absent == 2
    assert [found.data.load(n).getpixel((0, 0)) for n in range(4)] == [(0, 0, 0), (0, 0, 0), (9, 0, 0), (0, 0, 2)]


def test_embeddings_of_a_view_are_found_under_its_own_name_alone():
    ids = ["a", "a@flip", "b@box=0,0,2,2"]
    found = match([*about("a@flip", "b@box=0,0,2,2", "a", "b", "a@box=0,0,2,2")], ids)
    assert found.rows.tolist() == [1, 2, 0]
    assert found.absent == 2


def test_ranking_needs_both_images_among_the_ids():
    ranked = [Statement("a", "t", "t", instead="b"), Statement("a", "t", "t", instead="c")]
    found = match(ranked, ["b", "a"])
    assert (found.rows.tolist(), found.others.tolist(), found.absent) == ([1], [0], 1)
    assert found.statements == ranked[:1]


@pytest.mark.parametrize("find", [located, lambda statements, data: match(statements, data.ids, data.label)])
def test_where_no_image_is_there_the_error_shows_both_kinds_of_ids(find):
    with pytest.raises(UserError, match=r"none of the 2 statements.*made/test.*'x\.jpg'.*'a'"):
        find(about("x.jpg", "y.jpg"), made("a", "b"))
    with pytest.raises(UserError, match="no statements"):
        find([], made("a", "b"))
