"""Each evaluation on hand-made embeddings whose right answer is known by arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from made_space import FakeClip, made_context
from PIL import Image

from pc_clip.core.config.evaluate import EVALUATIONS, DifferenceConfig, EvaluateConfig, RankConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Attribute, Change, Dataset, Question, Statement
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.evals import average, compositional, difference, find, rank, relations, zeroshot
from pc_clip.evals.evaluate import measure
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model

# -- zero-shot ---------------------------------------------------------------------------------------------


def test_zeroshot_counts_what_is_right_and_where_it_goes_wrong():
    question = Question("animal", ("cat", "dog", "cow"), np.arange(4), np.array([0, 1, 1, 2]), ("a {}",))
    texts = {"a cat": [1, 0, 0], "a dog": [0, 1, 0], "a cow": [0, 0, 1]}
    result = zeroshot.evaluate(
        made_context(texts, [[1, 0.1, 0], [0, 1, 0.2], [0.9, 0.5, 0], [0, 0.4, 0.6]], questions=(question,))
    )
    assert result.metrics == {"zeroshot": 0.75, "zeroshot_animal": 0.75}
    assert result.n == 4
    assert result.details["animal"]["per_class"] == {"cat": 1.0, "dog": 0.5, "cow": 1.0}
    assert result.details["animal"]["confusions"] == [{"true": "dog", "guessed": "cat", "share": 0.5}]


def test_the_mean_over_templates_is_of_unit_vectors():
    question = Question("q", ("x", "y"), np.arange(1), np.array([0]), ("a {}", "the {}"))
    clip = FakeClip({"a x": [1, 0], "the x": [0, 1], "a y": [-1, 0], "the y": [-1, 0]}, [[1, 0]])
    assert torch.allclose(
        zeroshot.class_embeddings(clip, question), F.normalize(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    )


# -- differences -------------------------------------------------------------------------------------------

SIZE = Attribute("size", np.array([1.0, 2.0, 3.0, np.nan]), "more", "less", "big", "small", gap=0.5)


def sentences(vector_if_up, also_reversed=True):
    """Embeddings for all wordings: along +v when the first image has more, -v when it has less."""
    v = np.array(vector_if_up, dtype=float)
    result = {"big": [1, 0, 0], "small": [-1, 0, 0]}
    for wording in range(4):
        sign = 1 if also_reversed or wording % 2 == 0 else -1
        result[difference.contrast("more", "less", wording)] = (sign * v).tolist()
        result[difference.contrast("less", "more", wording)] = (-sign * v).tolist()
    return result


Z = [[-1, 1, 0], [0, 1, 0], [1, 1, 0], [5, -1, 2]]  # the first coordinate grows with size


def test_what_sentences_say_is_told_from_what_they_mention_first():
    """Along the attribute all is right, against it all wrong; who knows only what comes first fails when reversed.

    A scorer that says the same of every sentence is at chance, because pairs come in random order.
    """

    def metrics(texts, n_pairs=50):
        config = EvaluateConfig(difference=DifferenceConfig(n_pairs=n_pairs))
        return difference.evaluate(made_context(texts, Z, config, attributes=(SIZE,))).metrics

    right, wrong = metrics(sentences([1, 0, 0])), metrics(sentences([-1, 0, 0]))
    for name in ("difference", "two_way", "reversed"):
        assert (right[name], wrong[name]) == (1.0, 0.0)
    assert right["caption_subtraction"] == wrong["caption_subtraction"] == 1.0
    first = metrics(sentences([1, 0, 0], also_reversed=False))
    assert (first["difference"], first["reversed"]) == (1.0, 0.0)
    always = metrics(dict.fromkeys(sentences([1, 0, 0]), [1.0, 0, 0]), n_pairs=2000)
    assert always["difference"] == pytest.approx(0.5, abs=0.05) and always["two_way"] == 0.0


def test_claims_are_true_clear_and_drawn_by_seed(small_example):
    for attribute in open_dataset("example", split="val").attributes:
        claims = difference.draw_claims(attribute, 50, [0, 1])
        gaps = attribute.value[claims.pairs[:, 0]] - attribute.value[claims.pairs[:, 1]]
        assert (np.abs(gaps) > attribute.gap).all() and claims.draw.tolist() == [0] * 50 + [1] * 50
        for n, up in enumerate(gaps > 0):
            more, less = (attribute.more, attribute.less) if up else (attribute.less, attribute.more)
            text, opposite, other = claims.text[n], claims.opposite[n], claims.reversed[n]
            assert text.index("first") < text.index("second") and text.index(more) < text.index(less)
            assert opposite.index(less) < opposite.index(more)
            assert other.index("second") < other.index("first") and other.index(less) < other.index(more)
        assert claims.text[50:] == difference.draw_claims(attribute, 50, [1]).text != claims.text[:50]


def test_recall_at_1_is_over_disjoint_blocks_and_ties_are_shared():
    eye = torch.eye(4)
    assert difference.recall_at_1(eye, eye, candidates=2) == 1.0
    assert difference.recall_at_1(eye, eye.roll(1, 0), candidates=4) == 0.0
    assert difference.recall_at_1(torch.ones(4, 2), torch.ones(4, 2), candidates=4) == 0.25
    assert difference.recall_at_1(eye, eye[[1, 0, 2, 3]], candidates=2) == 0.5
    twice = eye[[0, 0, 1, 2]]  # two sentences about the first pair
    assert difference.recall_at_1(twice, twice, np.array([[0, 1], [0, 1], [0, 2], [0, 3]]), candidates=4) == 1.0


def test_sentences_of_a_file_sign_two_way_mirrored_and_recall(tmp_path):
    texts, rows = {}, []
    for n in range(3):
        text = f"The first image shows a{n}, while the second shows b."
        texts[text], texts[swap_roles(text)] = np.eye(3)[n].tolist(), (-np.eye(3)[n]).tolist()
        rows.append(to_line(Difference(f"i{2 * n}", f"i{2 * n + 1}", text)))
    z = np.concatenate([np.stack([np.ones(3) + e, np.ones(3) - e]) for e in np.eye(3)])
    (tmp_path / "d.jsonl").write_text("".join(rows))
    result = difference.evaluate(
        made_context(texts, z.tolist(), EvaluateConfig(difference=DifferenceConfig(sentences="d.jsonl")))
    )
    assert result.metrics == {"sign": 1.0, "difference_r1": 1.0, "two_way": 1.0, "mirrored": 1.0}


# -- ranking -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 99))
def test_pair_accuracy_is_the_share_of_clear_pairs_in_order(values, seed):
    value = np.array(values, dtype=float)
    score = np.random.default_rng(seed).integers(0, 4, len(value)).astype(float)
    attribute = Attribute("a", value, "", "", "", "", gap=1.0)
    pairs = [(i, j) for i in range(len(value)) for j in range(len(value)) if value[i] - value[j] > 1]
    if pairs:
        expected = np.mean([1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0 for i, j in pairs])
        assert rank.pair_accuracy(score, attribute) == pytest.approx(expected)


def test_attributes_and_folders_are_ranked():
    known = rank.evaluate(made_context(sentences([1, 0, 0]), Z, attributes=(SIZE,)))
    assert known.metrics["rank"] == known.metrics["spearman_size"] == known.metrics["rank_by_subtraction"] == 1.0
    assert known.pictures.keys() == {"size.png"}
    texts = {"warm": [1.0, 0.0], "cold": [0.0, 1.0]}
    z = [[0.2, 1.0], [1.0, 0.9], [1.0, 0.1]]
    alone = rank.evaluate(made_context(texts, z, EvaluateConfig(rank=RankConfig(attribute="warm"))))
    against = rank.evaluate(made_context(texts, z, EvaluateConfig(rank=RankConfig(attribute="warm", against="cold"))))
    for result in (alone, against):
        assert result.pictures["ranked.png"].image.width > 300
        assert [row["image"] for row in result.details["order"]] == ["i2", "i1", "i0"]
    unit = np.array([1.0, 0.9]) / np.hypot(1.0, 0.9)
    assert against.details["order"][1]["score"] == pytest.approx(unit[0] - unit[1], abs=1e-6)


# -- which evaluations, and where their results are kept ----------------------------------------------------


def test_what_each_evaluation_lacks():
    """None where data and settings have all it needs, else what is missing, in words."""

    def data(name="made", **known) -> Dataset:
        return Dataset(name, "test", ["0"], lambda row: Image.new("RGB", (4, 4)), "f", **known)

    def config(mode: str, **options) -> EvaluateConfig:
        made = EvaluateConfig()
        for name, value in options.items():
            setattr(getattr(made, mode), name, value)
        return made

    question = Question("q", ("a", "b"), np.arange(1), np.zeros(1, dtype=int))
    true, false = (Statement("0", "a", "b", label) for label in (True, False))
    classes, change = {"questions": (question,)}, Change("0", "0", ("x",))
    plain = EvaluateConfig()
    for name, column in (
        ("x", "caption"),
        ("triplets", "caption2"),
        ("quartets", "image_0"),
        ("choices", "caption_options"),
    ):
        Path(f"{name}.jsonl").write_text(json.dumps({column: "a"}))
    Path("relative.json").write_text(json.dumps([{"reference": "0", "target_hard": "0", "caption": "a"}]))
    Path("picks.json").write_text(json.dumps({"set": {"3": "a"}}))
    cases = [  # mode, what has it, its settings
        ("zeroshot", data(**classes), plain),
        ("difference", data(attributes=(SIZE,)), plain),
        ("difference", data(), config("difference", sentences="d.jsonl")),
        ("wordings", data(captions=[("x",)]), plain),
        ("rank", data(), config("rank", attribute="warm")),
        ("comparative", data("example", **classes), config("comparative", pairs="auto")),
        ("extended", data(**classes), config("extended", descriptions="d.jsonl")),
        ("average", data("example", **classes), EvaluateConfig(checkpoint="runs/x")),
        ("probe", data("example", **classes), plain),
        ("geometry", data(captions=[("x",)]), plain),
        ("retrieve", data(captions=[("x",)]), plain),
        ("batches", data(captions=[("x",)]), plain),
        ("caption", data(changes=(change,)), plain),
        ("change_retrieval", data(changes=(change,)), plain),
        ("relations", data(statements=(true, false)), plain),
        ("relations", data(), EvaluateConfig(statements=["x.jsonl"])),
        ("compositional", data(statements=(true,)), plain),
        ("paraphrases", data(), EvaluateConfig(statements=["triplets.jsonl"])),
        ("winoground", data(), EvaluateConfig(statements=["quartets.jsonl"])),
        ("choice", data(), EvaluateConfig(statements=["choices.jsonl"])),
        ("imagecode", data(), EvaluateConfig(statements=["picks.json"])),
        ("relative", data(), EvaluateConfig(statements=["relative.json"])),
    ]
    assert {mode for mode, _, _ in cases} == EVALUATIONS.keys()
    for mode, enough, options in cases:
        assert find(mode).applies(enough, options) is None, mode
        assert isinstance(find(mode).applies(data(), plain), str), mode
    assert average.applies(data("folder", **classes), EvaluateConfig(checkpoint="runs/x"))  # no split to choose on
    assert relations.applies(data(statements=(true,)), plain) and compositional.applies(
        data(statements=(false,)), plain
    )


def test_weights_that_have_diverged_are_named():
    clip = create_model("example")
    with torch.no_grad():
        clip.model.text_projection[0, 0] = torch.nan
    with pytest.raises(UserError, match="weights of example have diverged: text_projection holds"):
        measure(clip, open_dataset("example", split="val"), EvaluateConfig(mode="zeroshot"))


def test_checkpoints_of_one_name_in_two_folders_keep_a_result_each(small_example, example_clip, caplog):
    caplog.set_level("INFO")
    data, other = open_dataset("example", split="val"), create_model("example")
    with torch.no_grad():
        other.model.text_projection += 0.1
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "same.pt").touch()

    def results(clip: Clip, path: str) -> list[str]:
        measure(clip, data, EvaluateConfig(mode="zeroshot", checkpoint=path))
        return sorted(path.name for path in Path("results").rglob("*.json"))

    first = results(example_clip, "a/same.pt")
    both = results(other, "b/same.pt")
    assert both == sorted([*first, f"zeroshot-example-val-{other.weights_hash()[:6]}.json"])
    assert "whose weights differ; this one is kept in" in caplog.text
    caplog.clear()
    assert results(other, "b/same.pt") == results(example_clip, "a/same.pt") == both
    assert caplog.text.count("already in") == 2
    assert results(other, "a/same.pt") == both  # the same checkpoint, trained again, replaces its result
