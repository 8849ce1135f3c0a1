"""Batches of similar examples at the size of COCO: a batch, an epoch's plan, its memory.

    python bench/clusters.py
    python bench/clusters.py --examples 300000 --only_faiss     # an approximate index against the exact way

A batch is 64 clusters of 16 among 118,287 embeddings of 512 numbers. They are made up, by seed: overlapping topics of
some 100 examples each, around a common direction as CLIP's embeddings are. The reference is `bench/reference.py`; it
and ours take turns. It spends the same time on each cluster, so some are measured for 64. The authors also have a
faster way, which looks up neighbours that were computed beforehand, and then an example may be in a batch twice.
FAISS is measured where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from itertools import islice
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import step as steps  # isort: skip  (pc_clip.clip comes before torch's data sets)

import numpy as np
import reference
import surroundings
import torch
from record import Figure, exit_if_missed, record
from threadpoolctl import threadpool_limits
from torch import Tensor

from pc_clip.core.errors import run_script
from pc_clip.train import clusters, neighbours

EXAMPLES, DIMENSIONS, TOPIC = 118_287, 512, 100
CLUSTERS, SIZE = 64, 16
SAMPLE = 4  # clusters that the reference is measured on, each round
ABOUT = "similar examples"


def figures(threads: int = 1, rounds: int = 5) -> list[Figure]:
    """Seconds, GB and how many times as long the published way takes.

    Raises RuntimeError where the two do not find the same neighbours.
    """
    with surroundings.threads(threads), threadpool_limits(threads):
        z = embeddings(EXAMPLES)
        _compare(z)
        ours, theirs = _batches(z, rounds)
        (epoch, one), (covering, other) = _epoch(z, cover=False), _epoch(z, cover=True)
        about = f"{CLUSTERS} clusters of {SIZE}, {len(z):,} examples x {DIMENSIONS}, {threads} thread(s)"
        results = [
            Figure(f"batch of {ABOUT}", ours, nan, "s", about, most=0.3),
            Figure(f"batch of {ABOUT}, reference : ours", theirs / ours, nan, "x",
                   f"{about}; the reference's takes {theirs:.0f} s, scaled up from {SAMPLE} of its clusters, "
                   "and has no neighbours computed beforehand"),
            Figure(f"plan of an epoch of {ABOUT}", epoch, nan, "s",
                   f"{about}; {len(z) // (CLUSTERS * SIZE)} batches; {covering:.1f} s where every example comes once",
                   most=60.0),
            Figure(f"plan of an epoch of {ABOUT}, peak memory above the embeddings", max(one, other), nan, "GB", about),
        ]  # fmt: skip
        return results + (of_faiss(z, about) if importlib.util.find_spec("faiss") else [])


def of_faiss(z: Tensor, about: str, pivots: int = 256) -> list[Figure]:
    """What the approximate index costs, and what it finds."""
    made: list[neighbours.Index] = []
    begin = time.perf_counter()
    memory = steps.peak_above(lambda: made.append(neighbours.build("faiss", z)))
    building, (index,) = time.perf_counter() - begin, made
    seconds = median(_timed(_batch, z, seed, index) for seed in range(5))
    exact = median(_timed(_batch, z, seed) for seed in range(3))
    rows, everybody = np.random.default_rng(0).choice(len(z), pivots, replace=False), np.ones(len(z), dtype=bool)
    results, true = (some.near(rows, SIZE - 1, everybody) for some in (index, neighbours.build("exact", z)))
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(true, results)])
    return [
        Figure(f"batch of {ABOUT}, FAISS", seconds, nan, "s",
               f"{about}; exactly {exact:.2f} s; the index is built once, in {building:.0f} s and {memory:.2f} GB"),
        Figure(f"neighbours that FAISS finds of the nearest {SIZE - 1}", 100 * recall, nan, "%",
               f"{about}; of {pivots} examples"),
    ]  # fmt: skip


def _compare(z: Tensor) -> None:
    """The nearest of a pivot, both ways."""
    pivot, *partners = _batch(z, 0)[:SIZE]
    published = reference.most_similar(z.numpy(), pivot, np.zeros(len(z), dtype=bool))[: SIZE - 1]
    if published.tolist() != partners:
        raise RuntimeError(f"the nearest of example {pivot} are {published.tolist()}, and were said to be {partners}")


def _batches(z: Tensor, rounds: int) -> tuple[float, float]:
    """Seconds a batch, ours and the reference's, in turn."""
    ours, theirs = [], []
    for seed in range(rounds):
        published = reference.similarity_clusters(z.numpy(), CLUSTERS, SIZE, np.random.default_rng(seed))
        theirs.append(_timed(list, islice(published, SAMPLE)) * CLUSTERS / SAMPLE)
        ours += [_timed(_batch, z, seed) for _ in range(3)]
    return median(ours), median(theirs)


def _batch(z: Tensor, seed: int, index: neighbours.Index | None = None) -> list[int]:
    rng, index = np.random.default_rng(seed), index or neighbours.build("exact", z)
    return next(clusters.plan(index, CLUSTERS * SIZE, 1, size=SIZE, share=1.0, rng=rng)).tolist()


def _epoch(z: Tensor, cover: bool) -> tuple[float, float]:
    """Seconds, and GB above those before."""
    rng, n = np.random.default_rng(0), CLUSTERS * SIZE
    index = neighbours.build("exact", z)
    batches = clusters.plan(index, n, len(z) // n, size=SIZE, share=1.0, cover=cover, rng=rng)
    begin = time.perf_counter()
    memory = steps.peak_above(lambda: list(batches))
    return time.perf_counter() - begin, memory


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def embeddings(n: int, seed: int = 0, latent: int = 24) -> Tensor:
    """[n, DIMENSIONS] unit float32. Examples differ in `latent` directions, and a little in all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions, common = normal(latent, DIMENSIONS) / latent**0.5, 0.7 * normal(DIMENSIONS)
    topics, z = normal(max(1, n // TOPIC), latent), torch.empty(n, DIMENSIONS)
    for some in z.split(1 << 14):  # in place, piece by piece: nothing else is as large
        of = torch.randint(len(topics), (len(some),), generator=generator)
        inner = (topics[of] + 0.6 * normal(len(some), latent)) @ directions
        some.copy_(torch.nn.functional.normalize(inner + common + 0.3 * normal(*some.shape), dim=-1))
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="with --only_faiss; nothing is then recorded")
    parser.add_argument("--only_faiss", action="store_true")
    arguments = parser.parse_args()
    if not arguments.only_faiss:
        exit_if_missed(record(figures(arguments.threads)))
        return
    with surroundings.threads(arguments.threads), threadpool_limits(arguments.threads):
        about = f"{arguments.examples:,} examples x {DIMENSIONS}, {arguments.threads} thread(s)"
        for figure in of_faiss(embeddings(arguments.examples), about):
            print(f"{figure.name}: {figure.ratio:.4g} {figure.unit} ({figure.note})")


if __name__ == "__main__":
    run_script(main)
