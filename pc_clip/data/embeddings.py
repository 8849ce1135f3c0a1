"""Image embeddings, computed once: a cache keyed by the image tower, the data and the transform.

Finetuning the text tower and every evaluation read images from here, so a second checkpoint with the same
image tower never encodes an image. `python -m pc_clip embeddings --data.dataset coco` fills it beforehand, on as
many processes and machines as there are (docs/scale.md).

A set of at most `--shard_size` images is one file, NAME.safetensors; a larger one is a folder NAME of shards with an
index. A cache file that is damaged, or of other images, is computed again and never read.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.data.dataset import Dataset
from pc_clip.data.embedding_shards import (
    INDEX,
    Head,
    Ids,
    Rows,
    Shards,
    Unsound,
    index_of,
    read_file,
    read_head,
    read_index,
    write,
)
from pc_clip.data.embedding_units import ALONE, Part, Work, blocks, embed_units, left_out, name_of, tars
from pc_clip.data.encoding import Options, encode, pixels
from pc_clip.data.registry import READERS
from pc_clip.models.clip import Clip

if TYPE_CHECKING:
    from pc_clip.core.config.settings import DataConfig, EmbedConfig

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

    verify: look at every byte of what is cached, however large; up to 2 GB are looked at in any case. Where the cache
    cannot be written the embeddings are returned all the same, and a warning says why.
    Raises UserError for an image that cannot be read, with its path.
    """
    options = Options(batch_size, workers)
    options.check()
    if found := _look_up(clip, data, cache, verify):
        return found[1]
    made = _compute(clip, data, options)
    try:
        _put(clip, data, cache, made)
    except (SafetensorError, OSError) as error:
        log.warning("the embeddings cannot be kept (%s); the next run computes them again", error)
    return made


def _place(clip: Clip, data: Dataset, cache: Path) -> tuple[Path, Path]:
    """Where the one file of a data set is, and the index of its shards."""
    name = f"{name_of(data)}-{clip.image_tower_hash()}"
    return cache / f"{name}.safetensors", cache / name / INDEX


def _look_up(clip: Clip, data: Dataset, cache: Path, verify: bool) -> tuple[Path, Embeddings] | None:
    file, index = _place(clip, data, cache)
    for path, read in ((file, _from_file), (index, _from_index)):
        if path.is_file() and (found := read(path, data, clip.image_tower_hash(), verify)):
            return path, found
    return None


def _compute(clip: Clip, data: Dataset, options: Options) -> Embeddings:
    steps = -(-len(data) // options.batch_size)
    with tqdm(
        desc=f"embedding {data.label}",
        total=len(data),
        unit=" images",
        leave=False,
        disable=None if steps > 3 else True,
    ) as bar:
        return Embeddings(encode(clip, data, options, bar.update).z, data.ids)


def _put(clip: Clip, data: Dataset, cache: Path, made: Embeddings) -> Path:
    path, tower = _place(clip, data, cache)[0], clip.image_tower_hash()
    made_by = {"model": clip.describe(), "image_tower": tower, "data": data.label, "fingerprint": data.fingerprint}
    save_embeddings(path, made, made_by)
    return path


def _from_file(path: Path, data: Dataset, tower: str, verify: bool) -> Embeddings | None:
    """What a cache file holds; None, and a warning, where it is not what its name says."""
    try:
        head = read_head(path)
        z, ids = read_file(head, verify)
    except Unsound as error:
        log.warning("%s; computing it again", error.why)
        return None
    if not head.is_checked or not _is_exact(head.made_by, head, data, tower):
        log.warning("%s is of another model or of other images than its name says; computing it again", path)
        return None
    return Embeddings(z, data.ids) if _are_of(data, ids, path) else None


def _from_index(path: Path, data: Dataset, tower: str, verify: bool) -> Embeddings | None:
    """What the shards hold that `python -m pc_clip embeddings` made; None, and a warning, as for a file."""
    try:
        made_by, heads = read_index(path, verify)
    except Unsound as error:
        log.warning("%s; computing them again", error.why)
        return None
    if not _is_exact(made_by, heads[0], data, tower):
        log.warning("%s is of another model or of other images than its name says; computing them again", path)
        return None
    shards = Shards(heads)  # its ids come first: all of it is read into memory
    return Embeddings(Rows(shards).whole(), data.ids) if _are_of(data, Ids(shards), path) else None


def _is_exact(made_by: Mapping[str, Any], head: Head, data: Dataset, tower: str) -> bool:
    """Whether it was made by this tower from this data, and is not rounded."""
    said = made_by.get("image_tower"), made_by.get("fingerprint"), made_by.get("precision", "no"), head.dtype
    return said == (tower, data.fingerprint, "no", "float32")


def _are_of(data: Dataset, ids: Sequence[str], path: Path) -> bool:
    if len(ids) == len(data) and list(ids) == data.ids:
        return True
    log.warning("%s holds other images than %s; computing them again", path, data.label)
    return False


# -- files by name -------------------------------------------------------------------------------------


def save_embeddings(path: Path, embeddings: Embeddings, made_by: dict[str, str]) -> None:
    """Write one file atomically, with checksums: a reader sees the whole file or none."""
    write(path, embeddings.z, embeddings.ids, made_by)


def load_embeddings(path: str | Path, clip: Clip, *, verify: bool = False) -> Embeddings:
    """Read a file of embeddings or an index of many, refusing those that another image tower made.

    A file that only claims a model by name (`pc_clip.release.authors`) is taken for that model's, and the log says so.
    verify: look at every byte, however many there are; up to 2 GB of them are looked at in any case.
    Raises UserError for what is absent, damaged or another model's.
    """
    path = index_of(path)
    if not path.is_file():
        if path.name == INDEX and any(path.parent.glob("*.safetensors")):
            raise UserError(
                f"{path.parent} holds files of embeddings, but no {INDEX}: either its parts are not all done (run "
                "python -m pc_clip embeddings again), or they are several sets' (name one file)"
            )
        raise UserError(f"no embeddings at {path}. Leave --data.embeddings out to compute them from the images.")
    if path.suffix == ".json":
        _, heads = read_index(path, verify)
        for head in {head.made_by["image_tower"]: head for head in heads}.values():
            _check_tower(path, head, clip)
        shards = Shards(heads)
        return Embeddings(Rows(shards), Ids(shards))
    head = read_head(path)
    _check_tower(path, head, clip)
    z, ids = read_file(head, verify)
    return Embeddings(z.float(), list(ids))  # float() leaves float32 mapped as it is


def _check_tower(path: Path, head: Head, clip: Clip) -> None:
    tower, said = clip.image_tower_hash(), head.made_by["image_tower"]
    if said == claim(clip.name, clip.pretrained):
        log.info("%s is said to be made by %s; without the images that is taken on trust", path, clip.describe())
    elif said != tower:
        raise UserError(
            f"{path} was made by the image tower of {head.made_by.get('model', '?')} ({said}), "
            f"but this run uses that of {clip.describe()} ({tower}). Use that model, or make the embeddings again."
        )
    elif head.is_checked:
        return
    if head.width != clip.embed_dim:  # in a file of ours with this tower's hash it is its width
        raise UserError(
            f"{path} has {head.width} numbers an image, but {clip.describe()} makes {clip.embed_dim}. "
            "Make the embeddings again with that model."
        )


# -- python -m pc_clip embeddings ----------------------------------------------------------------------


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
    from pc_clip.data.training_data import load_dataset

    options = Options(config.batch_size, config.data.workers, config.precision, config.dtype, config.broken)
    options.check()
    check_at_least("shard_size", config.shard_size, 1)
    if config.data.embeddings:
        raise UserError("data.embeddings names what is there already; leave it out to embed the images")
    _check_for_training(config.data)
    part, cache = Part.parse(config.part), Path(config.cache) if config.cache else CACHE
    data = None if config.data.dataset == "webdataset" else load_dataset(config.data)
    work = _tars(config.data) if data is None else blocks(data, config.shard_size)
    device = resolve_device(config.device)
    device = f"cuda:{processes.local_rank}" if device == "cuda" and processes.size > 1 else device
    clip = Clip.create(*config.model.source(config.data.dataset), device=device)
    tower, usual = clip.image_tower_hash(), cache == CACHE

    if data is not None and not options.suffix:  # then it may be one file, as evaluations write it
        if len(work.units) == 1 and options.broken == "error":
            if part.number > 1:
                log.info("%s is one block: part 1 does it", work.label)
                return None
            made = _one_file(clip, data, cache, options, config.verify) if processes.is_main else None
            processes.wait()
            return made
        file, _ = _place(clip, data, cache)
        if file.is_file() and (one := _from_file(file, data, tower, config.verify)):
            return Made(file, *one.z.shape, usual) if processes.is_main else None
    folder = cache / f"{work.name}-{tower}{options.suffix}"
    heads = embed_units(work, clip, folder, options, part=part, processes=processes, verify=config.verify)
    if not heads:
        return None
    found = usual and work.opens and not options.suffix and not any(left_out(head) for head in heads)
    return Made(folder / INDEX, sum(head.rows for head in heads), heads[0].width, found)


def _check_for_training(data: DataConfig) -> None:
    """Raises UserError for settings of training that would be without effect here."""
    if data.mix:
        raise UserError("data.mix is for training: embed each of its data sets by itself")
    if data.min_crop != 1:
        raise UserError(f"data.min_crop {data.min_crop:g} is for training; what is embedded is the whole image")
    if data.broken != "error":
        raise UserError(f"data.broken {data.broken} is for training; here it is --broken {data.broken}")


def _one_file(clip: Clip, data: Dataset, cache: Path, options: Options, verify: bool) -> Made:
    """Embed a set that is one block. It is there to be kept, so that a cache that cannot be written is an error."""
    found = _look_up(clip, data, cache, verify)
    if not found:
        made = _compute(clip, data, options)
        found = _put(clip, data, cache, made), made
    path, embeddings = found
    return Made(path, *embeddings.z.shape, cache == CACHE)


def _tars(data: DataConfig) -> Work:
    if data.captions:
        raise UserError("data.captions chooses images by id; a WebDataset is embedded tar by tar, all of it")
    return tars(Path(data.root or READERS["webdataset"].root), data.split)


def main(argv: Sequence[str] | None = None) -> None:
    """Embed the images of a data set once, for training and evaluations to read.

    Many processes share the work, started by `accelerate launch -m pc_clip embeddings` or as jobs with --part 1/16 to
    16/16. After an interruption the same command continues. A WebDataset may hold images alone.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    from pc_clip.core.cli import configure
    from pc_clip.core.config.settings import EmbedConfig

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = configure(EmbedConfig, "python -m pc_clip embeddings", main.__doc__, argv)
    processes = Processes.here()
    with logging_redirect_tqdm():  # lines of the log above the bar, not through it
        made = embed(config, processes)
    if made and processes.is_main:
        print(f"{made.images} images, {made.width} numbers each: {made.path}")
        print(f"--data.embeddings {made.path} names them{FOUND * made.found_by_itself}")
