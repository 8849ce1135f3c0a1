"""CoCa (Yu et al. 2022), whose decoder also says how likely a caption is, given an image: log p(caption | image).

open_clip's CoCa reads a caption's tokens by its text tower, causally; the decoder attends from these to the image's
tokens, and what it makes at a place are logits of the token at the next one.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from pc_clip.core.errors import UserError
from pc_clip.models.clip import Clip
from pc_clip.train.methods.base import Images, Texts, compute_distributed

from open_clip.coca_model import CoCa  # isort: skip  (after torchvision_compat)

IMAGES = 32  # at a time
CAPTIONS = 64


def check(clip: Clip) -> None:
    """Raise UserError for a model that gives captions no likelihood: no CoCa, or one that reads them in both ways."""
    if not isinstance(clip.model, CoCa):
        raise UserError(
            f"{clip.name} is no CoCa model, so captions have no likelihood by it; "
            "take one of open_clip's coca_... models, or set preference.captioning 0"
        )
    text = clip.model.text
    if getattr(text, "attn_mask", None) is None or getattr(text, "pool_type", None) != "argmax":
        raise UserError(
            f"the text tower of {clip.name} is not causal, so captions have no likelihood by it; "
            "take another of open_clip's coca_... models, or set preference.captioning 0"
        )


def encode_image(model: CoCa, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """[U, 3, H, W] -> embeddings [U, D], not normalised, and what the decoder attends to: tokens [U, T, W]"""
    return model._encode_image(pixels, normalize=False)


def encode_text(model: CoCa, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[V, L] int64 with every column -> embeddings [V, D], not normalised, and one vector a token: [V, L, W]"""
    return model._encode_text(tokens, normalize=False)


def log_likelihood(model: CoCa, image_tokens: Tensor, tokens: Tensor, token_vectors: Tensor) -> Tensor:
    """log p of each caption given its image: the sum over its tokens, the end of the text included.  -> [B] float32

    image_tokens: [B, T, W] of `encode_image`; tokens: [B, L] int64; token_vectors: [B, L, W] of `encode_text`. The
    begin of the text is given; what comes after its end counts for nothing. Memory: logits of B * l tokens, l that of
    the longest caption.
    """
    end = tokens.argmax(-1)  # [B], the place of the end of the text: the highest id
    length = int(end.max())
    logits = model.text_decoder(image_tokens, token_vectors[:, :length]).float()  # [B, l, vocabulary]
    said = tokens[:, 1 : length + 1]
    cost = nn.functional.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="none").view_as(said)  # [B, l]
    # Not by the padding's id, as open_clip's loss does: 0 is also the token "!".
    counted = torch.arange(length, device=tokens.device) < end[:, None]
    return -(cost * counted).sum(-1)


def caption_log_likelihood(model: CoCa, image: Tensor, tokens: Tensor) -> Tensor:
    """log p(caption | image), one caption an image; `log_likelihood` says what is summed.  -> [B] float32, at most 0

    image: [B, 3, H, W] pixels, or [B, T, W] tokens of `encode_image`; tokens: [B, L] int64.
    """
    image_tokens = encode_image(model, image)[1] if image.ndim == 4 else image
    return log_likelihood(model, image_tokens, tokens, encode_text(model, tokens)[1])


@torch.no_grad()
def log_likelihoods_of_all(
    clip: Clip, images: Images, texts: Texts, image: np.ndarray, text: np.ndarray, precision: str = "no"
) -> Tensor:
    """log p of N captions, each given an image, by the model as it is now.  -> [N] float32, on the CPU

    image, text: [N] rows of `images`, which must give pixels (uncropped: what changes with the epoch has no such
    number), and of `texts`. precision: as train.precision. Equal pairs are computed once, by all processes together.
    """
    pairs, places = np.unique(np.stack([image, text], 1), axis=0, return_inverse=True)  # sorted by image

    def compute(some: np.ndarray) -> Tensor:
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return _of_pairs(clip, images, texts, pairs[some])

    return compute_distributed(len(pairs), compute, "captions given images")[torch.from_numpy(places.reshape(-1)), 0]


def _of_pairs(clip: Clip, images: Images, texts: Texts, pairs: np.ndarray) -> Tensor:
    """pairs: [P, 2], rows of images and of texts. An image is encoded once.  -> [P, 1] float32, on the CPU"""
    used, own = np.unique(pairs[:, 0], return_inverse=True)
    blocks = [np.arange(start, min(start + IMAGES, len(used))) for start in range(0, len(used), IMAGES)]
    found = torch.empty(len(pairs), 1)
    with closing(images.batches([used[block] for block in blocks], 0)) as coming:
        for pixels, block in zip(coming, blocks):
            image_tokens = encode_image(clip.model, pixels.to(clip.device))[1]
            theirs = np.flatnonzero(np.isin(own, block))
            for start in range(0, len(theirs), CAPTIONS):
                some = theirs[start : start + CAPTIONS]
                tokens = texts.batch(pairs[some, 1]).to(clip.device)
                there = torch.from_numpy(own[some] - block[0]).to(clip.device)
                found[torch.from_numpy(some), 0] = caption_log_likelihood(clip.model, image_tokens[there], tokens).cpu()
    return found
