"""Retrieval on hand-made embeddings, against slow and obvious counting."""

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from made_space import made_context

from pc_clip.core.config.evaluate import BatchesConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data.registry import open_dataset
from pc_clip.evals import batches, retrieve
from pc_clip.evals.evaluate import measure as measure_all
from pc_clip.interface import run
from pc_clip.metrics import intervals as _intervals
from pc_clip.metrics import retrieval
from pc_clip.report import page

FAMILIES = ("t2i", "i2t", "paired_t2i", "paired_i2t")


def measure(z, texts: dict[str, list[float]], captions: list[tuple[str, ...]], config=None, mode=retrieve):
    """The result for images with embeddings z and texts with theirs, as they are."""
    return mode.evaluate(made_context(texts, z, config, unit=False, captions=captions))


def made(z, texts, each, config=None, mode=retrieve):
    """The same for texts in a row, each[n] of them for image n."""
    names = [f"t{n}" for n in range(len(texts))]
    ends = np.cumsum(each)
    captions = [tuple(names[end - count : end]) for end, count in zip(ends, each)]
    return measure(z, dict(zip(names, [list(map(float, text)) for text in texts])), captions, config, mode)


def in_batches(z, texts, each, size, seed=0):
    return made(z, texts, each, EvaluateConfig(seed=seed, batches=BatchesConfig(size=size)), batches)


# -- slow and obvious ----------------------------------------------------------------------------------------


def places(query, items, right) -> list[int]:
    """The ranks, from 1, that ties leave open to the best right item."""
    scores = [sum(a * b for a, b in zip(query, item)) for item in items]
    best = max(scores[n] for n in right)
    first = 1 + sum(score > best for score in scores)
    return list(range(first, first + 1 + sum(scores[n] == best for n in range(len(items)) if n not in right)))


def hit(open_to: list[int], k: int) -> float:
    middle = (open_to[0] + open_to[-1]) / 2
    return sum(place <= k for place in open_to) / len(open_to) if middle <= k else 0.0


def slowly(z, texts, each) -> dict[str, list[tuple[int, list[int]]]]:
    """Of each family, (image, open ranks) a query."""
    owner = [n for n, count in enumerate(each) for _ in range(count)]
    own = [[t for t, image in enumerate(owner) if image == n] for n in range(len(z))]
    actual = {name: [] for name in FAMILIES}
    actual["t2i"] = [(owner[t], places(text, z, [owner[t]])) for t, text in enumerate(texts)]
    actual["i2t"] = [(n, places(image, texts, own[n])) for n, image in enumerate(z)]
    for turn in range(min(each)):
        chosen = [texts[own[n][turn]] for n in range(len(z))]
        actual["paired_t2i"] += [(n, places(text, z, [n])) for n, text in enumerate(chosen)]
        actual["paired_i2t"] += [(n, places(image, chosen, [n])) for n, image in enumerate(z)]
    return actual


@st.composite
def small_sets(draw):
    """Images, texts and captions an image; whole numbers, so that many cosines are the same, and exactly so."""
    each = draw(st.lists(st.integers(1, 3), min_size=2, max_size=9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    widest = draw(st.integers(0, 3))
    z, texts = (rng.integers(-widest, widest + 1, (n, 3)) for n in (len(each), sum(each)))
    return z.tolist(), texts.tolist(), each


@given(small_sets())
def test_all_figures_are_what_counting_one_query_at_a_time_gives(case):
    z, texts, each = case
    actual, expected = made(z, texts, each), slowly(z, texts, each)
    names = set()
    for name, queries in expected.items():
        candidates = sum(each) if name == "i2t" else len(z)
        assert actual.details[f"{name}_median_rank"] == np.median([np.mean(open_to) for _, open_to in queries])
        assert actual.details["tied"][name] == pytest.approx(np.mean([len(open_to) > 1 for _, open_to in queries]))
        for k in (k for k in retrieval.KS if k < candidates):
            names.add(f"{name}_r{k}")
            assert actual.metrics[f"{name}_r{k}"] == pytest.approx(np.mean([hit(open_to, k) for _, open_to in queries]))
        hits = [(image, hit(open_to, 1)) for image, open_to in queries]
        for image, value in enumerate(actual.items.get(f"{name}_r1", ())):
            own = sum(value for asked, value in hits if asked == image)
            assert value == pytest.approx(own / (len(queries) / len(z)), abs=1e-4)
    assert set(actual.items) == set(retrieve.COMPARED) & set(actual.metrics)
    assert (
        set(actual.metrics) == set(actual.intervals) == names | {m for m in actual.metrics if m.startswith("centred")}
    )


@given(st.lists(st.integers(1, 5), min_size=2, max_size=70), st.integers(0, 99))
def test_a_model_that_tells_nothing_apart_gets_nothing_beyond_chance(each, seed):
    """One embedding for everything, of numbers that a product rounds."""
    one = F.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=37)), dim=0).float().tolist()
    actual = made([one] * len(each), [one] * sum(each), each)
    total = sum(each)
    for metric, value in actual.metrics.items():
        name, k = metric.rsplit("_r", 1)
        k = int(k)
        chance = (
            np.mean([1 - comb(total - own, k) / comb(total, k) for own in each])
            if name.endswith("i2t") and "paired" not in name
            else k / len(each)
        )
        assert value <= chance + 1e-12
        assert value == 0 or k > 1
    assert actual.details["t2i_median_rank"] == actual.details["paired_i2t_median_rank"] == (1 + len(each)) / 2


@given(st.integers(2, 12), st.integers(0, 99))
def test_centring_removes_a_captions_mean_score(n, seed):
    rng = np.random.default_rng(seed)
    z, texts = rng.normal(size=(n, 5)), rng.normal(size=(2 * n, 5))
    scores = z @ texts.T
    scores -= scores.mean(0)
    ranks = [1 + int((scores[i] > scores[i, 2 * i : 2 * i + 2].max()).sum()) for i in range(n)]
    actual = made(z, texts, [2] * n)
    assert actual.metrics["centred_i2t_r1"] == np.mean([rank <= 1 for rank in ranks])
    assert actual.details["centred_i2t_median_rank"] == np.median(ranks)


# -- what the figures mean -----------------------------------------------------------------------------------


def test_what_each_definition_counts():
    texts = {"a": [1, 0, 0], "also a": [0.9, 0.1, 0], "b": [0, 1, 0], "c": [0.9, 0, 0.1]}
    actual = measure(torch.eye(3), texts, [("a", "also a"), ("b",), ("c",)])
    assert actual.metrics == pytest.approx(
        {"t2i_r1": 0.75, "i2t_r1": 1, "paired_t2i_r1": 2 / 3, "paired_i2t_r1": 1, "centred_i2t_r1": 1}
    )  # "c" is nearer to the first image than to its own, and still the nearest that its own has
    assert actual.n == 3
    assert (actual.details["images"], actual.details["captions"], actual.details["captions_in_turn"]) == (3, 4, 1)


def test_a_k_that_every_answer_meets_is_left_out_and_said():
    left_out = made(np.eye(10), np.repeat(np.eye(10), 2, axis=0), [2] * 10).details["left_out"]
    fewest = {name: 20 if name in ("i2t", "centred_i2t") else 10 for name in (*FAMILIES, "centred_i2t")}
    assert set(left_out) == {f"{name}_r{k}" for name, least in fewest.items() for k in retrieval.KS if k >= least}
    assert left_out["t2i_r10"].endswith("number of candidates, 10")


@pytest.mark.parametrize("images", [7, 61, 301])
def test_the_same_text_of_two_images_ties_exactly_wherever_it_stands(images):
    """Each text is said of two images, so that every image finds its own tied with another's."""
    rng = np.random.default_rng(images)
    z = F.normalize(torch.from_numpy(rng.normal(size=(images, 77))), dim=-1).float()
    texts = [tuple(f"t{n}" for n in rng.permutation([i, (i + 1) % images])) for i in range(images)]
    embeddings = F.normalize(torch.from_numpy(rng.normal(size=(images, 77))), dim=-1).float()
    actual = measure(z, {f"t{n}": embeddings[n].tolist() for n in range(images)}, texts)
    assert actual.details["tied"]["i2t"] == 1.0
    assert actual.details["tied"]["t2i"] == 0.0
    assert actual.metrics["i2t_r1"] == 0.0


@given(small_sets(), st.integers(1, 40))
def test_the_size_of_blocks_changes_nothing(case, at_once):
    z, texts, each = case
    owner = np.repeat(np.arange(len(z)), each)
    own = retrieval.relation(owner[:, None], len(z))
    whole, parts = (
        retrieval.ranks(torch.tensor(texts).float(), torch.tensor(z).float(), own, size) for size in (10_000, at_once)
    )
    assert np.array_equal(whole, parts)


# -- intervals and items -------------------------------------------------------------------------------------


def test_intervals_are_over_images_because_captions_of_one_image_are_alike():
    """Five times the same caption tell no more than one does."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(80, 12))
    texts = z + 1.2 * rng.normal(size=(80, 12))
    once, five = made(z, texts, [1] * 80), made(z, np.repeat(texts, 5, axis=0), [5] * 80)
    assert once.metrics["t2i_r1"] == pytest.approx(five.metrics["t2i_r1"])
    assert once.intervals["t2i_r1"] == pytest.approx(five.intervals["t2i_r1"])
    assert once.intervals["t2i_r1"] == pytest.approx(_intervals.of_mean(np.array(once.items["t2i_r1"]), 0))


# -- among the images of a batch -----------------------------------------------------------------------------


@pytest.mark.slow
@given(small_sets(), st.integers(2, 9), st.integers(0, 9))
def test_figures_of_batches_are_what_counting_one_query_at_a_time_gives(case, size, seed):
    z, texts, each = case
    size = min(size, len(z))
    actual, expected = in_batches(z, texts, each, size, seed), {}
    order, starts = stream(seed, "retrieval batches").permutation(len(z)).tolist(), np.cumsum(each) - each
    for start in range(0, len(z) - size + 1, size):
        batch = order[start : start + size]
        for turn in range(min(each)):
            pictures, captions = [z[i] for i in batch], [texts[starts[i] + turn] for i in batch]
            for way, queries, items in (("t2i", captions, pictures), ("i2t", pictures, captions)):
                for n, query in enumerate(queries):
                    open_to = places(query, items, [n])
                    expected.setdefault(f"batch_{way}_r1", []).append(hit(open_to, 1))
                    expected.setdefault(f"batch_{way}_mrr", []).append(1 / np.mean(open_to))
    assert actual.metrics == pytest.approx({name: np.mean(values) for name, values in expected.items()})
    for name, values in actual.items.items():
        assert len(values) == actual.n == actual.details["images"]
        assert np.mean(values) == pytest.approx(actual.metrics[name], abs=1e-4)
    assert set(actual.intervals) == set(actual.items) == set(actual.metrics)


def test_batch_retrieval_counts_left_out_images_and_is_easier():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 6))
    texts = z + rng.normal(size=(50, 6))
    small, whole = in_batches(z, texts, [1] * 50, 4), in_batches(z, texts, [1] * 50, 50)
    assert (small.n, small.details["batches"], small.details["left_out"]) == (48, 12, 2)
    assert (whole.n, whole.details["batches"], whole.details["left_out"]) == (50, 1, 0)
    assert small.metrics["batch_t2i_r1"] > whole.metrics["batch_t2i_r1"] + 0.2
    low, high = small.intervals["batch_t2i_r1"]
    assert low < small.metrics["batch_t2i_r1"] < high


@pytest.mark.slow
def test_batches_are_measured_where_they_are_asked_for_by_name_alone(coco_folder, example_clip):
    every = measure_all(example_clip, open_dataset("coco", coco_folder, "val2017"), EvaluateConfig())
    modes = {actual["evaluation"] for actual in every}
    assert "retrieve" in modes and "batches" not in modes
    command = ["--mode", "batches", "--dataset", "coco", "--root", str(coco_folder), "--model.name", "example"]
    for size in ("4", "6"):
        run.main([*command, "--batches.size", size])
    results = [json.loads(path.read_text()) for path in sorted(Path("results").rglob("batches-*.json"))]
    assert [actual["details"]["batch"] for actual in results] == [4, 6]
    assert all(len(actual["items"]["batch_t2i_mrr"]) == actual["n"] == 12 for actual in results)


# -- what cannot be measured ---------------------------------------------------------------------------------


def test_images_without_a_caption_are_left_out_and_counted(caplog):
    texts = {"a": [1.0, 0.0, 0.0], "b": [0.1, 1.0, 0.0]}
    z = np.eye(3)
    with_one = measure(z, texts, [("a",), (), ("b",)])
    assert "1 of 3 images are left out: they have no caption" in caplog.text
    alone = measure(z[[0, 2]], texts, [("a",), ("b",)])
    assert with_one.metrics == alone.metrics and with_one.n == alone.n == 2
    assert (with_one.details["without_caption"], alone.details["without_caption"]) == (1, 0)
    assert in_batches(np.eye(4), np.eye(3, 4), [1, 1, 0, 1], 3).details["left_out"] == 1


def test_too_few_images_with_captions_are_refused():
    for evaluate, message in (
        (lambda: made(np.eye(1), np.eye(1), [1]), "made/test has 1 images with a caption"),
        (lambda: measure(np.eye(2), {"a": [1.0, 0.0]}, [("a",), ()]), "made/test has 1 images with a caption"),
        (lambda: in_batches(np.eye(4), np.eye(4), [1] * 4, 1), "batches.size is 1; it must be at least 2"),
        (lambda: in_batches(np.eye(4), np.eye(4), [1] * 4, 5), "has 4 images with a caption, too few for one batch"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate()


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_figures_intervals_and_items_and_the_report_reads_them(small_example, capsys):
    run.main(["--mode", "retrieve", "--split", "val", "--device", "cpu"])
    (path,) = Path("results").rglob("retrieve-*.json")
    actual = json.loads(path.read_text())
    assert {f"{name}_r{k}" for name in FAMILIES for k in (1, 5, 10, 20, 50)} <= set(actual["metrics"])
    for metric, (low, high) in actual["intervals"].items():
        assert 0 <= low <= actual["metrics"][metric] <= high <= 1
    assert {metric: len(values) for metric, values in actual["items"].items()} == {
        f"{name}_r1": 60 for name in FAMILIES
    }
    assert actual["images"] == open_dataset("example", split="val").fingerprint
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    for metric, (low, high) in actual["intervals"].items():
        ends = [f"[{100 * low:.1f},", f"{100 * high:.1f}]"]
        assert shown[metric] == [f"{100 * actual['metrics'][metric]:.1f}", *ends]
    path, left_out = page.write([Path("results")])
    assert not left_out
    assert "paired_i2t_r50" in path.with_suffix(".csv").read_text()
