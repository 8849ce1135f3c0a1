"""Retrieval among the images of a batch, against slow and obvious counting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pc_clip.core.config.evaluate import BatchesConfig, EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.registry import open_dataset
from pc_clip.evals import EvalContext, batches
from pc_clip.evals.evaluate import measure
from pc_clip.interface import run


class Given:
    def __init__(self, texts):
        self.texts = texts

    def embed_texts(self, texts):
        return torch.tensor([self.texts[text] for text in texts], dtype=torch.float32)


def made(z, texts, each, size, seed=0):
    """The result for images with embeddings z, and texts in a row, each[n] of them for image n."""
    ends = np.cumsum(each)
    captions = [tuple(f"t{n}" for n in range(end - count, end)) for end, count in zip(ends, each)]
    ids = [f"i{n}" for n in range(len(z))]
    data = Dataset("made", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", captions)
    known = {f"t{n}": list(map(float, text)) for n, text in enumerate(texts)}
    subject = EvalContext(Given(known), lambda: None, data, EvaluateConfig(seed=seed, batches=BatchesConfig(size=size)))
    subject.__dict__["z"] = torch.as_tensor(z, dtype=torch.float32)
    return batches.evaluate(subject)


def rank_of(query, items, right) -> tuple[float, float]:
    """R@1 and reciprocal rank of one query, one item at a time; a tie has the middle of its ranks."""
    scores = [sum(a * b for a, b in zip(query, item)) for item in items]
    above = sum(score > scores[right] for score in scores)
    level = sum(score == scores[right] for score in scores) - 1
    return float(above == 0 and level == 0), 1 / (1 + above + level / 2)


def slowly(z, texts, each, size, seed):
    order = stream(seed, "retrieval batches").permutation(len(z)).tolist()
    starts = np.cumsum(each) - each
    found = {f"batch_{way}_{what}": [] for way in ("t2i", "i2t") for what in ("r1", "mrr")}
    for start in range(0, len(order) - size + 1, size):
        batch = order[start : start + size]
        for turn in range(min(each)):
            pictures, captions = [z[i] for i in batch], [texts[starts[i] + turn] for i in batch]
            for n in range(size):
                for way, query, items in (("t2i", captions[n], pictures), ("i2t", pictures[n], captions)):
                    for what, value in zip(("r1", "mrr"), rank_of(query, items, n)):
                        found[f"batch_{way}_{what}"].append(value)
    return {name: np.mean(values) for name, values in found.items()}


@st.composite
def small_sets(draw):
    """Images, texts and captions an image; whole numbers, so that many cosines are the same, and exactly so."""
    each = draw(st.lists(st.integers(1, 3), min_size=3, max_size=11))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    widest = draw(st.integers(0, 3))
    z, texts = (rng.integers(-widest, widest + 1, (n, 3)).tolist() for n in (len(each), sum(each)))
    return z, texts, each, draw(st.integers(2, len(each))), draw(st.integers(0, 9))


@given(small_sets())
def test_figures_are_what_counting_one_query_at_a_time_gives(case):
    found, expected = made(*case), slowly(*case)
    assert found.metrics == pytest.approx(expected)
    for name, values in found.items.items():
        assert len(values) == found.n == found.details["images"]
        assert np.mean(values) == pytest.approx(expected[name], abs=1e-4)
    assert set(found.intervals) == set(found.items) == set(found.metrics)


def test_left_out_images_are_counted_and_a_batch_is_easier_than_the_whole():
    z = np.random.default_rng(0).normal(size=(50, 6))
    texts = z + np.random.default_rng(1).normal(size=(50, 6))
    small, whole = made(z, texts, [1] * 50, 4), made(z, texts, [1] * 50, 50)
    assert (small.n, small.details["batches"], small.details["left_out"]) == (48, 12, 2)
    assert (whole.n, whole.details["batches"], whole.details["left_out"]) == (50, 1, 0)
    assert small.metrics["batch_t2i_r1"] > whole.metrics["batch_t2i_r1"] + 0.2
    low, high = small.intervals["batch_t2i_r1"]
    assert low < small.metrics["batch_t2i_r1"] < high


def test_what_cannot_be_measured_is_said():
    for each, size, message in (
        ([1] * 4, 1, "batches.size is 1; it must be at least 2"),
        ([1] * 4, 5, "made/test has 4 images, too few for one batch; --batches.size is 5"),
        ([1, 1, 0, 1], 2, r"an image without a caption \(i2\)"),
    ):
        with pytest.raises(UserError, match=message):
            made(np.eye(4), np.eye(sum(each), 4), each, size)


def test_it_is_measured_where_it_is_asked_for_by_name_alone(coco_folder, example_clip):
    results = measure(example_clip, open_dataset("coco", coco_folder, "val2017"), EvaluateConfig())
    every = {found["evaluation"] for found in results}
    assert "retrieve" in every and "batches" not in every
    command = ["--mode", "batches", "--dataset", "coco", "--root", str(coco_folder), "--model.name", "example"]
    for size in ("4", "6"):
        run.main([*command, "--batches.size", size])
    results = [json.loads(path.read_text()) for path in sorted(Path("results").rglob("batches-*.json"))]
    assert [found["details"]["batch"] for found in results] == [4, 6]
    assert all(len(found["items"]["batch_t2i_mrr"]) == found["n"] == 12 for found in results)
