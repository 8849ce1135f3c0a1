"""Neighbours: the exact ones are those of a full sort; approximate ones are mostly those, and the same again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.train import neighbours


def embeddings(n, seed=0, d=6):
    return torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d))), dim=-1)


def slow_nearest(z, row, allowed):
    """All others that may be found, most similar first."""
    others = [n for n in range(len(z)) if n != row and allowed[n]]
    return sorted(others, key=lambda n: -float(z[n] @ z[row]))


@given(st.integers(2, 40), st.integers(1, 45), st.integers(1, 15), st.sampled_from([0.2, 0.7, 1.0]), st.integers(0, 20))
def test_the_nearest_are_those_of_a_full_sort(n, m, columns, share, seed):
    z, rng = embeddings(n, seed), np.random.default_rng(seed)
    rows, allowed = rng.choice(n, min(n, 3), replace=False), rng.random(n) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "COLUMNS", columns)
        actual = neighbours.build("exact", z).near(rows, m, allowed)
    for row, near in zip(rows, actual):
        expected = slow_nearest(z, row, allowed)[:m]
        assert near.tolist() == expected + [-1] * (m - len(expected))


def test_duplicates_are_neighbours_an_example_is_not_its_own():
    """All are equally similar: itself may be anywhere among them."""
    z = torch.nn.functional.normalize(torch.ones(50, 4), dim=-1)
    for row, near in zip(range(50), neighbours.nearest(z, np.arange(50), 49, np.ones(50, bool))):
        assert sorted(near.tolist()) == [n for n in range(50) if n != row]


def test_faiss_recall_is_high_and_seeded():
    """In 8 dimensions, of 3,000; all that it finds may be found."""
    pytest.importorskip("faiss")
    z, rows = embeddings(3000, d=8).float(), np.arange(40)
    index, again = (neighbours.build("faiss", z, seed=3) for _ in range(2))
    for share in (1.0, 0.5):
        allowed = np.random.default_rng(0).random(3000) < share
        actual, true = index.near(rows, 20, allowed), neighbours.nearest(z, rows, 20, allowed)
        assert (actual == again.near(rows, 20, allowed)).all()
        recall = np.mean([len(set(some) & set(all_)) / 20 for some, all_ in zip(actual.tolist(), true.tolist())])
        assert recall > 0.95
        for row, near in zip(rows, actual):
            kept = near[near >= 0]
            assert row not in kept and allowed[kept].all() and len(set(kept.tolist())) == len(kept)
            cosines = (z[kept] @ z[row]).tolist()
            assert cosines == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)


@given(st.integers(2, 60), st.integers(1, 70), st.sampled_from([0.1, 0.6, 1.0]), st.integers(0, 20))
def test_what_faiss_does_not_find_is_left_empty_at_the_end(n, m, share, seed):
    """With so few examples there is one list, so that only what may not be found is missing."""
    pytest.importorskip("faiss")
    z, rng = embeddings(n, seed).float(), np.random.default_rng(seed)
    rows, allowed = rng.choice(n, min(n, 3), replace=False), rng.random(n) < share
    actual = neighbours.build("faiss", z, seed).near(rows, m, allowed)
    assert actual.tolist() == neighbours.nearest(z, rows, m, allowed).tolist()
