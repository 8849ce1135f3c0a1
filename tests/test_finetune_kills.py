"""Finetuning killed with SIGKILL at any moment and continued ends with the weights of a run that nothing disturbed,
bit for bit; and runs at the same time do not harm each other.

The processes that are killed are forked, which is quick and no different for the files they leave. Where a kill is to
come within a write, the process itself halts there, after a random part of it, so that no machine is too fast for it.
"""

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
import safetensors.torch
import tiny_runs
import torch
from tiny_runs import put

from pc_clip.core import files
from pc_clip.core.config.train import FinetuneConfig, PairwiseConfig, RetainConfig
from pc_clip.core.errors import UserError
from pc_clip.core.paths import STATE_FILE
from pc_clip.train import state
from pc_clip.train.loop import finetune
from pc_clip.train.methods import pairwise

pytestmark = pytest.mark.usefixtures("small_runs")
forks = multiprocessing.get_context("fork")
STEPS, SAVE_EVERY, LOG_EVERY = 72, 3, 2


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    """A run named a, with anchor and mirror pairs."""
    config = tiny_runs.settings("pairwise", tiny, steps=STEPS, save_every=SAVE_EVERY, log_every=LOG_EVERY)
    config.pairwise = PairwiseConfig(mirror=True)
    config.retain = RetainConfig(texts=1.0, captions=40, batch=2)
    config.model.train = "text_blocks"
    return config


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
            theirs.send(tiny_runs.attempt(config))

        self.process = forks.Process(target=work, daemon=True)
        self.process.start()
        theirs.close()

    def message(self) -> str:
        assert self.pipe.poll(60), "nothing happens"
        return self.pipe.recv()

    def reached(self) -> None:
        message = self.message()
        assert message == "reached", f"{message}: too early for this test to mean anything"

    def release(self) -> None:
        self.pipe.send("go on")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, "it was done too early for this test to mean anything"

    def end(self) -> str:
        """Its last message: done, or the error."""
        message = self.message()
        self.process.join(60)
        return message


def killed_at(config, prepare) -> None:
    child = Run(config, prepare)
    child.reached()
    child.kill()


def straight(config) -> dict[str, bytes]:
    """The files of a run that nothing disturbs, which leaves no cache behind."""
    assert Run(put(config, {"out": "straight"})).end() == "done"
    shutil.rmtree("data")
    return contents(Path("straight") / config.name)


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def assert_same_run(actual: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same files; weights and state bit for bit, and the log but for its times."""
    assert actual.keys() == expected.keys()
    for name in ("model.safetensors", "state.safetensors"):
        assert tiny_runs.same(safetensors.torch.load(actual[name]), safetensors.torch.load(expected[name])), name
    assert rows(actual) == rows(expected)


def rows(run: dict[str, bytes]) -> list[dict[str, float]]:
    return [json.loads(line) | {"pairs_per_second": 0} for line in run["metrics.jsonl"].splitlines()]


# -- the moments ---------------------------------------------------------------------------------------


def halting(owner, name, n, is_meant=lambda *_: True, after=False, before=lambda *_: None):
    """Halt before, or after, the n-th call of a function that is meant, counted from 0."""

    def prepare(halt):
        function, count = getattr(owner, name), itertools.count()

        def patched(*args, **options):
            mine = is_meant(*args) and next(count) == n
            if mine and not after:
                before(*args)
                halt()
            result = function(*args, **options)
            if mine and after:
                halt()
            return result

        setattr(owner, name, patched)

    return prepare


def in_step(n):
    """When the n-th step has begun: its batch is there."""
    return halting(pairwise.Method, "forward", n)


def in_writing(name, n, part):
    """When a part of the n-th file of that name is written; safetensors writes into a file of its own beside it."""

    def write_part(tensors, path, metadata):
        content = safetensors.torch.save(tensors, metadata)
        Path(path).with_name(".tmpXY").write_bytes(content[: int(part * len(content))])

    return halting(files, "save_file", n, lambda tensors, path, metadata: name in str(path), before=write_part)


def at_moving(name, n, after=False):
    """Before, or after, the n-th file of that name is moved into place."""
    return halting(os, "replace", n, lambda source, target: Path(target).name == name, after)


def before_deletion(n):
    """Before the n-th file of the run that is replaced is deleted."""
    return halting(Path, "unlink", n, lambda path: path.parent == Path("runs/a"))


def moments(rng):
    """Twenty moments, in an order in which each can come."""
    part = lambda: rng.uniform(0.02, 0.98)  # noqa: E731
    begin = [
        at_moving("environment.json", 0),
        at_moving("config.yaml", 0),
        at_moving("config.yaml", 0, after=True),
        in_step(0),
        in_writing("state.safetensors", 0, part()),
        at_moving("state.safetensors", 0),
        at_moving("state.safetensors", 0, after=True),
    ]
    middle = [
        *(in_step(int(rng.integers(1, 6))) for _ in range(4)),
        *(in_writing("state.safetensors", int(rng.integers(2)), part()) for _ in range(3)),
        *(at_moving("state.safetensors", int(rng.integers(2)), after=True) for _ in range(2)),
        at_moving("metrics.jsonl", 0),
    ]
    end = [
        in_writing("model.safetensors", 0, part()),
        at_moving("model.safetensors", 0),
        at_moving("model.safetensors", 0, after=True),
    ]
    return begin + [middle[n] for n in rng.permutation(len(middle))] + end


@pytest.mark.slow
def test_killed_at_twenty_moments_and_continued_each_time(config):
    expected, run, left = straight(config), Path("runs/a"), Counter()
    config.resume = True  # from the first: a job that is sent again and again has one command
    for prepare in moments(np.random.default_rng(0)):
        killed_at(config, prepare)
        left["kills"] += 1
        left["without config"] += not (run / "config.yaml").exists()
        left["without state"] += not (run / "state.safetensors").exists()
        left["torn"] += any(Path().rglob(".tmpXY"))
        if not (run / "model.safetensors").exists():
            with (run / "metrics.jsonl").open("a") as log:  # a line that was cut short
                log.write('{"step": ')
    assert (left["kills"], left["without config"], left["without state"]) == (20, 2, 6)
    assert left["torn"] >= 5  # what is half-written lies there for a day, and is never read
    assert Run(config).end() == "done"
    assert_same_run(contents(run), expected)
    assert [row["step"] for row in rows(expected)] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))


@pytest.mark.slow
def test_a_kill_while_overwriting_never_mixes_runs(config):
    """--overwrite deletes a run of other settings. Nothing of that one must get into the new one."""
    config = put(config, {"train.steps": 6})
    assert Run(put(config, {"train.lr": 5e-3})).end() == "done"
    shutil.copytree("runs/a", "old")
    expected, outcomes = straight(config), Counter()
    for n in (0, 2, 3):  # all is still there; all but model and state; and but the config
        shutil.rmtree("runs")
        shutil.copytree("old", "runs/a")
        killed_at(put(config, {"overwrite": True}), before_deletion(n))
        message = Run(put(config, {"resume": True})).end()
        if message != "done":
            assert "other settings" in message
            assert Run(put(config, {"overwrite": True})).end() == "done"
        outcomes[message == "done"] += 1
        assert_same_run(contents(Path("runs/a")), expected)
    assert outcomes[True] and outcomes[False]


@pytest.mark.slow
def test_a_run_that_is_being_trained_is_not_trained_by_another_process(config):
    config = put(config, {"train.steps": 12})
    expected = straight(config)
    first = Run(config, in_step(8))
    first.reached()
    before = contents(Path("runs/a"))
    for settings in ({}, {"resume": True}, {"overwrite": True}):
        assert "another process is training runs/a" in Run(put(config, settings)).end()
    assert contents(Path("runs/a")) == before
    first.release()
    assert first.end() == "done"
    assert_same_run(contents(Path("runs/a")), expected)
    left = [path for path in Path().rglob("*") if ".partial" in str(path) or path.name.startswith(".")]
    assert not left  # by a write or a lock, in the run's folder or in caches


# -- the state -----------------------------------------------------------------------------------------


def test_no_byte_of_a_state_can_change_unseen(tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.rand(3, 4)), "b": torch.nn.Parameter(torch.rand(4))}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1)
    sum((p**2).sum() for p in parameters.values()).backward()
    optimizer.step()
    state.save_state(tmp_path, 2, parameters, optimizer)
    path, expected = tmp_path / STATE_FILE, {n: p.detach().clone() for n, p in parameters.items()}
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 7)]) + whole[at + 1 :])
        fresh = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in parameters.items()}
        try:
            step = state.load_state(tmp_path, fresh, torch.optim.Adam(fresh.values())).step
        except UserError as error:
            assert "--overwrite true" in str(error)
            assert not any(p.any() for p in fresh.values())  # and nothing of it was used
        else:  # a blank between two words of the header
            assert step == 2 and tiny_runs.same(fresh, expected)


def test_what_cannot_be_continued_says_what_to_do(config):
    config = put(config, {"train.steps": 6})
    tiny_runs.interrupt(config, 4)
    path = Path("runs/a/state.safetensors")
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is not a whole safetensors file"),
        (whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:], "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} {message}.*--overwrite true"):
            finetune(put(config, {"resume": True}))
    Path("runs/a/config.yaml").unlink()
    with pytest.raises(UserError, match="holds a state.safetensors that no config describes"):
        finetune(put(config, {"resume": True}))


# -- files ---------------------------------------------------------------------------------------------


def test_many_processes_write_one_file_at_once(tmp_path):
    """Each clears up all the time, and none takes away what another is about to use."""

    def work(letter):
        for _ in range(30):
            files.write_text(tmp_path / "one", letter * 1000)

    processes = [forks.Process(target=work, args=(letter,), daemon=True) for letter in "abcd"]
    for process in processes:
        process.start()
    end = time.monotonic() + 60
    for process in processes:
        process.join(end - time.monotonic())
        assert process.exitcode == 0
    assert (tmp_path / "one").read_text() in [letter * 1000 for letter in "abcd"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
