"""Files of statements: each form in each format, and what is said of a row that is none."""

import json

import pandas
import pytest
from conftest import SHARED

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Statement
from pc_clip.data.relations import RELATIONS
from pc_clip.data.statements import READERS, label_of, read_statements
from pc_clip.data.views import match

PLAIN = {"image": "a.jpg", "preferred": "a red car", "rejected": "a blue car"}
ARO = {"image_id": "2", "image_path": "2.jpg", "true_caption": "a man on a bus", "false_caption": "a bus on a man"}
BOX = {"bbox_x": 3, "bbox_y": 4.0, "bbox_w": 10, "bbox_h": 20}
RANKED = {"caption": "a car", "preferred_image": "a.jpg", "rejected_image": "b.jpg"}
VSR = {"image": "1.jpg", "caption": "The cat is under the table.", "label": 0, "relation": "under", "annotator_id": 1}
NEGATIVE = {"filename": "7.jpg", "caption": "a cat\non a mat", "negative_caption": "a mat on a cat"}


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


def refused(path):
    with pytest.raises(UserError) as error:
        read_statements([path])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", READERS)
def test_each_form_is_read_from_each_kind_of_file(tmp_path, ending):
    """Quotes, tabs and line breaks survive; empty cells are none; an image may be a number."""
    rows = [{**PLAIN, "kind": "colour", "category": "look"},
            {**PLAIN, "preferred": 'a "big", red\ncar', "rejected": "a tab\t", "kind": "", "category": ""}]  # fmt: skip
    assert read_statements([write(tmp_path / f"mine{ending}", *rows)]) == [
        Statement("a.jpg", "a red car", "a blue car", True, "colour", "look"),
        Statement("a.jpg", 'a "big", red car', "a tab", True, "mine"),
    ]
    (ranked,) = read_statements([write(tmp_path / f"rank{ending}", RANKED)])
    assert ranked == Statement("a.jpg", "a car", "a car", True, "rank", "", "b.jpg")
    (negative,) = read_statements([write(tmp_path / f"swap{ending}", NEGATIVE)])
    assert negative == Statement("7.jpg", "a cat on a mat", "a mat on a cat", True, "swap")
    (vsr,) = read_statements([write(tmp_path / f"vsr{ending}", VSR)])
    assert (vsr.true, vsr.kind, vsr.category) == (False, "under", "Projective") and vsr.preferred == vsr.contradiction
    assert vsr.contradiction in {f"The cat is {opposite} the table." for opposite in RELATIONS["under"].opposites}
    (aro,) = read_statements([write(tmp_path / f"aro{ending}", {**ARO, **BOX, "relation_name": "on"})])
    assert (aro.image, aro.kind, aro.category) == ("2.jpg@box=3,4,13,24", "on", "aro_relation")
    (number,) = read_statements([write(tmp_path / f"n{ending}", {"image_id": 139, "preferred": "x", "rejected": "y"})])
    assert number.image == "139"


def test_labels_are_words_or_digits_and_may_be_absent_beside_a_negative(tmp_path):
    labels = {"0": False, "1": True, "true": True, "False": False, "1.0": True, "0.0": False}
    read = read_statements([write(tmp_path / "t.csv", *({**VSR, "label": label} for label in labels))])
    assert [s.true for s in read] == list(labels.values())
    read = read_statements([write(tmp_path / "u.csv", *({**NEGATIVE, "label": label} for label in ("0", "1", "")))])
    assert [s.true for s in read] == [False, True, True] and read[0].preferred == "a mat on a cat"


def test_what_the_columns_leave_open(tmp_path):
    no_relation = {name: value for name, value in VSR.items() if name != "relation"}
    actual, null = read_statements([write(tmp_path / "a.jsonl", no_relation, {**VSR, "relation": None})])
    assert actual.kind == null.kind == "under"
    hugging = {**VSR, "caption": "The cat is hugging it.", "relation": "hugging"}
    (unknown,) = read_statements([write(tmp_path / "b.jsonl", hugging)])
    assert (unknown.contradiction, unknown.category) == ("The cat is not hugging it.", "other")
    attributes, whole = read_statements(
        [write(tmp_path / "c.json", {**ARO, **BOX, "attributes": ["white", "round"]}, ARO)]
    )
    assert (attributes.kind, attributes.category) == ("white / round", "aro_attribution")
    assert (whole.image, whole.kind, whole.category) == ("2.jpg", "c", "")
    (tmp_path / "swap_obj.json").write_text(json.dumps({"0": NEGATIVE, "3": NEGATIVE}))  # as SugarCrepe has them
    assert [s.kind for s in read_statements([tmp_path / "swap_obj.json"])] == ["swap_obj"] * 2


def test_the_seed_draws_the_contradictions_whatever_the_order(tmp_path):
    rows = [{**VSR, "caption": f"The cat is under the {thing}."} for thing in ("bed", "car", "cup", "bus", "tv", "cow")]
    there, back = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[::-1])
    drawn = {seed: [s.contradiction for s in read_statements([there], seed)] for seed in range(4)}
    assert [s.contradiction for s in read_statements([back], 2)][::-1] == drawn[2]
    assert len({tuple(texts) for texts in drawn.values()}) > 1


def test_a_folder_stands_for_its_files_in_order_and_names_results(tmp_path):
    for name in ("b.csv", "a.jsonl", "c.parquet"):
        write(tmp_path / "set" / name, PLAIN)
    (tmp_path / "set" / "README.md").write_text("not one of them")
    read = read_statements([tmp_path / "set", tmp_path / "set" / "b.csv"])
    assert [s.kind for s in read] == ["a", "b", "c", "b"]
    assert label_of([tmp_path / "set", "x/test.jsonl"]) == "set+test"
    (tmp_path / "empty").mkdir()
    for path in ("empty", "none.json", "set/README.md"):
        assert "no file of statements at" in refused(tmp_path / path)


def test_byte_order_marks_and_blank_lines_are_no_content(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeffimage,preferred,rejected\n\na,x,y\n\n", encoding="utf-8")
    (tmp_path / "t.jsonl").write_text("\ufeff" + json.dumps(PLAIN) + "\n\n", encoding="utf-8")
    assert [s.image for s in read_statements([tmp_path / "t.csv", tmp_path / "t.jsonl"])] == ["a", "a.jpg"]


def test_a_row_that_is_none_is_named_by_its_line(tmp_path):
    for row, pattern in [
        (
            {"image": "a", "text": "x"},
            "found image, text; a row needs an image (image, filename,",
        ),
        ({**PLAIN, "rejected": "a red  car "}, "the two texts or images are the same, 'a red car'"),
        ({**PLAIN, "rejected": " "}, "rejected must be a text"),
        ({**PLAIN, "image": {"bytes": "x"}}, "image must name an image"),
        ({**VSR, "label": 2}, "label must be 0 or 1 (false or true), found '2'"),
        ({**VSR, "relation": "above"}, "does not hold the relation 'above'"),
        ({"image": "1", "caption": "The cat sleeps.", "label": 1}, "no relation known"),
        ({**ARO, "bbox_x": 1}, "a box needs bbox_x, bbox_y, bbox_w, bbox_h"),
        ({**ARO, **BOX, "bbox_w": 0}, "not empty"),
        ({**ARO, **BOX, "bbox_w": 1.5}, "whole pixels"),
        ({**ARO, "attributes": "white"}, "attributes must be a list"),
        ({**RANKED, "rejected_image": "a.jpg"}, "the two texts or images are the same"),
        ([1], "must be an object"),
    ]:
        path = write(tmp_path / "mine.jsonl", PLAIN, row)
        message = refused(path)
        assert message.startswith(f"{path} line 2") and pattern in message
    for ending, where in {"csv": "line 3", "tsv": "line 3", "json": "entry 1", "parquet": "row 2"}.items():
        assert f"mine.{ending} {where}: rejected" in refused(
            write(tmp_path / f"mine.{ending}", PLAIN, {**PLAIN, "rejected": ""})
        )


def test_a_file_that_is_none_is_named(tmp_path):
    for name, content, pattern in [
        ("t.csv", "image,preferred,rejected\na,x,y\nb,x\n", "line 3: it does not have the 3 different fields"),
        ("t.csv", "image,preferred,rejected\na,x,y,z\n", "line 2: it does not have the 3 different fields"),
        ("t.csv", 'image,preferred,rejected\na,"x,y\n', "is a quote not closed"),
        ("t.csv", "image,image,preferred,rejected\na,b,x,y\n", "line 2: it does not have the 4 different fields"),
        ("t.csv", "image,preferred,rejected\n", "holds no rows"),
        ("t.csv", "image,preferred,rejected\na,é,b\n", "is not UTF-8 text"),
        ("t.jsonl", "\n{\n", "line 2 is not JSON"),
        ("t.json", "{}\n{}", "the name must end in .jsonl"),
        ("t.json", '{"image": "a"}', "entry image must be an object"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
    ]:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        message = refused(tmp_path / name)
        assert message.startswith(str(tmp_path / name)) and pattern in message


@pytest.mark.skipif(not (SHARED / "vsr").is_dir(), reason="the published files are not part of the project")
def test_the_published_files():
    photographs = [path.name for path in (SHARED / "coco_mini").glob("*2017/*.jpg")]
    crepe = read_statements([SHARED / "sugar_crepe"])
    files = list((SHARED / "sugar_crepe").glob("*.json"))
    assert {s.kind for s in crepe} == {path.stem for path in files} and all(s.true for s in crepe)
    assert len(crepe) == sum(len(json.loads(path.read_text())) for path in files)
    here = match(crepe, photographs)
    assert len(here.statements) == 426 and len({*here.rows.tolist()}) == 89
    vsr = read_statements([SHARED / "vsr" / "random"])
    labels = [json.loads(line)["label"] for line in (SHARED / "vsr/random/dev.jsonl").read_text().splitlines()]
    assert len(vsr) == 10972 and [s.true for s in vsr[: len(labels)]] == [label == 1 for label in labels]
    assert len(match(vsr, photographs).statements) == 51


VALSE = {"image_file": "COCO_val2014_000000000139.jpg", "caption": "a dog", "foil": "a cat", "mturk": {"caption": 2}}


def test_unconfirmed_valse_rows_are_dropped_and_counted(tmp_path, caplog):
    rows = {"a": VALSE, "b": {**VALSE, "mturk": {"caption": 1, "foil": 2}}}
    path = tmp_path / "plurals.json"
    path.write_text(json.dumps(rows))
    with caplog.at_level("INFO"):
        (statement,) = read_statements([path])
    assert (statement.text, statement.contradiction, statement.kind) == ("a dog", "a cat", "plurals")
    assert statement.category == "valse" and "1 of 2 rows are left out, not confirmed (--unconfirmed)" in caplog.text
    assert len(read_statements([path], unconfirmed=True)) == 2
    valse = SHARED / "benchmarks" / "valse"
    if valse.is_dir():
        confirmed, every = (len(read_statements([valse], unconfirmed=each)) for each in (False, True))
        assert (confirmed, every) == (7702, 8758)
