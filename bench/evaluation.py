"""What an evaluation of a second checkpoint costs: zero-shot, and all pairs of some images.

    python bench/evaluation.py

A first checkpoint has filled the cache of image embeddings; a second one has the same image tower and another text
tower, as finetuning makes it. Ours is `pc_clip.evals.evaluate.measure`, which is run.py from where the model is built
and the data set open: the hash of the weights, the cached embeddings, the texts, the intervals, the result on the disk.
The reference (`bench/reference.py`) gets the same pixels, decoded and transformed beforehand, and takes turns with
ours. Weights and images are random, made by seed in a temporary folder; what both find is compared.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from pc_clip.core.config.evaluate import DifferenceConfig
from pc_clip.models import lora
from pc_clip.models.loading import create_model

from pc_clip.models.clip import Clip  # isort: skip  (before torch's data sets)

import numpy as np
import reference
import surroundings
import torch
from PIL import Image
from record import Figure, exit_if_missed, record
from torch import Tensor
from torch.utils.data import TensorDataset

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import run_script
from pc_clip.data import differences
from pc_clip.data.class_names import class_names
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.embeddings import CACHE
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext
from pc_clip.evals.difference import cosines, pair_differences
from pc_clip.evals.evaluate import measure
from pc_clip.models.loading import load_model, save_model

MODEL, SIZE = "ViT-B-32", 224
IMAGES, CLASSES = 512, 100
EACH = 3  # times that ours is measured for each time of the reference
PAIRED, SAMPLE = 100, 96  # images, all of whose pairs are taken; pairs that the reference is measured on
TEMPLATE = "This is a photo of a {}"
CHECKPOINT, SENTENCES = Path("second.safetensors"), Path("sentences.jsonl")
PHRASES = (
    ("larger objects", "smaller objects"),
    ("more objects", "fewer objects"),
    ("a lighter background", "a darker background"),
)


class Timed(NamedTuple):
    seconds: float
    result: Any


def figures(threads: int = 1, rounds: int = 2) -> list[Figure]:
    """How many times as long the published way takes. Raises RuntimeError where the two do not find the same."""
    with surroundings.threads(threads), surroundings.temporary_folder():
        first = _random_model(MODEL)
        data = write_images(Path("images"), list(class_names("food101").display_names.values())[:CLASSES], IMAGES, SIZE)
        our_confusion(first, data)  # fills the cache
        save_model(CHECKPOINT, with_other_text(first))
        about = f"{MODEL}, {threads} thread(s)"
        return [
            _zeroshot(data, rounds, about),
            _all_pairs(write_images(Path("paired"), ["thing"], PAIRED, SIZE), rounds, about),
        ]


def _zeroshot(data: Dataset, rounds: int, about: str) -> Figure:
    loads, mine, theirs, hashes = [], [], [], []
    for _ in range(rounds):
        for _ in range(EACH):  # ours is short, and so at the mercy of what else the machine does
            loaded = timed(load_model, CHECKPOINT)  # anew, because a model may remember its hash
            clip = loaded.result
            results = timed(our_confusion, clip, data)
            loads.append(loaded.seconds)
            mine.append(results.seconds)
            hashes.append(timed(clip.weights_hash).seconds + timed(clip.image_tower_hash).seconds)
        pixels = transformed(clip, data)
        published = timed(published_confusion, clip, data, pixels)
        theirs.append(published.seconds)
        if not np.array_equal(results.result, published.result):
            differ = int((results.result != published.result).sum())
            raise RuntimeError(f"{differ} entries of the confusion matrix differ")
    ours, theirs, loading, hashing = (median(seconds) for seconds in (mine, theirs, loads, hashes))
    with_loading = (theirs + loading) / (ours + loading)
    note = (
        f"{about}, {len(data)} images, {CLASSES} classes, cached embeddings; {ours:.2f} s ({hashing:.2f} s is hashing "
        f"weights) against {theirs:.1f} s; same confusion matrix; with building and loading the model, {loading:.1f} s "
        f"in both, {with_loading:.0f} x; goal 100 x"
    )
    return Figure("zero-shot of a second checkpoint, reference : ours", theirs / ours, 40.0, "x", note)


def _all_pairs(data: Dataset, rounds: int, about: str) -> Figure:
    sentences = write_sentences(SENTENCES, data)
    shown = sample(sentences, SAMPLE)
    cold = warm = theirs = error = 0.0
    for _ in range(rounds):
        clear_cache()
        first, again = load_model(CHECKPOINT), load_model(CHECKPOINT)
        cold += timed(our_difference_classification, first, data).seconds / rounds
        warm += timed(our_difference_classification, again, data).seconds / rounds
        pixels = transformed(first, data)
        published = timed(published_cosines, first, data, pixels, shown)
        theirs += published.seconds / rounds * len(sentences) / len(shown)
        error = max(error, float((our_cosines(first, data, shown) - published.result).abs().max()))
    if error > 1e-5:
        raise RuntimeError(f"a cosine is {error:.1g} off the reference's")
    note = (
        f"{about}, {len(sentences)} pairs; {cold:.1f} s, images encoded, against {theirs:.0f} s scaled up from "
        f"{len(shown)} of the pairs; largest error of a cosine {error:.0e}; from the cache {warm:.2f} s, "
        f"{theirs / warm:.0f} x"
    )
    return Figure(f"all pairs of {len(data)} images, reference : ours", theirs / cold, 100.0, "x", note)


# -- zero-shot -----------------------------------------------------------------------------------------


def our_confusion(clip: Clip, data: Dataset) -> np.ndarray:
    """[true, guessed] of one evaluation, as its result on the disk has it."""
    (result,) = measure(clip, data, _settings("zeroshot", templates=[TEMPLATE]))
    return np.array(result["details"]["class"]["confusion"])


def published_confusion(clip: Clip, data: Dataset, pixels: Tensor) -> np.ndarray:
    (question,) = data.questions
    images = TensorDataset(pixels, torch.from_numpy(question.target))
    return reference.zeroshot(clip.model, clip.tokenizer, images, question.classes).long().numpy()


# -- all pairs -----------------------------------------------------------------------------------------


def write_sentences(path: Path, data: Dataset, seed: int = 0) -> list[Difference]:
    """A sentence for every pair of images: one of few, as attributes have them."""
    rng = np.random.default_rng(seed)
    texts = [contrast(*sentences, 0) for more, less in PHRASES for sentences in ((more, less), (less, more))]
    results = [Difference(i, j, texts[rng.integers(len(texts))]) for i, j in combinations(data.ids, 2)]
    path.write_text("".join(map(to_line, results)), encoding="utf-8")
    return results


def our_difference_classification(clip: Clip, data: Dataset) -> dict[str, float]:
    (result,) = measure(clip, data, _settings("difference", difference=DifferenceConfig(sentences=str(SENTENCES))))
    return result["metrics"]


def our_cosines(clip: Clip, data: Dataset, sentences: list[Difference]) -> Tensor:
    """What those figures are made of.  -> [P]"""
    z = EvalContext(clip, lambda: None, data, _settings("difference")).z
    pairs = differences.rows(sentences, data.ids, str(SENTENCES))
    return cosines(clip, [each.text for each in sentences], pair_differences(z, pairs))


def published_cosines(clip: Clip, data: Dataset, pixels: Tensor, sentences: list[Difference]) -> Tensor:
    """[P]. Each sentence is tokenised once, which is not measured where there are few."""
    tokens = {text: clip.tokenizer(text)[0] for text in {each.text for each in sentences}}
    pairs = map(tuple, differences.rows(sentences, data.ids, str(SENTENCES)).tolist())
    return torch.tensor(
        list(reference.all_pairs(clip.model, pixels, {p: tokens[d.text] for p, d in zip(pairs, sentences)}).values())
    )


def sample(sentences: list[Difference], n: int, seed: int = 0) -> list[Difference]:
    return [sentences[k] for k in np.random.default_rng(seed).choice(len(sentences), n, replace=False)]


# -- models and images ---------------------------------------------------------------------------------


def _random_model(name: str) -> Clip:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, load_weights=False)


@torch.no_grad()
def with_other_text(clip: Clip, amount: float = 0.1, seed: int = 0) -> Clip:
    """The same model after each weight of its text tower moved, in place, by so much of that tensor's spread."""
    generator = torch.Generator().manual_seed(seed)
    for weight in lora.trainable(clip, "text").values():
        weight.add_(amount * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return clip


def write_images(folder: Path, classes: Iterable[str], n: int, size: int, seed: int = 0) -> Dataset:
    """n pictures of coarse noise in a folder a class, opened."""
    rng, classes = np.random.default_rng(seed), list(classes)
    for k in range(n):
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        path = folder / classes[k % len(classes)].replace(" ", "_") / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path)
    return open_dataset("folder", folder)


def transformed(clip: Clip, data: Dataset) -> Tensor:
    """[N, 3, H, W]"""
    return torch.stack([clip.preprocess(data.load(row)) for row in range(len(data))])


def clear_cache() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def _settings(mode: str, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(dataset="folder", mode=mode, checkpoint=str(CHECKPOINT), again=True, **settings)


def timed(work: Callable[..., Any], *arguments: Any) -> Timed:
    begin = time.perf_counter()
    results = work(*arguments)
    return Timed(time.perf_counter() - begin, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    exit_if_missed(record(figures(parser.parse_args().threads)))


if __name__ == "__main__":
    run_script(main)
