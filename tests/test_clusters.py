"""Batches of similar examples: clusters are neighbours, nobody comes twice, and an epoch can cover everything."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_neighbours import embeddings, slow_nearest

from pc_clip.train import clusters, neighbours


def hardness(z) -> float:
    """Mean cosine of a batch's negatives."""
    total = z.sum(0)
    return float((total @ total - len(z)) / (len(z) * (len(z) - 1)))


def plan(z, batch_size, steps, seed=0, kind="exact", **settings):
    index = Forgetful(z) if kind == "forgetful" else neighbours.build(kind, z)
    actual = clusters.plan(index, batch_size, steps, **settings, rng=np.random.default_rng(seed))
    return [batch.tolist() for batch in actual]


class Forgetful:
    """An approximate index that finds every third of the nearest, and nothing at all for odd rows."""

    def __init__(self, z):
        self.z = z

    def near(self, rows, m, allowed):
        actual = neighbours.nearest(self.z, rows, m, allowed)
        kept = np.where((np.arange(m) % 3 == 0) & (rows % 2 == 0)[:, None], actual, -1)
        return np.take_along_axis(kept, np.argsort(kept < 0, axis=1, kind="stable"), 1)


def test_how_many_clusters_a_share_holds():
    for batch_size, size, share, expected in (
        (64, 16, 0.5, [16, 16]), (1024, 16, 2 / 1024, [2]), (10, 4, 1.0, [4, 4, 2]), (9, 4, 1.0, [4, 4]),
        (8, 4, 0.0, []), (8, 4, 0.125, []), (16, 16, 0.5, [8]),
    ):  # fmt: skip
        assert clusters.sizes(batch_size, size, share) == expected, (batch_size, size, share)


@given(st.integers(30, 60), st.integers(2, 6), st.integers(1, 3), st.integers(1, 8), st.integers(0, 30))
def test_clusters_are_a_pivot_and_partners_from_its_neighbourhood(n, size, neighbourhood, spare, seed):
    """Each cluster, told from the first on, among those whom no cluster before it took; in the order of the sizes."""
    z, rng = embeddings(n, seed), np.random.default_rng(seed)
    allowed = rng.random(n) < 0.9
    wanted = [size] * (int(allowed.sum()) // (2 * size)) + [2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "SPARE", spare)  # few enough for earlier clusters to take them all
        batch = clusters.clustered_batch(neighbours.Exact(z), wanted, neighbourhood, allowed, rng)
    assert len(batch) == len(set(batch.tolist())) == sum(wanted)
    free = allowed.copy()
    for end, size in zip(accumulate(wanted), wanted):
        pivot, *partners = batch[end - size : end]
        assert free[pivot]
        near = slow_nearest(z, pivot, free)[: neighbourhood * size - 1]
        assert set(partners) <= set(near)
        assert neighbourhood > 1 or partners == near[: size - 1]
        free[[pivot, *partners]] = False


@given(st.integers(24, 70), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans(), st.booleans(), st.integers(0, 20))
def test_a_batch_never_holds_an_example_twice_and_is_full(n, share, cover, approximate, seed):
    z, kind = embeddings(n, seed), "forgetful" if approximate else "exact"
    settings = {"size": 4, "share": share, "cover": cover, "neighbourhood": 1 + seed % 2, "kind": kind}
    batches = plan(z, 12, 9, seed, **settings)
    assert [len(set(batch)) for batch in batches] == [12] * 9
    assert batches == plan(z, 12, 9, seed, **settings)
    steps = n // 12
    if cover:  # a pass: each at most once
        for begin in range(0, 9 - steps + 1, steps):
            assert len({row for batch in batches[begin : begin + steps] for row in batch}) == steps * 12


@given(st.integers(1, 4), st.integers(0, 20))
def test_partners_come_from_the_neighbourhood_also_where_the_index_finds_nothing(neighbourhood, seed):
    z = embeddings(40, seed)
    (batch,) = plan(z, 8, 1, seed, "forgetful", size=8, share=1.0, neighbourhood=neighbourhood)
    near = slow_nearest(z, batch[0], np.ones(40, bool))
    reach = 8 * neighbourhood - 1 if batch[0] % 2 else 3 * 8 * neighbourhood  # odd ones are completed, all exact
    assert set(batch[1:]) <= set(near[:reach])


@pytest.mark.parametrize("cover", [False, True])
def test_an_approximate_index_makes_whole_batches_nearly_as_similar(cover):
    pytest.importorskip("faiss")
    z = embeddings(1500, d=8).float()
    settings = {"size": 10, "share": 0.8, "cover": cover}
    exact, actual = (plan(z, 50, 30, kind=kind, **settings) for kind in ("exact", "faiss"))
    assert [len(set(batch)) for batch in actual] == [50] * 30
    if cover:
        assert sorted(row for batch in actual for row in batch) == list(range(1500))
    theirs, ours = (np.mean([hardness(z[batch[:10]]) for batch in some]) for some in (exact, actual))
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("cover", [False, True])
def test_epochs_go_on_after_all_have_come(cover):
    counts = np.bincount(np.concatenate(plan(embeddings(24), 12, 6, size=4, share=0.0, cover=cover)))
    assert counts.tolist() == [3] * 24


def test_nobody_is_left_over_more_often_than_others_in_cover_mode():
    """Nine in a heap, and three far from all: as partners these would come last. A quarter is left over an epoch."""
    z = torch.eye(12)[[0] * 9 + [1, 2, 3]] + 0.01 * torch.from_numpy(np.random.default_rng(0).normal(size=(12, 12)))
    z, left = torch.nn.functional.normalize(z, dim=-1), np.zeros(12)
    for seed in range(400):
        (first,) = plan(z, 9, 1, seed, size=9, share=1.0, cover=True)
        left[sorted(set(range(12)) - set(first))] += 1
    assert left.sum() == 400 * 3
    assert abs(left - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)  # five standard deviations


def test_who_is_left_over_is_drawn_anew_in_each_pass():
    batches = plan(embeddings(14), 6, 40, size=3, share=1.0, cover=True)
    left = [frozenset(range(14)) - set(a) - set(b) for a, b in zip(batches[::2], batches[1::2])]
    assert {len(some) for some in left} == {2}
    assert frozenset.union(*left) == set(range(14))


def test_the_edges_of_the_settings_work():
    for n, settings in (
        (40, {"size": 12, "share": 1.0}),  # one cluster, the whole batch
        (40, {"size": 4, "share": 1 / 12}),  # one example is no cluster
        (12, {"size": 12, "share": 1.0, "neighbourhood": 9}),  # the batch is all there is
        (40, {"size": 5, "share": 1.0, "neighbourhood": 30}),  # a neighbourhood that is larger than the set
    ):
        for batch in plan(embeddings(n), 12, 7, **settings) + plan(embeddings(n), 12, 7, cover=True, **settings):
            assert len(set(batch)) == 12 and set(batch) <= set(range(n)), settings
