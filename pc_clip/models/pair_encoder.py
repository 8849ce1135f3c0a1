"""Two images through one vision transformer: first each by itself, then both together (CLIP4IDC, arXiv 2206.00629)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations as _type
from torch.utils.checkpoint import checkpoint

from pc_clip.core.errors import UserError
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)

from open_clip.transformer import ResidualAttentionBlock, VisionTransformer  # isort: skip


class PairEncoder(nn.Module):
    """CLIP4IDC's pair encoder around an image tower, which it calls and does not own.

    The first `intra_layers` blocks see each image alone. Then the tokens of both, with an embedding that says which
    image they are of, are put one after the other, with a positional embedding of their own and a norm, and the other
    blocks see them together. P patches an image: class tokens are at 0 and P + 1.

    The tower's weights are in use from the start. The pair's positional embedding begins as the tower's own, twice, so
    that the same place is alike in both images; which image is which begins small (0.02), by torch's generator.

    With `aligned_tokens`, which the paper does not have, each token is also given the token at the same position in the
    other image, through a matrix that begins as zero: attention then need not learn first to look at that position
    (docs/change.md).
    """

    def __init__(
        self, visual: nn.Module, name: str, intra_layers: int | None = None, aligned_tokens: bool = False
    ) -> None:
        """name: of the model, for messages. intra_layers: None for three quarters of the blocks, 9 of ViT-B's 12.

        Raises UserError unless the tower is a plain vision transformer with a class token, and for impossible layers.
        """
        super().__init__()
        if why := _unfit(visual):
            raise UserError(
                f"pairs of images need a vision transformer of open_clip's with a class token, and the image tower of "
                f"{name} {why}; take ViT-B-32 for instance, or example_vit"
            )
        self._visual = [visual]  # in a list, so that its weights are not counted as ours
        width, self.blocks = visual.conv1.out_channels, len(visual.transformer.resblocks)
        self.intra_layers = self.blocks * 3 // 4 if intra_layers is None else intra_layers
        if not 0 <= self.intra_layers < self.blocks:
            raise UserError(
                f"change.intra_layers is {self.intra_layers}; the image tower of {name} has {self.blocks} blocks, and "
                "at least the last must see both images"
            )
        self.grid = visual.grid_size  # (rows, columns) of patches
        self.patches = self.grid[0] * self.grid[1]
        self.before, self.after = (nn.Parameter(0.02 * torch.randn(width)) for _ in range(2))
        own = visual.positional_embedding.detach()
        self.positional_embedding = nn.Parameter(torch.cat([own, own]).clone())
        self.norm = nn.LayerNorm(width)
        self.counterpart = nn.Parameter(torch.zeros(width, width)) if aligned_tokens else None

    @property
    def visual(self) -> VisionTransformer:
        return self._visual[0]

    @property
    def aligned_tokens(self) -> bool:
        return self.counterpart is not None

    @property
    def width(self) -> int:
        return self.positional_embedding.shape[1]

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Tokens of both images, after the tower's last norm. [B, 3, H, W], [B, 3, H, W] -> [B, 2 (P + 1), W]"""
        blocks = self.visual.transformer.resblocks
        x = self.visual._embeds(torch.cat([before, after]))  # [2 B, P + 1, W]
        for block in blocks[: self.intra_layers]:
            x = self._through(block, x)
        first, second = x.chunk(2)
        if self.counterpart is not None:
            first, second = first + second @ self.counterpart, second + first @ self.counterpart
        x = torch.cat([first + self.before, second + self.after], dim=1)  # [B, 2 (P + 1), W]
        x = self.norm(x + self.positional_embedding)
        for block in blocks[self.intra_layers :]:
            x = self._through(block, x)
        return self.visual.ln_post(x)

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block, computed again in the backward pass where the tower is set so (train.recompute)."""
        if self.visual.transformer.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run_block, block, x, use_reentrant=False)
        return run_block(block, x)

    def embed(self, tokens: Tensor) -> Tensor:
        """The pair's embedding: the mean of both class tokens, projected as CLIP does. [B, 2 (P + 1), W] -> [B, D]"""
        return tokens[:, [0, self.patches + 1]].mean(1) @ self.visual.proj


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """A block of a vision transformer; on a CPU its attention is two plain products.  [B, L, W] -> [B, L, W]

    With some tens of tokens torch's kernels for attention take several times as long there, in bf16 above all.
    """
    attn, cpu = getattr(block, "attn", None), x.device.type == "cpu"
    if not cpu or type(block) is not ResidualAttentionBlock or _type(attn) is not nn.MultiheadAttention:
        return block(x)
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, L, W / heads]
    with torch.autocast("cpu", enabled=False):
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)  # [B, heads, L, L]
        read = (weights @ v).transpose(1, 2).flatten(2)
    x = x + block.ls_1(attn.out_proj(read))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _unfit(visual: nn.Module) -> str:
    """Why an image tower cannot take pairs; empty where it can."""
    if type(visual) is not VisionTransformer:
        return f"is a {type(visual).__name__}"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        return "pools in another way"
    if visual.final_ln_after_pool or visual.proj is None:
        return "has no norm and projection for each token"
    if not visual.transformer.batch_first:
        return "has blocks that take the batch second"
    return "drops patches" if not isinstance(visual.patch_dropout, nn.Identity) else ""
