"""What methods share: texts as tokens, images as pixels or embeddings, the loader, the state of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import tee
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from torch import Tensor, nn

from pc_clip.core import cache
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.distributed import process_slice
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import tokens
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.embedding_shards import Rows
from pc_clip.data.embeddings import Options, embed_images, encode, load_embeddings
from pc_clip.data.images import RandomCrop, Reader, plain
from pc_clip.models import lora
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.parameters import image_tower_learns
from pc_clip.train.samplers import Sampler

LARGEST_LOGIT_SCALE = torch.tensor(100.0).log().item()
TEXTS_PER_BATCH = 256
ROWS_AT_ONCE = 1 << 16  # rows of embeddings that all processes hold at a time
CUT = "texts reach the context length; what comes after it is not read"


class BaseMethod(nn.Module):
    """A method without its batches and its loss; methods/__init__.py says what those are."""

    sampler: Sampler  # made by the method, which knows what its examples are
    images: Images
    retention: Any = None  # a Retention (train/retention.py), set by the loop where the settings ask for it
    more_captions: Sequence[tuple[str, ...]] = ()  # ordinary ones that are not the data set's
    idle: tuple[str, ...] = ("logit_", "text_decoder.")  # how the names of weights begin that no loss reaches
    chosen_by = ""  # the figure of `validate` by which the best epoch is chosen; empty for the last epoch
    chosen_on = ""  # what `validate` looks at, by content

    def __init__(self, clip: Clip, config: FinetuneConfig) -> None:
        super().__init__()
        self.model, self.clip, self.config = clip.model, clip, config
        self.share = process_slice("train.batch_size", config.train.batch_size)
        self.notes: list[str] = []
        # Statistics of BatchNorm are learnt from scratch only: a finetuned model keeps those it has.
        self.train(config.model.pretrained == SCRATCH)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.config.train.steps or self.config.train.epochs * self.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, when all steps before it are done."""
        if self.training and PartialState().num_processes > 1:  # else each process embeds by statistics of its own
            for value in self.model.buffers():
                broadcast(value)
        self.sampler.begin(epoch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        learn = lora.trainable(self.clip, self.config.model.train)
        return {name: p for name, p in learn.items() if not name.startswith(self.idle)}

    def learns(self, similarity: str) -> bool:
        """Whether what makes examples similar, their text or their image, changes in training."""
        return similarity == "text" or self.images.learns

    def rate(self, name: str) -> float:
        """Learning-rate multiplier of a parameter of `trainable`."""
        return 1.0

    def after_step(self) -> None:
        """Called after each step of the optimizer. CLIP keeps its logit scale at 100 or below (Radford et al. 2021)."""
        scale = getattr(self.model, "logit_scale", None)
        if scale is not None and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=LARGEST_LOGIT_SCALE)

    def note(self, count: int, what: str) -> None:
        """Add a line for the log, where there is anything to count."""
        if count:
            self.notes.append(f"{count} {what}")

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, with the terms of retention, and numbers for the log."""
        if self.retention is None:
            return self.loss(batch)
        loss, logs = self.loss(batch.method_batch)
        retention, more = self.retention.loss(batch.ordinary)
        return loss + retention, logs | more

    # -- the loader ------------------------------------------------------------------------------------

    def loader(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """This process's part of each batch of an epoch, without the first `skip`. Images are read ahead.

        `draw` makes all random choices of a batch, for skipped ones too; `image_rows` are the images that a part needs,
        in the order in which `batch` then gets them. With retention each is a `Retained`.
        """
        rng = stream(self.config.seed, "batches", epoch)

        def draw() -> Iterator[tuple[Any, np.ndarray | None]]:
            for n, chosen in enumerate(self.sampler.batches(epoch, rng)):
                kept = self.retention.draw(rng) if self.retention else None
                part = self.draw(chosen, rng, epoch, n)
                if n >= skip:
                    yield part, kept

        drawn, ahead, also = tee(draw(), 3)
        rows, ordinary_rows = (self.image_rows(part) for part, _ in ahead), (kept for _, kept in also)
        seen = self.retention.read(ordinary_rows, epoch) if self.retention else ordinary_rows
        with closing(self.read(rows, epoch)) as coming, closing(seen) as ordinary:
            first = epoch * self.steps_per_epoch + skip
            for step, ((part, kept), images, more) in enumerate(zip(drawn, coming, ordinary), start=first):
                batch, progress = self.batch(part, images), step / self.total_steps
                yield self.retention.attach(batch, kept, more, progress) if self.retention else batch

    def read(self, rows: Iterable[np.ndarray], epoch: int) -> Iterator[Any]:
        """The images of each array of rows."""
        return self.images.batches(rows, epoch)

    # -- what the next step depends on besides weights and optimizer ----------------------------------------

    def state(self) -> dict[str, Tensor]:
        buffers = self.model.named_buffers() if self.training else ()
        tensors = {f"sampler.{name}": value for name, value in self.sampler.state().items()}
        return tensors | {f"buffer.{name}": value for name, value in buffers}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave; nothing for an empty one."""
        if sampler := {name.removeprefix("sampler."): v for name, v in state.items() if name.startswith("sampler.")}:
            self.sampler.restore(sampler)
        for name, value in self.model.named_buffers():
            if f"buffer.{name}" in state:
                value.copy_(state[f"buffer.{name}"])


# -- texts and images ---------------------------------------------------------------------------------------


class Tokens:
    """A table of tokens, [U, L], of which batches are cut. It may lie in a file that is mapped into memory."""

    def __init__(self, clip: Clip, tokens: np.ndarray) -> None:
        self.clip, self.tokens = clip, tokens

    def count_truncated(self, rows: np.ndarray) -> int:
        """How many texts among these rows, each counted once, reach the end of the context and may be cut."""
        return int(self.clip.fills_context(torch.from_numpy(self.tokens[np.unique(rows), -2:].astype(np.int64))).sum())

    def batch(self, rows: np.ndarray) -> Tensor:
        """Tokens of some rows, cut to the longest of them.  -> [B, L] int64"""
        return self.clip.trim(torch.from_numpy(self.tokens[rows].astype(np.int64)))


class Texts(Tokens):
    """Distinct texts, tokenised once and for all (`pc_clip.data.tokens`). `rows` maps texts to rows of `tokens`."""

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.distinct = list(dict.fromkeys(texts))
        self.row = {text: n for n, text in enumerate(self.distinct)}
        with PartialState().main_process_first():  # the others then find them in the cache
            super().__init__(clip, tokens.tokenize(clip.tokenizer, self.distinct))
        self.truncated = self.count_truncated(np.arange(len(self.distinct)))

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self.row[text] for text in texts], dtype=np.int64)


class Images:
    """Images by row: cached embeddings, or pixels where the image tower itself learns.

    pixels: give pixels in any case, to a method that reads more from images than their embeddings.
    """

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig, pixels: bool = False) -> None:
        self.clip, self.data, self.ids = clip, data, data.ids
        self.learns, share = image_tower_learns(config.model.train), config.data.min_crop
        if share != 1 and not self.learns:
            raise UserError(
                f"data.min_crop is {share:g}, but with model.train {config.model.train} the image tower is frozen and "
                "its images are embedded once, uncropped; leave it at 1, or set model.train both"
            )
        transform = plain(clip.preprocess) if share == 1 else RandomCrop.of(clip, share, config.seed)
        self.reader = Reader(data, transform, config.data.workers)  # of pixels
        self.z: Tensor | Rows | None = None
        if self.learns or pixels:
            if config.data.embeddings:
                why = f"model.train {config.model.train}" if self.learns else "this method"
                raise UserError(f"{why} reads the images in each step; leave data.embeddings out")
            self.reader.start()  # while this is the only thread; batches are asked for by another
        elif config.data.embeddings:
            self.z, self.ids = load_embeddings(config.data.embeddings, clip)
        else:
            with PartialState().main_process_first():  # the others then find them in the cache
                self.z, self.ids = embed_images(clip, data, workers=config.data.workers)

    def batches(self, rows: Iterable[np.ndarray], epoch: int) -> Iterator[Tensor]:
        """An epoch's batches: of each array of rows [B, D] embeddings or [B, 3, H, W] pixels, in this epoch's crops.

        Pixels come from worker processes, which work two batches each ahead. Closing the iterator before
        its end stops them. Raises UserError for an image that cannot be read, with its path.
        """
        if self.z is not None:
            yield from (_take(self.z, some) for some in rows)
            return
        with closing(self.reader.batches(rows, epoch)) as coming:
            for batch in coming:
                yield batch.whole()

    def equal(self, pairs: np.ndarray) -> np.ndarray:
        """Which pairs of rows, [N, 2], are of one picture as far as their embeddings tell.  -> [N] bool

        Unit embeddings no more than 1e-6 apart are equal, and those that are not finite. Where the tower itself
        learns nothing is known of its embeddings, and no pair is.
        """
        return np.zeros(len(pairs), dtype=bool) if self.z is None else _equal_rows(self.z, pairs)

    def encode(self, images: Tensor) -> Tensor:
        """[B, D] embeddings of a batch from `batches`."""
        return images if self.z is not None else self.clip.encode_image(images)


class CaptionedImages(Images):
    """Images of which only captions are known: by row, the unit mean of the captions' unit embeddings at the start."""

    def __init__(self, clip: Clip, ids: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
        self.clip, self.ids, self.learns = clip, ids, False
        self.z = embed_captions(clip, captions)


def embed_captions(clip: Clip, captions: Sequence[Sequence[str]]) -> Tensor:
    """The unit mean of each image's caption embeddings, cached.  -> [N, D] float32"""
    row = {text: n for n, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    key = {"texts": tokens.digest_of(list(row)), "weights": clip.weights_hash(), "device": clip.device.type}
    key["tokenizer"] = tokens.identity(clip.tokenizer) or ""

    def embed() -> dict[str, np.ndarray]:
        return {"z": clip.embed_texts(list(row)).numpy()}

    with PartialState().main_process_first():  # the others then find them in the cache
        made = cache.cached("captions", key, embed) if key["tokenizer"] else embed()
    z = torch.from_numpy(made["z"])
    means = torch.stack([z[[row[text] for text in texts]].mean(0) for texts in captions])
    return nn.functional.normalize(means, dim=-1)


def _take(z: Tensor | Rows, rows: np.ndarray) -> Tensor:
    """Rows of embeddings. Of a plain tensor index_select reads them in a quarter of the time of z[rows]."""
    chosen = torch.from_numpy(rows)
    return z.index_select(0, chosen) if isinstance(z, Tensor) else z[chosen]


def _equal_rows(z: Tensor | Rows, pairs: np.ndarray, block: int = 8192) -> np.ndarray:
    """Images.equal, a block of embeddings at a time. Only pairs whose sums over the dimensions agree are compared."""

    def unit(rows: np.ndarray) -> Tensor:
        return nn.functional.normalize(_take(z, rows), dim=-1)

    used, places = np.unique(pairs, return_inverse=True)
    sums = torch.cat([unit(some).sum(-1) for some in np.split(used, range(block, len(used), block))]).numpy()
    first, second = sums[places.reshape(pairs.shape)].T
    equal = ~(np.abs(first - second) > 2e-6 * z.shape[1] ** 0.5)  # NaN is not apart
    candidates = np.flatnonzero(equal)
    for some in np.split(candidates, range(block, len(candidates), block)):
        apart = (unit(pairs[some, 0]) - unit(pairs[some, 1])).norm(dim=-1)
        equal[some] = ~(apart > 1e-6).numpy()
    return equal


# -- embeddings by all processes together --------------------------------------------------------------------


def embed_rows_of_texts(texts: Tokens, rows: np.ndarray, precision: str = "no") -> Tensor:
    """Unit embeddings of some texts of a table, by the weights as they are now.  -> [R, D] float32, on the CPU

    precision: as train.precision. A text that is in several rows is embedded once.
    """
    clip, (used, places) = texts.clip, np.unique(rows, return_inverse=True)

    @torch.no_grad()
    def compute(some: np.ndarray) -> Tensor:
        z, mine = torch.empty(len(some), clip.embed_dim), used[some]
        order = np.argsort((texts.tokens[mine] != 0).sum(1), kind="stable")  # like lengths together: less padding
        for start in range(0, len(mine), TEXTS_PER_BATCH):
            these = order[start : start + TEXTS_PER_BATCH]
            with torch.autocast(clip.device.type, torch.bfloat16, enabled=precision == "bf16"):
                z_batch = clip.encode_text(texts.batch(mine[these]).to(clip.device))
            z[torch.from_numpy(these)] = nn.functional.normalize(z_batch.float(), dim=-1).cpu()
        return z

    return compute_distributed(len(used), compute)[torch.from_numpy(places)]


def embed_rows_of_images(images: Images, rows: np.ndarray, now: bool, config: FinetuneConfig) -> Tensor:
    """Unit embeddings of some images: cached ones, or where the tower learns and `now`, fresh.  -> [R, D] float32"""

    def compute(some: np.ndarray) -> Tensor:
        options = Options(workers=config.data.workers, precision=config.train.precision)
        z = encode(images.clip, subset(images.data, rows[some]), options).z
        return nn.functional.normalize(z.float(), dim=-1)

    if images.z is None and now:
        return compute_distributed(len(rows), compute)
    z = images.z
    if z is None:
        with PartialState().main_process_first():  # the others then find them in the cache
            z = embed_images(images.clip, images.data, workers=config.data.workers).z
    return nn.functional.normalize(_take(z, rows).float(), dim=-1)


def compute_distributed(n: int, compute: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Rows 0 to n - 1 by `compute`, each process its part; every process has them all.  -> [n, D] on the CPU"""
    state, blocks = PartialState(), []
    for block in np.split(np.arange(n), range(ROWS_AT_ONCE, n, ROWS_AT_ONCE)):
        each = -(-len(block) // state.num_processes)
        z = compute(np.resize(block[state.process_index * each :][:each], each))
        blocks.append(z if state.num_processes == 1 else gather(z.to(state.device))[: len(block)].cpu())
    return torch.cat(blocks)
