"""Killed with SIGKILL at any moment and continued, the file is that of an uninterrupted run, line for line.

The processes that are killed are forked, which is quick and no different for the files they leave. Their writer is
greedy (the same job, the same sentence), gives its sentences in no order, and rejects some. Their disk takes every
line in slow pieces, so that a kill often comes within a line.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pc_clip.core import environment
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.write import generate, work
from pc_clip.write.rules import RulesWriter

forks = multiprocessing.get_context("fork")
N_IMAGES, N_PAIRS = 40, 780
SLOW = 0.0006  # seconds between the pieces of a line; so the whole would take some seconds


class Greedy(RulesWriter):
    def stream(self, jobs):
        for n in np.random.default_rng(os.getpid()).permutation(len(jobs)).tolist():  # each process in another order
            yield n, "" if jobs[n].seed % 7 == 0 else self._write(jobs[n])


@pytest.fixture(autouse=True)
def _greedy(monkeypatch):
    monkeypatch.setattr(work, "make_writer", lambda config, task=None: Greedy())
    monkeypatch.setattr(environment, "commit", lambda: None)  # two processes of git a run


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, N_IMAGES)


def make_config(folder, images):
    table = folder / "captions.tsv"
    lines = [f"{n:02d}\t{n}.jpg\tA large café with {n} green tables\tA room with {n} dogs" for n in range(images)]
    table.write_text("\n".join(["id\timage\tcaption1\tcaption2", *lines]) + "\n", encoding="utf-8")
    return GenerateConfig(name="some", captions=str(table), out=str(folder / "out"))


def uninterrupted(config):
    """Sentences and rejected ones of a run that nothing disturbs."""
    return found(generate.generate(dataclasses.replace(config, out=f"{config.out}-whole")))


def found(path):
    return [path.read_bytes(), path.with_suffix(".rejected.jsonl").read_bytes()]


def slow_disk():
    """Every line in pieces, as a write that was cut short is continued."""
    write = os.write

    def halting(file, content):
        time.sleep(SLOW)
        return write(file, content[: len(content) // 2 + 1])

    os.write = halting


def start(config, processes, prepare=slow_disk):
    """generate() in a process that has begun when this returns."""
    ours, theirs = forks.Pipe()

    def run():
        theirs.send("begun")
        prepare()
        generate.generate(config, processes)

    process = forks.Process(target=run)
    process.start()
    assert ours.recv() == "begun"
    return process


def kill(process):
    """Whether it was still at work."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def shards(config):
    """Shards as they stand: {name: bytes}."""
    return {path.name: path.read_bytes() for path in (Path(config.out) / "some.parts").glob("[0-9]*.jsonl")}


def whole_lines(contents):
    """The numbers of the sentences that are there, and how many shards have a torn line."""
    lines = [line for content in contents.values() for line in content.split(b"\n")[:-1]]
    return [json.loads(line)["n"] for line in lines], sum(not c.endswith(b"\n") for c in contents.values() if c)


def wait_for_growth(config, size):
    """Until the shards have grown by so many bytes."""
    grown, end = sum(map(len, shards(config).values())) + size, time.monotonic() + 60
    while sum(map(len, shards(config).values())) < grown:
        assert time.monotonic() < end
        time.sleep(0.001)


def assert_nothing_lost(before, after):
    for name, content in before.items():
        kept = content[: content.rfind(b"\n") + 1]
        assert after[name].startswith(kept), name
    numbers, torn = whole_lines(after)
    assert len(numbers) == len(set(numbers))
    return torn


def test_killed_at_twenty_random_moments_and_continued_each_time(config):
    expected = uninterrupted(config)
    rng = np.random.default_rng(0)
    torn, contents = 0, {}
    for k in range(20):
        process = start(config, Processes())
        if k % 2:  # some time after it began, perhaps before the first line; or within or after some line
            time.sleep(rng.uniform(0, 0.06))
        else:
            wait_for_growth(config, rng.integers(1, 4000))
        assert kill(process), "it was done too early for this test to mean anything"
        torn += assert_nothing_lost(contents, contents := shards(config))
    done, _ = whole_lines(contents)
    assert 20 < len(done) < N_PAIRS
    assert torn > 2
    path = generate.generate(config)
    assert found(path) == expected
    assert len(b"".join(expected).splitlines()) == N_PAIRS
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.jsonl", "some.meta.json", "some.rejected.jsonl"]


def test_two_processes_killed_at_random_then_one_then_three(config):
    expected = uninterrupted(config)
    rng = np.random.default_rng(1)
    contents = {}
    for size in (2, 2, 2, 2, 2, 1, 1):
        barrier = forks.Barrier(size)
        processes = [start(config, Processes(rank, size, rank, barrier.wait)) for rank in range(size)]
        wait_for_growth(config, rng.integers(1, 4000))
        for process in rng.permutation(processes).tolist():  # one outlives the other for a while
            time.sleep(rng.uniform(0, 0.05))
            assert kill(process)
        assert_nothing_lost(contents, contents := shards(config))
    assert all(whole_lines({name: contents[name]})[0] for name in ("0.jsonl", "1.jsonl"))
    barrier = forks.Barrier(3)
    processes = [start(config, Processes(rank, 3, rank, barrier.wait), lambda: None) for rank in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found(Path(config.out) / "some.jsonl") == expected


def test_a_process_that_outlives_its_main_one_is_not_written_over(config):
    """A launcher and its main process killed: the other writes on, and the next launch is told."""
    barrier = forks.Barrier(2)
    processes = [start(config, Processes(rank, 2, rank, barrier.wait)) for rank in range(2)]
    wait_for_growth(config, 2000)
    assert kill(processes[0])
    with pytest.raises(generate.UserError, match="another process is writing"):
        generate.generate(config)
    assert kill(processes[1])
    assert found(generate.generate(config)) == uninterrupted(config)


# -- at every step of the end --------------------------------------------------------------------------


def killed_before_call(k):
    """Kills its process before the k-th call, counted from 0, that changes something about a file but its content."""
    count = itertools.count()

    def deadly(call):
        def wrapped(*args, **options):
            if next(count) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    def prepare():
        for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, deadly(getattr(os, name)))

    return prepare


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_any_step_of_the_merging(tmp_path, overwrite):
    """With an older file to be replaced, what stands there is at every moment the old one, the new one or none.

    Each time all but the end has been done, and lies in two shards.
    """
    config = make_config(tmp_path, 6)
    expected, out = uninterrupted(config), Path(config.out)
    older = [b"", b""]
    if overwrite:
        older = found(generate.generate(dataclasses.replace(config, seed=1)))
        config.overwrite = True
    begin = start(config, Processes())
    wait_for_growth(config, 1000)
    assert kill(begin)
    (out / "some.parts" / "0.jsonl").rename(out / "some.parts" / "1.jsonl")
    out.rename(tmp_path / "begun")
    states = Counter()
    for k in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", out)
        process = start(config, Processes(), killed_before_call(k))
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        path = out / "some.jsonl"
        if path.exists():
            old = path.read_bytes() == older[0]
            assert found(path) == (older if old else expected)
            assert json.loads((out / "some.meta.json").read_text())["settings"]["seed"] == int(old)
            states["old" if old else "new"] += 1
        else:
            states["none"] += 1
        assert found(generate.generate(config)) == expected, k
        assert sorted(p.name for p in out.iterdir()) == ["some.jsonl", "some.meta.json", "some.rejected.jsonl"]
    assert states["none"] > 2 and states["new"] > 2 and (states["old"] > 2) == overwrite, states
