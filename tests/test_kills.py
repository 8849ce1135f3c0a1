"""Killed with SIGKILL at any moment and continued, the file is that of an uninterrupted run, line for line."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from writing_runs import names, on_captions

from pc_clip.core import environment
from pc_clip.core.distributed import Processes
from pc_clip.write import generate, work
from pc_clip.write.progress import Progress
from pc_clip.write.rules import RulesWriter

forks = multiprocessing.get_context("fork")  # quick, and no different for the files that are left
N_IMAGES, N_PAIRS = 40, 780


class Unordered(RulesWriter):
    """The same sentence for the same job, in another order in each process; some are rejected."""

    def stream(self, jobs):
        for n in np.random.default_rng(os.getpid()).permutation(len(jobs)).tolist():
            yield n, "" if jobs[n].seed % 7 == 0 else self._write(jobs[n])


class SlowFile(io.FileIO):
    """Takes a line in several slow pieces, so that a kill often comes within a line."""

    def write(self, content):
        time.sleep(0.0006)
        return super().write(content[: len(content) // 2 + 1])


def start(config, processes):
    """generate() in a process of its own."""

    def run():
        Progress.open = lambda self, rank: io.BufferedWriter(
            SlowFile(self.folder / f"{time.time_ns()}-{rank}.jsonl", "xb")
        )
        generate.generate(config, processes)

    process = forks.Process(target=run)
    process.start()
    return process


def content_of(config):
    """What the working folder holds: {name: bytes}."""
    return {path.name: path.read_bytes() for path in (Path(config.out) / "some.parts").glob("[0-9]*.jsonl")}


def files(path):
    return [path.read_bytes(), path.with_suffix(".rejected.jsonl").read_bytes()]


@pytest.mark.slow
def test_twenty_kills_lose_and_duplicate_nothing(monkeypatch):
    monkeypatch.setattr(work, "make_writer", lambda config, task=None: Unordered())
    monkeypatch.setattr(environment, "commit", lambda: None)  # two processes of git a run
    config = on_captions([(f"A large café with {n} green tables", f"A room with {n} dogs") for n in range(N_IMAGES)])
    expected = files(generate.generate(dataclasses.replace(config, out="whole")))
    assert len(b"".join(expected).splitlines()) == N_PAIRS
    rng, torn = np.random.default_rng(0), 0
    for kill in range(20):
        size = 1 + kill % 2
        before = content_of(config)
        barrier = forks.Barrier(size)
        processes = [start(config, Processes(rank, size, rank, barrier.wait)) for rank in range(size)]
        grown, end = sum(map(len, before.values())) + rng.integers(1, 4000), time.monotonic() + 60
        while sum(map(len, content_of(config).values())) < grown:
            assert time.monotonic() < end
            time.sleep(0.001)
        for process in rng.permutation(processes).tolist():  # one outlives the other for a while
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.join()
            assert process.exitcode < 0, "it was done too early for this test to mean anything"
        after = content_of(config)
        assert all(after[name] == content for name, content in before.items())
        numbers = [json.loads(line)["n"] for text in after.values() for line in text.split(b"\n")[:-1]]
        assert len(numbers) == len(set(numbers))
        torn += sum(not text.endswith(b"\n") for name, text in after.items() if name not in before)
    assert 20 < len(numbers) < N_PAIRS and torn > 2
    path = generate.generate(config)
    assert files(path) == expected
    assert names("out") == ["some.jsonl", "some.meta.json", "some.rejected.jsonl"]
