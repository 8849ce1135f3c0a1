"""A training step of the text tower against the published loop: time, gradient, memory, compensated summation.

    python bench/step.py

Weights are random, texts are random tokens of lengths such as a language model's differences have (49 tokens in the
mean, one text in eight cut at 77): neither changes what a step costs. Both loops take turns in one process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable
from math import nan
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import reference
import surroundings
import torch
from record import Figure, exit_if_missed, record
from torch import Tensor, nn

import pc_clip.models.clip  # noqa: F401  (before open_clip)
from pc_clip.core.config.train import TrainConfig
from pc_clip.core.errors import run_script
from pc_clip.models.fast_text import FastText
from pc_clip.train import losses
from pc_clip.train.optim import make_optimizer

import open_clip  # isort: skip

TOWERS = ("ViT-B-32", "ViT-L-14")
ROUNDS = 4
EPOCH = 1094  # steps of the paper's 560,000 differences at batch 512
RATE = 1e-8  # the paper's
RATES = (RATE, 5e-9)  # at which displacement is looked at: where the paper begins, and its decay is after 6 epochs


class Batch(NamedTuple):
    first: Tensor  # [B, D], embeddings of the first images
    second: Tensor  # [B, D]
    tokens: Tensor  # [B, 77] int64


def tower(name: str) -> nn.Module:
    """A model with random weights, biases and gains that are not what they are at the start, and no image tower."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name, pretrained=None)
    model.visual = nn.Identity()
    return roughened(model)


@torch.no_grad()
def roughened(model: nn.Module) -> nn.Module:
    """The same model after the biases and gains of its blocks moved: their gradients are then seen to be right."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.transformer.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(model: nn.Module, n: int, seed: int) -> Batch:
    """n random texts and pairs of images, on the CPU."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.round(rng.gamma(9.0, 5.0, n) + 2), 14, 77).astype(int)
    lengths[rng.random(n) < 1 / 12] = 77
    tokens = rng.integers(256, 49406, (n, 77))
    tokens[np.arange(77)[None] >= lengths[:, None]] = 0
    tokens[:, 0], tokens[np.arange(n), lengths - 1] = 49406, 49407
    first, second = (torch.from_numpy(rng.normal(size=(n, model.text_projection.shape[1]))).float() for _ in range(2))
    return Batch(first, second, torch.from_numpy(tokens))


def to_device(model: nn.Module, some: Iterable[Tensor]) -> Batch:
    """A batch where the model is; from pinned memory, without waiting until it is there."""
    device = model.text_projection.device
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in some))


# -- the two steps -------------------------------------------------------------------------------------


def published(model: nn.Module, update: bool = True) -> Callable[..., float]:
    """A step as the published loop makes it (`reference.training_step`). It takes a batch and returns the loss."""
    optimizer = reference.make_optimizer(model, lr=RATE) if update else None

    def step(*some: Tensor) -> float:
        model.requires_grad_(True)
        return reference.training_step(model, optimizer, *to_device(model, some))

    return step


def ours(
    model: nn.Module, *, bf16: bool, recompute: bool = False, compensated: bool = False, update: bool = True
) -> Callable[..., float]:
    """A step as pc_clip.train.loop makes it: only the blocks are in the graph, and each loss is looked at.

    It takes a batch and returns the loss; without `update` the gradients are left to be read.
    """
    parameters = list(model.transformer.parameters())
    optimizer = make_optimizer(TrainConfig(lr=RATE, compensated=compensated), parameters)
    fast = FastText(FastText.of(model).tower, recompute)

    def step(*some: Tensor) -> float:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        first, second, tokens = to_device(model, some)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            text = fast(tokens)
            loss = losses.info_nce(text.float(), losses.unit_differences(first, second), 1.0)
        results = loss.item()  # where training stops when it is not a number; a GPU is waited for
        loss.backward()
        if update:
            optimizer.step()
        return results

    return step


def in_turn(steps: dict[str, Callable[..., float]], batches: list[Batch]) -> dict[str, float]:
    """Median seconds of each, over all batches but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for some in batches:
        for name, step in steps.items():
            then = time.perf_counter()
            step(*some)
            seconds[name].append(time.perf_counter() - then)
    return {name: float(np.median(results[1:])) for name, results in seconds.items()}


def of_speed(name: str, model: nn.Module) -> list[Figure]:
    """name: of the model, in the figures' names, as below."""
    about = f"{name} text tower, batch 64, {torch.get_num_threads()} thread(s)"
    steps = {"published": published(model), "fp32": ours(model, bf16=False), "bf16": ours(model, bf16=True)}
    took = in_turn(steps, [batch(model, 64, seed) for seed in range(ROUNDS + 1)])
    sentences = {key: f"{about}; {took['published']:.2f} s against {took[key]:.2f} s" for key in ("bf16", "fp32")}
    return [
        Figure(f"training step, bf16 mixed, {name}", took["published"] / took["bf16"], 5, "x", sentences["bf16"]),
        Figure(f"training step, fp32, {name}", took["published"] / took["fp32"], 1.7, "x", sentences["fp32"]),
    ]


# -- the gradient --------------------------------------------------------------------------------------


def of_gradient(name: str, model: nn.Module, some: Batch) -> list[Figure]:
    turned, error = gradient_errors(model, some)
    about = f"all blocks, batch {len(some.tokens)}"
    return [
        Figure(f"gradient against plain fp32, bf16 mixed, {name}", turned * 1e6, nan, "e-6", f"1 - cosine; {about}",
               most=100),
        Figure(f"gradient against plain fp32, fp32, {name}", error * 1e6, nan, "e-6", f"relative error; {about}",
               most=10),
    ]  # fmt: skip


def gradient_errors(model: nn.Module, some: Batch) -> tuple[float, float]:
    """Of the gradient of all blocks, against the published step's: 1 - cosine in bf16, relative error in fp32."""
    plain = gradient(model, published(model, update=False), some)
    bf16, fp32 = (gradient(model, ours(model, bf16=kind, update=False), some) for kind in (True, False))
    cosine = torch.cosine_similarity(bf16, plain, dim=0)
    return float(1 - cosine), float((fp32 - plain).norm() / plain.norm())


def gradient(model: nn.Module, step: Callable[..., float], some: Batch) -> Tensor:
    """What a step that does not update leaves in the blocks.  -> [parameters] float64"""
    step(*some)
    return torch.cat([p.grad.flatten().double() for p in model.transformer.parameters()])


# -- compensated summation -----------------------------------------------------------------------------


def of_compensation(name: str) -> list[Figure]:
    """What it costs of a step, and what it saves of the displacement."""
    return [_cost_of_compensation(name), *(figure for lr in RATES for figure in _displacement(lr))]


def _cost_of_compensation(name: str) -> Figure:
    model = tower(name)
    steps = {"plain": ours(model, bf16=True), "compensated": ours(model, bf16=True, compensated=True)}
    took = in_turn(steps, [batch(model, 64, seed) for seed in range(ROUNDS + 1)])
    cost = took["compensated"] / took["plain"] - 1
    about = f"{name}, bf16 mixed, batch 64, {torch.get_num_threads()} thread(s)"
    return Figure("compensated summation, share of a step", 100 * cost, nan, "%", about, most=10)


def _displacement(lr: float) -> list[Figure]:
    plain, compensated = displacement_errors(lr)
    about = f"the {EPOCH:,} steps of an epoch, against float64"
    return [
        Figure(f"displacement lost by float32, lr {lr:g}", 1e3 * plain, nan, "e-3", about),
        Figure(f"displacement lost with compensation, lr {lr:g}", 1e3 * compensated, nan, "e-3", about, most=1),
    ]


def displacement_errors(lr: float, steps: int = EPOCH, width: int = 512) -> tuple[float, float]:
    """Relative error of how far a matrix like a block's has come, against float64: plain, and compensated.

    All three follow the same gradients, `steps` of them.
    """
    generator = torch.Generator().manual_seed(0)
    start = 0.05 * torch.randn(width, width, generator=generator)
    dtypes = (torch.float64, torch.float32, torch.float32)
    exact, plain, compensated = (nn.Parameter(start.to(dtype, copy=True)) for dtype in dtypes)
    optimizers = [
        torch.optim.Adam([exact], lr=lr),
        make_optimizer(TrainConfig(lr=lr), [plain]),
        make_optimizer(TrainConfig(lr=lr, compensated=True), [compensated]),
    ]
    for _ in range(steps):
        g = torch.randn(width, width, generator=generator, dtype=torch.float64) + 0.5
        for weight, optimizer in zip((exact, plain, compensated), optimizers):
            weight.grad = g.to(weight.dtype)
            optimizer.step()
    end, way = exact.detach(), (exact.detach() - start).norm()
    lost, left = (float((weight.detach().double() - end).norm() / way) for weight in (plain, compensated))
    return lost, left


# -- memory --------------------------------------------------------------------------------------------


def of_memory(name: str, n: int) -> list[Figure]:
    """Peak memory of two steps above the model with its image tower left out, each in a process of its own.

    The published loop would not fit: it is measured on two small batches, and its memory is linear in the batch.
    """
    few, more = 16, 32
    less, peak = (_peak_of(name, "published", k) for k in (few, more))
    all_of_it = less + (peak - less) / (more - few) * (n - few)
    above = "peak memory above the model"
    return [
        Figure(f"{above}, published, {name}", all_of_it, nan, "GB", f"batch {n}, from batches of {few} and {more}"),
        *(
            Figure(f"{above}, {kind}, {name}", _peak_of(name, kind, n), nan, "GB", f"batch {n}", most=most)
            for kind, most in (("bf16", 8), ("bf16, recompute", 3))
        ),
    ]


def _peak_of(name: str, kind: str, n: int) -> float:
    """GB of two steps at batch n, above the model, in a new process."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_send_peak, args=(there, name, kind, n, torch.get_num_threads()))
    process.start()
    there.close()  # so that recv() ends when the process dies
    results = here.recv()
    process.join()
    return results


def _send_peak(pipe, name: str, kind: str, n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, recompute = tower(name), "recompute" in kind
    step = published(model) if kind == "published" else ours(model, bf16=True, recompute=recompute)

    def two_steps() -> None:
        for seed in range(2):
            step(*batch(model, n, seed))

    pipe.send(peak_above(two_steps))


def peak_above(work: Callable[[], None]) -> float:
    """GB of resident memory, at its highest while `work` is done, above what there was before (Linux)."""
    free_what_is_left()
    Path("/proc/self/clear_refs").write_text("5")  # puts the mark of the highest down to now
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def free_what_is_left() -> None:
    """Give back what earlier work left: else it is in the memory before, and whatever is put there costs nothing."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _memory(which: str) -> float:
    """VmRSS, GB in memory now, or VmHWM, the most since the mark was last put down."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e9


def figures(threads: int = 1) -> list[Figure]:
    """All that is measured on a CPU, in the order of the table."""
    with surroundings.threads(threads):
        results = []
        for name in TOWERS:
            model = tower(name)
            results += [*of_speed(name, model), *of_gradient(name, model, batch(model, 64, 0))]
        return results + of_compensation("ViT-B-32") + of_memory("ViT-L-14", 512)


if __name__ == "__main__":
    run_script(lambda: exit_if_missed(record(figures())))
