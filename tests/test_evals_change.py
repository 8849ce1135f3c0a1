"""Captions of changes, and the retrieval of pairs, on hand-made answers whose scores are known."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
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
from pc_clip.evals import EvalContext, caption, change_retrieval
from pc_clip.metrics import captions
from pc_clip.metrics.retrieval import chance, recalls, relation

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
    monkeypatch.setenv("PATH", "")  # no Java
    monkeypatch.setattr(example_sets, "CHANGES_SIZES", {"train": 40, "val": 10, "test": 24})


def subject(clip: FakeClip, data: Dataset, base=None, **settings) -> EvalContext:
    return EvalContext(clip, lambda: base, data, EvaluateConfig(dataset=data.name, **settings))


def made(changes: list[Change], **known) -> Dataset:
    ids = [image for change in changes for image in (change.before, change.after)]
    return Dataset("made", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", changes=tuple(changes), **known)


def truth(data: Dataset) -> dict[str, str]:
    return {change.before: change.sentences[0] for change in data.changes}


# -- captions ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_repeating_the_references_is_right_everywhere():
    data, train = (open_dataset("example_changes", split=split) for split in ("test", "train"))
    result = caption.evaluate(subject(FakeClip(truth(data)), data))
    kinds = {change.kind for change in data.changes}
    for name in ("right", "right_type", "right_object", "right_value", "changed", *(f"right_{k}" for k in kinds)):
        assert result.metrics[name] == 1
        assert result.intervals[name] == (1, 1)
    for name in ("bleu_1", "bleu_4", "rouge_l", *(f"bleu_4_{kind}" for kind in kinds)):
        assert result.metrics[name] == pytest.approx(1)
    assert (result.n, result.details["captioner"]) == (24, "decoder")
    assert result.details["distinct"] == len(set(truth(data).values()))
    assert result.details["described_as"] == {kind: {kind: sum(c.kind == kind for c in data.changes)} for kind in kinds}
    ((common, _),) = Counter(sentence for change in train.changes for sentence in change.sentences).most_common(1)
    alone = captions.score([common] * 24, [c.sentences for c in data.changes], quick=True)
    assert result.metrics["most_common_cider"] == alone.corpus["cider"]
    assert result.metrics["most_common_bleu_4"] == alone.corpus["bleu_4"]
    assert result.metrics["most_common_right"] == np.mean([all(data.judge(n, common).values()) for n in range(24)])
    assert result.metrics["shuffled_right"] < 0.5
    assert result.metrics["shuffled_cider"] < result.metrics["cider"]


@pytest.mark.slow
def test_who_always_says_that_nothing_changed_is_right_of_unchanged_pairs_alone():
    data = open_dataset("example_changes", split="test")
    unchanged = np.array([change.kind == "none" for change in data.changes])
    sentences = next(change.sentences[0] for change in data.changes if change.kind == "none")
    result = caption.evaluate(subject(FakeClip({change.before: sentences for change in data.changes}), data))
    assert result.metrics["right"] == result.metrics["changed"] == unchanged.mean()
    assert result.metrics["right_none"] == 1
    assert result.metrics["right_type"] == result.metrics["right_object"] == 0
    assert result.metrics["shuffled_right"] == result.metrics["right"]  # who never looks loses nothing by a shuffle
    assert result.metrics["shuffled_cider"] == pytest.approx(result.metrics["cider"])
    assert result.items["right"] == unchanged.astype(float).tolist()


@pytest.mark.slow
def test_each_sentence_is_scored_against_its_own_pair():
    """Half of the pairs get their own sentence. Items say which, and their mean is the metric."""
    data = open_dataset("example_changes", split="test")
    sentences = truth(data)
    wrong = [change.before for change in data.changes if change.kind != "none"][::2]
    sentences |= dict.fromkeys(wrong, "a purple cow appeared")
    result = caption.evaluate(subject(FakeClip(sentences), data))
    assert result.items["right"] == [float(change.before not in wrong) for change in data.changes]
    for name in ("cider", "rouge_l", "right", "changed"):
        assert result.metrics[name] == pytest.approx(np.mean(result.items[name]), abs=1e-4)
        low, high = result.intervals[name]
        assert low < result.metrics[name] < high
    for kind in {change.kind for change in data.changes}:
        of = [change.kind == kind for change in data.changes]
        assert result.metrics[f"cider_{kind}"] == pytest.approx(np.array(result.items["cider"])[of].mean(), abs=1e-4)


@pytest.mark.slow
def test_without_a_decoder_the_nearest_training_sentence_is_said():
    data, train = (open_dataset("example_changes", split=split) for split in ("test", "train"))
    sentences = list(dict.fromkeys(s for change in train.changes for s in change.sentences))
    texts = dict(zip(sentences, np.eye(len(sentences)).tolist()))
    chosen = {change.before: sentences[3 * n] for n, change in enumerate(data.changes)}
    clip = FakeClip(texts=texts, pairs={before: texts[sentence] for before, sentence in chosen.items()})
    result = caption.evaluate(subject(clip, data))
    assert result.details["captioner"] == "nearest training sentence"
    assert [row["generated"] for row in result.details["sentences"]] == list(chosen.values())[:20]
    assert result.metrics["right"] < 1


def test_a_decoder_is_evaluated_without_a_training_split(tmp_path, caplog):
    root = tmp_path / "own"
    root.mkdir()
    rows = [{"before": f"{n}.png", "after": "after.png", "sentence": s} for n, s in enumerate(("it left", "it came"))]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("0", "1", "after"):
        Image.new("RGB", (8, 8)).save(root / f"{name}.png")
    data = open_dataset("changes", root, "test")
    caplog.set_level("INFO")
    result = caption.evaluate(subject(FakeClip(truth(data) | {"1.png": ""}), data, root=str(root)))
    assert "bleu_4" in result.metrics and "most_common_bleu_4" not in result.metrics
    assert [s["generated"] for s in result.details["sentences"]] == ["it left", ""]
    assert result.items["rouge_l"] == [1, 0] and "sheet.png" in result.pictures
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


# -- retrieval -----------------------------------------------------------------------------------------------


def test_duplicate_pairs_are_not_wrong_answers():
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
    sentences = np.array([[s in of for s in range(m)] for of in belongs])
    expected = {}
    for k in (1, 5, 10):
        if k < m:
            expected[f"p2s_r{k}"] = np.mean([sentences[row][np.argsort(-cosine[row])[:k]].any() for row in range(n)])
        if k < n:
            expected[f"s2p_r{k}"] = np.mean(
                [sentences.T[col][np.argsort(-cosine.T[col])[:k]].any() for col in range(m)]
            )
    assert recalls(z, t, belongs) == pytest.approx(expected)


def test_chance_is_what_random_orders_get():
    belongs = [[0, 1, 2], [2], [3], [4, 5]]
    level, rng = chance(relation(belongs, 6)), np.random.default_rng(0)
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
    result = change_retrieval.evaluate(asked)
    assert result.metrics["p2s_r1"] == result.metrics["s2p_r1"] == pytest.approx(4 / 6)
    assert (result.metrics["p2s_add_r1"], result.metrics["p2s_none_r1"], result.metrics["p2s_move_r1"]) == (1, 1, 0)
    assert result.metrics["p2s_r5"] == pytest.approx(4 / 6 + 2 / 6 * 4 / 5)  # the swapped tie with all but the first
    assert "p2s_r10" not in result.metrics
    assert result.metrics["chance_p2s_r1"] == pytest.approx(1 / 6)
    assert result.metrics["subtraction_p2s_r1"] == 0
    assert result.items["p2s_r1"] == [1, 1, 1, 1, 0, 0]
    low, high = result.intervals["p2s_r1"]
    assert 0 < low < 4 / 6 < high <= 1
    assert result.n == 6


def test_what_cannot_be_measured_is_refused_before_anything_is_decoded(monkeypatch):
    one, two = (made([Change("a", "b", ("x",)), Change("c", "d", ("y",))][:n]) for n in (1, 2))
    plain = SimpleNamespace(change=None, describe=lambda: "plain")
    monkeypatch.setattr(apply, "captions", lambda *_, **__: pytest.fail("decoded"))
    for module, clip, data, settings, message in (
        (caption, plain, one, {}, "has no pair encoder"),
        (caption, FakeClip(), one, {}, "has no decoder, and made/test has no training sentences"),
        (caption, FakeClip(truth(one)), one, {"caption": CaptionConfig(spice=True)}, "SPICE"),
        (change_retrieval, plain, two, {}, "has no pair encoder"),
        (change_retrieval, FakeClip(), one, {}, "needs two"),
    ):
        with pytest.raises(UserError, match=message):
            module.evaluate(subject(clip, data, **settings))
