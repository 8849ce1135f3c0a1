"""Preference tuning of the text tower: steps a second, against a loop that runs policy and reference on every item.

    python bench/preference.py

On the example's statements, by DPO, in float32, from the picture to the optimizer's step. Both take turns in one
process; the gradients of their first step are compared.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from itertools import islice
from math import nan
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference
import surroundings
import torch
from record import Figure, exit_if_missed, record
from torch import Tensor
from torch.utils.data import DataLoader

from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig, TrainConfig
from pc_clip.core.errors import run_script
from pc_clip.core.random import stream
from pc_clip.data.training_data import load_dataset
from pc_clip.models.loading import create_model
from pc_clip.train.methods import preference
from pc_clip.train.optim import make_optimizer

BATCH, BETA, LR = 128, 1.0, 1e-4
STEPS, ROUNDS = 5, 7  # steps a turn, and turns


def figures(threads: int = 1) -> list[Figure]:
    """Steps a second, and how many times as many as the reference's.

    Raises RuntimeError where the two do not have the same gradients.
    """
    with surroundings.threads(threads), surroundings.temporary_folder():
        begin = time.perf_counter()
        method = make_method()
        finding = time.perf_counter() - begin
        compare(method)
        turns = {"ours": ours(method), "theirs": theirs(method)}
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(ROUNDS):
            for name, steps in turns.items():
                begin = time.perf_counter()
                for _ in islice(steps, STEPS):
                    pass
                seconds[name].append((time.perf_counter() - begin) / STEPS)
        mine, published = (median(seconds[name][1:]) for name in ("ours", "theirs"))  # the first warms up
    about = f"DPO on the example, batch {BATCH}, text tower, float32, {threads} thread(s)"
    return [
        Figure("preference tuning, steps a second", 1 / mine, nan, "/s",
               f"{about}; before them {finding:.0f} s for images, tokens and what the start thinks of all statements"),
        Figure("preference tuning, ours : reference", published / mine, 3.0, "x",
               f"{about}; the reference makes {1 / published:.2f} steps a second"),
    ]  # fmt: skip


def make_method() -> preference.Method:
    """The method as a run has it; for this its images, texts and reference are found from nothing."""
    config = FinetuneConfig(method="preference", device="cpu")
    config.data.dataset, config.model.train = "example_relations", "text"
    config.train = TrainConfig(batch_size=BATCH, lr=LR, optimizer="adam", epochs=1)
    config.preference = PreferenceConfig(loss="dpo", beta=BETA)
    clip = create_model("example")
    clip.choose_text_way(fast=True)
    method = preference.Method(clip, load_dataset(config.data), config)
    learning = set(method.trainable().values())
    for parameter in clip.model.parameters():
        parameter.requires_grad_(parameter in learning)
    return method


def ours(method: preference.Method) -> Iterator[float]:
    """Steps as pc_clip.train.loop makes them, without end."""
    optimizer = make_optimizer(method.config.train, list(method.trainable().values()))
    epoch = 0
    while True:
        method.begin_epoch(epoch)
        for batch in method.loader(epoch):
            loss, _ = method(batch)
            yield loss.item()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        epoch += 1


def theirs(method: preference.Method) -> Iterator[float]:
    """Steps of the reference on a copy of the model, without end."""
    policy, frozen, loader = published(method)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=LR)
    while True:
        for some in loader:
            yield reference.preference_step(policy, frozen, optimizer, *some, BETA)


def published(method: preference.Method) -> tuple[torch.nn.Module, torch.nn.Module, DataLoader]:
    """Policy, frozen reference and data, as the reference has them."""
    clip, data, sentences = create_model("example"), method.images.data, method.texts.distinct
    items = [
        (int(row), sentences[a], sentences[b]) for row, (a, b) in zip(method.image[:, 0], method.text, strict=True)
    ]
    policy, frozen = clip.model, copy.deepcopy(clip.model).requires_grad_(False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in method.trainable())
    results = reference.Preferences(data.load, clip.preprocess, clip.tokenizer, items)
    order = torch.Generator().manual_seed(0)
    return policy, frozen, DataLoader(results, batch_size=BATCH, shuffle=True, drop_last=True, generator=order)


def compare(method: preference.Method) -> None:
    """The gradients of one batch, both ways."""
    batch = next(method.loader(0))
    method(batch)[0].backward()
    mine = {name: p.grad.clone() for name, p in method.trainable().items()}
    method.zero_grad(set_to_none=True)
    policy, frozen, loader = published(method)
    rng = stream(method.config.seed, "batches", 0)  # the loader's own, for which items these are
    rows = next(method.sampler.batches(0, rng)).tolist()
    some = [torch.stack(parts) for parts in zip(*(loader.dataset[row] for row in rows))]
    reference.preference_step(policy, frozen, torch.optim.SGD(policy.parameters(), lr=0.0), *some, BETA)
    true = {name: p.grad for name, p in policy.named_parameters() if name in mine}
    off = _norm({name: mine[name] - true[name] for name in true}) / _norm(true)
    if not off < 1e-3:
        raise RuntimeError(f"our gradient is off the reference's by {off:.1e} of its length")


def _norm(gradients: dict[str, Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def main() -> None:
    exit_if_missed(record(figures()))


if __name__ == "__main__":
    run_script(main)
