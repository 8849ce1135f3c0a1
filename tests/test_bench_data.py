"""The benchmark of the data's way into a batch, at a small size: it runs, and leaves nothing behind."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_data", BENCH / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in {"IMAGES": 40, "DIMENSIONS": 8, "SENTENCES": 1000, "BATCH": 8, "SAMPLE": 10}.items():
        monkeypatch.setattr(module, name, size)
    return module


def test_figures_are_taken_and_nothing_is_left(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads, here = torch.get_num_threads(), Path.cwd()
    found = bench.figures(threads=1)
    assert {f.unit: f.most for f in found if not math.isnan(f.most)} == {"s": 5.0, "ms": 2.0}
    assert all(0 < f.ratio < math.inf for f in found)
    assert (torch.get_num_threads(), Path.cwd()) == (threads, here)
    assert not list(tmp_path.iterdir())


def test_what_is_measured_is_a_batch_of_the_written_differences(bench):
    from pc_clip.models.clip import Clip

    clip = Clip.create("example")
    method = bench._start(clip, bench._write_data(clip))[1]
    batch = next(method.loader(0))
    assert len(batch.text) == 8
    assert batch.images.shape[1] == 8
    assert 30 < (batch.tokens != 0).sum(1).float().mean() < 60
