"""Progress: whatever the working folder holds is continued to the same file, and no two launches write it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_runs import PLAIN_FLAGS, interrupt, names, on_captions, whole

from pc_clip.core import environment
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.write import generate
from pc_clip.write.progress import Progress
from pc_clip.write.rules import RulesWriter

ROOT = Path(__file__).parents[1]
N_PAIRS = 45  # of 10 images
forks = multiprocessing.get_context("fork")


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: None)  # two processes of git a file
    return on_captions([[f"A large café with {n} green tables in it and a dog"] for n in range(10)])


@pytest.mark.slow
def test_any_lines_in_any_files_with_any_tails_give_the_same_file(config):
    path = interrupt(config, N_PAIRS)
    lines, expected, asked = path.read_bytes().splitlines(keepends=True), whole(config), []
    numbers = st.lists(st.sampled_from(range(N_PAIRS)), unique=True)
    tails = st.sampled_from([b"", b"{", b"\xff", lines[7][:-1], lines[8][:20]])

    @given(numbers, st.lists(st.integers(0, 3), min_size=N_PAIRS, max_size=N_PAIRS), st.lists(tails, min_size=4))
    @settings(max_examples=25)
    def holds(done, places, ends):
        shutil.rmtree(config.out)
        interrupt(config, 0)
        for place, end in zip(range(4), ends):
            content = b"".join(lines[n] for n, at in zip(done, places) if at == place)
            (path.parent / f"{place}.jsonl").write_bytes(content + end)
        asked.clear()
        assert generate.generate(config).read_bytes() == expected
        assert len(asked) == N_PAIRS - len(done)

    write = RulesWriter._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RulesWriter, "_write", lambda self, job: asked.append(job) or write(self, job))
        holds()


def test_a_sentence_that_came_twice_is_taken_once(config):
    path = interrupt(config, 10)
    lines = path.read_bytes().splitlines(keepends=True)
    path.with_name("9.jsonl").write_bytes(b"".join(lines[3:6]).replace(b"dog", b"cat"))
    assert len(generate.generate(config).read_text(encoding="utf-8").splitlines()) == N_PAIRS


def test_a_bad_progress_line_is_an_error_with_file_and_line(config):
    path = interrupt(config, 10)
    lines = path.read_bytes().splitlines(keepends=True)
    row = json.loads(lines[1])
    others = [row | {"n": N_PAIRS}, row | {"n": None}, row | {"second": "09"}]
    for line in [b"\0\0\n", b"[3]\n", b"{}\n", b"\xff\xfe\n", *(json.dumps(o).encode() + b"\n" for o in others)]:
        content = b"".join([*lines[:4], line, *lines[4:]])
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"\.jsonl line 5 is not a sentence on one of these.*delete the line"):
            generate.generate(config)
        assert path.read_bytes() == content


def test_sentences_without_settings_are_not_taken_for_ours(config):
    interrupt(config, 3).with_name("settings.json").write_text("{")
    with pytest.raises(UserError, match="begun with other settings"):
        generate.generate(config)
    assert generate.generate(dataclasses.replace(config, overwrite=True)).is_file()


def test_a_folder_that_holds_no_sentence_yet_hinders_nobody(config):
    interrupt(config, 0)
    assert generate.generate(dataclasses.replace(config, seed=5)).is_file()


# -- several processes ---------------------------------------------------------------------------------


def test_three_processes_share_the_work_and_one_merges_it(config):
    expected = whole(config)
    interrupt(config, 4)
    barrier = forks.Barrier(3)
    started = [
        forks.Process(target=generate.generate, args=(config, Processes(rank, 3, rank, barrier.wait)))
        for rank in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert Path("out/some.jsonl").read_bytes() == expected
    assert names("out") == ["some.jsonl", "some.meta.json"]


def test_a_second_launch_of_the_same_name_is_refused_and_harms_nothing(config):
    path = interrupt(config, 10)
    before, settings = path.read_bytes(), json.loads(path.with_name("settings.json").read_text())
    held, end = forks.Event(), forks.Event()

    def hold():
        with Progress(Path("out/some.jsonl")).working(settings, False, Processes()):
            held.set()
            end.wait(60)

    holder = forks.Process(target=hold)
    holder.start()
    assert held.wait(60)
    for other in (config, dataclasses.replace(config, overwrite=True), dataclasses.replace(config, seed=1)):
        with pytest.raises(UserError, match=r"another process is writing .*some\.jsonl"):
            generate.generate(other)
    assert path.read_bytes() == before
    holder.kill()  # its lock goes with it
    holder.join()
    assert generate.generate(config).read_bytes() == whole(config)


def test_a_process_whose_neighbour_died_says_so(config):
    def broken():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(UserError, match="another process of this run has stopped.*same command continues"):
        generate.generate(config, Processes(1, 2, 1, broken))


@pytest.mark.slow
def test_launched_as_two_processes_the_script_writes_what_one_does(config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    Path("none.yaml").write_text("name: some\n")
    script = [str(ROOT / "generate_diffs.py"), "--config", "none.yaml", "--split", "null"]
    script += ["--captions", config.captions, "--out", config.out, *PLAIN_FLAGS]
    ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Path("out/some.jsonl").read_bytes() == whole(config)
    assert ran.stderr.count("is written") == 1
