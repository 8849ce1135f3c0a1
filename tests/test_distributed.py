"""Two processes: one step has the gradients of one process with the whole batch, and what ends one ends both.

The processes are forked from this one, which is quick, and find each other as those of torchrun do: by environment
variables, over gloo. Each of the two groups below goes through many runs, one after the other.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import attempt, put, rows, same, weights

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.models import fast_text
from pc_clip.models.clip import SCRATCH
from pc_clip.train import methods
from pc_clip.train.loop import finetune
from pc_clip.train.methods import change, pairwise

pytestmark = pytest.mark.usefixtures("small_runs")
forks = multiprocessing.get_context("fork")


def together(processes: int, work: Callable[[int], object]) -> None:
    """work(rank) in each of some processes, which have ten minutes; what they print is shown if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(rank: int) -> None:
        sys.stdout = sys.stderr = Path(f"output.{rank}").open("w", buffering=1)  # noqa: SIM115 (open to the end)
        if processes > 1:
            size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ.update(size, **place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.destroy_process_group = lambda *_: None  # at the end of a run; the next one needs it
        work(rank)

    running = [forks.Process(target=process, args=(rank,), daemon=True) for rank in range(processes)]
    for each in running:
        each.start()
    end = time.monotonic() + 600
    for each in running:
        each.join(max(0.0, end - time.monotonic()))
        if each.is_alive():
            each.kill()
            each.join()
    printed = "\n".join(Path(f"output.{rank}").read_text()[-3000:] for rank in range(processes))
    assert [each.exitcode for each in running] == [0] * processes, printed


# -- gradients -----------------------------------------------------------------------------------------


def gradient_cases(tiny: str) -> dict[str, tuple[FinetuneConfig, set[str]]]:
    """Settings, and weights of which a gradient must be there and not small."""
    text, image = "transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight"
    both, several = {"model.train": "both"}, {"retain.texts": 1.0, "retain.captions": 40}
    several |= {"retain.batch": 4, "pairwise.mirror": True, "train.recompute": True}
    retained = {f"retain.{name}": 0.5 for name in ("texts", "images", "similarities", "contrastive")}
    clusters = {"sampler.kind": "clusters", "sampler.similarity": "image", "sampler.cluster_size": 4}
    change = {"change.dropout": 0.0, "change.clip_lr_scale": 1.0}
    cases = {  # method, settings and weights
        "squared error": ("pairwise", {"pairwise.loss": "mse", "model.train": "text_blocks"}, {text}),
        "all of pairwise": ("pairwise", several, {text}),
        "adapters": ("pairwise", {"model.lora_rank": 2}, {f"{text}.lora_B"}),
        "both towers": ("contrastive", both, {text, image, "logit_scale"}),
        # embedded by both, each its part
        "clusters of images": ("contrastive", both | clusters | {"sampler.share": 0.5}, {text, image, "logit_scale"}),
        "dpo, and all that is retained": ("preference", both | retained, {text, image}),
        "negatives": ("preference", both | {"preference.loss": "contrastive"}, {text, image}),
        # Sentences of unequal lengths in both processes; those that hold for several pairs are none's negatives.
        "retrieve": ("change", change | {"change.stage": "retrieve"}, {image, text, "logit_scale"}),
        "caption": ("change", change, {image, "change.encoder.before", "change.decoder.words.weight"}),
    }
    # In the second step torch tells of parameters that had no part in the first.
    made = {name: tiny_runs.settings(method, tiny, steps=2) for name, (method, _, _) in cases.items()}
    return {name: (put(made[name], settings), learn) for name, (_, settings, learn) in cases.items()}


def keep_first_gradients(config: FinetuneConfig, path: Path) -> None:
    """Run it, and keep the gradients that the optimizer gets in the first step."""
    kind, names, step = methods.find(config.method).Method, {}, torch.optim.Adam.step
    trainable = kind.trainable

    def named(self):
        actual = trainable(self)
        names.update({parameter: name for name, parameter in actual.items()})
        return actual

    def kept(self, *args, **options):
        if not path.exists():
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            save_file({names[p]: p.grad.contiguous() for p in parameters}, path)
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_text, "PART", 60)  # tokens recomputed at a time: few, so that there are several parts
        patch.setattr(kind, "trainable", named)
        patch.setattr(torch.optim.Adam, "step", kept)
        finetune(config)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tiny):
    cases = gradient_cases(tiny)

    def work(rank: int, processes: int) -> None:
        for name, (config, _) in cases.items():
            config.name, config.out = name, str(processes)
            keep_first_gradients(config, Path(f"{name}.{processes}.{rank}"))

    together(1, lambda rank: work(rank, 1))
    together(2, lambda rank: work(rank, 2))
    bad = []
    for name, (_, learning) in cases.items():
        one, first, second = (load_file(f"{name}.{place}") for place in ("1.0", "2.0", "2.1"))
        assert one.keys() == first.keys() == second.keys() and learning <= one.keys(), name
        largest = max(float(gradient.norm()) for gradient in one.values())
        for weight, expected in one.items():
            # Some gradients are nothing but rounding: a bias of keys changes no attention.
            near = (first[weight] - expected).norm() <= 2e-5 * expected.norm() + 1e-6 * largest
            if not near or not torch.equal(first[weight], second[weight]):
                bad.append(f"{name}: {weight} is off by {(first[weight] - expected).norm():.1e} of {largest:.1e}")
        bad += [f"{name}: {weight} is small" for weight in learning if one[weight].norm() < 1e-3 * largest]
        alone, shared = rows(f"1/{name}")[0], rows(f"2/{name}")[0]  # loss, how hard the negatives are, ...
        for figure in alone.keys() - {"pairs_per_second"}:
            if shared[figure] != pytest.approx(alone[figure], rel=1e-4, abs=1e-4):
                bad.append(f"{name}: {figure} is {shared[figure]}, alone {alone[figure]}")
    assert not bad, "\n".join(bad)


# -- what ends one ends both ---------------------------------------------------------------------------


def at_step(patch: pytest.MonkeyPatch, kind: type, step: int, change_loss: Callable[[torch.Tensor], torch.Tensor]):
    """Change the loss of a step, which is counted from 1, in this process."""
    forward, losses = kind.forward, []

    def changed(self, batch):
        loss, logs = forward(self, batch)
        losses.append(loss)
        return (change_loss(loss) if len(losses) == step else loss), logs

    patch.setattr(kind, "forward", changed)


def sigterm(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def saved_step(name: str) -> int:
    if dist.is_initialized():
        dist.barrier()  # the first process writes it
    with safe_open(f"runs/{name}/state.safetensors", "pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.slow
def test_two_processes_stop_together_and_resuming_loses_nothing(tiny, tiny_resnet):
    """By SIGTERM, which schedulers send to one process or to all; by a loss that is no number; by wrong settings."""
    random, ends = tiny_runs.settings("pairwise", tiny), {}
    clusters = {"sampler.kind": "clusters", "sampler.similarity": "image", "sampler.cluster_size": 4}
    clusters |= {"model.pretrained": SCRATCH, "model.train": "both"}  # each process has statistics of its own
    clusters = put(tiny_runs.settings("contrastive", tiny_resnet, steps=6, max_steps_per_epoch=3), clusters)
    best = tiny_runs.settings("change", tiny, steps=None, epochs=2, max_steps_per_epoch=2)
    best = put(best, {"change.validation": "val", "name": "best"})
    stops = [("random", random, 3), ("clusters", clusters, 3), ("clusters", clusters, 5)]  # 3: between two epochs

    def work(rank: int) -> None:
        for name, case, step in stops:
            config = put(case, {"name": f"{name} stopped at {step}"})
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:
                    at_step(patch, methods.find(case.method).Method, step, sigterm)
                ends[config.name] = [attempt(config), saved_step(config.name)]
            if rank == 0:
                shutil.copytree(f"runs/{config.name}", f"alone/{config.name}")
            ends[config.name].append(attempt(put(config, {"resume": True})))
        for name, case in (("random straight", random), ("clusters straight", clusters)):
            ends[name] = attempt(put(case, {"name": name}))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                at_step(patch, pairwise.Method, 5, lambda loss: loss * math.nan)
            ends["nan"] = [attempt(put(random, {"name": "nan"})), saved_step("nan")]
        for name, value in (("train.precision", "fp8"), ("train.batch_size", 7)):
            ends[name] = attempt(put(random, {"overwrite": True, "name": "random straight", name: value}))
        figures = iter([0.9, 0.1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change.Method, "validate", lambda self: {"cider": next(figures)})
            ends["best"] = [attempt(best), len(list(figures))]
        attempt(put(best, {"name": "one epoch", "train.epochs": 1, "change.validation": "none"}))
        Path(f"ends.{rank}").write_text(json.dumps(ends))

    together(2, work)
    first, second = (json.loads(Path(f"ends.{rank}").read_text()) for rank in (0, 1))
    for name, _, step in stops:
        stopped = f"{name} stopped at {step}"
        assert first[stopped] == second[stopped] == ["interrupted", step, "done"]
        assert same(weights(f"runs/{stopped}"), weights(f"runs/{name} straight")), stopped
    assert first["nan"][1] == second["nan"][1] == 4
    assert "became nan at step 5, on 4 items beginning with train-" in second["nan"][0] and "nan" in first["nan"][0]
    for end in (first, second):
        assert "train.precision is 'fp8'" in end["train.precision"]
        assert "batch_size 7 cannot be dealt out to 2" in end["train.batch_size"]
    assert Path("runs/random straight/model.safetensors").is_file()  # nothing is overwritten
    assert [first["best"], second["best"]] == [["done", 0], ["done", 2]]  # the first finds the figures, for both
    assert [row["step"] for row in rows("runs/best", "validation")] == [2, 4]
    assert same(weights("runs/best"), weights("runs/one epoch"))
    # What two processes began is continued by one: the same up to the order of summation.
    config = put(random, {"name": "random stopped at 3", "out": "alone", "resume": True})
    assert attempt(config) == "done"
    losses = [[row["loss"] for row in rows(run)] for run in ("alone/random stopped at 3", "runs/random straight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    one, two, begin = weights("alone/random stopped at 3"), weights("runs/random straight"), tiny_runs.start(config)
    moved, apart = (torch.cat([(one[k] - other[k]).flatten() for k in begin]).norm() for other in (begin, two))
    assert apart < 0.05 * moved  # Adam's first steps are signs, so gradients near zero may part
