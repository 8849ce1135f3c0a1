"""Batches with similar examples in them, so that negatives are hard: SimCLIP's clusters of nearest neighbours.

"An empirical study of CLIP fine-tuning with similarity clusters" (FITML 2024). A share p of each batch is clusters of
k examples: a pivot drawn at random and k - 1 of its nearest neighbours; the rest is drawn at random. No example is
twice in a batch, because it would be its own negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

COLUMNS = 1 << 18  # similarities are computed to so many examples at a time


def nearest(z: Tensor, rows: np.ndarray, m: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """The m examples most similar to each of some, nearest first, themselves left out.  -> [R, m] int64

    z: [N, D] unit embeddings; rows: [R] of it; allowed: [N] bool, who may be found. Where fewer than m may, the rest of
    a row is -1. Memory: R x COLUMNS similarities at a time.
    """
    queries, own = z[torch.from_numpy(rows)], torch.from_numpy(rows)[:, None]
    best, found = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long)
    for start in range(0, len(z), COLUMNS):
        some = z[start : start + COLUMNS]
        similar = queries @ some.T  # [R, C]
        places = torch.arange(start, start + len(some))[None]
        barred = places == own if allowed is None else (places == own) | ~torch.from_numpy(allowed[places[0].numpy()])
        best = torch.cat([best, similar.masked_fill_(barred, -torch.inf)], 1)
        found = torch.cat([found, places.expand(len(rows), -1)], 1)
        best, order = best.topk(min(m, best.shape[1]), 1)
        found = found.gather(1, order)
    found = found.masked_fill(best == -torch.inf, -1).numpy()
    return np.pad(found, ((0, 0), (0, m - found.shape[1])), constant_values=-1)


def sizes(batch_size: int, size: int, share: float) -> list[int]:
    """How large the clusters of a batch are: as many of `size` as the share holds, and one of what is left of it."""
    inside = round(share * batch_size)
    rest = inside % size
    return [size] * (inside // size) + ([rest] if rest > 1 else [])


def clustered_batch(
    z: Tensor, wanted: Sequence[int], neighbourhood: int, allowed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The examples of one batch's clusters, cluster by cluster.  -> [sum of `wanted`] int64, none of them twice

    wanted: the clusters' sizes; neighbourhood: the k - 1 partners of a pivot are drawn from the `neighbourhood` * k
    nearest, itself counted, so that 1 means the nearest. allowed: [N] bool, who may be taken; as many as are wanted
    at least. Where too few are left near a pivot, those further away take their place.
    """
    taken, clusters = ~allowed, []
    need = neighbourhood * max(wanted, default=0) + sum(wanted)  # enough even if all taken before are the nearest
    left = list(wanted)
    while left:
        pivots = rng.choice(np.flatnonzero(~taken), len(left), replace=False)
        for pivot, near in zip(pivots, nearest(z, pivots, min(need, len(z) - 1), ~taken)):
            if taken[pivot]:
                continue  # it is a partner in a cluster made since; another pivot is drawn in the next round
            size = left.pop()
            near = near[near >= 0]
            near = near[~taken[near]][: neighbourhood * size - 1]
            partners = near[: size - 1] if neighbourhood == 1 else rng.choice(near, size - 1, replace=False)
            clusters.append(np.concatenate([[pivot], partners]))
            taken[clusters[-1]] = True
    return np.concatenate(clusters) if clusters else np.empty(0, dtype=np.int64)


def plan(
    z: Tensor,
    batch_size: int,
    steps: int,
    *,
    size: int,
    share: float,
    neighbourhood: int = 1,
    cover: bool = False,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Batches of one epoch: clusters first, then examples drawn at random.  -> `steps` of [batch_size] int64

    z: [N, D] unit embeddings. cover: no example comes twice in the epoch, so that in N // batch_size steps (nearly)
    every one comes once; pivots are then drawn from those that have not come, and late clusters are less alike.
    Otherwise an example may come in several batches, as in the reference; those drawn at random come in the order
    of a shuffled epoch.
    """
    n, wanted = len(z), sizes(batch_size, size, share)
    unseen = np.ones(n, dtype=bool)
    queue = rng.permutation(n)
    for _ in range(steps):
        if cover and unseen.sum() < batch_size:
            unseen[:] = True
        inside = clustered_batch(z, wanted, neighbourhood, unseen.copy() if cover else np.ones(n, dtype=bool), rng)
        free = unseen.copy()
        free[inside] = False
        waiting = queue[free[queue]]
        if len(waiting) < batch_size - len(inside):  # the epoch's order is used up: another one begins
            unseen[:] = True
            queue = rng.permutation(n)
            free = unseen.copy()
            free[inside] = False
            waiting = queue[free[queue]]
        outside = waiting[: batch_size - len(inside)]
        unseen[outside] = False
        if cover:
            unseen[inside] = False
        yield np.concatenate([inside, outside])


def hardness(z: Tensor) -> float:
    """Mean cosine of the negatives of a batch. z: [B, D] unit embeddings"""
    total = z.sum(0)
    return float((total @ total - len(z)) / (len(z) * (len(z) - 1)))
