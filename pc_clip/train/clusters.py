"""SimCLIP's similarity clusters: batches of nearest neighbours, so that in-batch negatives are hard.

"An empirical study of CLIP fine-tuning with similarity clusters" (FITML 2024). A share p of each batch is clusters of
k examples: a pivot drawn at random and k - 1 of its nearest neighbours; the rest is drawn at random. No example is
twice in a batch, because it would be its own negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pc_clip.train import neighbours
from pc_clip.train.neighbours import Index

SPARE = 8  # so many times a cluster's neighbourhood is looked for, because earlier clusters may have taken some of it


def sizes(batch_size: int, size: int, share: float) -> list[int]:
    """How large the clusters of a batch are: as many of `size` as the share holds, and one of what is left of it.

    A cluster has at least two examples; a smaller rest is drawn at random.
    """
    inside = round(share * batch_size)
    rest = inside % size
    return [size] * (inside // size) + ([rest] if rest > 1 else [])


def clustered_batch(
    index: Index, wanted: Sequence[int], neighbourhood: int, allowed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The examples of one batch's clusters, in the order of `wanted`, each pivot first.  -> [sum of `wanted`] int64

    wanted: the clusters' sizes; neighbourhood: the k - 1 partners of a pivot are drawn from the `neighbourhood` * k
    nearest, itself counted, so that 1 means the nearest. allowed: [N] bool, who may be taken; as many as are wanted
    at least. None is taken twice. Where too few are left of what the index finds, because they are taken or because
    it is an approximate one, the nearest of all that are left are looked for.
    """
    taken, clusters, left = ~allowed, [], int(np.count_nonzero(allowed))
    while len(clusters) < len(wanted):
        pivots = rng.choice(np.flatnonzero(~taken), len(wanted) - len(clusters), replace=False)
        m = min(SPARE * neighbourhood * max(wanted), left - 1)
        for pivot, near in zip(pivots, index.near(pivots, m, ~taken)):
            if taken[pivot]:
                continue  # it is a partner in a cluster made since; another pivot is drawn in the next round
            size = wanted[len(clusters)]
            among = min(neighbourhood * size, left) - 1
            near = near[near >= 0]
            near = near[~taken[near]][:among]
            if len(near) < among:
                near = neighbours.nearest(index.z, np.array([pivot]), among, ~taken)[0]
            partners = near[: size - 1] if neighbourhood == 1 else rng.choice(near, size - 1, replace=False)
            clusters.append(np.concatenate([[pivot], partners]))
            taken[clusters[-1]] = True
            left -= size
    return np.concatenate(clusters) if clusters else np.empty(0, dtype=np.int64)


def plan(
    index: Index,
    batch_size: int,
    steps: int,
    *,
    size: int,
    share: float,
    neighbourhood: int = 1,
    cover: bool = False,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Batches of one epoch.  -> `steps` of [batch_size] int64

    Clusters come first in a batch, whole and one after the other, as large and in the order that `sizes` says, each
    with its pivot first. What is drawn at random follows.

    index: of N examples (`neighbours.build`); size, share and neighbourhood: k, p and s of the study. cover: each
    N // batch_size batches hold no example twice, so that all come once but for the rest of N / batch_size, which
    is drawn anew each time; pivots are drawn from those that have not come, and late clusters are less alike.
    Otherwise an example may come in several batches, as in the reference; those drawn at random come in the order of
    a shuffled epoch. Whether settings can be met is checked by samplers.py.
    """
    n, wanted = len(index.z), sizes(batch_size, size, share)
    waiting = np.empty(0, dtype=np.int64) if cover else rng.permutation(n)  # in the order of shuffled epochs
    free = np.ones(n, dtype=bool)
    for step in range(steps):
        if not cover:
            free[:] = True
        elif step % (n // batch_size) == 0:
            # The rest is drawn beforehand: what remains in the end would most often be those far from all others.
            free[:] = True
            free[rng.choice(n, n % batch_size, replace=False)] = False
        inside = clustered_batch(index, wanted, neighbourhood, free, rng)
        free[inside] = False
        lacking = batch_size - len(inside)
        if cover:
            outside = rng.choice(np.flatnonzero(free), lacking, replace=False)
            free[outside] = False
        else:
            if np.count_nonzero(free[waiting]) < lacking:  # another order begins; waiting examples come first
                again = rng.permutation(n)
                waiting = np.concatenate([waiting, again[~np.isin(again, waiting)]])
            places = np.flatnonzero(free[waiting])[:lacking]
            outside, waiting = waiting[places], np.delete(waiting, places)
        yield np.concatenate([inside, outside])
