"""Files of statements: each format, and each way of being wrong."""

import json

import pandas
import pytest
from conftest import SHARED

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Statement
from pc_clip.data.relations import RELATIONS
from pc_clip.data.statements import label_of, read_statements
from pc_clip.data.views import match

PLAIN = {"image": "a.jpg", "preferred": "a red car", "rejected": "a blue car"}
ARO = {
    "image_id": "2",
    "image_path": "2.jpg",
    "true_caption": "the man on the bus",
    "false_caption": "the bus on the man",
}
BOX = {"bbox_x": 3, "bbox_y": 4.0, "bbox_w": 10, "bbox_h": 20}
RANKED = {"caption": "a car", "preferred_image": "a.jpg", "rejected_image": "b.jpg@crop=0,0,1,0.5"}
VSR = {"image": "1.jpg", "caption": "The cat is under the table.", "label": 0, "relation": "under", "annotator_id": 1}


def write(path, *rows):
    """The rows, in the format that the path's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif path.suffix == ".parquet":
        pandas.DataFrame(list(rows)).to_parquet(path)
    else:
        pandas.DataFrame(list(rows)).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_own_pairs_are_read_from_every_kind_of_file(tmp_path, ending):
    rows = [PLAIN, {"image": "b", "preferred": 'a "big", red\ncar', "rejected": "a tab\t"}, PLAIN]
    found = read_statements([write(tmp_path / f"mine.{ending}", *rows)])
    once = Statement("a.jpg", "a red car", "a blue car", True, "mine")
    assert found == [once, Statement("b", 'a "big", red car', "a tab", True, "mine"), once]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_ranking_data_is_one_text_and_two_images(tmp_path, ending):
    found = read_statements([write(tmp_path / f"rank.{ending}", RANKED)])
    assert found == [Statement("a.jpg", "a car", "a car", True, "rank", "", "b.jpg@crop=0,0,1,0.5")]


def test_kind_and_category_are_read_where_they_are_given(tmp_path):
    rows = [{**PLAIN, "kind": "colour", "category": "look"}, {**PLAIN, "kind": "", "category": ""}]
    for ending in ("csv", "jsonl", "parquet"):
        found = read_statements([write(tmp_path / f"k.{ending}", *rows)])
        assert [(s.kind, s.category) for s in found] == [("colour", "look"), ("k", "")]


def test_a_statement_of_vsr_is_set_against_its_contradiction(tmp_path):
    no_relation = {name: value for name, value in VSR.items() if name != "relation"}
    rows = [VSR, {**VSR, "label": 1}, {**no_relation, "label": True}, {**VSR, "relation": None}]
    found = read_statements([write(tmp_path / "test.jsonl", *rows)])
    assert [s.true for s in found] == [False, True, True, False]
    assert {(s.image, s.text, s.kind, s.category) for s in found} == {
        ("1.jpg", "The cat is under the table.", "under", "Projective")
    }
    against = {f"The cat is {opposite} the table." for opposite in RELATIONS["under"].opposites}
    assert {s.contradiction for s in found} <= against
    assert found[0].preferred == found[0].contradiction
    assert found[1].preferred == found[1].text


def test_labels_of_a_table_are_words_or_digits(tmp_path):
    rows = [{**VSR, "label": label} for label in ("0", "1", "true", "False", "1.0", "0.0")]
    found = read_statements([write(tmp_path / "t.csv", *rows)])
    assert [s.true for s in found] == [False, True, True, False, True, False]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_label_says_whether_a_caption_with_a_negative_of_its_own_is_true(tmp_path, ending):
    row = {"image": "a", "caption": "a red car", "negative_caption": "a blue car"}
    rows = [{**row, "label": label} for label in ("0", "1", "")]
    found = read_statements([write(tmp_path / f"t.{ending}", *rows)])
    assert [s.true for s in found] == [False, True, True]
    assert found[0].preferred == "a blue car"
    with pytest.raises(UserError, match="label must be 0 or 1"):
        read_statements([write(tmp_path / f"u.{ending}", {**row, "label": "car"})])


def test_a_relation_that_nobody_knows_is_negated(tmp_path):
    row = {**VSR, "caption": "The cat is hugging it.", "relation": "hugging"}
    (found,) = read_statements([write(tmp_path / "t.jsonl", row)])
    assert (found.contradiction, found.kind, found.category) == ("The cat is not hugging it.", "hugging", "other")


def test_the_seed_draws_the_contradictions_whatever_the_order(tmp_path):
    rows = [{**VSR, "caption": f"The cat is under the {thing}."} for thing in ("bed", "car", "cup", "bus", "tv", "cow")]
    there, back = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[::-1])
    of = {seed: [s.contradiction for s in read_statements([there], seed)] for seed in range(4)}
    assert [s.contradiction for s in read_statements([back], 2)][::-1] == of[2]
    assert len({tuple(texts) for texts in of.values()}) > 1


def test_sugarcrepe_is_an_object_or_a_list_of_rows(tmp_path):
    row = {"filename": "7.jpg", "caption": "a cat\non a mat", "negative_caption": "a mat on a cat"}
    whole = tmp_path / "swap_obj.json"
    whole.write_text(json.dumps({"0": row, "3": row}))
    wanted = Statement("7.jpg", "a cat on a mat", "a mat on a cat", True, "swap_obj")
    assert read_statements([whole]) == [wanted, wanted]
    assert read_statements([write(tmp_path / "list" / "swap_obj.json", row)]) == [wanted]


def test_aro_is_about_the_part_of_the_image_in_the_box(tmp_path):
    relation = write(tmp_path / "visual_genome_relation.json", {**ARO, **BOX, "relation_name": "on"})
    attributes = write(tmp_path / "visual_genome_attribution.json", {**ARO, **BOX, "attributes": ["white", "round"]})
    found = read_statements([relation, attributes])
    assert [s.image for s in found] == ["2.jpg@box=3,4,13,24"] * 2
    assert [(s.kind, s.category) for s in found] == [("on", "aro_relation"), ("white / round", "aro_attribution")]
    assert found[0].preferred == "the man on the bus"
    (whole,) = read_statements([write(tmp_path / "own.json", ARO)])
    assert (whole.image, whole.kind, whole.category) == ("2.jpg", "own", "")


def test_an_image_may_be_a_number(tmp_path):
    row = {"image_id": 139, "preferred": "x", "rejected": "y"}
    for ending in ("jsonl", "parquet", "csv"):
        (found,) = read_statements([write(tmp_path / f"n.{ending}", row)])
        assert found.image == "139"


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    write(tmp_path / "set" / "b.csv", PLAIN)
    write(tmp_path / "set" / "a.jsonl", PLAIN)
    write(tmp_path / "set" / "c.parquet", PLAIN)
    (tmp_path / "set" / "README.md").write_text("not one of them")
    found = read_statements([tmp_path / "set", tmp_path / "set" / "b.csv"])
    assert [s.kind for s in found] == ["a", "b", "c", "b"]


def test_a_name_for_results(tmp_path):
    write(tmp_path / "set" / "b.csv", PLAIN)
    assert label_of([tmp_path / "set"]) == "set"
    assert label_of([tmp_path / "set" / "b.csv"]) == "b"
    assert label_of([tmp_path / "set", "x/test.jsonl"]) == "set+test"


def test_byte_order_marks_and_blank_lines_are_no_content(tmp_path):
    table, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    table.write_text("\ufeffimage,preferred,rejected\n\na,x,y\n\n", encoding="utf-8")
    lines.write_text("\ufeff" + json.dumps(PLAIN) + "\n\n", encoding="utf-8")
    assert [s.image for s in read_statements([table, lines])] == ["a", "a.jpg"]


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a", "text": "x"}, "found image, text; a row needs image, preferred, rejected; or"),
        ({"preferred": "x", "rejected": "y"}, "found preferred, rejected"),
        ({"caption": "x", "preferred_image": "a"}, "found caption, preferred_image"),
        ({**PLAIN, "rejected": "a red  car "}, "the two texts are the same, 'a red car'"),
        ({**PLAIN, "rejected": " "}, "rejected is empty"),
        ({**PLAIN, "preferred": 3}, "preferred must be a text, found '3'"),
        ({**PLAIN, "preferred": None}, "found image, rejected"),
        ({**PLAIN, "image": ""}, "image must name an image, found ''"),
        ({**PLAIN, "image": {"bytes": "x"}}, "image must name an image"),
        ({**VSR, "label": 2}, "label must be 0 or 1 (false or true), found '2'"),
        ({**VSR, "label": "yes"}, "label must be 0 or 1"),
        ({**VSR, "relation": "above"}, "does not hold the relation 'above'"),
        ({**VSR, "caption": "The cat hugs it.", "relation": "hugs"}, "does not follow is or are"),
        ({"image": "1", "caption": "The cat sleeps.", "label": 1}, "no relation known"),
        ({"image": "1", "caption": "The car in the street is red.", "label": 1}, "no relation known"),
        ({"image": "1", "caption": "No cat is on the mat.", "label": 1}, "'No' comes before 'on'"),
        ({**ARO, "bbox_x": 1}, "a box needs bbox_x, bbox_y, bbox_w, bbox_h, found only bbox_x"),
        ({**ARO, **BOX, "bbox_w": 0}, "the box is empty"),
        ({**ARO, **BOX, "bbox_w": 1.5}, "bbox_w must be a whole number of pixels, found '1.5'"),
        ({**ARO, **BOX, "attributes": "white"}, "attributes must be a list"),
        ({**RANKED, "rejected_image": "a.jpg"}, "are both 'a.jpg'"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_line(tmp_path, row, said):
    path = write(tmp_path / "mine.jsonl", PLAIN, row)
    with pytest.raises(UserError) as error:
        read_statements([path])
    assert str(error.value).startswith(f"{path} line 2: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_kind_of_file_says_where_a_row_is(tmp_path):
    bad = {**PLAIN, "rejected": ""}
    for ending, where in {"csv": "line 3", "tsv": "line 3", "json": "entry 1", "parquet": "row 2"}.items():
        with pytest.raises(UserError, match=rf"mine\.{ending} {where}: rejected is empty"):
            read_statements([write(tmp_path / f"mine.{ending}", PLAIN, bad)])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "image,preferred,rejected\na,x,y\nb,x\n", "line 3: 2 fields, but the first line names 3 columns"),
        ("t.csv", "image,preferred,rejected\na,x,y,z\n", "line 2: 4 fields"),
        ("t.csv", 'image,preferred,rejected\na,"x\ny",z\nb,x,x\n', "line 4: the two texts are the same"),
        ("t.csv", 'image,preferred,rejected\na,"x,y\n', "line 2: "),
        ("t.csv", "image,image,preferred,rejected\n", "the column 'image' is there twice"),
        ("t.csv", "image,preferred,rejected\n", "holds no rows"),
        ("t.jsonl", "", "holds no rows"),
        ("t.jsonl", "{}\n{", "line 1: found nothing"),
        ("t.jsonl", "\n{\n", "line 2 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1: a row must be an object"),
        ("t.json", "[", "is not JSON"),
        ("t.json", "{}\n{}", "the name must end in .jsonl"),
        ("t.json", "[3]", "entry 0: a row must be an object"),
        ("t.json", '{"image": "a"}', "must be a list of rows or an object of rows"),
        ("t.json", "[]", "holds no rows"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
        ("t.txt", "x", "must end in .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_statements([path])
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_a_file_of_another_encoding_is_refused(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    path.write_bytes("image,preferred,rejected\na,é,b\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_statements([path])


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="no file of statements at"):
        read_statements([tmp_path / "none.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no files of statements in it"):
        read_statements([tmp_path / "empty"])


# -- the published files -----------------------------------------------------------------------------------


def published(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the published files are not at {folder}")
    return folder


def photographs():
    return [path.name for path in published("coco_mini").glob("*2017/*.jpg")]


def test_sugarcrepe_as_published():
    folder = published("sugar_crepe")
    found = read_statements([folder])
    assert {s.kind for s in found} == {path.stem for path in folder.glob("*.json")}
    assert len(found) == sum(len(json.loads(path.read_text())) for path in folder.glob("*.json"))
    assert all(s.true for s in found)
    here = match(found, photographs())
    assert len(here.statements) == 426
    assert len({*here.rows.tolist()}) == 89


def test_vsr_as_published():
    found = read_statements([published("vsr") / "random"])
    assert len(found) == 10972
    labels = [json.loads(line)["label"] for line in (SHARED / "vsr" / "random" / "dev.jsonl").read_text().splitlines()]
    assert [s.true for s in found[: len(labels)]] == [label == 1 for label in labels]
    assert {s.category for s in found} == {
        "Adjacency", "Directional", "Orientation", "Projective", "Proximity", "Topological", "Unallocated"
    }  # fmt: skip
    assert len(match(found, photographs()).statements) == 51
