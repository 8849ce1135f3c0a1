"""Which examples come together in a batch: at random, or in clusters of similar ones. Any method can use either.

A sampler has

    steps_per_epoch          batches an epoch
    begin(epoch)             called before each epoch, by all processes, when the weights are as they then are
    batches(epoch, rng)      [B] int64 each: the examples of the epoch's batches, over all processes
    state(), restore(state)  what a run that is continued within an epoch needs of that epoch
    notes                    lines for the log
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

CLUSTER_SIZE = 16  # k where nobody says otherwise: that of the authors' README


class Examples(Protocol):
    """What a sampler asks of a method about its N examples. similarity: text or image."""

    def embeddings(self, similarity: str, now: bool) -> Tensor:
        """[N, D] unit embeddings, by the model as it is now or as it was before training."""

    def learns(self, similarity: str) -> bool:
        """Whether these change in training."""

    def alike(self, similarity: str) -> np.ndarray:
        """[N] int64: a number for each example, the same for those that no embedding could tell apart."""


class Sampler(Protocol):
    steps_per_epoch: int
    notes: list[str]

    def begin(self, epoch: int) -> None: ...

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[np.ndarray]: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...


def make(config: FinetuneConfig, n: int, batch_size: int, examples: Examples, what: str = "examples") -> Sampler:
    """The sampler that the settings name, for n examples in batches of batch_size.

    Raises UserError for settings that do not fit each other, and for fewer examples than fill a batch.
    """
    check_choice("sampler.kind", config.sampler.kind, ("random", "clusters"))
    if n < batch_size:
        raise UserError(f"{n} {what} do not fill one batch of {config.train.batch_size}; make train.batch_size smaller")
    steps = n // batch_size
    if config.train.max_steps_per_epoch is not None:
        check_at_least("train.max_steps_per_epoch", config.train.max_steps_per_epoch, 1)
        steps = min(steps, config.train.max_steps_per_epoch)
    if config.sampler.kind == "random":
        return Random(n, batch_size, steps, _without_effect(config.sampler))
    return Clusters(config, batch_size, steps, examples)


def _without_effect(options: SamplerConfig) -> list[str]:
    """A line that names what is set but means nothing for random batches: a config of clusters may be run without."""
    plain = vars(SamplerConfig())
    unused = [f"sampler.{name}" for name, value in vars(options).items() if value != plain[name] and name != "kind"]
    return [f"batches are random, so {', '.join(unused)} has no effect"] if unused else []


class Random:
    """Every example at most once an epoch, in whole batches."""

    def __init__(self, n: int, batch_size: int, steps_per_epoch: int, notes: Sequence[str] = ()) -> None:
        self.n, self.batch_size, self.steps_per_epoch = n, batch_size, steps_per_epoch
        self.notes = list(notes)

    def begin(self, epoch: int) -> None:
        pass

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        order = rng.permutation(self.n)
        for step in range(self.steps_per_epoch):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


class Clusters:
    """Batches of which a share is clusters of similar examples: pc_clip.train.clusters, an epoch at a time.

    The batches of an epoch are settled when it begins, because what is similar may depend on the weights of that
    moment; they are part of a run's state, so that it can be continued within the epoch. Examples that no embedding
    could tell apart, such as pairs of which the same sentence is told, are one while batches are made, and one of them
    is drawn for each batch: they would be negatives of each other that nothing can be learnt from.
    """

    def __init__(self, config: FinetuneConfig, batch_size: int, steps_per_epoch: int, examples: Examples) -> None:
        self.options, self.seed, self.examples = config.sampler, config.seed, examples
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        train = config.train
        epochs = train.epochs if train.steps is None else -(-train.steps // steps_per_epoch)
        check_options(self.options, batch_size, epochs)
        self.size = cluster_size(self.options, batch_size)
        self.members = _Members(examples.alike(self.options.similarity))
        if len(self.members) < batch_size:
            raise UserError(
                f"only {len(self.members)} examples differ by {self.options.similarity}, which do not fill a batch of "
                f"{batch_size} in clusters; make train.batch_size smaller, or take --sampler.kind random"
            )
        self.online = self.options.online and examples.learns(self.options.similarity)
        self.index: neighbours.Index | None = None  # of the weights before training, which are gone after an epoch
        if not self.online:
            self.z, self.index = self._search(False)
        self.epoch, self.plan = -1, np.empty((0, batch_size), dtype=np.int64)
        self.notes = [_describe(self.options, batch_size, self.size, self.online)]

    def _search(self, now: bool) -> tuple[Tensor | None, neighbours.Index | None]:
        """What is searched and how: in the main process, on its GPU if it has one. Nothing in the others."""
        z = self.examples.embeddings(self.options.similarity, now)  # by all processes together
        if not PartialState().is_main_process:
            return None, None
        z = self.members.first_of(z).to(PartialState().device if self.options.index == "exact" else "cpu")
        return z, neighbours.build(self.options.index, z, self.seed % 2**31)

    def begin(self, epoch: int) -> None:
        """Settle the epoch's batches: in one process, for all of them, since rounding must not tell them apart."""
        if epoch == self.epoch:
            return
        z, index = self._search(True) if self.online else (self.z, self.index)
        state = PartialState()
        plan = (
            np.empty((self.steps_per_epoch, self.batch_size), dtype=np.int64)
            if z is None
            else self._plan(z, index, epoch)
        )
        if state.num_processes > 1:
            plan = broadcast(torch.from_numpy(plan).to(state.device)).cpu().numpy()
        self.epoch, self.plan = epoch, plan

    def _plan(self, z: Tensor, index: neighbours.Index, epoch: int) -> np.ndarray:
        options, rng = self.options, stream(self.seed, "clusters", epoch)
        made = clusters.plan(
            z,
            self.batch_size,
            self.steps_per_epoch,
            size=self.size,
            share=share(options, epoch),
            neighbourhood=options.neighbourhood,
            cover=options.cover,
            index=index,
            rng=rng,
        )
        return self.members.draw(np.stack(list(made)), rng)

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        self.begin(epoch)
        yield from self.plan

    def state(self) -> dict[str, Tensor]:
        return {"epoch": torch.tensor(self.epoch), "plan": torch.from_numpy(self.plan)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.epoch, self.plan = int(state["epoch"]), state["plan"].numpy()


class _Members:
    """Groups of examples that are alike, in the order of their numbers. len() of it: how many groups."""

    def __init__(self, group: np.ndarray) -> None:
        self.order = np.argsort(group, kind="stable")
        _, self.start, self.count = np.unique(group[self.order], return_index=True, return_counts=True)
        self.all_differ = len(self.start) == len(group)  # each example is then a group of its own, in its own place

    def __len__(self) -> int:
        return len(self.start)

    def first_of(self, z: Tensor) -> Tensor:
        """One row a group.  [N, D] -> [G, D]"""
        return z if self.all_differ else z[torch.from_numpy(self.order[self.start])]

    def draw(self, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An example of each group, any of them as likely as another. -> the same shape"""
        if self.all_differ:
            return groups
        return self.order[self.start[groups] + rng.integers(self.count[groups])]


def share(options: SamplerConfig, epoch: int) -> float:
    """The share of a batch that is in clusters in an epoch (from 0): exactly `share` from the last doubling on."""
    return options.share / 2 ** sum(at > epoch for at in options.double_at)


def cluster_size(options: SamplerConfig, batch_size: int) -> int:
    """k, given or by the number of clusters. Raises UserError where these do not come out even."""
    if options.clusters is None:
        return CLUSTER_SIZE if options.cluster_size is None else options.cluster_size
    inside = round(options.share * batch_size)
    if inside % options.clusters:
        raise UserError(
            f"sampler.clusters is {options.clusters}, which does not divide the {inside} examples in clusters "
            f"(sampler.share {options.share} of a batch of {batch_size})"
        )
    size = inside // options.clusters
    if options.cluster_size not in (None, size):
        raise UserError(
            f"sampler.clusters {options.clusters} of sampler.cluster_size {options.cluster_size} are "
            f"{options.clusters * options.cluster_size} examples, and sampler.share {options.share} of a batch of "
            f"{batch_size} is {inside}; leave one of the three out"
        )
    return size


def check_options(options: SamplerConfig, batch_size: int, epochs: int) -> None:
    """Raises UserError for settings of clusters that mean nothing."""
    check_choice("sampler.similarity", options.similarity, ("text", "image"))
    check_choice("sampler.index", options.index, neighbours.KINDS)
    neighbours.check(options.index)
    check_at_least("sampler.neighbourhood", options.neighbourhood, 1)
    if not 0 < options.share <= 1:
        raise UserError(f"sampler.share is {options.share}; it is a share of the batch, above 0 and at most 1")
    if options.clusters is not None:
        check_at_least("sampler.clusters", options.clusters, 1)
    size = cluster_size(options, batch_size)
    if not 2 <= size <= batch_size:
        raise UserError(f"clusters of {size} in batches of {batch_size}: they need at least 2 and at most {batch_size}")
    if not clusters.sizes(batch_size, size, options.share):
        raise UserError(
            f"sampler.share {options.share} of a batch of {batch_size} is less than two examples, so no cluster; "
            "make it larger, or take --sampler.kind random"
        )
    _check_schedule(options, epochs)


def _check_schedule(options: SamplerConfig, epochs: int) -> None:
    at = options.double_at
    if any(a >= b for a, b in zip([0, *at], at)):
        raise UserError(f"sampler.double_at is {at}; it takes epochs from 1 on, each later than the one before")
    if at and options.clusters is not None:
        raise UserError("sampler.double_at changes how many clusters there are; give sampler.cluster_size instead")
    if at and at[-1] >= epochs:
        ends = share(options, epochs - 1)
        raise UserError(
            f"the share of clusters would end at {ends:g} and not at {options.share:g}: it doubles at epochs {at}, and "
            f"the run has {epochs}, the last of them {epochs - 1}; see sampler.double_at"
        )


def _describe(options: SamplerConfig, batch_size: int, size: int, online: bool) -> str:
    when = "by the model at each epoch's beginning" if online else "by the model before training"
    shares = [(at, share(options, at)) for at in (0, *options.double_at)]
    told = ", ".join(f"{p:g} from epoch {at}" for at, p in shares) if len(shares) > 1 else f"{shares[0][1]:g}"
    few = "" if round(shares[0][1] * batch_size) > 1 else " (fewer than two examples at first, so no cluster)"
    near = "the nearest" if options.neighbourhood == 1 else f"of the {options.neighbourhood * size} nearest"
    return f"clusters of {size} similar by {options.similarity} ({near}, {when}); share of a batch: {told}{few}"
