"""The benchmark of similar batches, at a small size: both ways find the same, and it says so where they do not."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_clusters", BENCH / "clusters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in {"EXAMPLES": 400, "DIMENSIONS": 32, "TOPIC": 20, "CLUSTERS": 6, "SIZE": 5}.items():
        monkeypatch.setattr(module, name, size)
    return module


def test_figures_are_taken_and_have_the_limits_asked(bench):
    threads = torch.get_num_threads()
    found = bench.figures(threads=1, rounds=2)
    assert [(f.unit, f.most) for f in found if not math.isnan(f.most)] == [("s", 0.3), ("s", 60.0)]
    assert len({f.name for f in found}) == len(found)
    assert all(0 <= f.ratio < math.inf for f in found)
    assert torch.get_num_threads() == threads


def test_what_is_measured_is_compared(bench, monkeypatch):
    monkeypatch.setattr(bench.reference, "most_similar", lambda z, pivot, taken: np.arange(len(z)))
    with pytest.raises(RuntimeError, match="the nearest of example"):
        bench.figures(threads=1, rounds=1)


def test_the_made_up_embeddings_are_unit_and_lie_in_topics(bench):
    z = bench.embeddings(400)
    assert z.norm(dim=1).tolist() == pytest.approx([1.0] * 400, abs=1e-5)
    assert torch.equal(z, bench.embeddings(400))
    nearest = (z @ z.T).fill_diagonal_(-1).max(1).values.mean()
    assert nearest > (z @ z.T).mean() + 0.2


def test_the_published_way_makes_clusters_of_neighbours_with_nobody_twice(bench):
    z = bench.embeddings(200).numpy()
    found = list(bench.reference.similarity_clusters(z, 6, 5, np.random.default_rng(0)))
    assert [len(cluster) for cluster in found] == [5] * 6
    assert len(set(np.concatenate(found).tolist())) == 30
    *partners, pivot = found[0]
    order = np.argsort(-z @ z[pivot])
    assert set(partners) < set(order[:6].tolist())
