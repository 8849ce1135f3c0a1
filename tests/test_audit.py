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
    annotations = [{"image_id": int(key), "caption": text} for key, texts in captions.items() for text in texts]
    path = Path("captions.json")
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def contrast(a, b):
    return f"The first image shows {a}, while the second image shows {b}."


def figures(*differences, captions=None, meta=None):
    return audit.audit(save(*differences, meta=meta), captions).figures


# -- figures -------------------------------------------------------------------------------------------


def test_lengths_and_repeats_are_counted():
    dog, cat = contrast("a dog", "a cat"), contrast("a dog", "a bus")
    actual = figures(("1", "2", dog), ("1", "3", dog), ("2", "3", dog.upper().replace(",", "")), ("3", "1", cat))
    assert (actual["sentences"], actual["images"], actual["distinct_words"]) == (4, 3, 10)
    assert actual["repeated"] == 0.25 and actual["repeated_nearly"] == 0.5
    assert actual["characters_mean"] == np.mean([len(dog), len(dog), len(dog) - 1, len(cat)])
    assert actual["tokens_max"] == 17  # 13 words, comma, full stop, start and end
    assert actual["over_77_tokens"] == 0


def test_long_sentences_are_those_the_text_tower_cuts():
    fits, cut = " ".join(["dog"] * 75), " ".join(["dog"] * 76)
    audited = audit.audit(save(("1", "2", fits), ("1", "3", cut)))
    assert audited.each.tokens.tolist() == [77, 78] and audited.figures["over_77_tokens"] == 0.5
    tokens = open_clip.SimpleTokenizer()([fits, cut])
    assert (tokens[0] == tokens[1]).all(), "of the longer one, the text tower sees what it sees of the other"


def test_what_is_said_is_held_against_all_captions_of_both_images():
    """Of six content words (giant, dogs, rode; two, cats, hats) the captions have not: giant, hats."""
    text = contrast("giant dogs that rode", "two cats with hats")
    captions = coco({"1": ["A dog rode."], "2": ["Two bikes.", "A cat sleeping."], "3": ["Giants with hats."]})
    actual = figures(("1", "2", text), ("1", "9", "of an image that the file does not know"), captions=captions)
    assert actual["novel_words"] == pytest.approx(2 / 6)
    assert actual["wrong_image_words"] == 0
    turned = figures(("2", "1", text), captions=captions)
    assert turned["novel_words"] == pytest.approx(2 / 6)
    assert turned["wrong_image_words"] == 1


def test_the_writers_captions_are_used_if_unchanged():
    path = coco()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    meta = {"settings": {"captions": str(path), "captions_sha256": digest}}
    item = ("1", "2", contrast("a dog", "a giraffe"))
    assert figures(item, meta=meta)["novel_words"] == 0.5
    path.write_text(path.read_text() + " ")
    assert figures(item, meta=meta)["novel_words"] is None


def test_both_orders_agree_or_contradict():
    same = (("1", "2", contrast("a brown dog", "a cat")), ("2", "1", contrast("a cat", "brown dogs")))
    liar = (("1", "3", contrast("a dog", "a car")), ("3", "1", contrast("a dog", "a car")))
    cases = {  # both_orders, agreement, crossed
        (*same, ("1", "3", contrast("a dog", "a car"))): (1, 1, 0),
        (*same, *liar): (2, 0.5, 0.5),
        (("1", "2", contrast("a dog", "a cat")), ("2", "1", contrast("a cat", "a dog and a bone"))): (1, 0.75, 0),
        (("1", "2", contrast("a dog", "a cat")), ("2", "1", "Only the first shows a cat on a sofa.")): (1, None, None),
    }
    actual = {case: figures(*case) for case in cases}
    assert {k: (f["both_orders"], f["agreement"], f["crossed"]) for k, f in actual.items()} == cases


def test_broken_sentences_are_counted():
    texts = [contrast("a dog", "a dog"), contrast("a dog", "a cat"), "A dog on a sofa."]
    audited = audit.audit(save(*[("1", "2", text) for text in texts]))
    shares = {name: audited.figures[name] for name in ("names_both", "same_of_both", "rejected_now")}
    assert shares == pytest.approx({"names_both": 2 / 3, "same_of_both": 1 / 3, "rejected_now": 2 / 3})
    assert audited.counts == {"same_of_both": 1, "kept": 1, "too_short": 1}


def test_copies_of_the_examples_that_the_writer_was_shown_are_counted():
    item = ("1", "2", contrast("a close view of food on a plate", "a giraffe"))
    meta = {"writer": {"worked_examples": [{"first": "A close view of food on a plate.", "answer": "Food."}]}}
    assert figures(item)["copies_example"] is None
    assert figures(item, meta=meta)["copies_example"] == 1
    for food, share in (("Food on a plate, a close view.", 0), ("A zebra.", 1)):
        captions = coco({"1": [food], "2": ["A giraffe."]})
        assert figures(item, captions=captions, meta=meta)["copies_example"] == share


@pytest.mark.slow
def test_reasons_and_the_shortest_length_are_the_writers_own():
    meta = {"settings": {"min_characters": 20}, "counts": {"repetition": 3, "kept": 1, "trimmed": 2}}
    short = ("1", "2", "In the first image a dog, in the second a cat.")
    assert figures(short)["rejected_now"] == 1
    audited = audit.audit(save(short, meta=meta))
    assert audited.figures["rejected_now"] == 0
    reasons = [["reason: repetition", "3"], ["reason: trimmed", "2"], ["reason: kept", "1"]]
    assert audit.table(audited).to_numpy().tolist()[-3:] == reasons


# -- what is written -----------------------------------------------------------------------------------


def test_the_command_prints_the_figures_and_writes_two_files(capsys):
    save(("1", "2", contrast("a dog", "a *cat* | [x]")), ("2", "3", contrast("two cats", "a red car")))
    audit.main([str(FILE), "--captions", str(coco()), "--out", "found", "--sample", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown if "both" in line][:2] == [["names_both", "1"], ["same_of_both", "0"]]
    assert shown[-2:] == [f"found/some.audit.{ending}" for ending in ("json", "png")]
    with Image.open("found/some.audit.png") as picture:
        assert picture.width > 1000
    content = json.loads(Path("found/some.audit.json").read_text())
    assert content["figures"]["sentences"] == 2 and len(content["sample"]) == 1
    assert [path.name for path in FILE.parent.iterdir()] == ["some.jsonl"]


def test_the_sample_is_seeded_and_bounded():
    audited = audit.audit(save(*[("1", "2", f"sentence number {n}") for n in range(50)]))
    lines = [[item["line"] for item in audit.sample(audited, 5, seed)] for seed in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2]
    assert lines[0] == sorted(set(lines[0])) and len(lines[0]) == 5
    drawn = audit.sample(audited, 99, 0)
    assert [(item["line"], item["text"]) for item in drawn] == [(n + 1, f"sentence number {n}") for n in range(50)]


# -- what cannot be read -------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", ['{"counts": {"kept"', "[]", '{"counts": {"kept": "many"}}', '{"counts": 5}'])
def test_a_broken_meta_file_is_named(meta):
    with pytest.raises(UserError, match=r"some\.meta\.json .*delete it"):
        audit.audit(save(("1", "2", contrast("a dog", "a cat")), meta=meta))


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(UserError, match="no differences at absent.jsonl"):
        audit.audit(Path("absent.jsonl"))
    path = save(("7", "8", contrast("a dog", "a cat")), ("7", "9", contrast("a dog", "a cat")))
    with pytest.raises(UserError, match=r"captions of other images \(1, 2, 3, .*7 and 8.*--captions"):
        audit.audit(path, coco())
    with pytest.raises(UserError, match=r"no captions file at absent\.json"):
        audit.audit(path, Path("absent.json"))
    with pytest.raises(UserError, match="--sample is -1"):
        audit.main([str(path), "--sample", "-1"])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        audit.audit(path)
