"""`python -m pc_clip embeddings`: the images of a data set embedded once, for training and evaluations to read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from pc_clip.core.cli import configure
from pc_clip.core.config.settings import DataConfig, EmbedConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.data.embedding_shards import INDEX, blocks, tars
from pc_clip.data.embeddings import CACHE, Options, cached_shards
from pc_clip.data.registry import READERS
from pc_clip.data.training_data import load_dataset
from pc_clip.models.loading import create_model

log = logging.getLogger(__name__)


def embed(config: EmbedConfig, processes: Processes | None = None) -> Path | None:
    """Embed what the settings say, together with other processes; None in processes other than the main one.

    Returns the index of the shards. Raises UserError for settings that do not fit, for an image that cannot be read,
    and for what data or model lack.
    """
    processes = processes or Processes()
    options = Options(config.batch_size, config.data.workers, config.precision, config.dtype, config.broken)
    options.check()
    check_at_least("shard_size", config.shard_size, 1)
    _check_for_training(config.data)
    if config.data.dataset == "webdataset":
        work = tars(Path(config.data.root or READERS["webdataset"].root), config.data.split)
    else:
        work = blocks(load_dataset(config.data), config.shard_size)
    device = resolve_device(config.device)
    device = f"cuda:{processes.local_rank}" if device == "cuda" and processes.size > 1 else device
    clip = create_model(*config.model.source(config.data.dataset), device=device)
    shards = cached_shards(clip, work, options, Path(config.cache) if config.cache else CACHE, processes)
    if not shards:
        return None
    log.info("%d images, %d numbers each", sum(len(shard.z) for shard in shards), shards[0].z.shape[1])
    return shards[0].path.with_name(INDEX)


def _check_for_training(data: DataConfig) -> None:
    """Raises UserError for settings of training that would be without effect here."""
    for name, is_set in [
        ("embeddings, which names what is there already", data.embeddings),
        ("mix", data.mix),
        ("min_crop", data.min_crop != 1),
        ("broken, which is --broken here", data.broken != "error"),
        ("captions, which chooses images by id", data.captions and data.dataset == "webdataset"),
    ]:
        if is_set:
            raise UserError(f"leave out data.{name}: whole images of one data set are embedded, for training to read")


def main(argv: Sequence[str] | None = None) -> None:
    """Embed the images of a data set once, for training and evaluations to read.

    Many processes share the work, started by `accelerate launch -m pc_clip embeddings`. After an interruption the same
    command continues. A WebDataset may hold images alone.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = configure(EmbedConfig, "python -m pc_clip embeddings", main.__doc__, argv)
    with logging_redirect_tqdm():  # lines of the log above the bar, not through it
        path = embed(config, Processes.here())
    if path:
        print(f"--data.embeddings {path}; in the usual cache, exact and of all images, they are found by themselves")
