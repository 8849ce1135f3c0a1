"""Captions of changes, and the retrieval of pairs, on hand-made answers whose scores are known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pc_clip.core.config.evaluate import CaptionConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import example_sets
from pc_clip.data import pairs as apply
from pc_clip.data.dataset import Change, Dataset
from pc_clip.data.pairs import Caption, distinct_sentences
from pc_clip.data.registry import open_dataset
from pc_clip.evals import EvalContext, _change_sheet, caption, change_retrieval
from pc_clip.metrics import captions
from pc_clip.metrics.captions import Tools
from pc_clip.metrics.retrieval import chance, recalls

pytest.importorskip("pycocoevalcap")


@dataclass
class FakeClip:
    """Says and embeds what it is told to. change.decoder is there where it has sentences to say."""

    said: dict[str, str] = field(default_factory=dict)  # by the id of the image before
    texts: dict[str, list[float]] = field(default_factory=dict)
    pairs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def change(self) -> SimpleNamespace:
        return SimpleNamespace(decoder="a decoder" if self.said else None)

    def embed_texts(self, texts):
        return F.normalize(torch.tensor([self.texts[t] for t in texts], dtype=torch.float32), dim=-1)

    def describe(self) -> str:
        return "fake"


def _captions(clip, data, *, attention=False, **_):
    rng = np.random.default_rng(0)
    words = [clip.said[change.before].split() for change in data.changes]
    return [Caption(" ".join(w), -1.0, w, rng.random((len(w), 2, 4, 4)) if attention else None) for w in words]


def _embed_pairs(clip, data, **_):
    z = [clip.pairs[change.before] for change in data.changes]
    return F.normalize(torch.tensor(z, dtype=torch.float32), dim=-1)


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """Sentences and embeddings come from FakeClip; METEOR, which takes seconds to start, has tests of its own."""
    monkeypatch.setattr(apply, "captions", _captions)
    monkeypatch.setattr(apply, "embed_pairs", _embed_pairs)
    monkeypatch.setattr(captions, "find_java", lambda: None)
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", {"train": 40, "val": 10, "test": 24})


def subject(clip: FakeClip, data: Dataset, base=None, **settings) -> EvalContext:
    return EvalContext(clip, lambda: base, data, EvaluateConfig(dataset=data.name, **settings))


def made(changes: list[Change], **known) -> Dataset:
    ids = [image for change in changes for image in (change.before, change.after)]
    return Dataset("made", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", changes=tuple(changes), **known)


def truth(data: Dataset) -> dict[str, str]:
    return {change.before: change.sentences[0] for change in data.changes}


# -- captions ------------------------------------------------------------------------------------------------


def test_who_says_what_the_references_say_is_right_everywhere():
    data = open_dataset("example_changes", split="test")
    found = caption.evaluate(subject(FakeClip(truth(data)), data))
    kinds = {change.kind for change in data.changes}
    for name in ("right", "right_type", "right_object", "right_value", "changed", *(f"right_{k}" for k in kinds)):
        assert found.metrics[name] == 1
        assert found.intervals[name] == (1, 1)
    for name in ("bleu_1", "bleu_4", "rouge_l", *(f"bleu_4_{kind}" for kind in kinds)):
        assert found.metrics[name] == pytest.approx(1)
    assert found.n == 24
    assert found.details["captioner"] == "decoder"
    assert found.details["distinct"] == len(set(truth(data).values()))
    assert found.details["told_as"] == {kind: {kind: sum(c.kind == kind for c in data.changes)} for kind in kinds}


def test_who_always_says_that_nothing_changed_is_right_of_unchanged_pairs_alone():
    data = open_dataset("example_changes", split="test")
    unchanged = np.array([change.kind == "none" for change in data.changes])
    said = next(change.sentences[0] for change in data.changes if change.kind == "none")
    found = caption.evaluate(subject(FakeClip({change.before: said for change in data.changes}), data))
    assert found.metrics["right"] == found.metrics["changed"] == unchanged.mean()
    assert found.metrics["right_none"] == 1
    assert found.metrics["right_type"] == found.metrics["right_object"] == 0
    assert found.metrics["shuffled_right"] == found.metrics["right"]  # who never looks loses nothing by a shuffle
    assert found.metrics["shuffled_cider"] == pytest.approx(found.metrics["cider"])
    assert found.items["right"] == unchanged.astype(float).tolist()


def test_a_sentence_that_says_nothing_tells_of_no_change_and_of_none():
    data = open_dataset("example_changes", split="test")
    found = caption.evaluate(subject(FakeClip(dict.fromkeys(truth(data), "the the a")), data))
    assert found.metrics["changed"] == found.metrics["right"] == 0
    assert all(told == {"not understood": n} for told in found.details["told_as"].values() for n in told.values())


def test_each_sentence_is_scored_against_its_own_pair():
    """Half of the pairs get their own sentence. Items say which, and their mean is the metric."""
    data = open_dataset("example_changes", split="test")
    said = truth(data)
    wrong = [change.before for change in data.changes if change.kind != "none"][::2]
    said |= dict.fromkeys(wrong, "a purple cow appeared")
    found = caption.evaluate(subject(FakeClip(said), data))
    assert found.items["right"] == [float(change.before not in wrong) for change in data.changes]
    for name in ("cider", "rouge_l", "right", "changed"):
        assert found.metrics[name] == pytest.approx(np.mean(found.items[name]), abs=1e-4)
        low, high = found.intervals[name]
        assert low < found.metrics[name] < high
    for kind in {change.kind for change in data.changes}:
        of = [change.kind == kind for change in data.changes]
        assert found.metrics[f"cider_{kind}"] == pytest.approx(np.array(found.items["cider"])[of].mean(), abs=1e-4)


def test_baselines_that_never_look_stand_beside_the_scores():
    data, train = (open_dataset("example_changes", split=split) for split in ("test", "train"))
    every = [sentence for change in train.changes for sentence in change.sentences]
    common = captions.most_frequent(every)
    assert every.count(common) == max(map(every.count, every))
    found = caption.evaluate(subject(FakeClip(truth(data)), data))
    alone = captions.score([common] * 24, [c.sentences for c in data.changes], Tools(None), quick=True)
    assert found.metrics["most_common_cider"] == alone.corpus["cider"]
    assert found.metrics["most_common_bleu_4"] == alone.corpus["bleu_4"]
    assert found.metrics["most_common_right"] == np.mean([all(data.judge(n, common).values()) for n in range(24)])
    assert found.metrics["shuffled_right"] < 0.5 < found.metrics["right"]
    assert found.metrics["shuffled_cider"] < found.metrics["cider"]


@pytest.mark.parametrize("seed", range(6))
def test_a_shuffle_does_not_follow_the_order_of_the_file(seed):
    """As in CLEVR-Change, every other pair is unchanged. Whoever gets another's sentence is right of about half."""
    changes = [
        Change(f"{n}a", f"{n}b", ("it moved",), "move") if n % 2 else Change(f"{n}a", f"{n}b", ("nothing",), "none")
        for n in range(200)
    ]

    def judge(row: int, said: str) -> dict[str, bool]:
        return dict.fromkeys(("type", "object", "value"), said == changes[row].sentences[0])

    data = made(changes, judge=judge)
    found = caption.evaluate(subject(FakeClip(truth(data)), data, seed=seed))
    assert found.metrics["right"] == 1
    assert 0.3 < found.metrics["shuffled_right"] < 0.7


@pytest.mark.parametrize("pairs", [2, 3, 8])
def test_no_pair_gets_its_own_sentence_by_a_shuffle(pairs):
    """Each has a sentence of its own, which nobody else's agrees with."""
    changes = [Change(f"{n}a", f"{n}b", (f"{'x' * (n + 1)} y{n} z{n} w{n}",)) for n in range(pairs)]
    data = made(changes)
    for seed in range(5):
        found = caption.evaluate(subject(FakeClip(truth(data)), data, seed=seed))
        assert found.metrics["bleu_1"] == pytest.approx(1)
        assert found.metrics["shuffled_bleu_4"] < 1e-6


def test_without_a_decoder_the_nearest_training_sentence_is_said():
    data, train = (open_dataset("example_changes", split=split) for split in ("test", "train"))
    sentences = list(dict.fromkeys(s for change in train.changes for s in change.sentences))
    texts = dict(zip(sentences, np.eye(len(sentences)).tolist()))
    chosen = {change.before: sentences[3 * n] for n, change in enumerate(data.changes)}
    clip = FakeClip(texts=texts, pairs={before: texts[sentence] for before, sentence in chosen.items()})
    found = caption.evaluate(subject(clip, data))
    assert found.details["captioner"] == "nearest training sentence"
    assert [row["generated"] for row in found.details["sentences"]] == list(chosen.values())[:20]
    assert found.metrics["right"] < 1


def test_a_data_set_that_says_no_kinds_and_judges_nothing_has_scores_alone():
    changes = [Change(f"{n}a", f"{n}b", (f"thing {n} moved left", f"the thing {n} is gone")) for n in range(4)]
    data = made(changes)
    found = caption.evaluate(subject(FakeClip(truth(data)), data))
    plain = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert set(found.intervals) == plain
    assert set(found.metrics) == plain | {"shuffled_bleu_4", "shuffled_cider"}  # no training split, no commonest
    assert set(found.items) == {"cider", "rouge_l"}
    assert "no Java runs here" in found.details["meteor"]


def test_kinds_that_a_file_writes_in_two_ways_are_one():
    kinds = ["Move", "move", "add", "colour  change"]
    changes = [Change(f"{n}a", f"{n}b", (f"thing {n} did what things do",), kind) for n, kind in enumerate(kinds)]
    data = made(changes)
    found = caption.evaluate(subject(FakeClip(truth(data) | {"0a": "no"}), data))
    cider = found.items["cider"]
    assert cider[0] == 0 < cider[1]
    assert found.metrics["cider_move"] == pytest.approx(cider[1] / 2, abs=1e-4)
    assert {"cider_add", "cider_colour_change"} < set(found.metrics)


def test_models_that_can_say_nothing_are_told_apart():
    data = made([Change("a", "b", ("it moved",))])
    with pytest.raises(UserError, match="has no pair encoder"):
        caption.evaluate(subject(SimpleNamespace(change=None, describe=lambda: "plain"), data))
    with pytest.raises(UserError, match="has no decoder, and made/test has no training sentences"):
        caption.evaluate(subject(FakeClip(), data))
    assert not caption.applies(made([]), EvaluateConfig())


def test_a_decoder_may_say_nothing():
    data = made([Change("a", "b", ("it moved",)), Change("c", "d", ("it left",))])
    found = caption.evaluate(subject(FakeClip(truth(data) | {"c": ""}), data))
    assert [s["generated"] for s in found.details["sentences"]] == ["it moved", ""]
    assert found.items["rouge_l"] == [1, 0]
    assert "sheet.png" in found.pictures


def test_a_kind_that_a_draw_has_no_pair_of_is_not_said_wrongly_there():
    """Of 20 pairs one is of the kind, and in a third of the draws none."""
    data = made([Change(f"{n}", "b", ("a thing has moved to there",), "add" if n else "drop") for n in range(20)])
    found = caption.evaluate(subject(FakeClip(truth(data)), data))
    assert found.intervals["bleu_4_drop"] == pytest.approx((1, 1))
    assert found.intervals["cider_drop"][0] == found.metrics["cider_drop"]


def test_spice_is_refused_before_anything_is_decoded(monkeypatch):
    data = made([Change("a", "b", ("it moved",))])
    monkeypatch.setattr(apply, "captions", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match="SPICE"):
        caption.evaluate(subject(FakeClip(truth(data)), data, caption=CaptionConfig(spice=True)))


def test_the_training_split_is_part_of_what_a_result_depends_on():
    data = open_dataset("example_changes", split="test")
    train = caption.also_reads(subject(FakeClip(), data))
    assert train.changes == open_dataset("example_changes", split="train").changes
    assert caption.also_reads(subject(FakeClip(), made([]))) is None


def lines(root: Path, **files: list[str]) -> Path:
    """Changes in files of JSON lines, whose pictures are those of test alone."""
    root.mkdir()
    for name, sentences in files.items():
        rows = [{"before": f"{name}{n}.png", "after": f"{name}.png", "sentence": s} for n, s in enumerate(sentences)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("test0", "test1", "test"):
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    return root


def test_of_training_pairs_the_sentences_are_enough(tmp_path):
    root = lines(tmp_path / "own", train=["it left", "it moved", "it left"], test=["it left", "it came"])
    data = open_dataset("changes", root, "test")
    found = caption.evaluate(subject(FakeClip(truth(data)), data, root=str(root)))
    assert found.metrics["most_common_bleu_4"] > 0


def test_without_a_training_split_a_decoder_is_measured_all_the_same(tmp_path, caplog):
    root = lines(tmp_path / "own", test=["it left", "it came"])
    data = open_dataset("changes", root, "test")
    caplog.set_level("INFO")
    found = caption.evaluate(subject(FakeClip(truth(data)), data, root=str(root)))
    assert "bleu_4" in found.metrics and "most_common_bleu_4" not in found.metrics
    assert "no training sentences" in caplog.text and "has no train.jsonl" in caplog.text
    with pytest.raises(UserError, match="has no decoder, and changes/test has no training sentences"):
        caption.evaluate(subject(FakeClip(), data, root=str(root)))


# -- the sheet -----------------------------------------------------------------------------------------------


def test_every_kind_has_its_place_on_the_sheet():
    kinds = ["add"] * 50 + ["none"] * 3 + ["move"] + ["drop"] * 20
    rows = caption.draw_rows(kinds, 12, np.random.default_rng(0))
    assert {kind: [kinds[row] for row in rows].count(kind) for kind in set(kinds)} in (
        {"add": 4, "none": 3, "move": 1, "drop": 4},
        {"add": 5, "none": 3, "move": 1, "drop": 3},
    )
    assert caption.draw_rows(kinds, 12, np.random.default_rng(0)) == rows
    assert caption.draw_rows(["", ""], 12, np.random.default_rng(0)) == [0, 1]


def test_the_sheet_shows_right_sentences_green_and_wrong_ones_red():
    data = open_dataset("example_changes", split="test")
    for right, here, absent in ((True, "GREEN", "RED"), (False, "RED", "GREEN"), (None, "GREY", "RED")):
        shown = [_change_sheet.Shown(change, "the star is gone", right, [], None) for change in data.changes[:2]]
        picture = _change_sheet.change_sheet(data, shown, "title")
        colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.image.getcolors(2**24)}
        assert getattr(_change_sheet, here) in colours
        assert getattr(_change_sheet, absent) not in colours
    assert "2 pairs of images" in picture.alt


def test_no_text_runs_out_of_its_cell():
    """Every line is measured; a word that no line holds is broken and nothing of it is lost."""
    text = "the " + "very" * 40 + " long sentence " * 9
    lines = _change_sheet.wrap(text, 300, 14, True)
    assert all(_change_sheet._font(14, True).getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _change_sheet.wrap("", 300, 14) == [""]


def test_maps_are_shown_of_words_that_name_something():
    tokens = ["the", "red", "star", "is", "gone", ",", "the", "star"]
    attention = np.full((8, 2, 4, 4), 1 / 32)
    for place, peak in ((0, 0.9), (1, 0.2), (2, 0.5), (4, 0.3), (7, 0.8)):
        attention[place, 0, 0, 0] = peak
    assert _change_sheet.chosen_words(tokens, attention) == [2, 4]
    assert _change_sheet.chosen_words(["the", "is"], attention[:2]) == []


def test_a_map_is_bright_where_it_was_looked_at():
    looks = np.zeros((4, 4))
    looks[3, 0] = 0.5  # bottom left
    seen = np.asarray(_change_sheet.overlay(Image.new("RGB", (64, 64), "black"), looks, 0.5, 80)).astype(int)
    plain = np.asarray(_change_sheet.overlay(Image.new("RGB", (64, 64), "black"), 0 * looks, 0.5, 80)).astype(int)
    changed = np.abs(seen - plain).sum(2)
    assert changed[65:78, 2:15].min() > 50
    assert changed[:40, 40:].max() == 0


# -- retrieval -----------------------------------------------------------------------------------------------


def test_sentences_of_a_pair_are_never_its_wrong_answers():
    pairs = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=-1)
    sentences = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0]]), dim=-1)
    assert recalls(pairs, sentences, [[0, 1], [2]]) == {"p2s_r1": 1, "s2p_r1": 1}
    assert recalls(pairs, sentences, [[2], [0, 1]]) == {"p2s_r1": 0, "s2p_r1": 0}


def test_a_sentence_said_of_several_pairs_is_one_sentence_and_finds_any_of_them():
    changes = [Change("a", "b", ("nothing changed", "it moved")), Change("c", "d", ("nothing changed",))]
    assert distinct_sentences(changes) == (["nothing changed", "it moved"], [[0, 1], [0]])
    pairs = torch.eye(3)[:2]  # the first pair lies at "nothing changed", the second at nothing
    assert recalls(pairs, torch.eye(3)[[0, 2]], [[0, 1], [0]]) == {"p2s_r1": 0.5, "s2p_r1": 0.5}


def test_two_images_that_are_listed_twice_are_no_wrong_answer_to_one_another():
    """As in Spot-the-Diff, where several people wrote of the same pair: its embedding is the same each time."""
    changes = [
        Change("a", "b", ("x",)),
        Change("c", "d", ("z",)),
        Change("a", "b", ("y", "x")),
        Change("b", "a", ("w",)),
    ]
    texts, belongs = distinct_sentences(changes)
    assert (texts, belongs) == (["x", "z", "y", "w"], [[0, 2], [1], [0, 2], [3]])
    pairs = torch.eye(3)[[0, 1, 0, 2]]
    assert recalls(pairs, torch.eye(3)[[0, 1, 0, 2]], belongs) == {"p2s_r1": 1, "s2p_r1": 1}


@given(st.integers(0, 200))
def test_recalls_are_those_of_a_plain_count(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(2, 9)), int(rng.integers(2, 30))
    belongs = [sorted(rng.choice(m, int(rng.integers(1, min(m, 5))), replace=False).tolist()) for _ in range(n)]
    used = {s: k for k, s in enumerate(sorted({s for of in belongs for s in of}))}
    belongs, m = [[used[s] for s in of] for of in belongs], len(used)
    z, t = (F.normalize(torch.from_numpy(rng.normal(size=(k, 5))).float(), dim=-1) for k in (n, m))
    cosine = (z @ t.T).numpy()
    said = np.array([[s in of for s in range(m)] for of in belongs])
    expected = {}
    for k in (1, 5, 10):
        if k < m:
            expected[f"p2s_r{k}"] = np.mean([said[row][np.argsort(-cosine[row])[:k]].any() for row in range(n)])
        if k < n:
            expected[f"s2p_r{k}"] = np.mean([said.T[col][np.argsort(-cosine.T[col])[:k]].any() for col in range(m)])
    assert recalls(z, t, belongs) == pytest.approx(expected)


def test_a_model_that_tells_nothing_apart_is_not_above_chance():
    belongs = [[0], [1], [2, 3], *[[n] for n in range(4, 30)]]
    found, level = recalls(torch.ones(29, 2), torch.ones(30, 2), belongs), chance(belongs, 30)
    assert all(found[name] <= level[f"chance_{name}"] + 1e-9 for name in found)


def test_chance_is_what_random_orders_get():
    belongs = [[0, 1, 2], [2], [3], [4, 5]]
    level, rng = chance(belongs, 6), np.random.default_rng(0)
    hits = np.mean([[set(rng.permutation(6)[:5]) & set(of) != set() for of in belongs] for _ in range(20_000)])
    assert level["chance_p2s_r5"] == pytest.approx(hits, abs=0.01)
    assert level["chance_p2s_r1"] == pytest.approx(np.mean([3, 1, 1, 2]) / 6)
    assert level["chance_s2p_r1"] == pytest.approx((5 * 1 + 2) / 6 / 4)
    assert "chance_s2p_r5" not in level


def test_retrieval_of_a_whole_data_set():
    """Pair n lies at its own sentence but for the last two, which are swapped; subtraction finds none."""
    kinds = ["add", "add", "none", "none", "move", "move"]
    changes = [Change(f"{n}a", f"{n}b", (f"sentence {n}",), kind) for n, kind in enumerate(kinds)]
    texts = {f"sentence {n}": np.eye(6)[n].tolist() for n in range(6)}
    pairs = {f"{n}a": np.eye(6)[k].tolist() for n, k in enumerate([0, 1, 2, 3, 5, 4])}
    clip = FakeClip(texts=texts, pairs=pairs)
    asked = subject(clip, made(changes), base=FakeClip(texts=texts))
    after = np.roll(np.eye(6), 1, axis=0)  # the image after less the one before is the next pair's sentence
    asked.__dict__["base_z"] = torch.tensor(np.stack([np.zeros((6, 6)), after], 1).reshape(12, 6)).float()
    found = change_retrieval.evaluate(asked)
    assert found.metrics["p2s_r1"] == found.metrics["s2p_r1"] == pytest.approx(4 / 6)
    assert (found.metrics["p2s_add_r1"], found.metrics["p2s_none_r1"], found.metrics["p2s_move_r1"]) == (1, 1, 0)
    assert found.metrics["p2s_r5"] == pytest.approx(4 / 6 + 2 / 6 * 4 / 5)  # the swapped tie with all but the first
    assert "p2s_r10" not in found.metrics
    assert found.metrics["chance_p2s_r1"] == pytest.approx(1 / 6)
    assert found.metrics["subtraction_p2s_r1"] == 0
    assert found.items["p2s_r1"] == [1, 1, 1, 1, 0, 0]
    low, high = found.intervals["p2s_r1"]
    assert 0 < low < 4 / 6 < high <= 1
    assert found.n == 6


def test_retrieval_wants_a_pair_encoder_two_pairs_and_finite_numbers():
    changes = [Change("a", "b", ("x",)), Change("c", "d", ("y",))]
    with pytest.raises(UserError, match="has no pair encoder"):
        change_retrieval.evaluate(subject(SimpleNamespace(change=None, describe=lambda: "plain"), made(changes)))
    with pytest.raises(UserError, match="needs two"):
        change_retrieval.evaluate(subject(FakeClip(), made(changes[:1])))
    clip = FakeClip(texts={"x": [1, 0], "y": [0, 1]}, pairs={"a": [float("nan"), 1], "c": [0, 1]})
    with pytest.raises(UserError, match="pairs of made/test are not finite"):
        change_retrieval.evaluate(subject(clip, made(changes)))


def test_judging_goes_by_the_rows_of_the_data_set():
    right = {0: "left", 1: "gone", 2: "left"}

    def judge(row: int, said: str) -> dict[str, bool]:
        return dict.fromkeys(("type", "object", "value"), said == right[row])

    kinds = ["move", "drop", "move"]
    changes = [Change(f"{n}a", f"{n}b", (right[n],), kind) for n, kind in enumerate(kinds)]
    judged = caption.judge(made(changes, judge=partial(judge)), ["left", "left", "what"])
    assert judged.right.tolist() == [True, False, False]
    assert judged.told.tolist() == ["move", "move", ""]
