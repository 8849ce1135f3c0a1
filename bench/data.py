"""Sentences and embeddings on their way into a batch: how long a run takes to start, and how long a batch.

    python bench/data.py

At the size of the paper's run: 118,287 images of 768 numbers each with five captions, 560,000 sentences of some 45
tokens. All of it is made up, by seed, in a temporary folder. The reference is `bench/reference.py`; it and ours take
turns. A start is all from reading the data set to the first batch, but for imports and the model, whose weights take
a second more to hash where they are ViT-L-14's; the second one finds the tokens in the cache. The reference's start is
the tokens of its sentences and of a caption an image, scaled up from a sample.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pc_clip.core.config.train import PairwiseConfig
from pc_clip.models.loading import create_model

from pc_clip.models.clip import Clip  # isort: skip  (before torch's data sets)

import numpy as np
import reference
import surroundings
import torch
from record import Figure, exit_if_missed, record
from torch.utils.data import DataLoader

from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.train import FinetuneConfig, TrainConfig
from pc_clip.core.errors import run_script
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.embeddings import Embeddings, save_embeddings
from pc_clip.data.training_data import load_dataset
from pc_clip.data.wordings import contrast
from pc_clip.train import run_folder
from pc_clip.train.methods import pairwise

IMAGES, DIMENSIONS, CAPTIONS, SENTENCES, BATCH = 118_287, 768, 5, 560_000, 512
SAMPLE = 4096  # texts that the reference's start is measured on


def figures(threads: int = 1) -> list[Figure]:
    """The time of a start and of a batch, in seconds and milliseconds and against the reference."""
    with surroundings.threads(threads), surroundings.temporary_folder():
        clip = create_model("example")
        config = _write_data(clip)
        first, _ = _start(clip, config)
        second, method = _start(clip, config)
        texts = [contrast(*pair, n) for n, pair in enumerate(_phrases(clip, 2 * SAMPLE, 16, seed=3).reshape(-1, 2))]
        captions = _phrases(clip, SAMPLE, 10, seed=4)
        published = SENTENCES * _each(clip.tokenizer, texts) + IMAGES * _each(clip.tokenizer, captions)
        ours, theirs = _batches(method)
    about = f"{SENTENCES:,} differences of {IMAGES:,} images x {DIMENSIONS}"
    return [
        Figure("start of a run, second time", second, nan, "s", f"{about}; the first takes {first:.1f} s", most=5.0),
        Figure("start of a run, reference : ours", published / second, nan, "x",
               f"the reference's is {published:.0f} s, scaled up from {SAMPLE:,} sentences and as many captions"),
        Figure("reading a batch of 512", ours * 1e3, nan, "ms", about, most=2.0),
        Figure("reading a batch of 512, reference : ours", theirs / ours, nan, "x",
               f"the reference's takes {theirs * 1e3:.0f} ms"),
    ]  # fmt: skip


def _start(clip: Clip, config: FinetuneConfig) -> tuple[float, pairwise.Method]:
    """Seconds from the settings to the first batch, and the method that gave it."""
    begin = time.perf_counter()
    data = load_dataset(config.data)
    run_folder.hashes(data, config)
    method = pairwise.Method(clip, data, config)
    next(method.loader(0))
    return time.perf_counter() - begin, method


def _each(tokenizer: Any, texts: Sequence[str]) -> float:
    """Seconds a text, one call each."""
    begin = time.perf_counter()
    for text in texts:
        tokenizer(text)
    return (time.perf_counter() - begin) / len(texts)


def _batches(method: pairwise.Method, rounds: int = 5, each: int = 20) -> tuple[float, float]:
    """Seconds a batch, ours and the reference's, in turn."""
    images = len(method.images.ids)
    table = torch.zeros(images + len(method.pairs), 77, dtype=torch.int64)
    rows = iter(table.split(1))  # the reference's items hold tokens; which ones does not matter to their reading
    items = reference.Differences(
        lambda text: next(rows), range(images), method.images.z, range(images), method.pairs.tolist(), method.pairs
    )
    loader = iter(DataLoader(items, BATCH, shuffle=True))
    own = method.loader(1)
    next(own)  # draws the order of the epoch
    ours, theirs = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        next(loader)
        theirs.append(time.perf_counter() - begin)
        for _ in range(each):
            begin = time.perf_counter()
            next(own)
            ours.append(time.perf_counter() - begin)
    return median(ours), median(theirs)


# -- the data ------------------------------------------------------------------------------------------


def _write_data(clip: Clip) -> FinetuneConfig:
    """A captions file, embeddings and differences in the working folder, and the settings that name them."""
    keys = [f"{n:012d}" for n in range(IMAGES)]
    captions = _phrases(clip, IMAGES * CAPTIONS, 10, seed=1)
    annotations = [{"image_id": keys[n // CAPTIONS], "id": n, "caption": text} for n, text in enumerate(captions)]
    images = [{"id": key, "file_name": f"{key}.jpg"} for key in keys]
    Path("captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    Path("train2017").mkdir()
    for key in keys:
        Path("train2017", f"{key}.jpg").touch()

    z = torch.from_numpy(np.random.default_rng(0).standard_normal((IMAGES, DIMENSIONS), dtype=np.float32))
    save_embeddings(Path("z.safetensors"), Embeddings(z, keys), {"image_tower": clip.image_tower_hash()})

    pairs = np.random.default_rng(2).integers(IMAGES, size=(SENTENCES, 2)).tolist()
    sentences = _phrases(clip, 2 * SENTENCES, 16, seed=2).reshape(-1, 2)
    with open("differences.jsonl", "w", encoding="utf-8") as file:
        for n, ((i, j), (a, b)) in enumerate(zip(pairs, sentences)):
            file.write(to_line(Difference(keys[i], keys[j], contrast(a, b, n))))

    data = DataConfig(
        dataset="coco", root=".", split="train2017", differences="differences.jsonl", embeddings="z.safetensors"
    )
    config = FinetuneConfig(data=data, train=TrainConfig(batch_size=BATCH), device="cpu")
    config.model.name = "example"
    config.pairwise = PairwiseConfig()
    return config


def _phrases(clip: Clip, n: int, words: int, seed: int) -> np.ndarray:
    """Strings of some of the tokenizer's own words.  -> [n] of str"""
    known = [word.removesuffix("</w>") for word in clip.tokenizer.encoder if word.endswith("</w>")]
    known = [word for word in known if word.isascii() and word.isalpha() and len(word) > 2][:4000]
    drawn = np.random.default_rng(seed).integers(len(known), size=(n, words))
    return np.array([" ".join([known[m] for m in row]) for row in drawn.tolist()], dtype=object)


if __name__ == "__main__":
    run_script(lambda: exit_if_missed(record(figures())))
