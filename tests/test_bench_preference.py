"""The benchmark of preference tuning, at a small size: both ways have the same gradients, and it says so else."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from pc_clip.data import example_sets

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 20, "val": 8, "test": 8})
    spec = importlib.util.spec_from_file_location("bench_preference", BENCH / "preference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in {"BATCH": 8, "STEPS": 1, "ROUNDS": 2}.items():
        monkeypatch.setattr(module, name, size)
    return module


def test_figures_are_taken_and_have_the_floor_asked(bench):
    threads = torch.get_num_threads()
    found = bench.figures(threads=1)
    assert [(f.unit, f.floor) for f in found if not math.isnan(f.floor)] == [("x", 3.0)]
    assert all(0 < f.ratio < math.inf for f in found)
    assert torch.get_num_threads() == threads


def test_what_is_measured_is_compared(bench, monkeypatch):
    monkeypatch.setattr(bench.reference, "_odds", lambda model, pixels, *texts: model.encode_text(texts[0]).sum(-1))
    with pytest.raises(RuntimeError, match="our gradient is off the reference's by"):
        bench.figures(threads=1)


def test_the_reference_prefers_by_log_probabilities(bench):
    """DPO of a policy that is the reference is log 2, whatever both prefer."""
    method = bench.make_method()
    policy, frozen, loader = bench.published(method)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    some = next(iter(loader))
    assert bench.reference.preference_step(policy, frozen, optimizer, *some, 0.7) == pytest.approx(math.log(2))
    assert bench.reference.preference_step(policy, frozen, optimizer, *some, 0.7) < math.log(2)
