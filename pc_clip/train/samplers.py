"""Batch samplers for any method: random, or similarity clusters (SimCLIP)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from pc_clip.core.config.train import FinetuneConfig, SamplerConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.random import stream
from pc_clip.train import clusters, neighbours


class Examples(Protocol):
    """A method's N examples, as a sampler needs them. similarity: text or image."""

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """[N, D] unit embeddings, by the current model or the start."""

    def learns(self, similarity: str) -> bool:
        """Whether these embeddings change in training."""

    def alike(self, similarity: str) -> np.ndarray:
        """[N] int64: a group number for each example, shared by identical texts (or images)."""


def make(config: FinetuneConfig, n: int, batch_size: int, examples: Examples, what: str = "examples") -> Sampler:
    """The sampler that the settings name, for n examples in batches of batch_size.

    Raises UserError for settings that do not fit each other, and for fewer examples than fill a batch.
    """
    options, most = config.sampler, config.train.max_steps_per_epoch
    check_choice("sampler.kind", options.kind, ("random", "clusters"))
    if n < batch_size:
        raise UserError(f"{n} {what} do not fill one batch of {config.train.batch_size}; make train.batch_size smaller")
    if most is not None:
        check_at_least("train.max_steps_per_epoch", most, 1)
    steps = n // batch_size if most is None else min(n // batch_size, most)
    if options.kind == "clusters":
        return Clusters(config, n, batch_size, steps, examples)
    sampler, plain = Sampler(n, batch_size, steps), vars(SamplerConfig())
    if unused := [f"sampler.{name}" for name, value in vars(options).items() if value != plain[name]]:
        sampler.notes.append(f"batches are random, so {', '.join(unused)} has no effect")
    return sampler


class Sampler:
    """Random batches: every example at most once an epoch, in whole batches."""

    def __init__(self, n: int, batch_size: int, steps_per_epoch: int) -> None:
        self.n, self.batch_size, self.steps_per_epoch = n, batch_size, steps_per_epoch
        self.notes: list[str] = []  # lines for the log

    def begin(self, epoch: int) -> None:
        """Called before each epoch, by all processes."""

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The examples of the epoch's batches, over all processes: [B] int64 each."""
        order = rng.permutation(self.n)
        for step in range(self.steps_per_epoch):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]

    def state(self) -> dict[str, Tensor]:
        """The state to resume within an epoch."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore `state`."""


class Clusters(Sampler):
    """Batches of which a share is clusters of similar examples: pc_clip.train.clusters, an epoch at a time.

    The batches of an epoch are drawn when it begins, because what is similar may depend on the weights of that
    moment; they are part of a run's state, so that it can be continued within the epoch. Examples that no embedding
    could tell apart, such as pairs of which the same sentence is told, are one while batches are made, and one of them
    is drawn for each batch: they would be negatives of each other that nothing can be learnt from.
    """

    def __init__(self, config: FinetuneConfig, n: int, batch_size: int, steps: int, examples: Examples) -> None:
        super().__init__(n, batch_size, steps)
        self.options, self.seed, self.examples = config.sampler, config.seed, examples
        train, similarity = config.train, self.options.similarity
        check_options(self.options, batch_size, -(-train.steps // steps) if train.steps else train.epochs)
        group = examples.alike(similarity)
        if len(np.unique(group)) == n:
            group = np.arange(n)  # whatever their numbers are
        self.members = np.argsort(group, kind="stable")  # group by group
        _, self.first, self.count = np.unique(group[self.members], return_index=True, return_counts=True)
        if len(self.first) < batch_size:
            raise UserError(
                f"only {len(self.first)} examples differ by {similarity}, which do not fill a batch of "
                f"{batch_size} in clusters; make train.batch_size smaller, or take --sampler.kind random"
            )
        self.online = self.options.online and examples.learns(similarity)
        if not self.online:
            self.index = self._index(now=False)  # of the weights before training, which are gone after an epoch
        self.epoch, self.plan = -1, np.empty((0, batch_size), dtype=np.int64)
        when = "by the model at each epoch's beginning" if self.online else "by the model before training"
        shares = ", ".join(f"{share(self.options, at):g} from epoch {at}" for at in (0, *self.options.double_at))
        self.notes.append(
            f"clusters of {self.options.cluster_size} similar by {similarity} {when}; share of a batch: {shares}"
        )

    def _index(self, now: bool) -> neighbours.Index | None:
        """The index of one example a group: in the main process, on its GPU if it has one. None in the others."""
        z = self.examples.embeddings(self.options.similarity, now)  # by all processes together
        if not PartialState().is_main_process:
            return None
        z = z[torch.from_numpy(self.members[self.first])]
        z = z.to(PartialState().device if self.options.index == "exact" else "cpu")
        return neighbours.build(self.options.index, z, self.seed % 2**31)

    def begin(self, epoch: int) -> None:
        """Draw the epoch's batches in one process for all, since rounding differs between processes."""
        if epoch == self.epoch:
            return
        state, plan = PartialState(), np.empty((self.steps_per_epoch, self.batch_size), dtype=np.int64)
        index = self._index(now=True) if self.online else self.index
        if index is not None:
            options, rng = self.options, stream(self.seed, "clusters", epoch)
            how = {"neighbourhood": options.neighbourhood, "cover": options.cover, "share": share(options, epoch)}
            batches = clusters.plan(index, *plan.shape[::-1], size=options.cluster_size, **how, rng=rng)
            groups = np.stack(list(batches))
            plan = self.members[self.first[groups] + rng.integers(self.count[groups])]
        if state.num_processes > 1:
            plan = broadcast(torch.from_numpy(plan).to(state.device)).cpu().numpy()
        self.epoch, self.plan = epoch, plan

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        self.begin(epoch)
        yield from self.plan

    def state(self) -> dict[str, Tensor]:
        return {"epoch": torch.tensor(self.epoch), "plan": torch.from_numpy(self.plan)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.epoch, self.plan = int(state["epoch"]), state["plan"].numpy()


def share(options: SamplerConfig, epoch: int) -> float:
    """The share of a batch that is in clusters in an epoch (from 0): exactly `share` from the last doubling on."""
    return options.share / 2 ** sum(at > epoch for at in options.double_at)


def check_options(options: SamplerConfig, batch_size: int, epochs: int) -> None:
    """Raises UserError for settings of clusters that mean nothing."""
    check_choice("sampler.similarity", options.similarity, ("text", "image"))
    check_choice("sampler.index", options.index, neighbours.KINDS)
    if options.index == "faiss" and find_spec("faiss") is None:
        raise UserError("sampler.index faiss is not installed: `pip install faiss-cpu`, or take exact")
    check_at_least("sampler.neighbourhood", options.neighbourhood, 1)
    if not 0 < options.share <= 1:
        raise UserError(f"sampler.share is {options.share}; it is a share of the batch, above 0 and at most 1")
    size, at = options.cluster_size, options.double_at
    if not 2 <= size <= batch_size:
        raise UserError(f"clusters of {size} in batches of {batch_size}: they need at least 2 and at most {batch_size}")
    if not clusters.sizes(batch_size, size, options.share):
        raise UserError(
            f"sampler.share {options.share} of a batch of {batch_size} is less than two examples, so no cluster; "
            "make it larger, or take --sampler.kind random"
        )
    if any(a >= b for a, b in zip([0, *at], at)):
        raise UserError(f"sampler.double_at is {at}; it takes epochs from 1 on, each later than the one before")
    if at and at[-1] >= epochs:
        raise UserError(
            f"the share of clusters would end at {share(options, epochs - 1):g} and not at {options.share:g}: it "
            f"doubles at epochs {at}, and the run has {epochs}, the last of them {epochs - 1}; see sampler.double_at"
        )
