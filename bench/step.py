"""A training step of the text tower against the published loop: time, gradient, memory, compensated summation.

    python bench/step.py

Weights are random, texts are random tokens with lengths like those of a language model's differences (mean about 45,
a twelfth of them cut at 77): neither changes what a step costs. Both loops take turns in one process.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import reference
import torch
from record import Figure, record
from torch import Tensor, nn

import pc_clip.clip  # noqa: F401  (before open_clip)
from pc_clip import losses
from pc_clip.compensated import CompensatedAdam
from pc_clip.fast_text import FastText
from pc_clip.memory import return_freed_memory

import open_clip  # isort: skip

TOWERS = ("ViT-B-32", "ViT-L-14")
ROUNDS = 4
EPOCH = 1094  # steps of the paper's 560,000 differences at batch 512


def tower(name: str) -> nn.Module:
    """A model with random weights, biases and gains that are not what they are at the start, and no image tower."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None)
    model.visual = nn.Identity()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch(model: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of the first and second images [n, D], and tokens [n, 77]."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.round(rng.gamma(9.0, 5.0, n) + 2), 14, 77).astype(int)
    lengths[rng.random(n) < 1 / 12] = 77
    tokens = rng.integers(256, 49406, (n, 77))
    tokens[np.arange(77)[None] >= lengths[:, None]] = 0
    tokens[:, 0], tokens[np.arange(n), lengths - 1] = 49406, 49407
    first, second = (torch.from_numpy(rng.normal(size=(n, model.text_projection.shape[1]))).float() for _ in range(2))
    return first, second, torch.from_numpy(tokens)


def published(model: nn.Module) -> Callable[..., float]:
    optimizer = reference.make_optimizer(model, lr=1e-8)

    def step(first: Tensor, second: Tensor, tokens: Tensor) -> float:
        model.requires_grad_(True)
        return reference.training_step(model, optimizer, first, second, tokens)

    return step


def ours(
    model: nn.Module, *, bf16: bool, recompute: bool = False, compensated: bool = False, update: bool = True
) -> Callable[..., float]:
    """A step as pc_clip.training makes it: only the blocks are in the graph."""
    parameters = list(model.transformer.parameters())
    optimizer = (
        CompensatedAdam(parameters, lr=1e-8) if compensated else torch.optim.Adam(parameters, lr=1e-8, fused=True)
    )
    fast = FastText(FastText.of(model).tower, recompute)
    if recompute:
        return_freed_memory()

    def step(first: Tensor, second: Tensor, tokens: Tensor) -> float:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            text = fast(tokens)
            loss = losses.info_nce(text.float(), losses.unit_differences(first, second), 1.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if update:
            optimizer.step()
        return loss.item()

    return step


def in_turn(steps: dict[str, Callable[..., float]], batches: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """Median seconds of each, over all batches but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for some in batches:
        for name, step in steps.items():
            then = time.perf_counter()
            step(*some)
            seconds[name].append(time.perf_counter() - then)
    return {name: float(np.median(found[1:])) for name, found in seconds.items()}


def of_speed(name: str) -> list[Figure]:
    model = tower(name)
    about = f"{name} text tower, batch 64, {torch.get_num_threads()} thread(s)"
    steps = {"published": published(model), "fp32": ours(model, bf16=False), "bf16": ours(model, bf16=True)}
    took = in_turn(steps, [batch(model, 64, seed) for seed in range(ROUNDS + 1)])
    said = {key: f"{about}; {took['published']:.2f} s against {took[key]:.2f} s" for key in ("bf16", "fp32")}
    return [
        Figure(f"training step, bf16 mixed, {name}", took["published"] / took["bf16"], 5, "x", said["bf16"]),
        Figure(f"training step, fp32, {name}", took["published"] / took["fp32"], 1.7, "x", said["fp32"]),
    ]


def of_gradient(name: str) -> list[Figure]:
    model = tower(name)
    some = batch(model, 64, 0)
    found = {}
    model.requires_grad_(True)
    for key in ("plain", "fp32", "bf16"):
        if key == "plain":
            reference.training_step(model, None, *some)
        else:
            ours(model, bf16=key == "bf16", update=False)(*some)
        found[key] = torch.cat([p.grad.flatten().double() for p in model.transformer.parameters()])
    plain = found["plain"]
    cosine = float(torch.cosine_similarity(found["bf16"], plain, dim=0))
    error = float((found["fp32"] - plain).norm() / plain.norm())
    return [
        Figure(f"gradient against plain fp32, bf16 mixed, {name}", cosine, 0.9999, "cosine", "all blocks, batch 64"),
        Figure(f"gradient against plain fp32, fp32, {name}", error * 1e6, 10, "e-6", "relative error; 10 at most"),
    ]


def of_compensation(name: str) -> list[Figure]:
    """What it costs of a step, and what it saves of the displacement."""
    model = tower(name)
    steps = {"plain": ours(model, bf16=True), "compensated": ours(model, bf16=True, compensated=True)}
    took = in_turn(steps, [batch(model, 64, seed) for seed in range(ROUNDS + 1)])
    cost = took["compensated"] / took["plain"] - 1
    lost = {kind: _displacement_error(kind) for kind in ("plain", "compensated")}
    about = f"{name}, bf16 mixed, batch 64; 10 at most"
    return [
        Figure("compensated summation, share of a step", 100 * cost, 10, "%", about),
        Figure(
            "displacement lost by float32",
            1e3 * lost["plain"],
            float("nan"),
            "e-3",
            "the 1,094 steps of an epoch at lr 5e-9",
        ),
        Figure("displacement lost with compensation", 1e3 * lost["compensated"], 1, "e-3", "the same; 1 at most"),
    ]


def _displacement_error(kind: str) -> float:
    """Against float64, of a matrix like a block's that follows the same gradients for an epoch."""
    start = 0.05 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    ends = []
    for dtype in (torch.float64, torch.float32):
        weight = nn.Parameter(start.to(dtype, copy=True))
        compensated = kind == "compensated" and dtype == torch.float32
        optimizer = CompensatedAdam([weight], lr=5e-9) if compensated else torch.optim.Adam([weight], lr=5e-9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(EPOCH):
            weight.grad = (torch.randn(512, 512, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
            optimizer.step()
        ends.append(weight.detach().double())
    exact, found = ends
    return float((found - exact).norm() / (exact - start.double()).norm())


def of_memory(name: str, n: int) -> list[Figure]:
    """Peak resident memory of two steps above the model with its image tower left out, each in a process of its own."""
    limits = {"published": float("nan"), "bf16": 8.0, "bf16, recompute": 3.0}
    figures = []
    for kind, limit in limits.items():
        size = 32 if kind == "published" else n  # the published loop would not fit: its memory is linear in the batch
        peaks = {k: _peak_of(name, kind, k) for k in ({size, size // 2} if kind == "published" else {size})}
        gib = peaks[size]
        note = f"batch {n}, {limit:g} at most" if kind != "published" else ""
        if kind == "published":
            gib = peaks[size // 2] + (peaks[size] - peaks[size // 2]) / (size // 2) * (n - size // 2)
            note = f"batch {n}, from batches of {size // 2} and {size}"
        figures.append(Figure(f"peak memory above the model, {kind}, {name}", gib, limit, "GB", note))
    return figures


def _peak_of(name: str, kind: str, n: int) -> float:
    ours_end, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_measure_peak, args=(theirs, name, kind, n, torch.get_num_threads())
    )
    process.start()
    theirs.close()
    found = ours_end.recv()
    process.join()
    return found


def _measure_peak(pipe, name: str, kind: str, n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = tower(name)
    step = published(model) if kind == "published" else ours(model, bf16=True, recompute="recompute" in kind)
    Path("/proc/self/clear_refs").write_text("5")  # puts the mark down: building the model does not count
    before = _memory("VmRSS")
    for seed in range(2):
        step(*batch(model, n, seed))
    pipe.send(_memory("VmHWM") - before)


def _memory(which: str) -> float:
    """VmRSS, GB in memory now, or VmHWM, the most since the mark was last put down (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e9


def figures(threads: int = 1) -> list[Figure]:
    torch.set_num_threads(threads)
    found = [figure for name in TOWERS for figure in of_speed(name) + of_gradient(name)]
    return found + of_compensation("ViT-B-32") + of_memory("ViT-L-14", 512)


if __name__ == "__main__":
    record(figures())
