"""A model that sees colours, and data of plain pictures to make statements about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.evals import EvalContext
from pc_clip.models.torchvision_compat import torchvision

COLOUR = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}


class Sees:
    """An image's embedding is its mean colour; texts have the embeddings they are given."""

    model = torch.nn.Identity()
    device = torch.device("cpu")
    preprocess = staticmethod(torchvision.transforms.functional.to_tensor)

    def __init__(self, texts: dict[str, list[float]]) -> None:
        self.texts = texts

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([self.texts[text] for text in texts], dtype=torch.float32), dim=-1)

    def image_tower_hash(self) -> str:
        return "colours"

    def describe(self) -> str:
        return "sees colours"


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
    clip = Sees(texts)
    return EvalContext(clip, lambda: clip, data, config or EvaluateConfig())
