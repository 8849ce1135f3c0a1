"""A CLIP model in the hand: `pc_clip.load`, and what PC-CLIP's evaluations do on your own images and texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError
from pc_clip.core.paths import HUB
from pc_clip.data.dataset import Change, Dataset, Question, as_rgb, read_image
from pc_clip.data.embeddings import Options, embed_images, encode
from pc_clip.data.pairs import captions
from pc_clip.data.registry import open_dataset
from pc_clip.evals import answers, prompting, rank, zeroshot
from pc_clip.models import loading
from pc_clip.models.change_model import change_of
from pc_clip.models.clip import Clip

Images = str | Path | Sequence[str | Path | Image.Image]


def load(name_or_checkpoint: str | Path, pretrained: str | None = None, device: str | None = None) -> Model:
    """Load a CLIP model to use, in evaluation mode.

    name_or_checkpoint: a run's folder, a .safetensors or .pt file, "hf-hub:USER/NAME"; or open_clip's name of an
    architecture, "local-dir:FOLDER", or "example" for the model that comes with the package. pretrained: one of
    open_clip's tags for that architecture, or a file of weights. device: "cpu" or "cuda"; the GPU if there is one
    unless given.
    Raises UserError for an unknown name, weights that cannot be had, or a file that does not fit.

    >>> import pc_clip
    >>> model = pc_clip.load("example")
    >>> model.embed_texts(["a large red circle", "a small blue square"]).shape
    torch.Size([2, 128])
    """
    device = resolve_device(device or "")
    if Path(name_or_checkpoint).exists() or (str(name_or_checkpoint).startswith(HUB) and not pretrained):
        return Model(loading.load_model(name_or_checkpoint, None, pretrained, device=device))
    return Model(loading.create_model(str(name_or_checkpoint), pretrained, device=device))


class Model:
    """A CLIP model with what PC-CLIP's evaluations do, on your own images and texts.

    Images are a folder, or a sequence of paths and PIL images. Embeddings of a folder are kept in data/cache. All
    embeddings are float32 on the CPU, with length 1. clip: the model, its transform and its tokenizer.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def embed_images(self, images: Images, batch_size: int = 128, workers: int = 0) -> Tensor:
        """Embed images, batch_size at a time, decoded by so many worker processes.  -> [N, D] unit embeddings

        Raises UserError for an image that cannot be read, with its path.

        >>> from PIL import Image, ImageOps
        >>> model = pc_clip.load("example")
        >>> model.embed_images([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]).shape
        torch.Size([2, 128])
        """
        if isinstance(images, str | Path):
            data = open_dataset("folder", images)
            return F.normalize(embed_images(self.clip, data, batch_size=batch_size, workers=workers).z, dim=-1)
        return F.normalize(encode(self.clip, _dataset(images), Options(batch_size, workers)).z, dim=-1)

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Embed a text or several; one that is longer than the context length is cut.  -> [N, D] unit embeddings

        >>> z = pc_clip.load("example").embed_texts(["a red circle", "a red circle"])
        >>> bool((z[0] == z[1]).all())
        True
        """
        return self.clip.embed_texts([texts] if isinstance(texts, str) else texts)

    def rank(self, images: Images, sentence: str, against: str | None = None) -> pd.DataFrame:
        """Put images in the order of a sentence or phrase, as `run.py --mode rank --images` does.

        against: the sentence's opposite; scores are then cosines with the difference of the two embeddings.
        Returns a row an image, the best first: `rank` from 1, `image` (its path, or its place among the images),
        `score`.

        >>> red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
        >>> model = pc_clip.load("example")
        >>> model.rank([red, blue], "a red object", against="a blue object").image.tolist()
        ['0', '1']
        """
        z = self.embed_images(images)
        return rank.order_of(_ids(images), rank.scores_of(self.clip, z, sentence, against))

    def difference(self, first: Images, second: Images, texts: str | Sequence[str]) -> Tensor:
        """Score sentences on how an image differs from another one.

        first, second: P images each, compared place by place. texts: T sentences, such as "The first image shows a
        larger dog than the second."
        Returns [P, T] cosines of each sentence with the unit difference of the two embeddings, first minus second.
        Raises UserError where there are not as many first as second images.

        >>> scores = pc_clip.load("example").difference([red], [blue], ["a red object", "a blue object"])
        >>> scores.shape, bool(scores[0, 0] > scores[0, 1])
        (torch.Size([1, 2]), True)
        """
        a, b = self.embed_images(first), self.embed_images(second)
        if len(a) != len(b):
            raise UserError(f"there are {len(a)} first images and {len(b)} second ones; give as many of each")
        pairs = np.stack([np.arange(len(a)), len(a) + np.arange(len(a))], axis=1)
        return answers.pair_differences(torch.cat([a, b]), pairs) @ self.embed_texts(texts).T

    def caption(self, first: Images, second: Images, beams: int = 1) -> list[str]:
        """Say in a sentence each what changed from a first image to a second one, by a model of method `change`.

        first, second: P images each, compared place by place.  -> P sentences
        Raises UserError for a model that has no caption decoder.

        >>> pc_clip.load("example").caption([red], [blue])
        Traceback (most recent call last):
        pc_clip.core.errors.UserError: example cannot write: ...
        """
        if (change := change_of(self.clip)) is None or change.decoder is None:
            raise UserError(
                f"{self.clip.describe()} cannot write: it has no caption decoder. Train one with "
                "configs/example_change.yaml, or configs/clip4idc_clevr.yaml"
            )
        first, second = _listed(first), _listed(second)
        if len(first) != len(second):
            raise UserError(f"there are {len(first)} first images and {len(second)} second ones; give as many of each")
        data = _dataset([*first, *second])
        pairs = zip(data.ids[: len(first)], data.ids[len(first) :])
        data = dataclasses.replace(data, changes=tuple(Change(a, b, ("",)) for a, b in pairs))
        return [each.text for each in captions(self.clip, data, beams=beams)]

    def zeroshot(
        self,
        images: Images,
        classes: Sequence[str],
        comparisons: Sequence[Mapping[str, str]] | None = None,
        templates: Sequence[str] = ("This is a photo of a {}.",),
        alpha: float = 0.5,
    ) -> pd.DataFrame:
        """Classify images by prompts, the mean of whose embeddings stands for a class.

        comparisons: what is known of how two classes differ, for PC-CLIP's comparative prompting: `class_a`, `class_b`,
        and `text`, which says how a differs from b. templates: prompts with {} for the class. alpha: with comparisons,
        the weight of the ordinary prompt.
        Returns a row an image, a column a class: the softmax of the cosines times the model's logit scale.

        >>> shares = pc_clip.load("example").zeroshot([red, blue], ["red", "blue"], templates=["a {} object"])
        >>> shares.idxmax(axis=1).tolist()
        ['red', 'blue']
        """
        templates = [templates] if isinstance(templates, str) else list(templates)
        if isinstance(classes, str) or len(classes) < 2:
            raise UserError(f"classes must be a list of two names or more, found {classes!r}")
        if wrong := [template for template in templates if "{}" not in template] or not templates:
            raise UserError(f"templates must be prompts with {{}} for the class, found {wrong or templates}")
        named = {each[side] for each in comparisons or () for side in ("class_a", "class_b")}
        if unknown := sorted(named - set(classes)):
            raise UserError(f"comparisons name {unknown[0]!r}, which is none of the classes {', '.join(classes)}")
        question = Question("yours", tuple(classes), np.empty(0, int), np.empty(0, int), tuple(templates))
        z = self.embed_images(images)
        prompts = zeroshot.class_embeddings(self.clip, question, templates)
        if comparisons:
            known, _ = prompting.corrections(self.clip, question, prompts, list(comparisons), "norm", z.mean(0))
            prompts = F.normalize(alpha * prompts + (1 - alpha) * known, dim=-1)
        scale = self.clip.model.logit_scale.detach().exp().cpu()
        return pd.DataFrame((scale * z @ prompts.T).softmax(-1).numpy(), index=_ids(images), columns=list(classes))


def _ids(images: Images) -> list[str]:
    if isinstance(images, str | Path):
        return open_dataset("folder", images).ids
    return [str(n) if isinstance(image, Image.Image) else str(image) for n, image in enumerate(images)]


def _listed(images: Images) -> list[str | Path | Image.Image]:
    return [Path(images, name) for name in _ids(images)] if isinstance(images, str | Path) else list(images)


def _dataset(images: Sequence[str | Path | Image.Image]) -> Dataset:
    def image_at(row: int) -> Image.Image:
        image = images[row]
        picture = as_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
        return ImageOps.exif_transpose(picture)

    return Dataset("images", "", _ids(images), image_at, "")
