"""Batches of similar examples: the nearest are the nearest, nobody comes twice, and an epoch can cover everything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pc_clip import clusters


def embeddings(n, seed=0, d=6):
    return torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d))), dim=-1)


def slow_nearest(z, row, allowed):
    """All others that may be found, most similar first."""
    others = [n for n in range(len(z)) if n != row and allowed[n]]
    return sorted(others, key=lambda n: -float(z[n] @ z[row]))


@given(st.integers(2, 40), st.integers(1, 45), st.integers(1, 15), st.integers(0, 20))
def test_the_nearest_are_those_of_a_full_sort(n, m, columns, seed):
    z, rng = embeddings(n, seed), np.random.default_rng(seed)
    rows, allowed = rng.choice(n, min(n, 3), replace=False), rng.random(n) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "COLUMNS", columns)
        found = clusters.nearest(z, rows, m, allowed)
    for row, near in zip(rows, found):
        expected = slow_nearest(z, row, allowed)[:m]
        assert near.tolist() == expected + [-1] * (m - len(expected))


@pytest.mark.parametrize(
    ("batch_size", "size", "share", "expected"),
    [(1024, 16, 1.0, [16] * 64), (64, 16, 0.5, [16, 16]), (1024, 16, 2 / 1024, [2]), (10, 4, 1.0, [4, 4, 2]),
     (9, 4, 1.0, [4, 4]), (8, 4, 0.0, [])],
)  # fmt: skip
def test_how_many_clusters_a_share_holds(batch_size, size, share, expected):
    assert clusters.sizes(batch_size, size, share) == expected


@given(st.integers(30, 60), st.integers(2, 6), st.integers(1, 3), st.integers(0, 30))
def test_clusters_are_a_pivot_and_partners_from_its_neighbourhood(n, size, neighbourhood, seed):
    """Each cluster, told from the first on, among those whom no cluster before it took."""
    z, rng = embeddings(n, seed), np.random.default_rng(seed)
    allowed = rng.random(n) < 0.9
    count = int(allowed.sum()) // (2 * size)
    batch = clusters.clustered_batch(z, [size] * count, neighbourhood, allowed, rng)
    assert len(batch) == len(set(batch.tolist())) == size * count
    free = allowed.copy()
    for pivot, *partners in batch.reshape(count, size):
        assert free[pivot]
        near = slow_nearest(z, pivot, free)[: neighbourhood * size - 1]
        assert set(partners) <= set(near)
        assert neighbourhood > 1 or partners == near[: size - 1]
        free[[pivot, *partners]] = False


@given(st.integers(24, 70), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans(), st.integers(0, 20))
def test_a_batch_never_holds_an_example_twice_and_is_full(n, share, cover, seed):
    z = embeddings(n, seed)
    batches = list(
        clusters.plan(
            z, 12, 9, size=4, share=share, cover=cover, neighbourhood=1 + seed % 2, rng=np.random.default_rng(seed)
        )
    )
    assert [len(set(batch.tolist())) for batch in batches] == [12] * 9
    assert [batch.tolist() for batch in batches] == [
        batch.tolist()
        for batch in clusters.plan(
            z, 12, 9, size=4, share=share, cover=cover, neighbourhood=1 + seed % 2, rng=np.random.default_rng(seed)
        )
    ]
    if cover:  # an epoch: each at most once
        epoch = np.concatenate(batches[: n // 12])
        assert len(set(epoch.tolist())) == len(epoch) == n // 12 * 12


def test_without_clusters_an_epoch_is_a_shuffled_one():
    z = embeddings(60)
    batches = list(clusters.plan(z, 12, 5, size=4, share=0.0, rng=np.random.default_rng(1)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(60))


def test_clusters_make_negatives_harder_and_hardness_is_their_mean_cosine():
    z = embeddings(300, d=4)
    of = {
        share: np.mean(
            [
                clusters.hardness(z[torch.from_numpy(batch)])
                for batch in clusters.plan(z, 30, 8, size=10, share=share, rng=np.random.default_rng(0))
            ]
        )
        for share in (0.0, 0.5, 1.0)
    }
    assert of[0.0] < of[0.5] < of[1.0]
    some = z[:7]
    cosines = [float(some[i] @ some[j]) for i in range(7) for j in range(7) if i != j]
    assert clusters.hardness(some) == pytest.approx(np.mean(cosines))
