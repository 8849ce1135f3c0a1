"""Statements true and false: what counts as right, what comes out without looking, and intervals over photographs."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from made_space import COLOUR, about
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.statements import read_statements
from pc_clip.evals import blind_baselines, relations
from pc_clip.interface import run


def said(image: str, text: str, contradiction: str, true: bool, kind="colour", category="Seen") -> Statement:
    return Statement(image, text, contradiction, true, kind, category)


def balanced(n: int) -> list[Statement]:
    """Of n red pictures and n blue ones, that each is red and that each is blue: half of it is true."""
    return [
        said(f"{colour}{i}", *texts, true=texts[0] == colour)
        for i in range(n)
        for colour in ("red", "blue")
        for texts in (("red", "blue"), ("blue", "red"))
    ]


TEXTS = {"red": COLOUR["red"], "blue": COLOUR["blue"]}


# -- what is right -----------------------------------------------------------------------------------------


def test_who_sees_is_right_and_who_does_not_has_half():
    result = relations.evaluate(about(balanced(12), TEXTS))
    for name in ("accuracy", "macro_recall", "macro_precision", "macro_f1"):
        assert result.metrics[name] == 1.0
        assert result.intervals[name] == (1.0, 1.0)
    for name in ("majority", "blind", "blind_mean", "prefers_caption_as_written", "blind_prefers_caption_as_written"):
        assert result.metrics[name] == pytest.approx(0.5)
    assert result.metrics["text_only"] <= 0.5
    assert result.n == 48
    assert result.details["beats_blind"] is True
    assert set(result.details["above"]) == {"majority", "blind", "blind_mean", "text_only"}
    assert result.details["above"]["majority"] == {"difference": 0.5, "low": 0.5, "high": 0.5}


def test_a_blind_scorer_gets_the_majority_rate(caplog):
    """Who always prefers what is written has 1 by that name alone; a tie is half right and never a win."""
    statements = [said(f"red{i}", f"t{i}", f"c{i}", true=i % 3 != 0) for i in range(30)]
    texts = {f"t{i}": [1.0, 1, 1] for i in range(30)} | {f"c{i}": [-1.0, -1, -1] for i in range(30)}
    with caplog.at_level(logging.WARNING):
        result = relations.evaluate(about(statements, texts))
    assert result.metrics["prefers_caption_as_written"] == result.metrics["blind_prefers_caption_as_written"] == 1.0
    assert result.metrics["accuracy"] == result.metrics["majority"] == result.metrics["blind"] == pytest.approx(2 / 3)
    assert result.metrics["macro_recall"] == 0.5
    assert result.details["beats_blind"] is False
    assert "accuracy 66.7, not clearly above what never looks at an image: it is above " in caplog.text
    assert "majority +0.0 [+0.0, +0.0]" in caplog.text
    texts = {"a": COLOUR["red"], "b": COLOUR["red"]}
    tied = [said("red0", "a", "b", True), said("red0", "b", "a", False), said("blue0", "a", "b", True)]
    result = relations.evaluate(about(tied, texts))
    for name in ("accuracy", "blind", "prefers_caption_as_written", "macro_recall", "macro_precision"):
        assert result.metrics[name] == 0.5
    assert result.details["tied"] == 1.0 and result.metrics["majority"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=30))
def test_macro_figures_of_tables_are_those_of_scikit_learn(case):
    true, says = np.array([t for t, _ in case]), np.array([s for _, s in case])
    if len(set(true.tolist())) < 2:
        return
    precision, recall, f1, _ = precision_recall_fscore_support(
        np.repeat(true, 2), np.tile([True, False], len(true)), average="macro", zero_division=0,
        sample_weight=np.stack([says, 1 - says], axis=1).ravel(),
    )  # fmt: skip
    table = np.array([[says[true].sum(), (1 - says[true]).sum(), says[~true].sum(), (1 - says[~true]).sum()]])
    assert relations.macro(table)[:, 0] == pytest.approx([recall, precision, f1])


def test_relations_and_categories_are_told_apart():
    colours = balanced(10)
    wrong = [said(f"red{i}", "blue", "red", true=i % 2 == 0, kind="under", category="Topological") for i in range(10)]
    result = relations.evaluate(about(colours + wrong, TEXTS))
    assert result.details["relations"]["colour"]["n"] == 40
    assert result.details["relations"]["colour"]["accuracy"] == 1.0
    under = result.details["relations"]["under"]
    assert under == result.details["categories"]["Topological"]
    assert under["accuracy"] == under["true"] == 0.5
    assert 0.1 <= under["interval"][0] < 0.5 < under["interval"][1] <= 0.9
    assert result.metrics["accuracy_seen"] == 1.0
    assert "accuracy_topological" not in result.metrics  # ten of them are too few
    assert result.metrics["accuracy"] == pytest.approx(45 / 50)


# -- which images ------------------------------------------------------------------------------------------


def test_only_images_asked_about_are_looked_at_and_absent_ones_are_counted():
    subject = about(balanced(3), TEXTS)
    asked = [s for s in balanced(3) if s.image != "red2"] + [said("green7", "red", "blue", False)]

    def load(row: int) -> Image.Image:
        assert subject.data.ids[row] != "red2"
        return Image.new("RGB", (8, 8), "red" if "red" in subject.data.ids[row] else "blue")

    data = Dataset("made", "test", subject.data.ids, load, "f", statements=tuple(asked))
    result = relations.evaluate(type(subject)(subject.clip, subject.find_base, data, subject.config))
    assert (result.n, result.details["absent"], result.details["photographs"]) == (10, 1, 5)
    assert result.metrics["accuracy"] == 1.0


def test_where_all_are_true_another_mode_is_named():
    kept = [said("red0", "red", "blue", True), said("absent", "red", "blue", False)]
    for statements, message in (
        (kept[:1] * 2, "all 2 statements are true; --mode compositional is for such"),
        (kept, "all 1 statements whose images are in made/test are true"),
    ):
        with pytest.raises(UserError, match=message):
            relations.evaluate(about(statements, TEXTS, images=["red0"]))


# -- what texts give away ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_learnt_from_other_statements_about_the_same_photograph():
    """Each photograph's statements are alike and have one label: by them it would be known, by others it is not."""
    rng = np.random.default_rng(3)
    centres, labels = rng.normal(size=(40, 200)), np.arange(40) % 2 == 0
    photograph = np.repeat(np.arange(40), 6)
    texts = centres[photograph] + 0.01 * rng.normal(size=(240, 200))
    score = blind_baselines.text_only_classifier(texts, labels[photograph], photograph, seed=0)
    assert np.mean((score > 0) == labels[photograph]) < 0.75
    alone = blind_baselines.text_only_classifier(texts, labels[photograph], np.arange(240), seed=0)
    assert np.mean((alone > 0) == labels[photograph]) > 0.95


# -- VSR's own files ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "vsr").is_dir(), reason="VSR's files are not at hand")
@pytest.mark.parametrize("split", ["random", "zeroshot"])
def test_on_vsr_who_does_not_look_is_held_to_the_majority(split, example_clip):
    """No more than 2.5 standard errors above the commoner label, for a grey picture and for texts alone."""
    figures = blind_baselines.audit(example_clip, SHARED / "vsr" / split / "test.jsonl")
    for name in ("blind", "text_only"):
        share, low, high = figures[name]
        assert share <= figures["majority"][0] + 2.5 * (high - low) / (2 * 1.96)


@pytest.mark.skipif(not (SHARED / "vsr").is_dir(), reason="VSR's files are not at hand")
@pytest.mark.parametrize(("split", "shared", "right"), [("random", 1666, 0.731), ("zeroshot", 0, 0.515)])
def test_vsrs_random_split_can_be_passed_by_who_knows_its_train_file(split, shared, right):
    """Who says the opposite of what a caption's label mostly is in the train file, and "true" where that is nothing."""
    learnt: dict[str, int] = {}
    for s in read_statements([SHARED / "vsr" / split / "train.jsonl"]):
        learnt[s.text] = learnt.get(s.text, 0) + (1 if s.true else -1)
    statements = read_statements([SHARED / "vsr" / split / "test.jsonl"])
    assert sum(s.text in learnt for s in statements) == shared
    says = np.array([-learnt.get(s.text, 0) or 1.0 for s in statements])
    assert blind_baselines.right(says, np.array([s.true for s in statements])).mean() == pytest.approx(right, abs=5e-4)


# -- the command -------------------------------------------------------------------------------------------


def rows(path: str, *labelled: tuple[str, str, int]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    lines = [json.dumps({"image": f"{i}.png", "caption": c, "label": n, "relation": r}) for i, (c, r, n) in labelled]
    Path(path).write_text("\n".join(lines))


@pytest.mark.slow
def test_results_are_kept_by_file_content():
    Path("pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), "red" if i % 2 else "blue").save(f"pictures/{i}.png")
    true = [(i, ("The cat is under the table.", "under", i % 2)) for i in range(4)]
    rows("one/test.jsonl", *true)
    rows("two/test.jsonl", *[(i, ("The cat is near the table.", "near", 1 - i % 2)) for i in range(4)])
    command = ["--mode", "relations", "--dataset", "folder", "--root", "pictures", "--model.name", "example"]
    for name in ("one", "two"):
        run.main([*command, "--statements", f"{name}/test.jsonl"])
    first, second = sorted(Path("results").rglob("relations-*.json"))
    assert ("one_test" in first.name, "two_test" in second.name) == (True, True)
    actual = json.loads(first.read_text())
    assert {"accuracy", "majority", "blind", "blind_mean"} <= set(actual["metrics"]) == set(actual["intervals"])
    rows("one/test.jsonl", *true[:3])
    run.main([*command, "--statements", "one/test.jsonl"])
    assert json.loads(first.read_text())["n"] == 3
    with pytest.raises(UserError, match="needs statements of which some are true and some false: --statements PATH"):
        run.main(command)
