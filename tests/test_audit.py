"""The audit: figures of small files that can be counted by hand, and what it says of files it cannot read."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, to_line
from pc_clip.models.clip import open_clip
from pc_clip.write import audit

TOKENIZER = open_clip.SimpleTokenizer()
FILE = Path("llm_diffs/some.jsonl")
CAPTIONS = {"1": ["A brown dog rides a bus."], "2": ["Two cats.", "Cats asleep in a box."], "3": ["A red car."]}


def save(*differences, meta=None):
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("".join(to_line(Difference(*d)) for d in differences), encoding="utf-8")
    if meta is not None:
        FILE.with_suffix(".meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return FILE


def coco(captions=CAPTIONS):
    images = [{"id": int(key), "file_name": f"{key}.jpg"} for key in captions]
    told = [{"image_id": int(key), "caption": text} for key, texts in captions.items() for text in texts]
    path = Path("captions.json")
    path.write_text(json.dumps({"images": images, "annotations": told}))
    return path


def contrast(a, b):
    return f"The first image shows {a}, while the second image shows {b}."


def figures(*differences, captions=None, meta=None):
    return audit.audit(save(*differences, meta=meta), captions).figures


# -- figures -------------------------------------------------------------------------------------------


def test_lengths_and_repeats_are_counted():
    dog, cat = contrast("a dog", "a cat"), contrast("a dog", "a bus")
    found = figures(("1", "2", dog), ("1", "3", dog), ("2", "3", dog.upper().replace(",", "")), ("3", "1", cat))
    assert (found["sentences"], found["images"]) == (4, 3)
    assert found["repeated"] == 0.25 and found["repeated_nearly"] == 0.5
    assert found["characters_mean"] == np.mean([len(dog), len(dog), len(dog) - 1, len(cat)])
    assert found["tokens_max"] == 17  # 13 words, comma, full stop, start and end
    assert found["over_77"] == 0


def test_long_sentences_are_those_the_text_tower_cuts():
    fits, cut = " ".join(["dog"] * 75), " ".join(["dog"] * 76)
    assert audit.audit(save(("1", "2", fits), ("1", "3", cut))).each.tokens.tolist() == [77, 78]
    assert figures(("1", "2", fits), ("1", "3", cut))["over_77"] == 0.5
    tokens = TOKENIZER([fits, cut])
    assert (tokens[0] == tokens[1]).all(), "of the longer one, the text tower sees what it sees of the other"


def test_what_is_said_is_held_against_all_captions_of_both_images():
    """Of six content words (giant, dogs, rode; two, cats, hats) the captions have not: giant, hats."""
    text = contrast("giant dogs that rode", "two cats with hats")
    captions = coco({"1": ["A dog rides."], "2": ["Two bikes.", "A cat sleeping."], "3": ["Giants with hats."]})
    captions.write_text(captions.read_text().replace("rides", "rode"))
    found = figures(("1", "2", text), ("1", "9", "of an image that the file does not know"), captions=captions)
    assert found["novel_words"] == pytest.approx(2 / 6)
    assert found["wrong_image_words"] == 0
    turned = figures(("2", "1", text), captions=captions)
    assert turned["novel_words"] == pytest.approx(2 / 6)
    assert turned["wrong_image_words"] == 1


def test_without_captions_nothing_is_said_of_them():
    found = audit.audit(save(("1", "2", contrast("a dog", "a cat"))))
    assert found.figures["novel_words"] is None
    assert (
        dict(audit.table(found).to_numpy().tolist())["content words that no caption of the two images has"]
        == "needs --captions"
    )


def test_the_captions_the_writer_had_are_found_as_long_as_they_are_the_same():
    path = coco()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    meta = {"settings": {"captions": str(path), "captions_sha256": digest}}
    item = ("1", "2", contrast("a dog", "a giraffe"))
    assert figures(item, meta=meta)["novel_words"] == 0.5
    path.write_text(path.read_text() + " ")
    assert figures(item, meta=meta)["novel_words"] is None


def test_both_orders_agree_or_contradict():
    same = (("1", "2", contrast("a brown dog", "a cat")), ("2", "1", contrast("a cat", "brown dogs")))
    found = figures(*same, ("1", "3", contrast("a dog", "a car")))
    assert (found["both_orders"], found["agreement"], found["unlike"], found["crossed"]) == (1, 1, 0, 0)
    liar = (("1", "3", contrast("a dog", "a car")), ("3", "1", contrast("a dog", "a car")))
    found = figures(*same, *liar)
    assert (found["both_orders"], found["agreement"], found["unlike"], found["crossed"]) == (2, 0.5, 0.5, 0.5)
    half = (("1", "2", contrast("a dog", "a cat")), ("2", "1", contrast("a cat", "a dog and a bone")))
    assert figures(*half)["agreement"] == 0.75


def test_orders_that_cannot_be_compared_are_left_out():
    found = figures(("1", "2", contrast("a dog", "a cat")), ("2", "1", "Only the first image shows a cat on a sofa."))
    assert (found["both_orders"], found["agreement"]) == (1, None)
    lonely = audit.audit(save(("1", "2", contrast("a dog", "a cat"))))
    assert dict(audit.table(lonely).to_numpy().tolist())["pairs with fewer than 0.2 in common"] == "not applicable"


def test_broken_sentences_are_counted():
    plate = "a close view of food on a plate"
    texts = [contrast("a dog", "a dog"), contrast(plate, "a giraffe"), contrast("a dog", "a cat"), "A dog on a sofa."]
    items = [("1", "2", text) for text in texts]
    found = audit.audit(save(*items))
    assert found.figures["names_both"] == 0.75
    assert found.figures["same_of_both"] == found.figures["copies_example"] == 0.25
    assert found.figures["rejected_now"] == 0.75
    assert found.counts == {"same_of_both": 1, "prompt_echo": 1, "kept": 1, "too_short": 1}
    assert found.counted == "rules"


@pytest.mark.parametrize(
    "writer, share", [({"writer": "rules"}, None), ({"worked_examples": []}, None), ({}, 1), ({"writer": "server"}, 1)]
)
def test_a_writer_that_was_shown_no_examples_copies_none(writer, share):
    text = contrast("a close view of food on a plate", "a giraffe")
    assert figures(("1", "2", text), meta={"writer": writer})["copies_example"] == share


def test_a_plate_of_food_may_be_called_one():
    item = ("1", "2", contrast("a close view of food on a plate", "a giraffe"))
    assert (
        figures(item, captions=coco({"1": ["Food on a plate, a close view."], "2": ["A giraffe."]}))["copies_example"]
        == 0
    )
    assert figures(item, captions=coco({"1": ["A zebra."], "2": ["A giraffe."]}))["copies_example"] == 1


def test_reasons_and_the_shortest_length_are_the_writers_own():
    meta = {"settings": {"min_characters": 20}, "counts": {"repetition": 3, "kept": 1, "trimmed": 2}}
    short = ("1", "2", "In the first image a dog, in the second a cat.")
    assert figures(short)["rejected_now"] == 1
    found = audit.audit(save(short, meta=meta))
    assert found.figures["rejected_now"] == 0
    assert found.counted == "meta"
    assert audit.table(found).to_numpy().tolist()[-3:] == [
        ["of the writer's sentences: kept", "1 (16.7%)"],
        ["of the writer's sentences: trimmed", "2 (33.3%)"],
        ["of the writer's sentences: repetition", "3 (50.0%)"],
    ]


# -- what is written -----------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_three_files(capsys):
    save(("1", "2", contrast("a dog", "a *cat* | [x]")), ("2", "3", contrast("two cats", "a red car")))
    audit.main([str(FILE), "--captions", str(coco()), "--out", "found", "--sample", "1"])
    said = capsys.readouterr().out
    assert "name both images" in said and "100.0%" in said
    assert said.splitlines()[-3:] == [f"found/some.audit.{ending}" for ending in ("md", "json", "png")]
    with Image.open("found/some.audit.png") as picture:
        assert picture.width > 1000
    content = json.loads(Path("found/some.audit.json").read_text())
    assert content["figures"]["sentences"] == 2 and len(content["sample"]) == 1
    text = Path("found/some.audit.md").read_text()
    assert "some.audit.png" in text and "| name both images" in text
    assert sorted(p.name for p in FILE.parent.iterdir()) == ["some.jsonl"]


def test_the_sample_is_drawn_by_the_seed_and_no_larger_than_the_file():
    path = save(*[("1", "2", f"sentence number {n}") for n in range(50)])
    found = audit.audit(path)
    lines = [[item["line"] for item in audit.sample(found, 5, seed)] for seed in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2]
    assert lines[0] == sorted(set(lines[0])) and len(lines[0]) == 5
    assert [item["line"] for item in audit.sample(found, 99, 0)] == list(range(1, 51))
    assert all(item["text"] == f"sentence number {item['line'] - 1}" for item in audit.sample(found, 20, 0))


# -- what cannot be read -------------------------------------------------------------------------------


def test_files_that_cannot_be_audited_are_errors():
    with pytest.raises(UserError, match="no differences at absent.jsonl"):
        audit.audit(Path("absent.jsonl"))
    with pytest.raises(UserError, match="holds no differences"):
        audit.audit(save())
    path = save(("1", "2", contrast("a dog", "a cat")), ("1", "3", contrast("a dog", "a cat")))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        audit.audit(path)


@pytest.mark.parametrize("meta", ['{"counts": {"kept"', "[]", '{"counts": {"kept": "many"}}', '{"counts": 5}'])
def test_a_broken_meta_file_is_named(meta):
    with pytest.raises(UserError, match=r"some\.meta\.json .*delete it"):
        audit.audit(save(("1", "2", contrast("a dog", "a cat")), meta=meta))


def test_captions_of_other_images_are_refused():
    path = save(("7", "8", contrast("a dog", "a cat")))
    with pytest.raises(UserError, match=r"captions of other images \(1, 2, 3, .*7 and 8.*--captions"):
        audit.audit(path, coco())
    with pytest.raises(UserError, match=r"no captions file at absent\.json"):
        audit.audit(path, Path("absent.json"))
    with pytest.raises(UserError, match="--sample is -1"):
        audit.main([str(path), "--sample", "-1"])
