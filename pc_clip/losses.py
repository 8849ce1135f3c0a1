"""Losses as pure functions of embeddings. What each takes is said; nothing is normalised behind your back
except where the docstring says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric InfoNCE: row n of `a` belongs to row n of `b`, all other rows are negatives.

    a, b: [B, D], any length: they are normalised here. Returns a scalar; equal to log B when all
    similarities are equal. Radford et al. 2021, figure 3; PC-CLIP (arXiv 2409.09721) uses it between text
    embeddings and image differences with temperature 1.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 would round cosines by more than a step changes them
        logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature  # [B, B]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of |a - b|^2 between unit vectors, which is 2 - 2 cos(a, b).

    a, b: [B, D], any length: they are normalised here. The MSE ablation of PC-CLIP up to the constant
    factor 1/D; without it the learning rates of InfoNCE fit.
    """
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).pow(2).sum(-1).mean()


def anchor(now: Tensor, start: Tensor) -> Tensor:
    """Mean of 1 - cos(now, start): how far embeddings have turned away from where they began. 0 at the start.

    now, start: [A, D], any length.
    """
    return (1 - F.cosine_similarity(now, start, dim=-1)).mean()


def unit_differences(first: Tensor, second: Tensor) -> Tensor:
    """Unit differences of unit image embeddings: normalise(z_i - z_j).  [B, D], [B, D] -> [B, D]

    PC-CLIP (arXiv 2409.09721). Two images with equal embeddings have no difference: such a row comes out as zero,
    never NaN, but it teaches nothing and is to be left out before (see methods.pairwise).
    """
    return F.normalize(F.normalize(first, dim=-1) - F.normalize(second, dim=-1), dim=-1)
