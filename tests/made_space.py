"""A model whose texts and images lie where a test puts them, and data sets of blank pictures for it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pc_clip.core.config.evaluate import DifferenceConfig, EvaluateConfig
from pc_clip.data.dataset import Dataset
from pc_clip.evals import EvalContext


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


def made_context(texts, z, config=None, base=True, unit: bool = True, **known) -> EvalContext:
    """Images at z and texts at theirs. base: the untrained model; True for the model itself, None for none."""
    clip = FakeClip(texts, z, unit)
    ids = [f"i{n}" for n in range(len(z))]
    data = Dataset("made", "test", ids, lambda row: Image.new("RGB", (8, 8)), "f", **known)
    config = config or EvaluateConfig(difference=DifferenceConfig(n_pairs=50))
    context = EvalContext(clip, lambda: clip if base is True else base, data, config)
    vars(context).update(z=clip.z, base_z=clip.z)
    return context
