"""Caption scores against pycocoevalcap's own way, against arithmetic, and without Java."""

import json

import numpy as np
import pytest
from conftest import SHARED

from pc_clip.core.errors import UserError
from pc_clip.metrics import captions
from pc_clip.metrics.captions import bleu_of, bleu_statistics, find_java, score, validation_cider

pytest.importorskip("pycocoevalcap")
SPOT = SHARED / "spot_the_diff"
SAID = ["a red car is gone", "the man moved", "nothing changed", "a tree"]
TOLD = [["the red car is gone", "a car left"], ["the man moved"], ["nothing changed", "no change"], ["a dog came"]]


def program(folder, script):
    """A `java` that is this script, the only program on the path.  -> the folder"""
    folder.mkdir()
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    return str(folder)


@pytest.mark.skipif(not SPOT.is_dir(), reason="no Spot-the-Diff sentences here")
def test_real_references_score_as_pycocoevalcaps_own_classes_say():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    coco = json.loads((SPOT / "spot_total_change_captions_reformat.json").read_text(encoding="utf-8"))
    by_image: dict[str, list[str]] = {image["id"]: [] for image in coco["images"][:200]}
    for annotation in coco["annotations"]:
        by_image.get(annotation["image_id"], []).append(annotation["caption"])
    references = list(by_image.values())
    first = [each[0] for each in references]
    ours = score(first[1:] + first[:1], references)
    sentences, references = captions._tokenized(first[1:] + first[:1], references, java=False)
    theirs = dict(enumerate(references)), {n: [each] for n, each in enumerate(sentences)}
    bleu, _ = Bleu(4).compute_score(*theirs, verbose=0)
    assert [ours.corpus[f"bleu_{k}"] for k in (1, 2, 3, 4)] == bleu
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        corpus, each = scorer.compute_score(*theirs)
        assert ours.corpus[name] == corpus and ours.items[name].tolist() == list(each)
    assert ours.corpus["cider"] == validation_cider(first[1:] + first[:1], list(by_image.values()))
    for name, (low, high) in ours.intervals.items():
        assert low <= ours.corpus[name] <= high


@pytest.mark.slow
@pytest.mark.skipif(not find_java(), reason="no Java runs here")
def test_with_java_words_are_ptb_tokens_and_meteor_is_there():
    """A line break, an empty sentence and METEOR's own mark shift nothing."""
    sentences = ["a man's hat, isn't it?", "", "a ||| b\nthe man\u2028moved", "naïve “café”"]
    actual = score(sentences, [["a man's hat"], ["x"], ["the man moved"], ["naïve café"]], java=True)
    assert actual.tokens[:3] == ["a man 's hat is n't it", "", "a b the man moved"]
    assert "café" in actual.tokens[3]
    assert 0 < actual.corpus["meteor"] < 1


def test_without_java_words_are_lower_case_and_the_result_says_so(monkeypatch, caplog, tmp_path):
    for script in ("exit 1", None):  # a java that only says that there is none; no java at all
        monkeypatch.setenv("PATH", program(tmp_path / "bin", script) if script else "")
        assert not find_java() and "lower-case words" in captions.TOKENIZERS[False]
    assert "METEOR is left out" in caplog.text
    actual = score(["The CAR isn't gone, it's a two-tone café...", "?!"], [["a"], ["b"]])
    assert actual.tokens == ["the car isn't gone it's a two-tone café", ""]
    assert "meteor" not in actual.corpus and "no Java runs here" in actual.notes["meteor"]
    with pytest.raises(UserError, match="SPICE is a Java program.*leave --caption.spice out"):
        find_java(spice=True)


@pytest.mark.slow
def test_a_failing_java_program_leaves_the_other_metrics(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", program(tmp_path / "dies", "exit 3"))
    with pytest.raises(RuntimeError, match="Meteor failed"):
        captions._by_java("meteor.meteor", "Meteor", *captions._numbered(["a"], [["b"]]))
    monkeypatch.setenv("PATH", program(tmp_path / "hangs", "exec /bin/sleep 60"))
    monkeypatch.setattr(captions, "PATIENCE", 5)
    with pytest.raises(RuntimeError, match="Meteor gave no answer in 5 seconds"):
        captions._by_java("meteor.meteor", "Meteor", *captions._numbered(["a"], [["b"]]))

    def no_meteor(module, *_):
        if module.startswith("meteor"):
            raise RuntimeError("out of luck")
        return {"0": ["a car", "a dog"]}

    monkeypatch.setattr(captions, "_by_java", no_meteor)
    actual = score(["a car"], [["a dog"]], java=True)
    assert actual.notes["meteor"] == "not computed: out of luck" and "bleu_4" in actual.corpus


def test_bleu_is_made_of_right_words_over_words_and_brevity():
    from pycocoevalcap.bleu.bleu import Bleu

    actual = score(SAID, TOLD)
    # right words 5 ("a" is in the other reference) + 3 + 2 + 1, of 5 + 3 + 2 + 2; the nearest references: 5, 3, 2, 3
    assert actual.corpus["bleu_1"] == pytest.approx(11 / 12 * np.exp(1 - 13 / 12), abs=1e-8)
    assert actual.bleu[0].tolist() == [5, 3, 2, 1, 5, 4, 3, 2, 5, 5]
    for rows in ([0, 3], [3], [0, 0, 2]):
        sentences, references = [SAID[row] for row in rows], [TOLD[row] for row in rows]
        theirs, _ = Bleu(4).compute_score(
            dict(enumerate(references)), {n: [s] for n, s in enumerate(sentences)}, verbose=0
        )
        assert bleu_of(actual.bleu[rows].sum(0)) == pytest.approx(theirs, rel=1e-12)
    assert bleu_statistics(["a b c"], [["a b c d", "a b"]])[0, -1] == 2  # the shorter of two equally near ones
    empty = score(["", "the man moved", "...", "a dog came"], TOLD)  # counts as wrong, and shifts nothing
    assert empty.items["rouge_l"] == pytest.approx([0, 1, 0, 1]) and empty.items["cider"][[0, 2]].tolist() == [0, 0]


def test_cider_weighs_rare_words_and_of_one_pair_is_marked():
    assert score(["it is"] * 3, [["it is"]] * 3).corpus["cider"] == 0
    rare = score(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert rare.corpus["cider"] == pytest.approx(10) and "cider" not in rare.notes
    alone = score(["a b c d"], [["a b c d"]])
    assert alone.corpus["cider"] == 0 and "only one pair" in alone.notes["cider"]


def test_intervals_contain_the_score_and_are_seeded(capfd):
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "car", "man", "left", "moved", "gone", "came", "tree", "dog"])
    sentences = [" ".join(rng.choice(words, 5)) for _ in range(60)]
    references = [[" ".join(rng.choice(words, 5))] for _ in range(60)]
    first, again, other = (score(sentences, references, seed) for seed in (0, 0, 1))
    assert first.intervals == again.intervals != other.intervals
    for name, (low, high) in first.intervals.items():
        assert low < first.corpus[name] < high
    assert score(sentences, references, quick=True).corpus == first.corpus
    assert capfd.readouterr() == ("", "")


def test_what_is_lacking_is_named(monkeypatch):
    with pytest.raises(UserError, match="1 of 2 pairs have no reference"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="there is no pair"):
        score([], [])
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        find_java()
