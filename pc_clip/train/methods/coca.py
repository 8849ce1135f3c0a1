"""Log-likelihoods log p(caption | image) by the decoder of CoCa (Yu et al. 2022).

open_clip's CoCa reads a caption's tokens by its text tower, causally; the decoder attends from these to the image's
tokens, and what it makes at a place are logits of the token at the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pc_clip.core.errors import UserError
from pc_clip.models.clip import Clip

from open_clip.coca_model import CoCa  # isort: skip  (after torchvision_compat)


def check(clip: Clip) -> None:
    """Raise UserError for a model that gives captions no likelihood: no CoCa, or one that reads them in both ways."""
    causal = isinstance(clip.model, CoCa) and getattr(clip.model.text, "attn_mask", None) is not None
    if not causal or getattr(clip.model.text, "pool_type", None) != "argmax":
        raise UserError(
            f"{clip.name} is not a CoCa model with a causal text tower, so captions have no likelihood by it; "
            "take one of open_clip's coca_... models, or set preference.captioning 0"
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
    target = tokens[:, 1 : length + 1]
    cost = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(
        target
    )  # [B, l]
    # Not by the padding's id, as open_clip's loss does: 0 is also the token "!".
    counted = torch.arange(length, device=tokens.device) < end[:, None]
    return -(cost * counted).sum(-1)
