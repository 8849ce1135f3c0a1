"""What a GPU makes of the paper's run: pairs a second, share of its peak, minutes for 20 epochs, images a second.

    python bench/gpu.py

ViT-L-14 with random weights at batch 512, in steps as pc_clip.train.loop makes them: a batch comes from pinned memory,
and its loss is looked at. What comes before, reading and decoding, is not in these figures. Limits are for Hopper in
bf16. What counts as arithmetic says `operations`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import step as steps
import surroundings
import torch
from record import Figure, exit_if_missed, record
from torch import Tensor, nn

from pc_clip.core.errors import run_script

import open_clip  # isort: skip  (after pc_clip.clip, which step imports)

MODEL, SIZE, BATCH = "ViT-L-14", 224, 512
PAPER = (560_000, 20)  # differences, epochs
# bf16 without sparsity, from the data sheets. "NVL" cards of the same names are slower; of them nothing is said here.
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


class Way(NamedTuple):
    name: str
    bf16: bool
    recompute: bool = False


WAYS = (Way("bf16", True), Way("bf16, recompute", True, recompute=True), Way("fp32", False))


def figures(threads: int = 1, device: str = "cuda") -> list[Figure]:
    """threads: of the CPU, which starts the kernels."""
    with surroundings.threads(threads):
        model = steps.tower(MODEL).to(device)
        batches = [steps.batch(model, BATCH, seed) for seed in range(4)]
        results = steps.of_gradient(f"{MODEL} on a GPU", model, steps.Batch(*(part[:64] for part in batches[0])))
        for way in WAYS:
            results += of_training(model, batches, way)
        del model
        model = open_clip.create_model(MODEL, pretrained=None).to(device).eval()
        return results + of_images(model, 256, SIZE)


# -- training ------------------------------------------------------------------------------------------


def of_training(model: nn.Module, batches: list[steps.Batch], way: Way, rounds: int = 20) -> list[Figure]:
    """Figures of one way, on the device of the model. batches: on the CPU, all of one size."""
    device, n = model.text_projection.device, len(batches[0].tokens)
    model.zero_grad(set_to_none=True)  # what another way left would count as the model's
    step = steps.ours(model, bf16=way.bf16, recompute=way.recompute)
    batches = [_pinned(batch, device) for batch in batches]
    peak = _peak_above(device, lambda: _each(step, batches, len(batches)))  # each once: all shapes are then known
    seconds = _seconds(device, lambda: _each(step, batches, rounds)) / rounds
    lengths = [_lengths(batch.tokens) for batch in batches]
    tokens = float(torch.cat(lengths).sum()) / len(batches)
    rate = sum(operations(model, some) for some in lengths) / len(batches) / seconds
    about = f"{MODEL} text tower, batch {n}, {way.name}, {tokens:.0f} tokens a batch; decoding and reading not in it"
    minutes = PAPER[0] * PAPER[1] / (n / seconds) / 60
    card = _card(device)
    asked = way.bf16 and ("H100" in card or "H200" in card)
    results = [
        Figure(f"GPU: training, {way.name}", n / seconds, nan, "pairs/s", about),
        Figure(f"GPU: the paper's 20 epochs, {way.name}", minutes, nan, "min", about, most=20 if asked else nan),
        Figure(f"GPU: peak memory above the model, {way.name}", peak / 1e9, nan, "GB", about),
    ]
    if way.bf16 and (most := _peak_rate(card)):
        note = f"{rate / 1e12:.0f} of {most / 1e12:.0f} TFLOP/s"
        note += "; what is computed again is not counted" if way.recompute else ""
        floor = 40 if asked and not way.recompute else nan
        results.append(Figure(f"GPU: share of the peak bf16 rate, {way.name}", 100 * rate / most, floor, "%", note))
    return results


def operations(model: nn.Module, lengths: Tensor) -> float:
    """Floating point operations that one step on these texts needs, forward and backward.  lengths: [N], tokens each

    A multiplication and an addition are two. With width W and L blocks:

    - linear layers: 6 a weight and token, 2 forward and 4 backward. A block has 12 W^2 weights. The last one needs
      only keys and values of each token, 2 W^2, and the other 10 W^2 once a text.
    - attention of a text of l tokens: causal, so half of l^2 scores, and 2 W operations for each of the two products;
      2 * 2 W * l^2 / 2 a block forward. In the last block one query reads l tokens: 2 * 2 W * l. Backward twice that.

    Not counted: padding, what is computed again, norms, softmax, activations, the projection, the loss, the optimizer.
    """
    width, blocks = model.transformer.width, len(model.transformer.resblocks)
    length = lengths.double()
    tokens, texts = float(length.sum()), len(length)
    linear = 6 * width**2 * ((12 * (blocks - 1) + 2) * tokens + 10 * texts)
    attention = 3 * 2 * 2 * width * float((length**2).sum() / 2 * (blocks - 1) + length.sum())
    return linear + attention


def _lengths(tokens: Tensor) -> Tensor:
    """Tokens of each text up to its end, which is its largest.  [N, L] -> [N]"""
    return tokens.argmax(-1) + 1


def _each(step: Callable[..., float], batches: list[steps.Batch], rounds: int) -> None:
    for k in range(rounds):
        step(*batches[k % len(batches)])


# -- images --------------------------------------------------------------------------------------------


@torch.no_grad()
def of_images(model: nn.Module, n: int, size: int, rounds: int = 5) -> list[Figure]:
    """Images a second, n at a time. They are on the device already."""
    device = model.text_projection.device
    pixels, results = torch.randn(n, 3, size, size, device=device), []
    about = f"{MODEL}, {size} pixels, batch {n}; reading and decoding not in it"
    for name, bf16 in (("bf16", True), ("fp32", False)):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model.encode_image(pixels)  # warms up
            seconds = _seconds(device, lambda: [model.encode_image(pixels) for _ in range(rounds)])
        results.append(Figure(f"GPU: image encoding, {name}", rounds * n / seconds, nan, "images/s", about))
    return results


# -- the device: on a CPU, where tests run this, there is nothing to wait for and nothing known -----------


def _pinned(batch: steps.Batch, device: torch.device) -> steps.Batch:
    return steps.Batch(*(part.pin_memory() for part in batch)) if device.type == "cuda" else batch


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Until all is done that `work` asked of the device."""
    _wait(device)
    then = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - then


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_above(device: torch.device, work: Callable[[], object]) -> float:
    """Bytes at the highest while `work` is done, above those before; NaN where that is not known."""
    if device.type != "cuda":
        work()
        return nan
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _peak_rate(card: str) -> float | None:
    """Operations a second in bf16, from its data sheet; None for one that is not known."""
    return None if card.endswith("NVL") else next((rate for name, rate in PEAK.items() if name in card), None)


if __name__ == "__main__":
    run_script(lambda: exit_if_missed(record(figures())))
