"""Neighbours: the exact ones are those of a full sort; approximate ones are mostly those, and the same again."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.core.errors import UserError
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
        found = neighbours.nearest(z, rows, m, allowed)
    for row, near in zip(rows, found):
        expected = slow_nearest(z, row, allowed)[:m]
        assert near.tolist() == expected + [-1] * (m - len(expected))


def test_without_a_mask_all_may_be_found_and_an_index_of_that_kind_says_the_same():
    z, rows = embeddings(30), np.array([4, 9])
    expected = [slow_nearest(z, row, np.ones(30, bool))[:5] for row in rows]
    assert neighbours.nearest(z, rows, 5).tolist() == expected
    assert neighbours.build("exact", z).near(rows, 5, np.ones(30, bool)).tolist() == expected


def test_copies_of_an_example_are_its_neighbours_and_it_is_not_its_own():
    """All are equally similar: itself may be anywhere among them."""
    z = torch.nn.functional.normalize(torch.ones(50, 4), dim=-1)
    for row, near in zip(range(50), neighbours.nearest(z, np.arange(50), 49)):
        assert sorted(near.tolist()) == [n for n in range(50) if n != row]


# -- approximate indices -------------------------------------------------------------------------------


def test_most_of_what_an_approximate_index_finds_are_the_nearest():
    """In 8 dimensions, of 3,000; all that it finds may be found."""
    pytest.importorskip("faiss")
    z, rows = embeddings(3000, d=8).float(), np.arange(40)
    index = neighbours.build("faiss", z, seed=3)
    for share in (1.0, 0.5):
        allowed = np.random.default_rng(0).random(3000) < share
        found, true = index.near(rows, 20, allowed), neighbours.nearest(z, rows, 20, allowed)
        recall = np.mean([len(set(some) & set(all_)) / 20 for some, all_ in zip(found.tolist(), true.tolist())])
        assert recall > 0.95
        for row, near in zip(rows, found):
            kept = near[near >= 0]
            assert row not in kept
            assert allowed[kept].all()
            assert len(set(kept.tolist())) == len(kept)
            cosines = (z[kept] @ z[row]).tolist()
            assert cosines == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)


@given(st.integers(2, 60), st.integers(1, 70), st.sampled_from([0.1, 0.6, 1.0]), st.integers(0, 20))
def test_what_faiss_does_not_find_is_left_empty_at_the_end(n, m, share, seed):
    """With so few examples there is one list, so that only what may not be found is missing."""
    pytest.importorskip("faiss")
    z, rng = embeddings(n, seed).float(), np.random.default_rng(seed)
    rows, allowed = rng.choice(n, min(n, 3), replace=False), rng.random(n) < share
    found = neighbours.build("faiss", z, seed).near(rows, m, allowed)
    assert found.tolist() == neighbours.nearest(z, rows, m, allowed).tolist()


def test_the_same_seed_gives_the_same_index():
    pytest.importorskip("faiss")
    z, everyone = embeddings(4000, d=16).float(), np.ones(4000, bool)
    found = [neighbours.build("faiss", z, seed=5).near(np.arange(30), 40, everyone).tolist() for _ in range(2)]
    assert found[0] == found[1]


def test_an_index_that_is_not_there_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match="index is 'fais'.*faiss"):
        neighbours.build("fais", embeddings(10))
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        neighbours.build("faiss", embeddings(10))
