"""Which examples come together: settings that fit each other, shares that double, clusters that are similar."""

import sys

import numpy as np
import pytest
import torch

from pc_clip.core.config.train import FinetuneConfig, SamplerConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.train import samplers
from pc_clip.train.clusters import sizes

GROUPS, EACH = 12, 8  # examples that are alike: 0-7, 8-15, ...
N = GROUPS * EACH


class Grouped:
    """Examples in GROUPS directions, EACH around each; what is asked of them is kept."""

    def __init__(self, learns: bool = True, alike: np.ndarray | None = None) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.changes, self.numbers = learns, np.arange(N) if alike is None else alike

    def embeddings(self, similarity: str, now: bool) -> torch.Tensor:
        self.asked.append((similarity, now))
        noise = torch.randn(N, GROUPS, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(torch.eye(GROUPS).repeat_interleave(EACH, 0) + 0.05 * noise, dim=-1)

    def learns(self, similarity: str) -> bool:
        return self.changes

    def alike(self, similarity: str) -> np.ndarray:
        return self.numbers


def make(examples: Grouped | None = None, batch_size: int = 24, **options) -> samplers.Sampler:
    train = {name: options.pop(name) for name in ("epochs", "steps", "max_steps_per_epoch") if name in options}
    options = {"kind": "clusters", "cluster_size": 4} | options
    config = FinetuneConfig(train=TrainConfig(batch_size=batch_size, **train), sampler=SamplerConfig(**options))
    return samplers.make(config, N, batch_size, examples or Grouped())


def epoch(sampler: samplers.Sampler, number: int) -> np.ndarray:
    return np.stack(list(sampler.batches(number, np.random.default_rng(number))))


def groups_in(clusters: np.ndarray) -> list[int]:
    """How many of the GROUPS each cluster has examples of."""
    return [len(set(cluster // EACH)) for cluster in clusters]


def test_random_batches_hold_everything_once_an_epoch_in_another_order_each():
    sampler = make(kind="random")
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert first.shape == second.shape == (sampler.steps_per_epoch, 24) == (4, 24)
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(N))
    assert (first != second).any()


@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_an_epoch_can_be_cut_short(kind):
    assert epoch(make(kind=kind, max_steps_per_epoch=3), 0).shape == (3, 24)
    assert make(kind=kind, max_steps_per_epoch=99).steps_per_epoch == 4


def test_the_given_fraction_is_in_clusters_the_rest_random():
    batches = epoch(make(share=0.5), 0)
    assert set(groups_in(batches[:, :12].reshape(-1, 4))) == {1}
    assert np.mean(groups_in(batches[:, 12:].reshape(-1, 4))) > 2.5
    assert all(len(set(batch)) == 24 for batch in batches)


def test_clusters_grow_in_number_with_the_share():
    sampler = make(epochs=5, double_at=[1, 3])
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.5), (3, 1.0), (4, 1.0)):
        for batch in epoch(sampler, number):
            held = sum(sizes(24, 4, share))
            assert held == 24 * share // 2 * 2
            assert set(groups_in(batch[: held // 4 * 4].reshape(-1, 4))) == {1}
    assert "share of a batch: 0.25 from epoch 0, 0.5 from epoch 1, 1 from epoch 3" in sampler.notes[0]


@pytest.mark.parametrize(
    ("online", "learns", "expected"),
    [(True, True, [True] * 3), (False, True, [False]), (True, False, [False])],  # the last: why look again
)
def test_online_embeds_each_epoch_offline_once_before_training(online, learns, expected):
    examples = Grouped(learns)
    sampler = make(examples, online=online)
    assert examples.asked == [("text", False)] * (not expected[0])
    for number in range(3):
        sampler.begin(number)
        epoch(sampler, number)
    assert [now for _, now in examples.asked] == expected
    assert ("at each epoch's beginning" in sampler.notes[0]) == expected[0]


def test_an_epoch_is_part_of_the_state_and_is_not_made_again():
    sampler, examples = make(), Grouped()
    sampler.begin(2)
    later = make(examples)
    later.restore(sampler.state())
    later.begin(2)
    assert (epoch(later, 2) == epoch(sampler, 2)).all()
    assert not examples.asked  # the weights of the epoch's beginning are gone
    later.begin(3)
    assert examples.asked


def test_identical_examples_are_never_negatives_and_all_appear():
    """Two of each eight are told by the same words: a batch of 24 has at most one of the two."""
    alike = np.arange(N)
    alike[1::EACH] = alike[::EACH]
    sampler, seen = make(Grouped(alike=alike)), set()
    for number in range(20):
        for batch in epoch(sampler, number):
            assert len(set(alike[batch].tolist())) == 24
            assert np.mean(groups_in(batch.reshape(-1, 4))) < 2.0
            seen |= set(batch.tolist())
    assert seen == set(range(N))


def test_how_examples_that_all_differ_are_numbered_does_not_matter():
    numbers = np.random.default_rng(0).permutation(N) + 7
    assert (epoch(make(), 0) == epoch(make(Grouped(alike=numbers)), 0)).all()


def test_random_batches_say_which_settings_of_clusters_have_no_effect():
    actual = make(kind="random", cluster_size=4, double_at=[1])
    assert actual.notes == ["batches are random, so sampler.cluster_size, sampler.double_at has no effect"]
    assert make(kind="random", cluster_size=16).notes == []


REFUSED = [
    ({"cluster_size": 0}, "clusters of 0 in batches of 24"),
    ({"share": 0.01}, "sampler.share 0.01 of a batch of 24 is less than two examples, so no cluster"),
    ({"similarity": "picture"}, "sampler.similarity is 'picture'"),
    ({"index": "fais"}, "sampler.index is 'fais'. Did you mean 'faiss'"),
    ({"index": "faiss"}, "pip install faiss-cpu"),  # before a run begins
    ({"neighbourhood": 0}, "sampler.neighbourhood is 0; it must be at least 1"),
    ({"share": 0.0}, "sampler.share is 0.0; it is a share of the batch, above 0 and at most 1"),
    ({"double_at": [3, 2]}, "sampler.double_at is [3, 2]; it takes epochs from 1 on, each later"),
    ({"double_at": [1, 5], "epochs": 5}, "would end at 0.5 and not at 1: it doubles at epochs [1, 5]"),
    ({"max_steps_per_epoch": 0}, "train.max_steps_per_epoch is 0; it must be at least 1"),
    ({"batch_size": 97}, "96 examples do not fill one batch of 97; make train.batch_size smaller"),
    ({"examples": Grouped(alike=np.arange(N) // EACH)}, "only 12 examples differ by text"),
]


def test_settings_that_do_not_fit_are_said_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    for options, message in REFUSED:
        with pytest.raises(UserError) as error:
            make(**{"epochs": 20, **options})
        assert message in str(error.value)
