"""Regularisation towards the start, for any method, on ordinary captions and images.

Each step has A ordinary captions with their images in addition to the method's batch. `retain.NAME` weighs the
terms: `texts` and `images`, 1 - cos between their embeddings and the start's; `similarities`, the KL divergence from
the start's softmax of captions over images and back (distillation); `contrastive`, CLIP's own loss. The start's
embeddings are computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.distributed import process_slice
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset, digest
from pc_clip.data.training_data import load_dataset
from pc_clip.train import losses
from pc_clip.train.methods.base import CUT, BaseMethod, Images, Texts, embed_rows_of_images

EXAMPLES = ("example_relations", "example_changes")  # without captions of their own; the example's are of such scenes


class OrdinaryBatch(NamedTuple):
    """A captions, each with an image it describes; `images` is empty where no term needs them."""

    tokens: Tensor  # [A, L] int64
    images: Tensor  # [A, D] embeddings, or [A, 3, H, W] pixels when the image tower learns
    ramp: float  # factor of all weights in this step
    text_start: Tensor  # [A, D] float32, unit length
    image_start: Tensor  # [A, D] float32, unit length


class Retained(NamedTuple):
    """A batch of the method, with a batch of ordinary captions."""

    ids: list[str]
    method_batch: Any
    ordinary: OrdinaryBatch


class Retention:
    """The retention terms of a run: ordinary captions, their images, and the start's embeddings of both."""

    def __init__(self, method: BaseMethod, data: Dataset) -> None:
        self.clip, config, options = method.clip, method.config, method.config.retain
        self.weights, self.temperature, self.ramp = _check(method), options.temperature, options.ramp
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, min_crop=1.0)
        )  # as the start saw them
        name = options.dataset or ("example" if config.data.dataset in EXAMPLES else "")
        if name:
            changes = {"dataset": name, "root": options.root, "split": options.split, "captions": options.file}
            config.data = dataclasses.replace(config.data, **changes, mix=[], embeddings=None)
            data = load_dataset(config.data, config.seed)
        more = method.more_captions if set(self.weights) == {"texts"} else ()
        written = [(text, row) for row, texts in enumerate([*(data.captions or []), *more]) for text in texts]
        if not written:
            raise UserError(
                f"retain.{', retain.'.join(self.weights)} needs ordinary captions, and {data.label} has none; name a "
                "data set that has with --retain.dataset"
            )
        image_of = dict(reversed(written))  # of a caption that several images have, the first of these
        self.fingerprint = digest(data.fingerprint, [text for text, _ in written])
        distinct = list(dict.fromkeys(text for text, _ in written))
        chosen = stream(config.seed, "anchor").permutation(len(distinct))[: options.captions]
        if "contrastive" in self.weights and options.batch > len(chosen):
            raise UserError(
                f"retain.batch is {options.batch}, and there are {len(chosen)} ordinary captions; with "
                "retain.contrastive no caption comes twice in a batch"
            )
        self.texts = Texts(self.clip, [distinct[n] for n in chosen])
        method.note(self.texts.truncated, f"ordinary {CUT}")
        self.text_start = self.clip.embed_texts(self.texts.distinct)  # [captions, D]
        self.images: Images | None = None
        if set(self.weights) - {"texts"}:
            self._look(data, config, [image_of[text] for text in self.texts.distinct])
        self.size, self.share = options.batch, process_slice("retain.batch", options.batch)

    def _look(self, data: Dataset, config: Any, rows: list[int]) -> None:
        """Open the images of the captions, and embed them by the start."""
        self.images = Images(self.clip, data, config)
        row = {key: n for n, key in enumerate(self.images.ids)}
        if absent := [data.ids[n] for n in rows if data.ids[n] not in row]:
            raise UserError(f"{len(absent)} images of ordinary captions have no embedding, first {absent[0]}")
        self.image_rows = np.array([row[data.ids[n]] for n in rows])
        used, places = np.unique(self.image_rows, return_inverse=True)
        self.image_start = embed_rows_of_images(self.images, used, False, config)[torch.from_numpy(places)]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """This process's part of a step's captions.  -> [A] int64"""
        count = len(self.texts.distinct)
        if "contrastive" in self.weights:  # a caption drawn twice would be its own negative
            return rng.choice(count, self.size, replace=False)[self.share]
        return rng.integers(count, size=self.size)[self.share]

    def read(self, drawn: Iterable[np.ndarray], epoch: int) -> Iterator[Tensor]:
        """The images of each step's captions; empty where no term needs them."""
        if self.images is None:
            return (torch.empty(0) for _ in drawn)
        return self.images.batches((self.image_rows[rows] for rows in drawn), epoch)

    def attach(self, batch: Any, rows: np.ndarray, images: Tensor, progress: float) -> Retained:
        """A method's batch, the captions of these rows and their images. progress: the share of all steps before."""
        ramp = min(1.0, progress / self.ramp) if self.ramp else 1.0
        chosen = torch.from_numpy(rows)
        image_start = torch.empty(0) if self.images is None else self.image_start[chosen]
        return Retained(
            batch.ids, batch, OrdinaryBatch(self.texts.batch(rows), images, ramp, self.text_start[chosen], image_start)
        )

    def loss(self, ordinary: OrdinaryBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, and each term for the log."""
        text = image = None
        if set(self.weights) != {"images"}:
            text = self.clip.encode_text(ordinary.tokens).float()
        if self.images is not None:
            image = self.images.encode(ordinary.images).float()
        terms: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "texts":
                terms[name] = losses.anchor(text, ordinary.text_start)
            elif name == "images":
                terms[name] = losses.anchor(image, ordinary.image_start)
            elif name == "similarities":
                start = ordinary.text_start, ordinary.image_start
                terms[name] = losses.over_all(losses.similarity_divergence, text, image, *start, self.temperature)
            else:
                scale = self.clip.model.logit_scale.exp()
                terms[name] = losses.over_all(losses.info_nce, text, image, 1 / scale)
        total = sum(self.weights[name] * term for name, term in terms.items())
        return ordinary.ramp * total, {f"retain_{name}": term.detach() for name, term in terms.items()}


def _check(method: BaseMethod) -> dict[str, float]:
    """The weights of terms that can change. Raises UserError for invalid settings, and where no term can change."""
    options, learn = method.config.retain, method.trainable()
    for name, weight in options.weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(f"retain.{name} is {weight}; it is a weight, 0 or more")
    for name in ("batch", "captions"):
        check_at_least(f"retain.{name}", getattr(options, name), 2 if set(options.weights) - {"texts", "images"} else 1)
    if not 0 <= options.ramp <= 1:
        raise UserError(f"retain.ramp is {options.ramp}; it is a share of all steps, from 0 to 1")
    if not options.temperature > 0:
        raise UserError(f"retain.temperature is {options.temperature}; it must be above 0")
    visual = {name for name in learn if name.startswith("visual.")}
    text = any(name not in visual and not name.startswith("change.") for name in learn)
    frozen = {name for name, learns in (("images", visual), ("texts", text)) if not learns} & options.weights.keys()
    if frozen == options.weights.keys():
        raise UserError(f"retain.{min(frozen)}: that tower is frozen, so that what it makes stays; set it to 0")
    for name in sorted(frozen):
        method.notes.append(f"retain.{name} has no effect: that tower is frozen, and what it makes stays")
    return {name: weight for name, weight in options.weights.items() if name not in frozen}
