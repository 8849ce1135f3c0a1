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


def settings(batch_size: int = 24, **options) -> FinetuneConfig:
    train = {name: options.pop(name) for name in ("epochs", "steps", "max_steps_per_epoch") if name in options}
    config = FinetuneConfig(train=TrainConfig(batch_size=batch_size, **train), sampler=SamplerConfig(**options))
    config.sampler.kind = options.get("kind", "clusters")
    return config


def make(config: FinetuneConfig, examples: Grouped | None = None) -> samplers.Sampler:
    return samplers.make(config, N, config.train.batch_size, examples or Grouped())


def epoch(sampler: samplers.Sampler, number: int) -> np.ndarray:
    return np.stack(list(sampler.batches(number, np.random.default_rng(number))))


def test_random_batches_hold_everything_once_an_epoch_in_another_order_each():
    sampler = make(settings(kind="random"))
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert first.shape == second.shape == (sampler.steps_per_epoch, 24) == (4, 24)
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(N))
    assert (first != second).any()


@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_an_epoch_can_be_cut_short(kind):
    sampler = make(settings(kind=kind, max_steps_per_epoch=3))
    assert sampler.steps_per_epoch == 3
    assert epoch(sampler, 0).shape == (3, 24)
    assert make(settings(kind=kind, max_steps_per_epoch=99)).steps_per_epoch == 4


@pytest.mark.parametrize(("options", "size"), [({"cluster_size": 8}, 8), ({"clusters": 3}, 8), ({"clusters": 6}, 4)])
def test_clusters_are_of_similar_examples(options, size):
    for batch in epoch(make(settings(**options)), 0):
        assert len(set(batch.tolist())) == 24
        for cluster in batch.reshape(-1, size):
            assert len(set(cluster // EACH)) == 1


def test_the_share_is_in_clusters_and_the_rest_at_random():
    batches = epoch(make(settings(cluster_size=4, share=0.5)), 0)
    inside, outside = batches[:, :12].reshape(-1, 4), batches[:, 12:].reshape(-1, 4)
    assert all(len(set(cluster // EACH)) == 1 for cluster in inside)
    assert np.mean([len(set(some // EACH)) for some in outside]) > 2.5


def test_clusters_grow_in_number_with_the_share():
    sampler = make(settings(epochs=5, cluster_size=4, double_at=[1, 3]))
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.5), (3, 1.0), (4, 1.0)):
        for batch in epoch(sampler, number):
            held = sum(sizes(24, 4, share))
            assert held == 24 * share // 2 * 2
            assert all(len(set(cluster // EACH)) == 1 for cluster in batch[: held // 4 * 4].reshape(-1, 4))
    assert "share of a batch: 0.25 from epoch 0, 0.5 from epoch 1, 1 from epoch 3" in sampler.notes[0]


@pytest.mark.parametrize(
    ("online", "learns", "expected"),
    [(True, True, [True] * 3), (False, True, [False]), (True, False, [False])],  # the last: why look again
)
def test_online_looks_at_the_model_at_each_epochs_beginning_and_offline_before_training(online, learns, expected):
    examples = Grouped(learns)
    sampler = make(settings(online=online, cluster_size=4), examples)
    assert examples.asked == [("text", False)] * (not expected[0])
    for number in range(3):
        sampler.begin(number)
        epoch(sampler, number)
    assert [now for _, now in examples.asked] == expected
    assert ("at each epoch's beginning" in sampler.notes[0]) == expected[0]


def test_an_epoch_is_part_of_the_state_and_is_not_made_again():
    sampler = make(settings(cluster_size=4))
    sampler.begin(2)
    expected, state = epoch(sampler, 2), sampler.state()

    examples = Grouped()  # which must not be asked: the weights of the epoch's beginning are gone
    later = make(settings(cluster_size=4), examples)
    later.restore(state)
    later.begin(2)
    assert (epoch(later, 2) == expected).all()
    assert not examples.asked
    later.begin(3)
    assert examples.asked


def test_examples_that_are_alike_are_not_each_others_negatives_and_all_of_them_come():
    """Two of each eight are told by the same words: a batch of 24 has at most one of the two."""
    alike = np.arange(N)
    alike[1::EACH] = alike[::EACH]
    sampler, seen = make(settings(cluster_size=4), Grouped(alike=alike)), set()
    for number in range(20):
        for batch in epoch(sampler, number):
            assert len(set(alike[batch].tolist())) == 24
            assert np.mean([len(set(cluster // EACH)) for cluster in batch.reshape(-1, 4)]) < 2.0
            seen |= set(batch.tolist())
    assert seen == set(range(N))


def test_how_examples_that_all_differ_are_numbered_does_not_matter():
    numbers = np.random.default_rng(0).permutation(N) + 7
    plain, numbered = (make(settings(cluster_size=4), Grouped(alike=alike)) for alike in (None, numbers))
    assert (epoch(plain, 0) == epoch(numbered, 0)).all()


def test_too_few_that_differ_are_said():
    with pytest.raises(UserError, match="only 12 examples differ by text, which do not fill a batch of 24 in clusters"):
        make(settings(cluster_size=4), Grouped(alike=np.arange(N) // EACH))


def test_random_batches_say_which_settings_of_clusters_have_no_effect():
    found = make(settings(kind="random", cluster_size=4, double_at=[1]))
    assert isinstance(found, samplers.Random)
    assert found.notes == ["batches are random, so sampler.cluster_size, sampler.double_at has no effect"]
    assert make(settings(kind="random")).notes == []


def test_an_index_that_is_not_installed_is_told_of_before_a_run_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        make(settings(cluster_size=4, index="faiss"))


REFUSED = [
    ({"cluster_size": 0}, r"clusters of 0 in batches of 24"),
    ({"share": 0.01}, r"sampler.share 0.01 of a batch of 24 is less than two examples, so no cluster"),
    ({"similarity": "picture"}, r"sampler.similarity is 'picture'.*text"),
    ({"index": "fais"}, r"sampler.index is 'fais'. Did you mean 'faiss'"),
    ({"neighbourhood": 0}, r"sampler.neighbourhood is 0; it must be at least 1"),
    ({"share": 0.0}, r"sampler.share is 0.0; it is a share of the batch, above 0 and at most 1"),
    ({"clusters": 5}, r"sampler.clusters is 5, which does not divide the 24 examples in clusters"),
    ({"clusters": 3, "cluster_size": 4}, r"clusters 3 of sampler.cluster_size 4 are 12 examples, .* is 24;"),
    ({"double_at": [3, 2]}, r"sampler.double_at is \[3, 2\]; it takes epochs from 1 on, each later"),
    ({"double_at": [1, 5], "epochs": 5}, r"would end at 0.5 and not at 1: it doubles at epochs \[1, 5\].*has 5"),
    ({"double_at": [1], "clusters": 3}, r"sampler.double_at changes how many clusters there are"),
    ({"max_steps_per_epoch": 0}, r"train.max_steps_per_epoch is 0; it must be at least 1"),
    ({"batch_size": 97}, r"96 examples do not fill one batch of 97; make train.batch_size smaller"),
]  # fmt: skip


def test_settings_that_do_not_fit_are_said_in_words():
    for options, message in REFUSED:
        with pytest.raises(UserError, match=message):
            make(settings(**{"epochs": 20, **options}))
