"""Image embeddings, computed once: a cache keyed by the image tower, the data and the transform.

Finetuning the text tower and every evaluation read images from here, so a second checkpoint with the same
image tower never encodes an image. `python -m pc_clip.embeddings --data.dataset coco` fills it beforehand.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pc_clip.clip import Clip
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError
from pc_clip.files import write_tensors

log = logging.getLogger(__name__)

CACHE = Path("data/cache/embeddings")


def claim(name: str, pretrained: str | None) -> str:
    """What stands for the image tower's hash in a file whose maker only told the model's name."""
    return f"claimed:{name}/{pretrained}" if pretrained else f"claimed:{name}"


class Embeddings(NamedTuple):
    """z: [N, D] float32, as the image tower gives them (not normalised); ids: the images', in the same order."""

    z: Tensor
    ids: list[str]


def embed_images(
    clip: Clip, data: Dataset, *, cache: Path = CACHE, batch_size: int = 128, workers: int = 0
) -> Embeddings:
    """Embeddings of all images of a data set, from the cache or computed and put there.

    A cache file that is cut short or of other data is computed again. Raises UserError for an image that
    cannot be read, with its path.
    """
    tower = clip.image_tower_hash()
    path = cache / f"{data.name}-{data.split or 'all'}-{data.fingerprint}-{tower}.safetensors"
    if path.is_file():
        try:
            return load_embeddings(path, clip)
        except (UserError, SafetensorError) as error:
            log.warning("%s is damaged (%s); computing it again", path, error)
    z = _encode(clip, data, batch_size, workers)
    made_by = {"model": clip.describe(), "image_tower": tower, "data": data.label, "fingerprint": data.fingerprint}
    save_embeddings(path, Embeddings(z, data.ids), made_by)
    return Embeddings(z, data.ids)


def save_embeddings(path: Path, embeddings: Embeddings, made_by: dict[str, str]) -> None:
    """Write atomically: a reader sees the whole file or none."""
    write_tensors(path, {"z": embeddings.z}, {**made_by, "ids": json.dumps(embeddings.ids)})


def load_embeddings(path: str | Path, clip: Clip) -> Embeddings:
    """Read a file of embeddings, refusing those that another image tower made.

    A file that only claims a model by name (`pc_clip.release`) is taken for that model's, and the log says so.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no embeddings at {path}. Leave --data.embeddings out to compute them from the images.")
    try:
        with safe_open(path, "pt") as file:
            made_by = file.metadata() or {}
            if not {"image_tower", "ids"} <= made_by.keys() or "z" not in file.keys():  # noqa: SIM118
                raise UserError(
                    f"{path} is no file of embeddings made by pc_clip: it does not say which images or tower"
                )
            z, ids = file.get_tensor("z"), json.loads(made_by["ids"])
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); make it again") from error
    tower = clip.image_tower_hash()
    if made_by["image_tower"] == claim(clip.name, clip.pretrained):
        log.info("%s is said to be made by %s; without the images that is taken on trust", path, clip.describe())
    elif made_by["image_tower"] != tower:
        raise UserError(
            f"{path} was made by the image tower of {made_by.get('model', '?')} ({made_by['image_tower']}), "
            f"but this run uses that of {clip.describe()} ({tower}). Use that model, or make the embeddings again."
        )
    return Embeddings(z, ids)


class _Pictures(torch.utils.data.Dataset):
    """Decodes and transforms one image at a time, so that worker processes can share the work."""

    def __init__(self, data: Dataset, preprocess) -> None:
        self.data, self.preprocess = data, preprocess

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Tensor | UserError:
        try:
            return self.preprocess(self.data.load(row))
        except UserError as error:  # raised where it can be caught: a worker process would wrap it in its traceback
            return error


def pixels(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """The images of a data set as the tower takes them, in order: [B, 3, H, W] float32 each."""
    for batch in DataLoader(_Pictures(data, clip.preprocess), batch_size, num_workers=workers, collate_fn=list):
        for image in batch:
            if isinstance(image, UserError):
                raise image
        yield torch.stack(batch)


@torch.no_grad()
def _encode(clip: Clip, data: Dataset, batch_size: int, workers: int) -> Tensor:
    was_training = clip.model.training
    clip.model.eval()
    batches = pixels(clip, data, batch_size, workers)
    total = -(-len(data) // batch_size)
    bar = tqdm(
        batches, f"embedding {data.label}", total, unit="batch", leave=False, disable=None if total > 3 else True
    )
    z = torch.cat([clip.encode_image(batch.to(clip.device)).float().cpu() for batch in bar])
    clip.model.train(was_training)
    return z


def main() -> None:
    """Fill the cache for one data set and one model."""
    import jsonargparse

    from pc_clip.config import EmbedConfig, configure, load_dataset

    config = configure(
        EmbedConfig, jsonargparse.ArgumentParser(prog="python -m pc_clip.embeddings", description=main.__doc__)
    )
    data = load_dataset(config.data)
    clip = Clip.create(*config.model.source(config.data.dataset), device=config.device)
    embeddings = embed_images(clip, data, batch_size=config.batch_size, workers=config.data.workers)
    print(f"{data.label}: {len(embeddings.ids)} images, {embeddings.z.shape[1]} numbers each, in {CACHE}")


if __name__ == "__main__":
    from pc_clip.errors import run_script

    run_script(main)
