"""Nearest neighbours: exact (all similarities and a top-k) or approximate (FAISS).

`nearest` is exact and works where z lies, on a CPU or a GPU. FAISS, where it is installed, looks at a few thousand
examples instead of all, misses some of the nearest, and pays from some hundred thousand examples on: numbers are in
docs/scale.md. It works on the CPU, with as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

COLUMNS = 1 << 15  # similarities are computed to so many examples at a time: 64 rows of them are 8 MB

# FAISS. With 4 sqrt(N) lists, fewer than a minute's building at 300,000 examples, a search compares a pivot with
# 4 sqrt(N) centroids and 16 sqrt(N) examples. k-means is most of the building; 64 examples a centroid keep it short.
LISTS_PER_ROOT, EXAMPLES_PER_CENTROID, ROUNDS = 4, 64, 10
LEAST_A_LIST = 39  # with fewer FAISS warns that centroids mean little
PROBES = 64  # lists that a search reads: of a million examples 16,000


class Index(Protocol):
    """A neighbour search over z, [N, D] unit embeddings, made by `build`."""

    z: Tensor

    def near(self, rows: np.ndarray, m: int, allowed: np.ndarray) -> np.ndarray:
        """Up to m examples similar to each of some, most similar first, themselves left out.  -> [R, m] int64

        rows: [R]; allowed: [N] bool, the candidates. No duplicates within a row; missing neighbours are -1, at the end.
        """


def build(kind: str, z: Tensor, seed: int = 0) -> Index:
    """An index of z, [N, D] unit embeddings. kind: exact or faiss.

    seed: below 2**31. The same one gives the same index, with any number of threads but for rounding.
    """
    return KINDS[kind](z, seed)


# -- exact ---------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(z: Tensor, rows: np.ndarray, m: int, allowed: np.ndarray) -> np.ndarray:
    """The m examples most similar to each of some, nearest first, themselves left out.  -> [R, m] int64

    z: [N, D] unit embeddings; rows: [R] of it; allowed: [N] bool, the candidates. With fewer than m of them the rest of
    a row is -1. Memory: R x COLUMNS similarities at a time, and as many embeddings where few are allowed.
    """
    own = torch.from_numpy(rows).to(z.device)[:, None]
    queries = z[own[:, 0]]
    best, neighbours = queries.new_empty(len(rows), 0), own.new_empty(len(rows), 0)
    for places, vectors, barred in _blocks(z, allowed):
        similar = (queries @ vectors.T).index_fill_(1, barred, -torch.inf)  # [R, C]
        value, column = similar.topk(min(m + 1, len(places)), 1)  # one more, because itself is among them
        best, neighbours = torch.cat([best, value], 1), torch.cat([neighbours, places[column]], 1)
        best, order = best.topk(min(m + 1, best.shape[1]), 1)
        neighbours = neighbours.gather(1, order)
    best, order = best.masked_fill_(neighbours == own, -torch.inf).topk(min(m, best.shape[1]), 1)
    neighbours = neighbours.gather(1, order).masked_fill_(best == -torch.inf, -1)
    return _padded(neighbours.cpu().numpy(), m)


def _blocks(z: Tensor, allowed: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """z in pieces: [C] which examples, [C, D] their embeddings, and which of these columns may not be found."""
    places, none = torch.arange(len(z), device=z.device), torch.empty(0, dtype=torch.long, device=z.device)
    if 2 * np.count_nonzero(allowed) < len(z):  # copying them costs less than all the others
        for some in places[torch.from_numpy(allowed).to(z.device)].split(COLUMNS):
            yield some, z[some], none
        return
    for block in (slice(start, start + COLUMNS) for start in range(0, len(z), COLUMNS)):
        yield places[block], z[block], torch.from_numpy(np.flatnonzero(~allowed[block])).to(z.device)


class Exact:
    """`nearest` as an index. Nothing is built."""

    def __init__(self, z: Tensor, seed: int = 0) -> None:
        self.z = z

    def near(self, rows: np.ndarray, m: int, allowed: np.ndarray) -> np.ndarray:
        return nearest(self.z, rows, m, allowed)


# -- approximate ---------------------------------------------------------------------------------------


class Faiss:
    """FAISS's inverted lists: each example is in the list of its nearest centroid, and a search reads some lists.

    It holds a float32 copy of z. Lists rather than a graph, because they are built in a fraction of the time, are the
    same for a seed, and a search can pass over examples that may not be found.
    """

    def __init__(self, z: Tensor, seed: int = 0) -> None:
        import faiss

        self.faiss, self.z = faiss, z
        faiss.omp_set_num_threads(torch.get_num_threads())
        n, d = z.shape
        lists = max(1, min(round(LISTS_PER_ROOT * sqrt(n)), n // LEAST_A_LIST))
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)  # here: cosines
        clustering = self.index.cp
        clustering.seed, clustering.niter, clustering.spherical = seed, ROUNDS, True
        clustering.max_points_per_centroid = EXAMPLES_PER_CENTROID
        vectors = _vectors(z)
        self.index.train(vectors)
        self.index.add(vectors)

    def near(self, rows: np.ndarray, m: int, allowed: np.ndarray) -> np.ndarray:
        selector = self.faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        parameters = self.faiss.SearchParametersIVF(nprobe=PROBES, sel=selector)
        wanted = min(m + 1, len(self.z))  # one more, because itself is among them
        _, neighbours = self.index.search(_vectors(self.z[torch.from_numpy(rows)]), wanted, params=parameters)
        keep = (neighbours >= 0) & (neighbours != rows[:, None])
        order = np.argsort(~keep, axis=1, kind="stable")[:, :m]  # those to keep come first, as they were
        return _padded(np.take_along_axis(np.where(keep, neighbours, -1), order, 1), m)


KINDS = {"exact": Exact, "faiss": Faiss}


def _vectors(z: Tensor) -> np.ndarray:
    """z as FAISS takes it; not copied where it is that already."""
    return np.ascontiguousarray(z.detach().cpu().float().numpy())


def _padded(neighbours: np.ndarray, m: int) -> np.ndarray:
    return np.pad(neighbours, ((0, 0), (0, m - neighbours.shape[1])), constant_values=-1)
