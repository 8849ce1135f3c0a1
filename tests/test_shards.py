"""Shards: any state of the working folder that can come about is merged to the same file, and no two write it."""

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.write import generate, progress
from pc_clip.write.progress import Jobs, Parts
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Job

ROOT = Path(__file__).parents[1]
N_PAIRS = 45  # of 10 images
forks = multiprocessing.get_context("fork")


def make_config(folder: Path) -> GenerateConfig:
    table = folder / "captions.tsv"
    lines = [f"{n}\t{n}.jpg\tA large café with {n} green tables in it and a dog" for n in range(10)]
    table.write_text("\n".join(["id\timage\tcaption1", *lines]) + "\n", encoding="utf-8")
    return GenerateConfig(name="some", captions=str(table), out=str(folder / "out"))


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


def begin(config, n=N_PAIRS):
    """A working folder with the first n sentences in shard 0, and its lines."""
    stream = RulesWriter.stream

    def stops(self, jobs):
        yield from itertools.islice(stream(self, jobs), n)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RulesWriter, "stream", stops)
        generate.generate(config)
    shard = Path(config.out) / "some.parts" / "0.jsonl"
    return shard, shard.read_bytes().splitlines(keepends=True)


# -- any state, one result -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A config, every line of its shard, and the finished file."""
    config = make_config(tmp_path_factory.mktemp("states"))
    _, lines = begin(config)
    return config, lines, generate.generate(config).read_bytes()


@given(st.data())
def test_any_lines_in_any_shards_with_any_tails_give_the_same_file(states, data):
    config, lines, expected = states
    out = Path(config.out) / "some.jsonl"
    shutil.rmtree(out.parent)
    shard, _ = begin(config, 0)
    done = data.draw(st.lists(st.sampled_from(range(N_PAIRS)), unique=True))
    places = data.draw(st.lists(st.sampled_from([0, 1, 2, 11]), min_size=len(done), max_size=len(done)))
    contents = {place: b"" for place in data.draw(st.sets(st.sampled_from([0, 1, 2, 11])))}
    for n, place in zip(done, places):
        contents[place] = contents.get(place, b"") + lines[n]
    tails = st.one_of(
        st.binary(max_size=20).filter(lambda tail: b"\n" not in tail),
        st.tuples(st.sampled_from(lines), st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]]),
        st.sampled_from(lines).map(lambda line: line[:-1]),  # whole but for its end is torn as well
    )
    for place, content in contents.items():
        shard.with_name(f"{place}.jsonl").write_bytes(content + data.draw(tails))
    asked, stream = Counter(), RulesWriter.stream

    def counted(self, jobs):
        asked.update(jobs.numbers.tolist())
        return stream(self, jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RulesWriter, "stream", counted)
        assert generate.generate(config).read_bytes() == expected
    assert asked == Counter(set(range(N_PAIRS)) - set(done))
    assert not shard.parent.exists()


@given(st.lists(st.integers(0, 99), unique=True), st.integers(1, 9))
def test_the_rest_is_dealt_out_whole_evenly_and_once(numbers, size):
    rest = np.array(sorted(numbers), dtype=np.int64)
    shares = [Processes(rank, size).share(rest).tolist() for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == rest.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(rest[k] in shares[k % size] for k in range(len(rest)))


def test_jobs_are_made_when_they_are_asked_for():
    made = []
    jobs = Jobs(np.array([3, 5, 8]), lambda n: made.append(n) or Job(str(n), "", n))
    assert len(jobs) == 3 and len(jobs[1:]) == 2 and not made
    assert jobs[-1].seed == 8 and jobs[1:][0].first == "5" and made == [8, 5]
    assert [job.seed for job in jobs] == [3, 5, 8]
    with pytest.raises(IndexError):
        jobs[3]


def test_a_sentence_that_came_twice_is_taken_once(config):
    shard, lines = begin(config, 10)
    shard.with_name("1.jsonl").write_bytes(b"".join(lines[3:6]).replace(b"dog", b"cat"))
    text = generate.generate(config).read_text(encoding="utf-8")
    assert len(text.splitlines()) == N_PAIRS and "cat" not in text


# -- what is no sentence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [b"\0\0\0\n", b"\n", b'{"n": 3\n', b"[3]\n", b"{}\n", b'{"n": 3, "first": "0", "second": "1"}\n', b"\xff\xfe\n"],
    ids=repr,
)
def test_garbage_within_a_shard_is_an_error_with_file_and_line(config, line):
    shard, lines = begin(config, 10)
    garbled = b"".join([*lines[:4], line, *lines[4:]])
    shard.write_bytes(garbled)
    with pytest.raises(UserError, match=r"some\.parts/0\.jsonl line 5 is no sentence .*delete the line") as error:
        generate.generate(config)
    assert "\n" not in str(error.value)
    assert shard.read_bytes() == garbled
    shard.write_bytes(b"".join(lines))
    assert generate.generate(config).is_file()


@pytest.mark.parametrize("n", [N_PAIRS, -1, 2.0, "2", None, True])
def test_a_number_of_no_item_is_an_error(config, n):
    shard, lines = begin(config, 3)
    shard.write_bytes(b"".join(lines) + json.dumps(json.loads(lines[1]) | {"n": n}).encode() + b"\n")
    with pytest.raises(UserError, match="line 4 is no sentence"):
        generate.generate(config)


def test_a_sentence_about_another_pair_is_an_error(config):
    shard, lines = begin(config, 3)
    shard.write_bytes(json.dumps(json.loads(lines[1]) | {"second": "9"}).encode() + b"\n")
    with pytest.raises(UserError, match=r"0\.jsonl line 1 is about \('0', '9'\), where \('0', '2'\) was expected"):
        generate.generate(config)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_sentences_without_settings_are_not_taken_for_ours(config, content):
    shard, lines = begin(config, 3)
    settings = shard.with_name("settings.json")
    settings.unlink() if content is None else settings.write_text(content)
    with pytest.raises(UserError, match="begun with other settings"):
        generate.generate(config)
    assert shard.read_bytes() == b"".join(lines)
    assert generate.generate(dataclasses.replace(config, overwrite=True)).is_file()


def test_a_folder_that_holds_no_sentence_yet_hinders_nobody(config):
    begin(config, 0)
    assert generate.generate(dataclasses.replace(config, seed=5)).is_file()


# -- the end -------------------------------------------------------------------------------------------


def test_what_an_interruption_left_beside_the_finished_file_is_removed(config, monkeypatch, caplog):
    shard, _ = begin(config)
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", lambda self: None)
        path = generate.generate(config)
    before = path.stat().st_mtime_ns
    assert shard.is_file()
    caplog.set_level(logging.INFO)
    assert generate.generate(config) == path
    assert "is complete" in caplog.text
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.jsonl", "some.meta.json"]
    assert path.stat().st_mtime_ns == before


def test_a_removal_that_was_cut_short_is_ended(config):
    path = generate.generate(config)
    rubbish = path.with_suffix(".parts.done")
    rubbish.mkdir()
    (rubbish / "3.jsonl").write_text("{")
    generate.generate(config)
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.jsonl", "some.meta.json"]


def test_a_line_is_with_the_system_at_once_and_on_the_disk_soon(tmp_path, monkeypatch):
    synced, reached, fsync = [], threading.Event(), os.fsync

    def watched(file):
        fsync(file)
        synced.append(os.fstat(file).st_size)
        reached.set()

    monkeypatch.setattr(progress, "SYNC_EVERY", 0.01)
    with Parts(tmp_path / "a.jsonl").lock(0), Parts(tmp_path / "a.jsonl").shard(0) as shard:
        monkeypatch.setattr(os, "fsync", watched)
        shard.add({"n": 0})
        assert shard.path.read_bytes() == b'{"n": 0}\n'
        assert reached.wait(10)  # with no second line to push it there
        monkeypatch.setattr(progress, "SYNC_EVERY", 1000)
        shard.add({"n": 1})
    assert synced[-1] == len(shard.path.read_bytes()) == 18


# -- several processes ---------------------------------------------------------------------------------


def run_forked(config, processes):
    """generate() in a process of its own."""
    process = forks.Process(target=generate.generate, args=(config, processes))
    process.start()
    return process


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_work_and_one_merges_it(config, tmp_path, size):
    expected = generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole")))
    begin(config, 4)
    barrier = forks.Barrier(size)
    started = [run_forked(config, Processes(rank, size, rank, barrier.wait)) for rank in range(size)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * size
    path = Path(config.out) / "some.jsonl"
    assert path.read_bytes() == expected.read_bytes()
    differing = {"date", "command"}
    one, several = (json.loads(p.with_suffix(".meta.json").read_text()) for p in (expected, path))
    assert {k: v for k, v in one.items() if k not in differing} == {
        k: v for k, v in several.items() if k not in differing
    }
    assert list(one) == list(several)
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.jsonl", "some.meta.json"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_run_of_the_same_name_is_refused_and_harms_nothing(config, tmp_path, rank):
    """Also when only a worker is left of the first, that outlived its launcher."""
    shard, lines = begin(config, 10)
    held, end = forks.Event(), forks.Event()

    def hold():
        with Parts(Path(config.out) / "some.jsonl").lock(rank):
            held.set()
            end.wait(60)

    holder = forks.Process(target=hold)
    holder.start()
    assert held.wait(60)
    for other in (config, dataclasses.replace(config, overwrite=True), dataclasses.replace(config, seed=1)):
        with pytest.raises(UserError, match=r"another process is writing .*some\.parts"):
            generate.generate(other)
    assert shard.read_bytes() == b"".join(lines)
    holder.kill()  # its lock goes with it
    holder.join()
    expected = generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole"))).read_bytes()
    assert generate.generate(config).read_bytes() == expected


def test_a_process_whose_neighbour_died_says_so(config):
    def broken():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(UserError, match="another process of this run has stopped.*same command continues"):
        generate.generate(config, Processes(1, 2, 1, broken))


def test_alone_no_state_of_processes_is_made(config, monkeypatch):
    """accelerate's would keep the device it was first asked for, and a training after it would then be on that."""
    import accelerate

    monkeypatch.setattr(accelerate, "PartialState", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Processes.here() == Processes()
    assert generate.generate(config).is_file()


def test_launched_as_two_processes_the_script_writes_what_one_does(config, tmp_path):
    expected = generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole"))).read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    settings = ["--name", "some", "--captions", config.captions, "--out", config.out, "--split", "null"]
    (tmp_path / "none.yaml").write_text("name: some\n")
    script = [str(ROOT / "generate_diffs.py"), "--config", "none.yaml", *settings]
    ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (Path(config.out) / "some.jsonl").read_bytes() == expected
    assert ran.stderr.count("is written") == 1
