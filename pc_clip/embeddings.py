"""Image embeddings, computed once: a cache keyed by the image tower, the data and the transform.

Finetuning the text tower and every evaluation read images from here, so a second checkpoint with the same
image tower never encodes an image. `python -m pc_clip.embeddings --data.dataset coco` fills it beforehand, on as
many processes and machines as there are (docs/scale.md).

A set of at most `--shard_size` images is one file, NAME.safetensors; a larger one is a folder NAME of shards with an
index. A cache file that is damaged, or of other images, is computed again and never read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pc_clip.clip import Clip
from pc_clip.datasets import READERS, Dataset
from pc_clip.embedding_shards import INDEX, Head, Ids, Rows, read_file, read_head, read_index, write_file
from pc_clip.embedding_units import ALONE, Part, Work, blocks, embed_units, name_of, tars
from pc_clip.encoding import Options, encode, pixels
from pc_clip.errors import UserError, check_at_least
from pc_clip.shards import Processes

if TYPE_CHECKING:
    from pc_clip.config import DataConfig, EmbedConfig

__all__ = ["CACHE", "Embeddings", "claim", "embed", "embed_images", "load_embeddings", "pixels", "save_embeddings"]

log = logging.getLogger(__name__)

CACHE = Path("data/cache/embeddings")
FOUND = "; what opens this data set finds them by itself"


def claim(name: str, pretrained: str | None) -> str:
    """What stands for the image tower's hash in a file whose maker only told the model's name."""
    return f"claimed:{name}/{pretrained}" if pretrained else f"claimed:{name}"


class Embeddings(NamedTuple):
    """Image embeddings as the tower gives them (not normalised), and the images' ids in the same order.

    z: [N, D] float32, memory-mapped where it comes from a file; Rows where it comes from an index: the same by
    `z[LongTensor]`, `z.shape` and `len(z)`, and `z.whole()` has all of it in memory.
    """

    z: Tensor | Rows
    ids: Sequence[str]


# -- the cache -----------------------------------------------------------------------------------------


def embed_images(
    clip: Clip,
    data: Dataset,
    *,
    cache: Path = CACHE,
    batch_size: int = 128,
    workers: int = 0,
    verify: bool = False,
) -> Embeddings:
    """Embeddings of all images of a data set, from the cache or computed and put there. z is a Tensor.

    verify: look at every byte of a cache file, however large; up to 2 GB are looked at in any case.
    Raises UserError for an image that cannot be read, with its path.
    """
    tower = clip.image_tower_hash()
    folder = cache / f"{name_of(data)}-{tower}"
    path = folder.with_name(f"{folder.name}.safetensors")
    found = _from_file(path, data, tower, verify) or _from_index(folder / INDEX, data, clip)
    if found:
        return found
    options = Options(batch_size, workers)
    steps = -(-len(data) // batch_size)
    with tqdm(
        desc=f"embedding {data.label}",
        total=len(data),
        unit=" images",
        leave=False,
        disable=None if steps > 3 else True,
    ) as bar:
        made = Embeddings(encode(clip, data, options, bar.update).z, data.ids)
    made_by = {"model": clip.describe(), "image_tower": tower, "data": data.label, "fingerprint": data.fingerprint}
    save_embeddings(path, made, made_by)
    return made


def _from_file(path: Path, data: Dataset, tower: str, verify: bool) -> Embeddings | None:
    """What a cache file holds; None, and a warning, where it is not what its name says."""
    if not path.is_file():
        return None
    try:
        head = read_head(path)
        z, ids = read_file(head, verify)
    except UserError as error:
        log.warning("%s; computing it again", error)
        return None
    of = head.made_by["image_tower"], head.made_by.get("fingerprint")
    if of != (tower, data.fingerprint) or not head.is_as_we_wrote_it or z.dtype != torch.float32:
        log.warning("%s is of another model or of other images than its name says; computing it again", path)
        return None
    return _of_these_images(path, z, ids, data)


def _from_index(path: Path, data: Dataset, clip: Clip) -> Embeddings | None:
    """What the shards hold that `python -m pc_clip.embeddings` made; None, and a warning, where they are damaged."""
    if not path.is_file():
        return None
    try:
        found = load_embeddings(path, clip)
    except UserError as error:
        log.warning("%s; computing them again", error)
        return None
    if len(found.ids) != len(data):  # before all of them are read into memory
        log.warning(
            "%s holds %d images, and %s has %d; computing them again", path, len(found.ids), data.label, len(data)
        )
        return None
    return _of_these_images(path, found.z.whole(), found.ids, data)


def _of_these_images(path: Path, z: Tensor, ids: Sequence[str], data: Dataset) -> Embeddings | None:
    if list(ids) == data.ids:
        return Embeddings(z, data.ids)
    log.warning("%s holds other images than %s; computing them again", path, data.label)
    return None


# -- files by name -------------------------------------------------------------------------------------


def save_embeddings(path: Path, embeddings: Embeddings, made_by: dict[str, str]) -> None:
    """Write one file atomically, with checksums: a reader sees the whole file or none."""
    write_file(path, embeddings.z, embeddings.ids, made_by)


def load_embeddings(path: str | Path, clip: Clip, *, verify: bool = False) -> Embeddings:
    """Read a file of embeddings or an index of many, refusing those that another image tower made.

    A file that only claims a model by name (`pc_clip.release`) is taken for that model's, and the log says so.
    verify: look at every byte, however many there are; up to 2 GB of them are looked at in any case.
    Raises UserError for what is absent, damaged or another model's.
    """
    path = Path(path) / INDEX if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no embeddings at {path}. Leave --data.embeddings out to compute them from the images.")
    if path.suffix == ".json":
        _, heads = read_index(path, verify)
        for made_by in {head.made_by["image_tower"]: head.made_by for head in heads}.values():
            _check_tower(path, made_by, clip)
        return Embeddings(Rows(heads), Ids(heads))
    head: Head = read_head(path)
    _check_tower(path, head.made_by, clip)
    z, ids = read_file(head, verify)
    return Embeddings(z.float(), list(ids))  # float() leaves float32 mapped as it is


def _check_tower(path: Path, made_by: dict[str, str], clip: Clip) -> None:
    tower = clip.image_tower_hash()
    if made_by["image_tower"] == claim(clip.name, clip.pretrained):
        log.info("%s is said to be made by %s; without the images that is taken on trust", path, clip.describe())
    elif made_by["image_tower"] != tower:
        raise UserError(
            f"{path} was made by the image tower of {made_by.get('model', '?')} ({made_by['image_tower']}), "
            f"but this run uses that of {clip.describe()} ({tower}). Use that model, or make the embeddings again."
        )


# -- python -m pc_clip.embeddings ----------------------------------------------------------------------


class Made(NamedTuple):
    """A file of embeddings or an index of them, and what is in it."""

    path: Path
    images: int
    width: int
    found_by_itself: bool  # by training and evaluations


def embed(config: EmbedConfig, processes: Processes = ALONE) -> Made | None:
    """Embed what the settings say, together with other processes; None where others have not done theirs yet.

    Raises UserError for settings that do not fit, for an image that cannot be read, and for what data or model lack.
    """
    from pc_clip.config import load_dataset

    options = Options(config.batch_size, config.data.workers, config.precision, config.dtype, config.broken)
    options.check()
    check_at_least("shard_size", config.shard_size, 1)
    if config.data.embeddings:
        raise UserError("data.embeddings names what is there already; leave it out to embed the images")
    part, verify = Part.parse(config.part), config.verify
    cache = Path(config.cache) if config.cache else CACHE
    in_tars = config.data.dataset == "webdataset"
    data = None if in_tars else load_dataset(config.data)
    work = _tars(config.data) if in_tars else blocks(data, config.shard_size)
    device = f"cuda:{processes.local_rank}" if config.device == "cuda" and processes.size > 1 else config.device
    clip = Clip.create(*config.model.source(config.data.dataset), device=device)

    tower = clip.image_tower_hash()
    folder = cache / f"{work.name}-{tower}{options.suffix}"
    file = folder.with_name(f"{folder.name}.safetensors")
    plain = data is not None and not options.suffix
    if plain and len(work.units) == 1 and config.broken == "error":
        if processes.is_main and part.number == 1:
            embed_images(clip, data, cache=cache, batch_size=config.batch_size, workers=options.workers, verify=verify)
        processes.wait()
    if plain and (one := _from_file(file, data, tower, verify)):
        return Made(file, len(one.ids), one.z.shape[1], not config.cache)
    if not embed_units(work, clip, folder, options, part=part, processes=processes, verify=verify):
        return None
    found = load_embeddings(folder / INDEX, clip)
    whole = data is None or len(found.ids) == len(data)
    return Made(folder / INDEX, *found.z.shape, not config.cache and not options.suffix and whole)


def _tars(data: DataConfig) -> Work:
    if data.captions:
        raise UserError("data.captions chooses images by id; a WebDataset is embedded tar by tar, all of it")
    return tars(Path(data.root or READERS["webdataset"].root), data.split)


def main(argv: Sequence[str] | None = None) -> None:
    """Embed the images of a data set once, for training and evaluations to read.

    Many processes share the work, started by `accelerate launch -m pc_clip.embeddings` or as jobs with --part 1/16 to
    16/16. After an interruption the same command continues. A WebDataset may hold images alone.
    """
    import jsonargparse
    from tqdm.contrib.logging import logging_redirect_tqdm

    from pc_clip.config import EmbedConfig, configure

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = jsonargparse.ArgumentParser(prog="python -m pc_clip.embeddings", description=main.__doc__)
    config, processes = configure(EmbedConfig, parser, argv), Processes.here()
    with logging_redirect_tqdm():  # lines of the log above the bar, not through it
        made = embed(config, processes)
    if made and processes.is_main:
        print(f"{made.images} images, {made.width} numbers each: {made.path}")
        print(f"--data.embeddings {made.path} names them{FOUND * made.found_by_itself}")


if __name__ == "__main__":
    from pc_clip.errors import run_script

    run_script(main)
