"""Padding-free forward and backward pass of open_clip's text transformer; numerically equivalent.

open_clip pads every text to one length, keeps every token to the end although only the end-of-text token is read,
and in mixed precision converts and copies more than it multiplies. Here

- the tokens of a batch lie one text after the other, without padding: [T, W]. Linear layers see nothing else.
- attention alone needs texts side by side. They are sorted by length and set out in a few groups, each padded to a
  multiple of 16 tokens. A causal mask keeps padding from every real token, so this is exact.
- the last block computes only what the end-of-text token reads.
- the residual stream, the norms and the weights that learn are float32; products are in the dtype of autocast,
  from copies of the weights. Without autocast everything is float32, and equal to open_clip's but for rounding.
- what is cheap (norms, activations) is computed again in the backward pass instead of being kept.

`FastText.of` knows open_clip's plain causal text transformers; for any other tower it says why not, and
pc_clip.models.clip calls the tower itself. tests/test_fast_text.py holds values and gradients against open_clip's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import type_before_parametrizations as _type
from torch.utils.checkpoint import checkpoint

from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.packing import Group, Packed, pack, pack_shared

from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, ResidualAttentionBlock  # isort: skip

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: texts of like lengths are padded to groups, as on a CPU
    varlen_attn = None

PART = 2048  # tokens computed again at a time


@dataclass(frozen=True)
class FastText:
    """A text tower of open_clip's, called without its waste.

    recompute: keep nothing for the backward pass but the tokens, and compute about 2,048 of them at a time again.
    What is kept no longer grows with the batch, for one more forward pass (GradCache, Gao et al. 2021, by torch's
    checkpoint).
    """

    tower: nn.Module
    recompute: bool = False

    @classmethod
    def of(cls, tower: nn.Module | None) -> FastText | str:
        """The fast way through a tower, or why there is none. tower: a plain causal one, see Clip._causal_tower.

        Strict about types: a replaced layer (a quantised one) would be bypassed. A parametrized weight (LoRA)
        is fine: reading it gives what its layer computes with.
        """
        if tower is None:
            return "it is not a plain causal transformer of open_clip's"
        if any(m._forward_hooks or m._forward_pre_hooks for m in tower.modules()):
            return "it has hooks"
        if not all(map(_is_plain_block, tower.transformer.resblocks)):
            return "its blocks have other layers"
        mask, length = tower.attn_mask, tower.positional_embedding.shape[0]
        if not torch.equal(mask.cpu(), torch.full((length, length), float("-inf")).triu_(1)):
            return "its mask is not the causal one"
        return cls(tower)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Text embeddings, not normalised. [N, L] int64 -> [N, D] in the dtype of the weights"""
        if not len(tokens):
            return self.tower(tokens) if hasattr(self.tower, "pool_type") else self.tower.encode_text(tokens)
        kind, own = tokens.device.type, self.tower.positional_embedding.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        with torch.autocast(kind, enabled=False):
            if not (self.recompute and torch.is_grad_enabled()):
                return self._encode(tokens, dtype)
            lengths, order = (tokens.argmax(-1) + 1).sort(stable=True)
            _, sizes = ((lengths.cumsum(0) - 1) // PART).unique_consecutive(return_counts=True)
            parts = [
                checkpoint(self._encode, part, dtype, use_reentrant=False, preserve_rng_state=False)
                for part in tokens[order].split(sizes.tolist())
            ]
            return torch.cat(parts)[order.argsort()]

    def _encode(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        # On a GPU prompts take no time, and shared rows would keep FlashAttention out.
        share = tokens.device.type == "cpu" and not torch.is_grad_enabled()
        tower = self.tower
        packed = pack_shared(tokens) if share else pack(tokens, grouped=not _has_kernel(tower, tokens.device, dtype))
        x = tower.token_embedding(packed.tokens) + tower.positional_embedding[packed.positions]  # [T, W]
        *blocks, last = tower.transformer.resblocks
        for block in blocks:
            x = _block(block, x, packed, dtype)
        x = _last_block(last, x, packed, dtype)  # [N, W]
        x = tower.ln_final(x)[packed.back]
        projection = tower.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # [N, D]

    def errors(self, plain: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[float, float]:
        """How far this way and open_clip's, under the autocast in force, are from open_clip's in float32.

        Relative errors, the larger one of the embeddings' and of that of the gradients of all blocks. tokens: [N, L]
        """
        parameters = list(self.tower.transformer.parameters())
        learns = [p.requires_grad for p in parameters]
        try:
            with torch.enable_grad():
                for p in parameters:
                    p.requires_grad_(True)
                with torch.autocast(tokens.device.type, enabled=False):
                    exact = _values_and_gradients(plain, tokens, parameters)
                outputs = [_values_and_gradients(encode, tokens, parameters) for encode in (self, plain)]
        finally:
            for p, before in zip(parameters, learns):
                p.requires_grad_(before)
        fast, usual = (max(float((a - b).norm() / b.norm()) for a, b in zip(each, exact)) for each in outputs)
        return fast, usual


def _values_and_gradients(
    encode: Callable[[Tensor], Tensor], tokens: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    z = encode(tokens).float()  # [N, D]
    gradients = torch.autograd.grad(F.normalize(z, dim=-1)[:, 0].sum(), parameters)
    return z.detach(), torch.cat([g.float().flatten() for g in gradients])


# -- blocks --------------------------------------------------------------------------------------------


def _is_plain_block(block: nn.Module) -> bool:
    """Whether a block of a text tower is one that `_block` computes."""
    attn = block.attn
    if type(block) is not ResidualAttentionBlock or {type(block.ls_1), type(block.ls_2)} != {nn.Identity}:
        return False
    if {type(block.ln_1), type(block.ln_2)} - {LayerNorm, LayerNormFp32}:
        return False
    if _type(attn) is not nn.MultiheadAttention or attn.in_proj_weight is None or attn.dropout:
        return False
    layers = [(name, _type(layer)) for name, layer in block.mlp.named_children()]
    return layers[::2] == [("c_fc", nn.Linear), ("c_proj", nn.Linear)] and layers[1][1] in (nn.GELU, QuickGELU)


def _block(block: nn.Module, x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """[T, W] -> [T, W], in the dtype of the weights"""
    heads, attn = block.attn.num_heads, block.attn
    qkv = _norm_linear(block.ln_1, attn.in_proj_weight, attn.in_proj_bias, x, dtype)  # [T, 3 W]
    read = _attend(qkv, packed, heads)
    x = x + _linear(_same, attn.out_proj.weight, attn.out_proj.bias, dtype, read)
    return x + _mlp(block, x, dtype)


def _last_block(block: nn.Module, x: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """The last block's output for the end-of-text tokens. [T, W] -> [N, W], in the dtype of the weights"""
    heads, attn, width = block.attn.num_heads, block.attn, x.shape[1]
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    q = _norm_linear(block.ln_1, weight[:width], bias[:width], x[packed.last], dtype)  # [N, W]
    kv = _norm_linear(block.ln_1, weight[width:], bias[width:], x, dtype)  # [T, 2 W]
    read = _attend_from_last(q, kv, packed, heads)
    x = x[packed.last] + _linear(_same, attn.out_proj.weight, attn.out_proj.bias, dtype, read)
    return x + _mlp(block, x, dtype)


def _mlp(block: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    u = _norm_linear(block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias, x, dtype)  # [T, 4 W]
    return _linear(block.mlp.gelu, block.mlp.c_proj.weight, block.mlp.c_proj.bias, dtype, u)


# -- attention -----------------------------------------------------------------------------------------


def _attend(qkv: Tensor, packed: Packed, heads: int) -> Tensor:
    """Causal attention within each text. [T, 3 W] -> [T, W]"""
    if not packed.groups:
        q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
        ends, longest = packed.ends, packed.longest
        z = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0))  # causal
        return z.reshape(len(qkv), -1)
    parts = [_attend_group(part, group, heads) for part, group in zip(_split(qkv, packed), packed.groups)]
    return torch.cat(parts)


def _attend_from_last(q: Tensor, kv: Tensor, packed: Packed, heads: int) -> Tensor:
    """Attention of one query a text over all its tokens. [N, W], [T, 2 W] -> [N, W]"""
    if not packed.groups:
        k, v = kv.view(len(kv), 2, heads, -1).unbind(1)
        each = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        z = varlen_attn(q.view(len(q), heads, -1), k, v, each, packed.ends, 1, packed.longest)
        return z.reshape(len(q), -1)
    queries = q.split([group.n for group in packed.groups])
    parts = [_read_group(q, kv, group, heads) for q, kv, group in zip(queries, _split(kv, packed), packed.groups)]
    return torch.cat(parts)


def _has_kernel(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention over texts of any length is there: half precision, on an Ampere GPU or newer."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or varlen_attn is None:
        return False
    if "window_size" not in inspect.signature(varlen_attn).parameters:  # its first version
        return False
    width = tower.transformer.resblocks[0].attn.head_dim
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def _split(rows: Tensor, packed: Packed) -> tuple[Tensor, ...]:
    return rows.split([group.rows for group in packed.groups])


def _attend_group(qkv: Tensor, group: Group, heads: int) -> Tensor:
    """[R, 3 W] -> [R, W]"""
    q, k, v = _side_by_side(qkv, group, heads, 3)  # [n * heads, length, W / heads] each
    ahead = torch.full((group.length, group.length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    p = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
    return _Collect.apply(p @ v, group, heads)


def _read_group(q: Tensor, kv: Tensor, group: Group, heads: int) -> Tensor:
    """[n, W], [R, 2 W] -> [n, W]"""
    k, v = _side_by_side(kv, group, heads, 2)  # [n * heads, length, W / heads]
    q = q.reshape(group.n * heads, 1, -1) * k.shape[-1] ** -0.5
    scores = (q @ k.transpose(1, 2)).view(group.n, heads, group.length).masked_fill(group.beyond, float("-inf"))
    p = scores.softmax(-1).view(group.n * heads, 1, group.length)
    return (p @ v).reshape(group.n, -1)


def _side_by_side(rows: Tensor, group: Group, heads: int, parts: int) -> tuple[Tensor, ...]:
    """Packed rows set out as texts and heads. [R, parts * W] -> `parts` of [n * heads, length, W / heads]"""
    return _SetOut.apply(rows, group, heads, parts).unbind(0)


class _SetOut(torch.autograd.Function):
    """One copy each way; the gradient of padding is dropped, which indexing by itself would add to a row."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: Group, heads: int, parts: int) -> Tensor:
        ctx.group, ctx.heads, ctx.parts = group, heads, parts
        x = rows.index_select(0, group.spread).view(group.n, group.length, parts, heads, -1)
        x = x.permute(2, 0, 3, 1, 4).contiguous()  # [parts, n, heads, length, W / heads]
        return x.view(parts, group.n * heads, group.length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, None]:
        group = ctx.group
        g = g.reshape(ctx.parts, group.n, ctx.heads, group.length, -1).permute(1, 3, 0, 2, 4)
        return g.reshape(group.n * group.length, -1).index_select(0, group.real), None, None, None


class _Collect(torch.autograd.Function):
    """Back from texts and heads to packed rows. [n * heads, length, W / heads] -> [R, W]"""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, heads: int) -> Tensor:
        ctx.group, ctx.heads = group, heads
        x = x.view(group.n, heads, group.length, -1).transpose(1, 2)
        return x.reshape(group.n * group.length, -1).index_select(0, group.real)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        padded = g.new_zeros(group.n * group.length, g.shape[1]).index_copy_(0, group.real, g)
        padded = padded.view(group.n, group.length, ctx.heads, -1).transpose(1, 2)
        return padded.reshape(group.n * ctx.heads, group.length, -1), None, None


# -- linear layers -------------------------------------------------------------------------------------


def _same(x: Tensor) -> Tensor:
    return x


def _norm_linear(norm: nn.LayerNorm, weight: Tensor, bias: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), gain, shift, norm.eps).to(dtype)

    return _linear(normed, weight, bias, dtype, x, norm.weight, norm.bias)


def _linear(before: Callable[..., Tensor], weight: Tensor, bias: Tensor, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    """before(*inputs) @ weight.T + bias in `dtype`; the gradients reach weight and bias in their own."""
    return _Linear.apply(before, weight.to(dtype), bias.to(dtype), *inputs)


class _Linear(torch.autograd.Function):
    """A linear layer behind a cheap function, whose inputs are kept instead of its result."""

    @staticmethod
    def forward(ctx, before: Callable[..., Tensor], weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:
        ctx.before = before
        ctx.save_for_backward(weight, *inputs)
        return F.linear(before(*inputs), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g.device.type, enabled=False):  # for a backward() within one; all is in one dtype already
            return _Linear._gradients(ctx, g)

    @staticmethod
    def _gradients(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, wants_weight, wants_bias, *wants_inputs = ctx.needs_input_grad
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(wants) for x, wants in zip(inputs, wants_inputs)]
            h = ctx.before(*inputs)
        of_weight = _outer(g, h.detach()) if wants_weight else None
        of_bias = g.sum(0) if wants_bias else None
        of_inputs: list[Tensor | None] = [None] * len(inputs)
        if any(wants_inputs):
            wanted = [x for x in inputs if x.requires_grad]
            gradients = iter(torch.autograd.grad(h, wanted, g @ weight))
            of_inputs = [next(gradients) if x.requires_grad else None for x in inputs]
        return None, of_weight, of_bias, *of_inputs


def _outer(g: Tensor, x: Tensor) -> Tensor:
    """g.T @ x, a weight's gradient. [T, M], [T, K] -> [M, K]

    With AMX, torch's CPU product with a transposed first factor takes several times as long as with a copy of it;
    the smaller of the two is copied.
    """
    if not (_AMX and g.device.type == "cpu" and g.dtype == torch.bfloat16 and len(g) >= 256):
        return g.t() @ x
    return (x.t().contiguous() @ g).t() if x.shape[1] < g.shape[1] else g.t().contiguous() @ x


_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
