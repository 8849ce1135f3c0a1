"""Two processes: one step has the gradients of one process with the whole batch, and what ends one ends both.

The processes are forked from this one, which is quick, and find each other as those of torchrun do: by environment
variables, over gloo.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import sample_differences
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finetune as script
from pc_clip.core import environment
from pc_clip.core.cli import dump
from pc_clip.core.config.train import (
    ChangeConfig,
    ContrastiveConfig,
    FinetuneConfig,
    PairwiseConfig,
    PreferenceConfig,
    SamplerConfig,
    TrainConfig,
)
from pc_clip.core.errors import run_script
from pc_clip.models import fast_text
from pc_clip.models.clip import SCRATCH
from pc_clip.train import methods
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change, contrastive, pairwise

forks = multiprocessing.get_context("fork")
STEPS = 8


@pytest.fixture(autouse=True)
def _small(small_example, monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: None)  # a process of git a run


@pytest.fixture
def config() -> FinetuneConfig:
    """A run of eight steps over the first training scenes, by the paper's loss."""
    sample_differences.write(Path("d.jsonl"))
    found = FinetuneConfig(name="a", out="runs", device="cpu")
    found.data.split, found.data.differences = "train", "d.jsonl"
    found.train = TrainConfig(batch_size=8, steps=STEPS, lr=1e-3, log_every=2, threads=1)
    found.pairwise = PairwiseConfig()
    return found


# -- processes -----------------------------------------------------------------------------------------


def together(processes: int, work: Callable[[int], object]) -> tuple[list[int | None], list[str]]:
    """work(rank) in each of some processes, as run_script runs it: exit codes, and what each printed.

    All have a minute. One that is still there then is killed, and its exit code is -9.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(rank: int) -> None:
        sys.stdout = sys.stderr = Path(f"said.{rank}").open("w", buffering=1)  # noqa: SIM115 (open to the end)
        if processes > 1:
            size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ.update(size, **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        AcceleratorState._reset_state(reset_partial_state=True)
        run_script(lambda: work(rank))

    running = [forks.Process(target=process, args=(rank,), daemon=True) for rank in range(processes)]
    for each in running:
        each.start()
    end = time.monotonic() + 60
    for each in running:
        each.join(max(0.0, end - time.monotonic()))
        if each.is_alive():
            each.kill()
            each.join()
    return [each.exitcode for each in running], [Path(f"said.{rank}").read_text() for rank in range(processes)]


def succeed(processes: int, work: Callable[[int], object]) -> None:
    codes, said = together(processes, work)
    assert codes == [0] * processes, "\n".join(said)


def at_step(step: int, do: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """In this process, have `do` change the loss of a step, which is counted from 1. All steps are counted."""
    forward, count = pairwise.Method.forward, itertools.count(1)

    def changed(self, batch):
        loss, logs = forward(self, batch)
        return (do(loss) if next(count) == step else loss), logs

    pairwise.Method.forward = changed


# -- gradients -----------------------------------------------------------------------------------------


def first_gradients(config: FinetuneConfig, name: str) -> list[dict[str, torch.Tensor]]:
    """The gradients that the optimizer gets in a run's first step, and the weights after its last, for each process."""

    def work(rank: int) -> None:
        fast_text.PART = 60  # tokens recomputed at a time: few, so that there are several parts
        step, method = torch.optim.Adam.step, methods.find(config.method).Method
        trainable, names = method.trainable, {}

        def named(self):
            found = trainable(self)
            names.update({parameter: name for name, parameter in found.items()})
            return found

        def kept(self, *args, **options):
            path = Path(f"{name}.{rank}.safetensors")
            if not path.exists():
                parameters = [p for group in self.param_groups for p in group["params"]]
                save_file({names[p]: p.grad.contiguous() for p in parameters if p.grad is not None}, path)
            return step(self, *args, **options)

        method.trainable, torch.optim.Adam.step = named, kept
        config.name = name
        finetune(config)

    processes = 1 if name == "one" else 2
    succeed(processes, work)
    return [load_file(f"{name}.{rank}.safetensors") for rank in range(processes)]


def image_and_text_towers(config: FinetuneConfig) -> None:
    config.method, config.model.train = "contrastive", "both"
    config.contrastive = ContrastiveConfig()  # with the model's own temperature, which learns


def clusters_of_similar_images(config: FinetuneConfig) -> None:
    """Embedded by both processes together, each its part."""
    image_and_text_towers(config)
    config.sampler = SamplerConfig(kind="clusters", similarity="image", cluster_size=4, share=0.5)


def squared_error(config: FinetuneConfig) -> None:
    config.pairwise.loss = "mse"


def all_of_pairwise(config: FinetuneConfig) -> None:
    config.pairwise = PairwiseConfig(anchor=1.0, anchor_captions=40, anchor_batch=4, mirror=True)
    config.model.train, config.train.recompute = "text", True


def preferences_by(loss: str, config: FinetuneConfig) -> None:
    config.method, config.data.dataset, config.model.train = "preference", "example_relations", "both"
    config.preference = PreferenceConfig(loss)


def changes(stage: str, config: FinetuneConfig) -> None:
    """Sentences of unequal lengths in both processes; those that hold for several pairs are none's negatives."""
    config.method, config.data.dataset, config.model.train = "change", "example_changes", "both"
    config.change = ChangeConfig(stage, width=16, heads=2, layers=1, dropout=0.0, clip_rate=1.0, validation="none")


CHANGES = [image_and_text_towers, clusters_of_similar_images, squared_error, all_of_pairwise]


CHANGES += [partial(preferences_by, loss) for loss in ("dpo", "contrastive")]
CHANGES += [partial(changes, stage) for stage in change.STAGES]


@pytest.mark.parametrize("alter", CHANGES)
def test_a_step_of_two_processes_has_the_gradients_of_one_with_the_whole_batch(config, alter):
    alter(config)
    config.train.steps = 2  # in the second, torch tells of parameters that had no part in the first
    (one,), two = first_gradients(config, "one"), first_gradients(config, "two")
    assert one.keys() == two[0].keys() == two[1].keys()
    learning = {
        "contrastive": {"logit_scale", "visual.conv1.weight"},
        "pairwise": set(),
        "preference": {"visual.conv1.weight"},
        "change": {"visual.conv1.weight", "change.encoder.before"},
    }[config.method]
    if config.method == "change" and config.change.stage == "caption":
        assert not any(name.startswith("transformer.") for name in one)  # no text is read
        learning |= {"change.decoder.words.weight"}
    else:
        learning |= {"logit_scale"} if config.method == "change" else set()
        assert "transformer.resblocks.0.attn.in_proj_weight" in one
    assert learning <= one.keys()
    largest = max(float(gradient.norm()) for gradient in one.values())
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        # Some gradients are nothing but rounding: a bias of keys changes no attention.
        assert (two[0][name] - expected).norm() <= 2e-5 * expected.norm() + 1e-6 * largest, name
    assert all(one[name].norm() > 0.01 * largest for name in learning)  # so that these were compared, too


def test_how_hard_a_batch_is_does_not_depend_on_the_number_of_processes(config):
    """All processes' rows are negatives of each other, also where clusters lie within one process."""
    clusters_of_similar_images(config)
    config.train.steps = config.train.log_every = 1
    rows = {}
    for config.name, processes in (("one", 1), ("two", 2)):
        succeed(processes, lambda rank: finetune(config))
        rows[config.name] = json.loads(Path(f"runs/{config.name}/metrics.jsonl").read_text())
    for name in ("mean_negative", "hardest_negative", "likely_false_negatives"):
        assert rows["two"][name] == pytest.approx(rows["one"][name], abs=1e-4), name


@pytest.mark.parametrize("start", [None, SCRATCH])
def test_two_processes_in_clusters_go_on_between_two_epochs_as_if_they_had_not_stopped(config, start):
    """From scratch each process has statistics of its own until the epoch begins."""
    clusters_of_similar_images(config)
    config.model.pretrained, config.train.steps, config.train.max_steps_per_epoch = start, 4, 2
    config.train.save_every = 1
    succeed(2, lambda rank: finetune(config))
    Path("runs/a").rename("runs/straight")

    def stopped(rank: int) -> None:
        forward, count = contrastive.Method.forward, itertools.count(1)

        def interrupted(self, batch):
            if next(count) == 2:
                signal.raise_signal(signal.SIGTERM)
            return forward(self, batch)

        contrastive.Method.forward = interrupted
        finetune(config)

    codes, said = together(2, stopped)
    assert codes == [130, 130], "\n".join(said)
    config.resume = True
    succeed(2, lambda rank: finetune(config))
    resumed, straight = (load_file(f"runs/{name}/model.safetensors") for name in ("a", "straight"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


# -- the group -----------------------------------------------------------------------------------------


def test_the_best_epoch_of_two_processes_is_found_by_one_and_kept(config):
    """The first of two: what is then saved is what they have after one epoch."""
    changes("caption", config)
    config.train.steps, config.train.max_steps_per_epoch, config.train.epochs = None, 2, 1
    succeed(2, lambda rank: finetune(config))
    figures = iter([0.9, 0.1])

    def work(rank: int) -> None:
        def validate(self) -> dict[str, float]:
            Path(f"validated.{rank}").touch()
            return {"cider": next(figures)}

        change.Method.validate = validate
        finetune(config)

    config.name, config.train.epochs, config.change.validation = "b", 2, "val"
    succeed(2, work)
    assert [path.name for path in Path().glob("validated.*")] == ["validated.0"]
    found = [json.loads(line)["step"] for line in Path("runs/b/validation.jsonl").read_text().splitlines()]
    assert found == [2, 4]
    one, two = (load_file(f"runs/{name}/model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("through", ["finetune", "script"])
def test_processes_wait_twelve_hours_for_one_that_embeds_the_images(config, through):
    config.train.steps = 1
    Path("a.yaml").write_text(dump(config))

    def work(rank: int) -> None:
        def read(loss):
            group = dist.group.WORLD._get_backend(torch.device("cpu"))
            Path(f"timeout.{rank}").write_text(str(group.options._timeout))
            return loss

        at_step(1, read)
        finetune(config) if through == "finetune" else script.main(["--config", "a.yaml"])

    succeed(2, work)
    assert [Path(f"timeout.{rank}").read_text() for rank in (0, 1)] == [str(timedelta(hours=12))] * 2


# -- what ends one ends both ---------------------------------------------------------------------------


def count_steps(rank: int) -> None:
    """Keep the number of steps begun in a file."""
    forward, count = pairwise.Method.forward, itertools.count(1)

    def counted(self, batch):
        Path(f"steps.{rank}").write_text(str(next(count)))
        return forward(self, batch)

    pairwise.Method.forward = counted


def steps() -> list[int]:
    return [int(Path(f"steps.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("asked", [{1: 4}, {0: 5, 1: 4}], ids=["the second", "both, one later"])
def test_sigterm_ends_both_after_one_step_and_resuming_loses_nothing(config, asked):
    """Schedulers stop one process, or all of them, and not at the same step."""
    wishes = dict(asked)

    def work(rank: int) -> None:
        count_steps(rank)
        if rank in wishes:
            at_step(wishes[rank], lambda loss: (os.kill(os.getpid(), signal.SIGTERM), loss)[1])
        finetune(config)

    codes, said = together(2, work)
    assert codes == [130, 130], "\n".join(said)
    stopped = steps()
    assert stopped[0] == stopped[1] < STEPS
    with safe_open("runs/a/state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == stopped[0]
    assert not Path("runs/a/model.safetensors").exists()

    config.resume = True
    wishes.clear()
    succeed(2, work)
    assert steps() == [STEPS - stopped[0]] * 2
    config.name = "straight"
    succeed(2, lambda rank: finetune(config))
    resumed, straight = (load_file(f"runs/{name}/model.safetensors") for name in ("a", "straight"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_loss_that_is_no_number_in_one_process_stops_both_and_says_so(config):
    config.train.save_every = 3

    def work(rank: int) -> None:
        count_steps(rank)
        if rank == 1:
            at_step(5, lambda loss: loss * math.nan)
        finetune(config)

    codes, said = together(2, work)
    assert codes == [2, 2], "\n".join(said)
    assert steps() == [5, 5]
    assert "error: the loss or a weight became nan at step 5, on 4 items beginning with train-" in said[1]
    assert all("error: " in each and "Traceback" not in each for each in said), "\n".join(said)
    with safe_open("runs/a/state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == 3


def test_weights_that_are_no_numbers_stop_both(config):
    """They are the same everywhere, and seen when they are to be saved."""
    config.train.save_every = 4

    def work(rank: int) -> None:
        step, count = torch.optim.Adam.step, itertools.count(1)

        def broken(self, *args, **options):
            step(self, *args, **options)
            if next(count) == 4:
                self.param_groups[0]["params"][0].data[0, 0] = math.inf

        torch.optim.Adam.step = broken
        finetune(config)

    codes, said = together(2, work)
    assert codes == [2, 2], "\n".join(said)
    assert all("became nan at step 4" in each for each in said)
    assert not Path("runs/a/state.safetensors").exists()


@pytest.mark.parametrize("setting", ["precision: fp16", "optimizer: sgd"])
def test_a_wrong_setting_stops_both(config, setting):
    settings = yaml.safe_load(dump(config))
    settings["train"] |= yaml.safe_load(setting)
    Path("a.yaml").write_text(yaml.safe_dump(settings))
    codes, said = together(2, lambda rank: script.main(["--config", "a.yaml"]))
    assert codes == [2, 2], "\n".join(said)
    assert all(f"error: train.{setting.split(':')[0]}" in each for each in said), "\n".join(said)


def test_a_batch_that_cannot_be_dealt_out_stops_both_and_overwrites_nothing(config):
    config.train.steps = 1
    succeed(1, lambda rank: finetune(config))
    before = {path.name: path.read_bytes() for path in Path("runs/a").iterdir()}
    config.overwrite, config.train.batch_size = True, 7
    codes, said = together(2, lambda rank: finetune(config))
    assert codes == [2, 2], "\n".join(said)
    assert all("error: train.batch_size 7 cannot be dealt out to 2 processes" in each for each in said)
    assert {path.name: path.read_bytes() for path in Path("runs/a").iterdir()} == before
