"""What methods share: texts as tokens, this process's part of a batch, images as pixels or embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from pc_clip.core import cache
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.data import tokens
from pc_clip.data.dataset import Dataset
from pc_clip.data.embedding_shards import Rows
from pc_clip.data.embeddings import embed_images, load_embeddings
from pc_clip.data.images import RandomCrop, Reader, Transform, plain
from pc_clip.models.clip import Clip, hash_tensors
from pc_clip.models.parameters import image_tower_learns


class Tokens:
    """A table of tokens, [U, L], of which batches are cut. It may lie in a file that is mapped into memory."""

    def __init__(self, clip: Clip, tokens: np.ndarray) -> None:
        self.clip, self.tokens = clip, tokens

    def count_truncated(self, *rows: np.ndarray) -> int:
        """How many texts among these rows, each counted once, were longer than the context and so were cut."""
        if self.clip._causal_tower is None:
            return 0
        used = np.zeros(len(self.tokens), dtype=bool)
        for some in rows:
            used[some] = True
        return int((self.tokens[:, -1] != 0)[used].sum())

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

    def embeddings(self, precision: str = "no") -> Tensor:
        """Unit embeddings of the distinct texts by the weights as they are now, from the cache.  -> [U, D] float32

        precision: as train.precision.
        """
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self._embeddings(precision)

    def _embeddings(self, precision: str) -> Tensor:
        made_by = tokens.identity(self.clip.tokenizer)
        if made_by is None:
            return self.clip.embed_texts(self.distinct)
        weights = {n: w for n, w in self.clip.model.state_dict().items() if not n.startswith("visual.")}
        key = {
            "texts": tokens.digest_of(self.distinct),
            "tokenizer": made_by,
            "text_tower": hash_tensors(weights, extra=self.clip.name),
            "device": self.clip.device.type,
        } | ({"precision": precision} if precision != "no" else {})
        with PartialState().main_process_first():
            made = cache.cached("embedded", key, lambda: {"z": self.clip.embed_texts(self.distinct).numpy()})
        z = torch.from_numpy(made["z"])
        # Activations and heads leave no trace in weights: a few texts tell whether this is the same tower.
        with torch.no_grad():
            few = self.clip.encode_text(self.batch(np.arange(len(z[:4]))).to(self.clip.device)).float().cpu()
        same = torch.allclose(z[:4], nn.functional.normalize(few, dim=-1), atol=1e-3)
        return z if same else self.clip.embed_texts(self.distinct)


class Images:
    """Images by row: cached embeddings, or pixels where the image tower itself learns.

    pixels: give pixels in any case, to a method that reads more from images than their embeddings.
    """

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig, pixels: bool = False) -> None:
        self.clip, self.data = clip, data
        self.learns = image_tower_learns(config.model.train)
        self.reader = Reader(data, self._transform(config), config.data.workers)  # of pixels
        self.z: Tensor | Rows | None = None
        self.ids = data.ids
        if config.data.embeddings:
            if self.learns:
                which = config.model.train
                raise UserError(f"model.train {which} learns from images; data.embeddings cannot stand in for them")
            if pixels:
                raise UserError("this method reads the images themselves; data.embeddings cannot stand in for them")
            self.z, self.ids = load_embeddings(config.data.embeddings, clip)
        elif not (self.learns or pixels):
            with PartialState().main_process_first():  # the others then find them in the cache
                self.z, self.ids = embed_images(clip, data, workers=config.data.workers)
        else:
            self.reader.start()  # while this is the only thread; batches are asked for by another

    def _transform(self, config: FinetuneConfig) -> Transform:
        """What becomes of a picture. Raises UserError for crops that cannot be."""
        share = config.data.min_crop
        if share == 1:
            return plain(self.clip.preprocess)
        if not self.learns and 0 < share < 1:
            raise UserError(
                f"data.min_crop is {share:g}, but with model.train {config.model.train} the image tower is frozen and "
                "its images are embedded once, uncropped; leave it at 1, or set model.train both"
            )
        return RandomCrop.of(self.clip, share, config.seed)

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
                if batch.broken:
                    self.reader.close()  # now, since an error keeps it for long
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


def _take(z: Tensor | Rows, rows: np.ndarray) -> Tensor:
    """Rows of embeddings. Of a plain tensor index_select reads them in a quarter of the time of z[rows]."""
    chosen = torch.from_numpy(rows)
    return z.index_select(0, chosen) if isinstance(z, Tensor) else z[chosen]


def _equal_rows(z: Tensor | Rows, pairs: np.ndarray, block: int = 8192, coordinates: int = 4) -> np.ndarray:
    """Images.equal, without all embeddings of all pairs in memory at once.

    Only pairs whose first coordinates agree can be equal: few, and these alone are compared in full.
    """

    used, places = np.unique(pairs, return_inverse=True)
    places = torch.from_numpy(places.reshape(pairs.shape))
    beginning = torch.empty(len(used), min(coordinates, z.shape[1]))  # of the unit embeddings
    for start in range(0, len(used), block):
        some = _take(z, used[start : start + block])
        norm = some.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        norm = norm.masked_fill(~norm.isfinite(), float("nan"))
        beginning[start : start + block] = (some[:, :coordinates] / norm).float()
    apart = (beginning[places[:, 0]] - beginning[places[:, 1]]).abs() > 2e-6  # twice, for rounding; NaN is not apart
    candidates = (~apart.any(-1)).nonzero().flatten().numpy()
    equal = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(candidates), block):
        some = candidates[start : start + block]
        first, second = (nn.functional.normalize(_take(z, pairs[some, k]), dim=-1) for k in (0, 1))
        equal[some] = ~((first - second).norm(dim=-1) > 1e-6).numpy()
    return equal
