"""A model whose texts and images lie where a test puts them, and data sets of blank pictures for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pc_clip.core.config.evaluate import DifferenceConfig, EvaluateConfig
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.evals import EvalContext
from pc_clip.models.torchvision_compat import torchvision


class FakeClip:
    """Texts and images have the embeddings they are given, with length 1 if they are to be unit vectors."""

    def __init__(self, texts: dict[str, list[float]], z, unit: bool = True, weights: str = "fake") -> None:
        self.texts, self.unit, self.weights = texts, unit, weights
        self.z = self._vectors(np.asarray(z, dtype=np.float32))

    def _vectors(self, values) -> torch.Tensor:
        vectors = torch.as_tensor(np.asarray(values, dtype=np.float32))
        return F.normalize(vectors, dim=-1) if self.unit else vectors

    def embed_texts(self, texts):
        return self._vectors([self.texts[text] for text in texts])

    def weights_hash(self) -> str:
        return self.weights


class SeeingClip(FakeClip):
    """Texts have the embeddings they are given; an image's is its mean colour. Counts the images it has seen."""

    name, pretrained, device = "colours", None, torch.device("cpu")
    preprocess = staticmethod(torchvision.transforms.functional.to_tensor)

    def __init__(self, texts: dict[str, list[float]], scale: float = 100.0) -> None:
        super().__init__(texts, np.zeros((1, 3)))
        self.model, self.seen = torch.nn.Module(), 0
        self.model.logit_scale = torch.nn.Parameter(torch.tensor(scale).log())

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.mean((2, 3))

    def image_tower_hash(self) -> str:
        return "colours"

    def describe(self) -> str:
        return "sees colours"


def made_context(texts, z, config=None, base=True, unit: bool = True, **known) -> EvalContext:
    """Images at z and texts at theirs. base: the untrained model; True for the model itself, None for none."""
    clip = FakeClip(texts, z, unit)
    ids = [f"i{n}" for n in range(len(z))]
    data = Dataset("made", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", **known)
    config = config or EvaluateConfig(difference=DifferenceConfig(n_pairs=50))
    context = EvalContext(clip, lambda: clip if base is True else base, data, config)
    vars(context).update(z=clip.z, base_z=clip.z)
    return context


COLOUR = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}


def about(
    statements: Sequence[Statement],
    texts: dict[str, list[float]],
    images: Sequence[str] | None = None,
    config: EvaluateConfig | None = None,
) -> EvalContext:
    """A subject whose data set has these statements, and plain pictures of the colours that their ids begin with."""
    ids = list(images or dict.fromkeys(s.image.split("@")[0] for s in statements))
    colours = [next((colour for colour in COLOUR if name.startswith(colour)), "black") for name in ids]
    data = Dataset(
        "made", "test", ids, lambda row: Image.new("RGB", (8, 8), colours[row]),
        f"made of {ids}", statements=tuple(statements),
    )  # fmt: skip
    clip = SeeingClip(texts)
    return EvalContext(clip, lambda: clip, data, config or EvaluateConfig())
