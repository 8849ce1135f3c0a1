"""The benchmark of searches for sentences, at a small size: both ways write the same, and it says so else."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from pc_clip.models.caption_decoder import Decoder, Found, Shape
from pc_clip.models.vocabulary import END, PAD, START

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_change", BENCH / "change.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"SHAPE": Shape(2, 2, 16, 14), "SEEN": 6, "WIDTH": 8, "WORDS": (12, 40), "BATCH": 9, "BEAMS": 2}
    for name, size in (small | {"LENGTH": 6.0, "ROUNDS": 1}).items():
        monkeypatch.setattr(module, name, size)
    return module


def test_figures_are_taken_and_have_the_floor_asked(bench):
    threads = torch.get_num_threads()
    found = bench.figures(threads=1)
    floors = {f.name: f.floor for f in found if not math.isnan(f.floor)}
    assert floors == {f"change sentences, greedy, {n} words, ours : reference": 10.0 for n in (12, 40)}
    assert all(0 < f.ratio < math.inf for f in found)
    assert len({f.name for f in found}) == len(found) == 12
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("ends", [True, False])
def test_both_ways_write_the_same_sentences_of_the_lengths_asked(bench, ends):
    decoder, seen = bench.make_decoder(40), bench.make_seen()
    lengths = bench.set_ends(decoder, seen, ends).tolist()
    mine, true = decoder.greedy(seen).tokens, bench.published(decoder, seen)
    assert bench.sentences(mine) == bench.sentences(true)
    assert true.shape == (9, 13)  # whatever has ended
    if ends:
        assert [len(said) + 1 for said in bench.sentences(mine)] == lengths
        assert sum(lengths) / 9 == pytest.approx(6, abs=1)
        assert len(set(lengths)) > 2
    else:
        assert lengths == [13] * 9
        assert END not in mine


def test_the_reference_reads_all_words_again_for_each_next_one(bench):
    read = []

    def decoder(words):
        read.append(words.clone())
        scores = torch.zeros(*words.shape, 4)
        scores[..., 0] = 1.0  # END, always
        scores[:, -1] += torch.tensor([0.0, 0.0, 0.0, 2.0]) if words.shape[1] == 2 else 0
        return scores

    words = bench.reference.greedy_words(decoder, 2, START, END, 4)
    assert [each.shape[1] for each in read] == [1, 2, 3, 4]
    assert words.tolist() == [[END, END + 3, END, END]] * 2
    assert bench.sentences(words) == [[], []]


def test_what_is_measured_is_compared(bench, monkeypatch):
    greedy = Decoder.greedy

    def wrong(self, seen):
        found = greedy(self, seen)
        return Found(torch.full_like(found.tokens, PAD), found.log_likelihood)

    monkeypatch.setattr(bench, "set_ends", lambda *_: torch.ones(3))
    monkeypatch.setattr(Decoder, "greedy", wrong)
    with pytest.raises(RuntimeError, match="9 of 9 sentences are not the reference's"):
        bench.figures(threads=1)
