"""Image embeddings, computed once: a cache keyed by the image tower, the data and the transform.

Finetuning the text tower and every evaluation read images from here, so a second checkpoint with the same
image tower never encodes an image. `python -m pc_clip embeddings --data.dataset coco` fills it beforehand, on as
many processes and machines as there are (docs/scale.md).

A set is a folder NAME of shards with an index (`data/embedding_shards.py`), or one file that was made elsewhere. A
shard that is damaged, or of other images, is computed again and never read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.data.dataset import BrokenImage, Dataset
from pc_clip.data.embedding_shards import (
    Rows,
    Shard,
    Work,
    blocks,
    embed_units,
    index_of,
    read,
    write_shard,
)
from pc_clip.data.images import once, plain
from pc_clip.models.clip import Clip

log = logging.getLogger(__name__)

CACHE = Path("data/cache/embeddings")


def claim(name: str, pretrained: str | None) -> str:
    """The identity of a file that names its model but not the image tower's hash."""
    return f"claimed:{name}/{pretrained}" if pretrained else f"claimed:{name}"


class Embeddings(NamedTuple):
    """Image embeddings as the tower gives them (not normalised), and the images' ids in the same order.

    z: [N, D] float32, memory-mapped where it comes from a file; Rows where it comes from an index: the same by
    `z[LongTensor]`, `z.shape` and `len(z)`, and `z.whole()` has all of it in memory.
    """

    z: Tensor | Rows
    ids: Sequence[str]


# -- images through the tower --------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How images are encoded.

    precision: "no" for float32, bf16 for autocast. dtype: what is kept, float32 or float16. broken: whether an image
    that does not decode is an "error", or left out ("skip"). workers: processes that decode.
    """

    batch_size: int = 128
    workers: int = 0
    precision: str = "no"
    dtype: str = "float32"
    broken: str = "error"

    def check(self) -> None:
        """Raises UserError for a value that means nothing."""
        check_at_least("batch_size", self.batch_size, 1)
        check_choice("precision", self.precision, ("no", "bf16"))
        check_choice("dtype", self.dtype, ("float32", "float16"))
        check_choice("broken", self.broken, ("error", "skip"))

    @property
    def suffix(self) -> str:
        """File-name suffix of rounded embeddings, so that they are not read as exact ones."""
        return "-bf16" * (self.precision == "bf16") + "-float16" * (self.dtype == "float16")


class Encoded(NamedTuple):
    z: Tensor  # [n, D], not normalised
    ids: list[str]  # n
    left_out: list[str]  # ids of the images that do not decode


def pixels(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """The images of a data set as the tower takes them, in order: [B, 3, H, W] float32 each.

    Raises UserError for an image that cannot be read, with its path.
    """
    with closing(once(data, plain(clip.preprocess), workers, batch_size)) as batches:
        for batch in batches:
            yield batch.whole()


@torch.no_grad()
def encode(clip: Clip, data: Dataset, options: Options, seen: Callable[[int], object] = lambda n: None) -> Encoded:
    """Embeddings of the images of a data set; `seen` is called with the number of images of each batch.

    Raises UserError for an image that cannot be read, with its path, unless it is broken and such are left out: what
    the disk or the network did not give is there the next time, and is never left out.
    """
    was_training = clip.model.training
    clip.model.eval()
    z, done, broken = None, 0, []
    try:
        with closing(once(data, plain(clip.preprocess), options.workers, options.batch_size)) as batches:
            for batch in batches:
                for row, error in batch.broken.items():
                    if options.broken == "error" or not isinstance(error, BrokenImage):
                        raise error
                    broken.append(row)
                if len(batch.pixels):
                    with torch.autocast(clip.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                        rows = clip.encode_image(batch.pixels.to(clip.device))
                    if z is None:  # filled batch by batch: torch.cat would hold all of it twice
                        z = torch.empty(len(data), rows.shape[1], dtype=getattr(torch, options.dtype))
                    z[done : done + len(rows)] = rows  # on the CPU, and rounded if that is wanted
                    done += len(rows)
                seen(len(batch.rows))
    finally:
        clip.model.train(was_training)
    left_out = set(broken)
    ids = [key for row, key in enumerate(data.ids) if row not in left_out]
    z = torch.empty(0, clip.embed_dim) if z is None else z[:done]
    return Encoded(z, ids, [data.ids[row] for row in broken])


# -- the cache and named files -------------------------------------------------------------------------


def embed_images(
    clip: Clip, data: Dataset, *, cache: Path = CACHE, batch_size: int = 128, workers: int = 0
) -> Embeddings:
    """Embeddings of all images of a data set, from the cache or computed and put there. z is a Tensor.

    Where the cache cannot be written the embeddings are returned all the same, and a warning says why.
    Raises UserError for an image that cannot be read, with its path.
    """
    options = Options(batch_size, workers)
    options.check()
    try:
        shards = cached_shards(clip, blocks(data), options, cache, Processes())
        if [key for shard in shards for key in shard.ids] == data.ids:
            return Embeddings(Rows([shard.z for shard in shards]).whole(), data.ids)
        log.warning("%s holds other images than %s; computing them again", shards[0].path.parent, data.label)
    except (SafetensorError, OSError) as error:
        log.warning("the embeddings cannot be kept (%s); the next run computes them again", error)
    return Embeddings(encode(clip, data, options).z, data.ids)


def cached_shards(clip: Clip, work: Work, options: Options, cache: Path, processes: Processes) -> list[Shard]:
    """The shards of an image set in the cache, those that are not there made by these processes; as `embed_units`."""
    made_by = {
        "model": clip.describe(), "image_tower": clip.image_tower_hash(), "data": work.label,
        "precision": options.precision, "dtype": options.dtype,
    }  # fmt: skip
    folder = cache / f"{work.name}-{clip.image_tower_hash()}{options.suffix}"

    def embed(images: Dataset, seen: Callable[[int], object]) -> Encoded:
        return encode(clip, images, options, seen)

    return embed_units(work, folder, made_by, embed, processes, may_leave_out=options.broken == "skip")


def save_embeddings(path: Path, embeddings: Embeddings, made_by: dict[str, str]) -> None:
    """One file, written atomically, with a checksum."""
    write_shard(path, embeddings.z, embeddings.ids, made_by)


def load_embeddings(path: str | Path, clip: Clip) -> Embeddings:
    """Read a file of embeddings or an index of many, refusing those that another image tower made.

    A file that only claims a model by name (`pc_clip.release.authors`) is taken for that model's, and the log says so.
    Raises UserError for what is absent, damaged or another model's.
    """
    path = index_of(path)
    if not path.is_file():
        raise UserError(
            f"no embeddings at {path}: run python -m pc_clip embeddings (again, where it was interrupted), or leave "
            "--data.embeddings out to compute them from the images"
        )
    _, shards = read(path)
    tower, claimed = clip.image_tower_hash(), claim(clip.name, clip.pretrained)
    for shard in shards:
        theirs, width = shard.made_by["image_tower"], shard.z.shape[1]
        if theirs != tower and (theirs != claimed or width != clip.embed_dim):
            raise UserError(
                f"{path} was made by the image tower of {shard.made_by.get('model', '?')} ({theirs}), with {width} "
                f"numbers an image, but this run uses that of {clip.describe()} ({tower}), with {clip.embed_dim}. Use "
                "that model, or make the embeddings again."
            )
    if claimed in {shard.made_by["image_tower"] for shard in shards}:
        log.info("%s is said to be made by %s; without the images that is taken on trust", path, clip.describe())
    ids = [key for shard in shards for key in shard.ids]
    return Embeddings(Rows([shard.z for shard in shards]) if path.suffix == ".json" else shards[0].z.float(), ids)
