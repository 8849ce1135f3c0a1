"""A CLIP model: weights, image transform and tokenizer, in open_clip's own classes. models/loading.py makes one."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.fast_text import FastText

import open_clip  # isort: skip

log = logging.getLogger(__name__)

SHIPPED = ("example", "example_vit")  # models inside the package
SCRATCH = "scratch"  # in place of a tag of pretrained weights: weights drawn at random
REMEMBERED = 100_000  # texts of a list whose embeddings are kept, at most: 300 MB at 768 numbers each
LIKE_LENGTHS = 16  # texts that are padded to one length
PART = 32  # texts or images that are encoded at a time where they are computed again
_SAMPLES = ("a dog", "two large red circles on a striped background", "A photo. " * 30)  # of every kind of length


def model_folder(name: str) -> Path:
    """Where a model shipped inside the package lives."""
    return Path(__file__).parents[1] / "example" / {"example": "model", "example_vit": "vit"}[name]


@dataclass
class Clip:
    """A CLIP model with all that is needed to use it.

    name: an open_clip architecture ("ViT-L-14"), "example" for the embedded model, "example_vit" for the same with a
        vision transformer as its image tower, or "local-dir:FOLDER".
    pretrained: the weights before any finetuning: a tag of open_clip's, a file, SCRATCH, or None.
    start: what a finetuned model began with: the hash of its "weights", and the "checkpoint" where that was one.
    fast_text: whether texts are encoded by fast_text.py where it knows the tower. The result is the same;
        `choose_text_way` checks that on this machine.
    recompute: what a gradient is taken of is encoded in parts, of which nothing is kept but the embeddings; the
        backward pass computes each again (GradCache, Gao et al. 2021). The gradient is that of the whole batch.
    """

    model: nn.Module
    tokenizer: Any
    preprocess: Any
    name: str
    pretrained: str | None = None
    start: dict[str, str] | None = None
    fast_text: bool = True
    recompute: bool = False
    _fast: tuple[nn.Module | None, FastText | str] | None = field(default=None, repr=False, compare=False)
    _memory: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    def remembering(self) -> Clip:
        """The same model for when its weights stay as they are: hashes and embeddings of texts are computed once.

        A list of texts is remembered as a whole, because a text's last digits depend on what it is encoded with.
        """
        return dataclasses.replace(self, _memory={})

    def _remembered(self, key: Any, compute: Callable[[], Any]) -> Any:
        if self._memory is None:
            return compute()
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens as the model was trained on them, cut to the longest text.  -> [N, L] int64, L <= context_length

        Texts longer than context_length are truncated and keep their end-of-text token.
        """
        return self.trim(self.tokenizer(list(texts)))

    def trim(self, tokens: Tensor) -> Tensor:
        """Drop the columns after the longest text. [N, L] -> [N, l], l <= L.

        Exact: with a causal mask nothing after the end-of-text token can reach it, and Hugging Face
        towers mask padding. Towers that need every column (SigLIP's, CoCa's) keep them all.
        """
        if self._causal_tower is not None:
            return tokens[:, : int(tokens.argmax(-1).max()) + 1]
        if self._is_hugging_face:
            padding = self.model.text.config.pad_token_id
            return tokens[:, : int((tokens != padding).sum(-1).max())]
        return tokens

    def fills_context(self, tokens: Tensor) -> Tensor:
        """Which texts reach the end of the context, so that more of them would not be read.  -> [N] bool

        tokens: [N, 2 or more], the last columns of what the tokenizer gave. A text that just fits is among them.
        """
        of_hugging_face = getattr(self.tokenizer, "tokenizer", None)
        padding = getattr(of_hugging_face, "pad_token_id", 0)
        ends_as_padding = of_hugging_face is not None and of_hugging_face.eos_token_id == padding  # as SigLIP's
        return tokens[:, -2 if ends_as_padding else -1] != padding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings, not normalised. [N, L] int64 -> [N, D], for any L that `trim` leaves."""
        if self.fast_text and isinstance(self._fast_tower, FastText):
            return self._fast_tower(tokens)
        return self._in_parts(self._encode_text_plainly, tokens)

    def _encode_text_plainly(self, tokens: Tensor) -> Tensor:
        """With open_clip's own modules: the reference for fast_text.py, and the way for all other towers."""
        text = self._causal_tower
        if text is None:
            return self._by_length(tokens) if self._is_hugging_face else self.model.encode_text(tokens)
        length = tokens.shape[1]
        x = text.token_embedding(tokens) + text.positional_embedding[:length]  # [N, L, W]
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = text.ln_final(x[torch.arange(len(x), device=x.device), tokens.argmax(-1)])  # [N, W]
        projection = text.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # [N, D]

    def _by_length(self, tokens: Tensor) -> Tensor:
        """Texts of like lengths together, so that a CPU computes little padding. A GPU is faster with all at once."""
        if tokens.device.type != "cpu":
            return self.model.encode_text(tokens)
        order = (tokens != self.model.text.config.pad_token_id).sum(-1).argsort(stable=True)
        parts = [self.model.encode_text(self.trim(tokens[rows])) for rows in order.split(LIKE_LENGTHS)]
        return torch.cat(parts)[order.argsort()]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings, not normalised. [N, 3, H, W] -> [N, D]"""
        return self._in_parts(self.model.encode_image, pixels)

    def _in_parts(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Not where BatchNorm learns its statistics from the batch, which is in training from scratch."""
        if not self.recompute or self.model.training or not torch.is_grad_enabled():
            return encode(batch)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in batch.split(PART)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit embeddings of texts, each distinct text encoded once, on the CPU.  -> [N, D] float32"""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        if len(distinct) > REMEMBERED:
            rows = self._embed_distinct(distinct, batch_size)
        else:
            rows = self._remembered(tuple(distinct), lambda: self._embed_distinct(distinct, batch_size))
        return rows[[distinct[text] for text in texts]]

    def _embed_distinct(self, distinct: Mapping[str, int], batch_size: int) -> Tensor:
        """Each text's embedding at its row.  -> [len(distinct), D]"""
        ordered = sorted(distinct, key=len)  # like lengths together, so that little padding is computed
        rows, cut = torch.empty(len(ordered), self.embed_dim), []
        starts = range(0, len(ordered), batch_size)
        for start in tqdm(starts, "encoding texts", leave=False, disable=None if len(starts) > 4 else True):
            batch = ordered[start : start + batch_size]
            tokens = self.tokenizer(batch)
            cut += [batch[n] for n in self.fills_context(tokens).nonzero().flatten().tolist()]
            z = self.encode_text(self.trim(tokens).to(self.device)).float().cpu()
            rows[[distinct[text] for text in batch]] = nn.functional.normalize(z, dim=-1)
        if cut:
            log.warning(
                "%d of %d texts reach the context length of %d tokens; what comes after it is not read, first: %s",
                len(cut), len(ordered), self.context_length, textwrap.shorten(cut[0], 80, placeholder=" ..."),
            )  # fmt: skip
        return rows

    @property
    def embed_dim(self) -> int:
        text = getattr(self.model, "text", self.model)
        if hasattr(text, "output_dim"):
            return text.output_dim
        projection = text.text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def _causal_tower(self) -> nn.Module | None:
        """The text transformer, where it is a plain causal one whose sequences can be cut short."""
        text = self.model if hasattr(self.model, "transformer") else getattr(self.model, "text", None)
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        plain = pool == "argmax" and getattr(text, "attn_mask", None) is not None
        special = getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False)
        has_projection = getattr(text, "text_projection", None) is not None
        return text if plain and has_projection and not special else None

    @property
    def _is_hugging_face(self) -> bool:
        return isinstance(getattr(self.model, "text", None), open_clip.hf_model.HFTextEncoder)

    @property
    def _fast_tower(self) -> FastText | str:
        """The fast way through the text tower, or why there is none."""
        tower = self._causal_tower
        if self._fast is None or self._fast[0] is not tower:
            self._fast = (tower, FastText.of(tower))
        return self._fast[1]

    def choose_text_way(self, fast: bool, recompute: bool = False) -> str:
        """Choose how texts are encoded: by fast_text.py where it knows the tower.  -> the choice, for the log

        Both ways are compared on a few texts first, under the autocast in force; where they differ, open_clip's own
        is taken. recompute: in parts, here and in FastText, and in training from scratch as open_clip does it.
        """
        self.fast_text, self.recompute = False, recompute
        if hasattr(self.model, "set_grad_checkpointing"):
            self.model.set_grad_checkpointing(recompute)  # for an image tower that learns, too
        fast_tower = self._fast_tower
        if not fast:
            return "text tower: open_clip's own, as model.fast_text false asks"
        if isinstance(fast_tower, str):
            return f"text tower: open_clip's own, because {fast_tower}"
        try:
            error, usual = fast_tower.errors(self._encode_text_plainly, self.tokenize(_SAMPLES).to(self.device))
        except RuntimeError as failure:
            reason = textwrap.shorten(str(failure), 160, placeholder=" ...")
            return f"text tower: open_clip's own, because the fast one failed here ({reason})"
        if not error <= max(1e-4, 2 * usual):  # in bf16 open_clip's own is off as well
            return f"text tower: open_clip's own, because the fast one is off by {error:.1e} here (it by {usual:.1e})"
        self.fast_text, self._fast = True, (fast_tower.tower, dataclasses.replace(fast_tower, recompute=recompute))
        return f"text tower: the fast way, values and gradients within {error:.0e} of open_clip's in float32 on samples"

    # -- its parts -------------------------------------------------------------------------------------

    def image_tower_hash(self) -> str:
        """Identifies the image tower: its weights and the transform of its input."""
        weights = self.model.visual.state_dict()
        return self._remembered("image tower", lambda: hash_tensors(weights, repr(self.preprocess)))

    def weights_hash(self) -> str:
        """Identifies the whole model: its weights and the transform of its input. Contains the image tower's hash."""
        rest = {name: value for name, value in self.model.state_dict().items() if not name.startswith("visual.")}
        extra = self.image_tower_hash() + "".join(map(repr, self.about().values()))
        return self._remembered("weights", lambda: hash_tensors(rest | self.extra_weights(), extra))

    def extra_weights(self) -> dict[str, Tensor]:
        """Weights in addition to those of `model`, by name; empty for a plain CLIP."""
        return {}

    def about(self) -> dict[str, Any]:
        """Settings that are needed to build what `extra_weights` belong to."""
        return {}

    def describe(self) -> str:
        return f"{self.name} ({self.pretrained})" if self.pretrained else self.name


def hash_tensors(state: Mapping[str, Tensor], extra: str = "") -> str:
    """SHA-256 of names, shapes and values, as 16 hexadecimal digits."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()[:16]
