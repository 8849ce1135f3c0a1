"""Finetuning killed with SIGKILL at any moment and continued ends with the weights of a run that nothing disturbed,
bit for bit; and runs at the same time do not harm each other.

The processes that are killed are forked, which is quick and no different for the files they leave. Where a kill is to
come within a write, the process itself halts there, after a random part of it, so that no machine is too fast for it.
"""

import copy
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import sample_differences
import torch
from safetensors import safe_open

from pc_clip.core import environment, files
from pc_clip.core.cli import dump
from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.core.paths import STATE_FILE
from pc_clip.data import example_sets
from pc_clip.models.clip import Clip
from pc_clip.train import state
from pc_clip.train.loop import finetune
from pc_clip.train.methods import pairwise

forks = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[1]
SIZES = example_sets.EXAMPLE_SIZES
STEPS, SAVE_EVERY, LOG_EVERY = 72, 3, 2


@pytest.fixture(autouse=True)
def _small(small_example, monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: None)  # a process of git a run


@pytest.fixture
def config():
    return make_config("train")


def make_config(split, steps=STEPS, **train) -> FinetuneConfig:
    """A run named a, with anchor and mirror pairs, over some scenes of the embedded example."""
    sample_differences.write(Path("d.jsonl"), split)
    found = FinetuneConfig(name="a", out="runs", device="cpu")
    found.data.split, found.data.differences = split, "d.jsonl"
    about = {"batch_size": 8, "lr": 1e-3, "save_every": SAVE_EVERY, "log_every": LOG_EVERY, "threads": 1}
    found.train = TrainConfig(steps=steps, **about | train)
    found.pairwise = PairwiseConfig(anchor=1.0, anchor_captions=40, anchor_batch=2, mirror=True)
    return found


def changed(config, **settings) -> FinetuneConfig:
    """A copy in which settings have other values: run settings, or those of the loop."""
    found = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(found.train if hasattr(found.train, name) else found, name, value)
    return found


# -- processes -----------------------------------------------------------------------------------------


class Run:
    """finetune() in a process of its own. `prepare(halt)` may patch what it likes there; halt() stops it for good,
    or until `release`, and is what `reached` waits for."""

    def __init__(self, config, prepare=lambda halt: None):
        self.pipe, theirs = forks.Pipe()

        def work():
            def halt():
                theirs.send("reached")
                theirs.recv()

            prepare(halt)
            try:
                finetune(config)
                theirs.send("done")
            except UserError as error:
                theirs.send(str(error))
                os._exit(2)

        self.process = forks.Process(target=work, daemon=True)
        self.process.start()
        theirs.close()

    def said(self):
        assert self.pipe.poll(60), "nothing happens"
        return self.pipe.recv()

    def reached(self):
        said = self.said()
        assert said == "reached", f"{said}: too early for this test to mean anything"

    def release(self):
        self.pipe.send("go on")

    def kill(self):
        """Whether it was still at work."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def end(self):
        """What it said last: done, or the error."""
        said = self.said()
        self.process.join(60)
        assert self.process.exitcode == (0 if said == "done" else 2)
        return said


def straight(config) -> dict[str, bytes]:
    """The files of a run that nothing disturbs, which leaves no cache behind."""
    assert Run(changed(config, out="straight")).end() == "done"
    shutil.rmtree("data")
    return contents(Path("straight") / config.name)


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def assert_same_run(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same files; weights and state bit for bit, and the log but for its times."""
    assert found.keys() == expected.keys()
    for name in ("model.safetensors", "state.safetensors"):
        assert header_and_values(found[name]) == header_and_values(expected[name]), name
    assert rows(found) == rows(expected)


def header_and_values(content: bytes) -> tuple[dict, bytes]:
    """Of a safetensors file. What the header says comes in no fixed order."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def rows(found: dict[str, bytes]) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    return [{name: value for name, value in line.items() if name != "pairs_per_second"} for line in lines]


def leftovers() -> list[str]:
    """What a write or a lock may leave, anywhere below here: in the run's folder, in caches."""
    return [str(p) for p in Path().rglob("*") if ".partial" in str(p) or p.name.startswith(".")]


# -- the moments ---------------------------------------------------------------------------------------


def in_step(n):
    """When the n-th step, counted from 0, has begun: its batch is there."""

    def prepare(halt):
        forward, count = pairwise.Method.forward, itertools.count()

        def halting(self, batch):
            if next(count) == n:
                halt()
            return forward(self, batch)

        pairwise.Method.forward = halting

    return prepare


def in_writing(name, n, part):
    """When a part of the n-th file of that name is written; safetensors writes into a file of its own beside it."""

    def prepare(halt):
        save, count = files.save_file, itertools.count()

        def halting(tensors, path, metadata):
            if name in str(path) and next(count) == n:
                content = safetensors.torch.save(tensors, metadata)
                Path(path).with_name(".tmpXY").write_bytes(content[: int(part * len(content))])
                halt()
            return save(tensors, path, metadata)

        files.save_file = halting

    return prepare


def at_moving(name, n, after=False):
    """Before, or after, the n-th file of that name is moved into place."""

    def prepare(halt):
        replace, count = os.replace, itertools.count()

        def halting(source, target):
            mine = Path(target).name == name and next(count) == n
            if mine and not after:
                halt()
            replace(source, target)
            if mine and after:
                halt()

        os.replace = halting

    return prepare


def in_logging(n, part):
    """Within the n-th line of metrics.jsonl."""

    def prepare(halt):
        usual, count = Path.open, itertools.count()

        class Torn(io.TextIOWrapper):
            def write(self, text):
                if next(count) == n:
                    super().write(text[: int(part * len(text))])
                    self.flush()
                    halt()
                return super().write(text)

        def opened(self, mode="r", *args, **options):
            if self.name == "metrics.jsonl" and mode == "a":
                return Torn(usual(self, "ab"), encoding="utf-8")
            return usual(self, mode, *args, **options)

        Path.open = opened

    return prepare


def moments(rng):
    """Twenty moments in an order in which each can come: name, how to get there, seconds it is left alone there."""
    part = lambda: rng.uniform(0.02, 0.98)  # noqa: E731
    images = "example-train"
    begin = [
        ("anywhere", lambda halt: None, rng.uniform(0, 0.3)),
        ("embeddings", in_writing(images, 0, part()), 0),
        ("opening", at_moving("environment.json", 0), 0),
        ("opening", at_moving("config.yaml", 0), 0),
        ("opened", at_moving("config.yaml", 0, after=True), 0),
        ("first step", in_step(0), 0),
        ("first save", in_writing("state.safetensors", 0, part()), 0),
        ("first save", at_moving("state.safetensors", 0), 0),
        ("first save", at_moving("state.safetensors", 0, after=True), 0),
    ]
    middle = [
        *(("step", in_step(int(rng.integers(1, 6))), rng.uniform(0, 0.05)) for _ in range(2)),
        *(("save", in_writing("state.safetensors", int(rng.integers(2)), part()), 0) for _ in range(2)),
        ("saved", at_moving("state.safetensors", int(rng.integers(2)), after=True), 0),
        *(("log", in_logging(int(rng.integers(3)), part()), 0) for _ in range(2)),
        ("log cut back", at_moving("metrics.jsonl", 0), 0),
    ]
    end = [
        ("model", in_writing("model.safetensors", 0, part()), 0),
        ("model", at_moving("model.safetensors", 0), 0),
        ("done", at_moving("model.safetensors", 0, after=True), 0),
    ]
    return begin + [middle[n] for n in rng.permutation(len(middle))] + end


def witness(run: Path) -> Counter:
    """What can be seen of a kill in the files it left."""
    seen = Counter()
    seen["killed"] += 1
    seen["without config"] += not (run / "config.yaml").exists()
    seen["without state"] += not (run / "state.safetensors").exists()
    log = run / "metrics.jsonl"
    seen["torn line"] += log.exists() and not log.read_bytes().endswith(b"\n") and log.stat().st_size > 0
    for path in Path().rglob(".tmpXY"):
        seen["torn " + path.parent.name.split("-")[0].split(".")[0]] += 1
    return seen


def test_killed_at_twenty_random_moments_and_continued_each_time(config):
    expected, seen, run = straight(config), Counter(), Path("runs/a")
    config.resume = True  # from the first: a job that is sent again and again has one command
    for name, prepare, rest in moments(np.random.default_rng(0)):
        child = Run(config, prepare)
        if name != "anywhere":
            child.reached()
        if rest:
            child.release()
            time.sleep(rest)
        assert child.kill(), f"{name}: it was done too early for this test to mean anything"
        seen += witness(run)
        assert leftovers() or name == "anywhere", f"{name}: nothing is left behind, not even the lock"
    assert seen["killed"] == 20
    assert seen["without config"] >= 4 and seen["without state"] >= 8 and seen["torn line"] >= 2, seen
    assert seen["torn example"] == 1 and seen["torn state"] == 3 and seen["torn model"] == 1, seen
    assert Run(config).end() == "done"
    assert_same_run(contents(run), expected)
    assert [row["step"] for row in rows(expected)] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    assert not [path for path in leftovers() if ".partial" not in path]  # those are removed after a day


def test_without_resume_a_run_killed_before_its_first_save_starts_anew_and_a_later_one_is_kept(config):
    config = changed(config, steps=6)
    expected = straight(config)
    for prepare in (at_moving("config.yaml", 0), in_step(1)):
        child = Run(config, prepare)
        child.reached()
        assert child.kill()
    child = Run(config, in_step(4))
    child.reached()
    assert child.kill()
    assert "was interrupted. Continue it with --resume true" in Run(config).end()
    assert Run(changed(config, resume=True)).end() == "done"
    assert_same_run(contents(Path("runs/a")), expected)


def test_a_run_that_is_killed_while_it_replaces_another_is_never_a_mixture(config):
    """--overwrite deletes a run of other settings. Nothing of that one must get into the new one."""
    config = changed(config, steps=6)
    old = changed(config, lr=5e-3)
    assert Run(old).end() == "done"
    shutil.copytree("runs/a", "old")
    expected = straight(config)

    def before_deletion(n):
        def prepare(halt):
            unlink, count = Path.unlink, itertools.count()

            def halting(self, *args, **options):
                if self.parent == Path("runs/a") and next(count) == n:
                    halt()
                unlink(self, *args, **options)

            Path.unlink = halting

        return prepare

    outcomes = Counter()
    for n in (0, 2, 3):  # all is still there; all but model and state; and but the config
        shutil.rmtree("runs")
        shutil.copytree("old", "runs/a")
        child = Run(changed(config, overwrite=True), before_deletion(n))
        child.reached()
        assert child.kill()
        said = Run(changed(config, resume=True)).end()
        if said != "done":
            assert "other settings" in said
            assert Run(changed(config, overwrite=True)).end() == "done"
        outcomes[said == "done"] += 1
        assert_same_run(contents(Path("runs/a")), expected)
    assert outcomes[True] and outcomes[False]


def test_a_state_that_no_config_describes_is_not_continued(config):
    child = Run(config, in_step(4))
    child.reached()
    assert child.kill()
    Path("runs/a/config.yaml").unlink()
    for resume in (True, False):
        assert "holds a state.safetensors that no config describes" in Run(changed(config, resume=resume)).end()


# -- a damaged state -----------------------------------------------------------------------------------


def trained():
    """Two small parameters and their optimizer, after two steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in {"w": (3, 4), "b": 4}.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1)
    for _ in range(2):
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()
    return parameters, optimizer


def everything(step, parameters, optimizer):
    moments = optimizer.state_dict()["state"]
    return [step, *(p.detach().tolist() for p in parameters.values())] + [
        (k, v.tolist()) for m in moments.values() for k, v in sorted(m.items())
    ]


def test_no_byte_of_a_state_can_change_unseen(tmp_path):
    parameters, optimizer = trained()
    state.save_state(tmp_path, 2, parameters, optimizer)
    expected = everything(2, parameters, optimizer)
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    harmless = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 7)]) + whole[at + 1 :])
        parameters, optimizer = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in parameters.items()}, None
        optimizer = torch.optim.Adam(parameters.values())
        try:
            step = state.load_state(tmp_path, parameters, optimizer).step
        except UserError as error:
            assert "--overwrite true" in str(error)
            assert not any(p.any() for p in parameters.values())  # and nothing of it was used
        else:
            assert at < header and everything(step, parameters, optimizer) == expected
            harmless += 1
    assert harmless < 20  # letters of the word "checksum", without which it is taken for an older file


def test_a_state_without_a_checksum_is_of_an_earlier_version_and_still_read(tmp_path):
    parameters, optimizer = trained()
    state.save_state(tmp_path, 2, parameters, optimizer)
    path = tmp_path / STATE_FILE
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"step": "2"})
    assert state.load_state(tmp_path, parameters, optimizer).step == 2


def test_a_damaged_state_is_refused_with_what_to_do(config):
    child = Run(config, in_step(4))
    child.reached()
    assert child.kill()
    path = Path("runs/a/state.safetensors")
    whole = path.read_bytes()
    for content, told in (
        (whole[: len(whole) // 2], "is not a whole file"),
        (b"", "is not a whole file"),
        (whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:], "is damaged"),
    ):
        path.write_bytes(content)
        said = Run(changed(config, resume=True)).end()
        assert told in said and str(path) in said and "--overwrite true" in said


# -- files ---------------------------------------------------------------------------------------------


def test_many_processes_write_one_file_at_once(tmp_path):
    """Each clears up all the time, and none takes away what another is about to use."""

    def work(letter):
        for _ in range(60):
            files.write_text(tmp_path / "one", letter * 1000)

    processes = [forks.Process(target=work, args=(letter,), daemon=True) for letter in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "one").read_text() in [letter * 1000 for letter in "abcd"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# -- at the same time ----------------------------------------------------------------------------------


def test_two_runs_at_once_on_one_cold_cache_end_as_each_does_alone(config):
    config = changed(config, steps=12)
    both = [config, changed(config, name="b", seed=1)]
    expected = [straight(each) for each in both]
    assert expected[0]["model.safetensors"] != expected[1]["model.safetensors"]
    barrier = forks.Barrier(2)

    def together(halt):  # both find no embeddings, both write them
        save = files.save_file

        def waiting(tensors, path, metadata):
            if "example-train" in str(path):
                barrier.wait(30)
            return save(tensors, path, metadata)

        files.save_file = waiting

    running = [Run(each, together) for each in both]
    assert [each.end() for each in running] == ["done", "done"]
    for each, files_alone in zip(both, expected):
        assert_same_run(contents(Path("runs") / each.name), files_alone)
    assert not leftovers()


def test_a_run_that_is_being_trained_is_not_trained_by_another_process(config):
    config = changed(config, steps=12)
    expected = straight(config)
    first = Run(config, in_step(8))
    first.reached()
    before = contents(Path("runs/a"))
    for settings in ({}, {"resume": True}, {"overwrite": True}):
        assert "another process is training runs/a" in Run(changed(config, **settings)).end()
    assert contents(Path("runs/a")) == before
    first.release()
    assert first.end() == "done"
    assert_same_run(contents(Path("runs/a")), expected)
    assert Run(config).end() == "done"  # which is said, and nothing done
    assert not leftovers()


# -- several processes ---------------------------------------------------------------------------------


def launch(processes: int, *arguments: str) -> subprocess.Popen:
    """finetune.py as `accelerate launch` starts it; with --cpu that would start one process, whatever it is told."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    command += [str(ROOT / "finetune.py"), *arguments]
    with Path("launch.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def test_a_run_launched_on_two_processes_and_killed_continues_on_one(monkeypatch):
    """The state does not depend on the number of processes, nor does the loss, up to the order of summation."""
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", SIZES)  # the launched processes have the whole example
    steps = 30
    config = make_config("val", steps, log_every=1, save_every=2)
    Path("two.yaml").write_text(dump(config))
    assert Run(changed(config, out="straight")).end() == "done"
    launched = launch(2, "--config", "two.yaml", "--resume", "true")
    state, end = Path("runs/a/state.safetensors"), time.monotonic() + 60
    while not state.exists() and launched.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    launcher = psutil.Process(launched.pid)
    for process in (launcher, *launcher.children(recursive=True)):
        process.kill()
    launched.wait()
    assert state.exists() and not Path("runs/a/model.safetensors").exists(), Path("launch.log").read_text()
    with safe_open(state, "pt") as file:
        assert 2 <= int(file.metadata()["step"]) < steps
    assert Run(changed(config, resume=True)).end() == "done"
    one, two = (contents(Path(out) / "a") for out in ("straight", "runs"))
    assert [row["step"] for row in rows(two)] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows(two)] == pytest.approx([row["loss"] for row in rows(one)], rel=1e-3)
    begin = Clip.create("example").model.state_dict()
    moved, apart = (
        torch.cat([(end_one[k] - other[k]).flatten() for k in begin]).norm()
        for end_one, other in (
            (safetensors.torch.load(one["model.safetensors"]), begin),
            (safetensors.torch.load(one["model.safetensors"]), safetensors.torch.load(two["model.safetensors"])),
        )
    )
    assert moved > 0.1
    assert apart < 0.02 * moved  # Adam's first steps are signs, so gradients near zero may part
