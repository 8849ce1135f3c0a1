"""What a GPU makes of the paper's run: pairs a second, share of its peak, minutes for 20 epochs, images a second.

    python bench/gpu.py

ViT-L-14 with random weights at batch 512 in bf16, as pc_clip.training makes a step. The arithmetic counted is what the
tower needs without padding: 6 operations a weight and token (2 forward, 4 backward), and attention.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import step as cpu
import torch
from record import Figure, record
from torch import nn

import pc_clip.clip  # noqa: F401  (before open_clip)
from pc_clip import losses
from pc_clip.fast_text import FastText

import open_clip  # isort: skip

PAPER = (560_000, 20)  # differences, epochs
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16 without sparsity, from the data sheets


def figures(threads: int = 1) -> list[Figure]:
    torch.set_num_threads(threads)
    device = torch.device("cuda")
    model = cpu.tower("ViT-L-14").to(device)
    batches = [[t.to(device) for t in cpu.batch(model, 512, seed)] for seed in range(4)]
    found = [_agreement(model, batches[0])]
    for name, bf16, recompute in (("bf16", True, False), ("bf16, recompute", True, True), ("fp32", False, False)):
        found += _speed(model, batches, name, bf16, recompute)
    del model
    return found + _images(device)


def _agreement(model: nn.Module, batch: list[torch.Tensor]) -> Figure:
    tokens = batch[2][:64]
    with torch.autocast("cuda", torch.bfloat16):
        apart = FastText.of(model).disagreement(model.encode_text, tokens)
    return Figure("GPU: fast text tower against open_clip's, bf16", apart * 1e3, 1, "e-3", "1 - cosine; 1 at most")


def _speed(model: nn.Module, batches: list[list[torch.Tensor]], name: str, bf16: bool, recompute: bool) -> list[Figure]:
    model.requires_grad_(False)
    parameters = [p.requires_grad_(True) for p in model.transformer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-8, fused=True)
    fast = FastText(FastText.of(model).tower, recompute)

    def step(first: torch.Tensor, second: torch.Tensor, tokens: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            text = fast(tokens)
            loss = losses.info_nce(text.float(), losses.unit_differences(first, second), 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for batch in batches:
        step(*batch)
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    then, n = time.perf_counter(), 20
    for k in range(n):
        step(*batches[k % len(batches)])
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - then) / n
    tokens = sum(int((batch[2].argmax(-1) + 1).sum()) for batch in batches) / len(batches)
    rate = _operations(model, tokens) / seconds
    card = torch.cuda.get_device_name()
    most = next((value for key, value in PEAK.items() if key in card), None)
    about = f"ViT-L-14 text tower, batch 512, {name}, {tokens:.0f} tokens a batch"
    minutes = PAPER[0] * PAPER[1] / (512 / seconds) / 60
    out = [
        Figure(f"GPU: training, {name}", 512 / seconds, float("nan"), "pairs/s", about),
        Figure(f"GPU: the paper's 20 epochs, {name}", minutes, 20 if bf16 else float("nan"), "min", "20 at most"),
        Figure(f"GPU: peak memory above the model, {name}", peak / 1e9, float("nan"), "GB", about),
    ]
    if most and bf16:
        share = 100 * rate / most
        out.append(Figure(f"GPU: share of the peak bf16 rate, {name}", share, 40, "%", f"{rate / 1e12:.0f} TFLOP/s"))
    return out


def _operations(model: nn.Module, tokens: float) -> float:
    weights = sum(p.numel() for p in model.transformer.parameters() if p.ndim > 1)
    return 6 * weights * tokens


def _images(device: torch.device) -> list[Figure]:
    model = open_clip.create_model("ViT-L-14", pretrained=None).to(device).eval()
    pixels = torch.randn(256, 3, 224, 224, device=device)
    out = []
    for name, enabled in (("bf16", True), ("fp32", False)):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            model.encode_image(pixels)
            torch.cuda.synchronize()
            then = time.perf_counter()
            for _ in range(5):
                model.encode_image(pixels)
            torch.cuda.synchronize()
        rate = 5 * len(pixels) / (time.perf_counter() - then)
        out.append(Figure(f"GPU: image encoding, {name}", rate, float("nan"), "images/s", "ViT-L-14, 224 pixels"))
    return out


if __name__ == "__main__":
    record(figures())
