"""One object for a CLIP model: weights, image transform and tokenizer, in open_clip's own classes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.random import seed_of
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.fast_text import FastText

import open_clip  # isort: skip
from open_clip.transform import PreprocessCfg, image_transform_v2  # isort: skip

log = logging.getLogger(__name__)

_SAMPLES = ("a dog", "two large red circles on a striped background", "A photo. " * 30)  # of every kind of length

REMEMBERED = 100_000  # texts whose embeddings are kept, at most: 300 MB at 768 numbers each
SCRATCH = "scratch"  # in the place of a tag of pretrained weights: weights drawn at random


def model_folder(name: str) -> Path:
    """Where a model shipped inside the package lives."""
    return Path(__file__).parents[1] / "example" / {"example": "model", "example_vit": "vit"}[name]


SHIPPED = ("example", "example_vit")


@dataclass
class Clip:
    """A CLIP model with all that is needed to use it.

    name: an open_clip architecture ("ViT-L-14"), "example" for the embedded model, "example_vit" for the same with a
        vision transformer as its image tower, or "local-dir:FOLDER".
    pretrained: what the weights were before any finetuning: a tag of open_clip's, a file, SCRATCH, or None.
    fast_text: whether texts are encoded by pc_clip.models.fast_text where it knows the tower. The result is the same;
        `choose_text_way` looks whether that is so on this machine.
    """

    model: nn.Module
    tokenizer: Any
    preprocess: Any
    name: str
    pretrained: str | None = None
    fast_text: bool = True
    _fast: tuple[nn.Module | None, FastText | str] | None = field(default=None, repr=False, compare=False)
    _memory: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    # -- making one ------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        load_weights: bool = True,
        device: str | torch.device = "cpu",
        preprocess: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> Clip:
        """Build the architecture and load its weights.

        preprocess: the image transform in place of the one that comes with the weights (mean, std, ...). seed: of the
        weights where `pretrained` is SCRATCH.
        Raises UserError for an unknown name, an unknown tag, or weights that cannot be had.
        """
        known_as, name = name, f"local-dir:{model_folder(name)}" if name in SHIPPED else name
        _check_name(name)
        load_weights = load_weights and pretrained != SCRATCH
        if known_as in SHIPPED and load_weights and pretrained is not None:
            raise UserError(
                f"model {known_as} has weights of its own; leave model.pretrained {pretrained} out "
                "(model.start names a checkpoint to train from, --checkpoint one to evaluate)"
            )
        beside = known_as == "example_vit" and load_weights  # its file has the image tower alone
        options = _resolve_local_text_tower(name) | ({"force_preprocess_cfg": preprocess} if preprocess else {})
        if load_weights and not name.startswith("local-dir:") and pretrained is None:
            tags = [tag for architecture, tag in open_clip.list_pretrained() if architecture == name]
            raise UserError(
                f"model {name} was asked for without weights. Give --model.pretrained a file or one of its tags: "
                f"{', '.join(tags) or 'it has none'}; or --checkpoint a finetuned one."
            )
        try:
            with _quiet_open_clip(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(
                    seed_of(seed, "weights")
                )  # of the CPU alone: torch.manual_seed takes the GPUs' along
                model = open_clip.create_model(
                    name,
                    pretrained if load_weights and not beside else None,
                    load_weights=load_weights and not beside,
                    pretrained_text=False,
                    **options,
                )
                if beside:
                    model.load_state_dict(_example_vit())
        except Exception as error:
            raise _cannot_load(name, pretrained, error) from error
        return cls._complete(model, known_as, pretrained, device)

    @classmethod
    def _complete(cls, model: nn.Module, name: str, pretrained: str | None, device: str | torch.device) -> Clip:
        folder = f"local-dir:{model_folder(name)}" if name in SHIPPED else name
        with _quiet_open_clip():
            tokenizer = open_clip.get_tokenizer(folder)
        # JSON has no tuples: without this, one transform would have two names, and so two caches.
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in model.visual.preprocess_cfg.items()}
        preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        return cls(model.to(device).eval(), tokenizer, preprocess, name, pretrained)

    def remembering(self) -> Clip:
        """The same model for when its weights stay as they are: hashes and embeddings of texts are computed once.

        Most evaluations ask about the same prompts, and several for the hash of the weights. A list of texts is
        remembered as a whole, because a text's last digits depend on what it is encoded with.
        """
        return dataclasses.replace(self, _memory={})

    def _remembered(self, key: Any, compute: Callable[[], Any]) -> Any:
        if self._memory is None:
            return compute()
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    # -- using it --------------------------------------------------------------------------------------

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

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings, not normalised. [N, L] int64 -> [N, D], for any L that `trim` leaves."""
        if self.fast_text and isinstance(self._fast_tower, FastText):
            return self._fast_tower(tokens)
        return self._encode_text_plainly(tokens)

    def _encode_text_plainly(self, tokens: Tensor) -> Tensor:
        """With open_clip's own modules: the reference for fast_text.py, and the way for all other towers."""
        text = self._causal_tower
        if text is None:
            return self.model.encode_text(tokens)
        length = tokens.shape[1]
        x = text.token_embedding(tokens) + text.positional_embedding[:length]  # [N, L, W]
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = text.ln_final(x[torch.arange(len(x), device=x.device), tokens.argmax(-1)])  # [N, W]
        projection = text.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # [N, D]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings, not normalised. [N, 3, H, W] -> [N, D]"""
        return self.model.encode_image(pixels)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit embeddings of texts, each distinct text encoded once, on the CPU.  -> [N, D] float32"""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        key = tuple(distinct)
        rows = (self._memory or {}).get(key)
        if rows is None:
            rows = self._embed_distinct(distinct, batch_size)
            if self._memory is not None and sum(map(len, self._memory)) + len(key) <= REMEMBERED:
                self._memory[key] = rows
        return rows[[distinct[text] for text in texts]]

    def _embed_distinct(self, distinct: Mapping[str, int], batch_size: int) -> Tensor:
        """Each text's embedding at its row.  -> [len(distinct), D]"""
        ordered = sorted(distinct, key=len)  # like lengths together, so that little padding is computed
        rows = torch.empty(len(ordered), self.embed_dim)
        starts = range(0, len(ordered), batch_size)
        for start in tqdm(starts, "encoding texts", leave=False, disable=None if len(starts) > 4 else True):
            batch = ordered[start : start + batch_size]
            z = self.encode_text(self.tokenize(batch).to(self.device)).float().cpu()
            rows[[distinct[text] for text in batch]] = nn.functional.normalize(z, dim=-1)
        return rows

    @property
    def embed_dim(self) -> int:
        text = self._causal_tower
        if text is not None and not isinstance(text.text_projection, nn.Linear):
            return text.text_projection.shape[1]
        return self.model.text.output_dim

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
        """Decide how texts are encoded, and say it for the log: by pc_clip.models.fast_text where it knows the tower.

        Both ways are compared on a few texts first, under the autocast in force; where they part, open_clip's own
        is taken. recompute: see FastText; for other towers it is open_clip's own checkpointing.
        Raises UserError for a tower that cannot recompute.
        """
        self.fast_text = False
        if recompute and self._is_hugging_face:
            raise UserError(f"the text tower of {self.name} cannot be recomputed; leave train.recompute out")
        if hasattr(self.model, "set_grad_checkpointing"):
            self.model.set_grad_checkpointing(recompute)  # for an image tower that learns, too
        found = self._fast_tower
        if not fast:
            return "text tower: open_clip's own, as model.fast_text false asks"
        if isinstance(found, str):
            return f"text tower: open_clip's own, because {found}"
        try:
            error, usual = found.errors(self._encode_text_plainly, self.tokenize(_SAMPLES).to(self.device))
        except RuntimeError as failure:
            reason = textwrap.shorten(str(failure), 160, placeholder=" ...")
            return f"text tower: open_clip's own, because the fast one failed here ({reason})"
        if not error <= max(1e-4, 2 * usual):  # in bf16 open_clip's own is off as well
            return f"text tower: open_clip's own, because the fast one is off by {error:.1e} here (it by {usual:.1e})"
        self.fast_text, self._fast = True, (found.tower, dataclasses.replace(found, recompute=recompute))
        return f"text tower: the fast way, values and gradients within {error:.0e} of open_clip's in float32 on samples"

    # -- its parts -------------------------------------------------------------------------------------

    def image_tower_hash(self) -> str:
        """Identifies the image tower: its weights and the transform of its input."""
        return self._remembered(
            "image tower", lambda: hash_tensors(self.model.visual.state_dict(), repr(self.preprocess))
        )

    def weights_hash(self) -> str:
        """Identifies the whole model: its weights and the transform of its input.

        Made of the image tower's hash and the rest, so that who needs both goes through those weights once.
        """

        def compute() -> str:
            rest = {name: value for name, value in self.model.state_dict().items() if not name.startswith("visual.")}
            described = "".join(map(repr, self.about().values()))
            return hash_tensors(rest | self.extra_weights(), extra=self.image_tower_hash() + described)

        return self._remembered("weights", compute)

    def extra_weights(self) -> dict[str, Tensor]:
        """Weights beside those of `model`, by name; empty for a plain CLIP."""
        return {}

    def about(self) -> dict[str, Any]:
        """What such weights do not say of themselves."""
        return {}

    def describe(self) -> str:
        return f"{self.name} ({self.pretrained})" if self.pretrained else self.name


def _example_vit() -> dict[str, Tensor]:
    """The example's text tower with a vision transformer that was trained beside it (example/pretrain.py)."""
    text, image = (load_file(model_folder(name) / "open_clip_model.safetensors") for name in SHIPPED)
    return {name: value for name, value in text.items() if not name.startswith("visual.")} | image


def hash_tensors(state: Mapping[str, Tensor], extra: str = "") -> str:
    """SHA-256 of names, shapes and values, as 16 hexadecimal digits."""
    digest = hashlib.sha256(extra.encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()[:16]


def blend(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, weight by weight (WiSE-FT, Wortsman et al. 2022).

    Raises UserError when the two are not of one architecture.
    """
    if start.keys() != end.keys() or any(start[k].shape != end[k].shape for k in start):
        raise UserError("weights of two architectures cannot be averaged")
    return {
        k: torch.lerp(start[k].float(), end[k].float(), alpha).to(start[k].dtype)
        if start[k].is_floating_point()
        else end[k]
        for k in start
    }


def preprocess_of_tag(name: str, pretrained: str | None) -> dict[str, Any] | None:
    """The image transform that belongs to one of open_clip's pretrained tags; None for anything else."""
    found = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    return {key: found[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in found} or None


def guess_architecture(state: Mapping[str, Tensor]) -> str:
    """The open_clip architecture of a bare state dict, by the shapes of its weights.

    Activations leave no trace in a state dict, so "ViT-L-14" and "ViT-L-14-quickgelu" look the same; the
    plain one is taken, which is right for the PC-CLIP authors' checkpoint (a DataComp model).
    Raises UserError when no architecture, or a state dict of something else, is found.
    """
    found = _signature_of_state(state)
    matches = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if config and found is not None and _signature_of_config(config) == found:
            matches.append(name)
    matches.sort(key=lambda name: ("quickgelu" in name, len(name), name))
    if not matches:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in list(state.items())[:3])
        raise UserError(
            f"the architecture of this state dict is not known: its first weights are {shapes}. "
            "Name it with --model.name (open_clip's name, or local-dir:FOLDER)."
        )
    log.info(
        "this state dict has the shapes of %s%s",
        matches[0],
        f" (also {', '.join(matches[1:4])})" if matches[1:] else "",
    )
    return matches[0]


def _signature_of_state(state: Mapping[str, Tensor]) -> tuple | None:
    """(embed_dim, text width, text layers, context, vocab, image width, patch, image layers, positions)."""
    prefix = "text." if "text.token_embedding.weight" in state else ""
    try:
        vocab, width = state[f"{prefix}token_embedding.weight"].shape
        context = state[f"{prefix}positional_embedding"].shape[0]
        embed = state[f"{prefix}text_projection"].shape[1]
        text_layers = _count_blocks(state, f"{prefix}transformer.resblocks.")
        patches = state["visual.conv1.weight"]
        positions = state["visual.positional_embedding"].shape[0]
    except KeyError:
        return None
    image_layers = _count_blocks(state, "visual.transformer.resblocks.")
    return embed, width, text_layers, context, vocab, patches.shape[0], patches.shape[-1], image_layers, positions


def _signature_of_config(config: dict) -> tuple | None:
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision or "hf_model_name" in text:
        return None
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    size = size if isinstance(size, int) else size[0]
    return (
        config["embed_dim"], text.get("width", 512), text.get("layers", 12), text.get("context_length", 77),
        text.get("vocab_size", 49408), vision.get("width", 768), patch, vision["layers"], (size // patch) ** 2 + 1,
    )  # fmt: skip


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _check_name(name: str) -> None:
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{folder} is no open_clip model folder: it has no open_clip_config.json")
    elif name not in open_clip.list_models() and not name.startswith("hf-hub:"):
        raise UserError(f"unknown model {name!r}. {_nearest_models(name)}")


def _nearest_models(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
    return f"Nearest: {', '.join(close) or 'none'}. open_clip.list_models() lists all; local-dir:FOLDER names your own."


def _resolve_local_text_tower(name: str) -> dict[str, Any]:
    """A Hugging Face text tower that lies in the model's own folder is written as "." in its config.

    open_clip would look for it from the working directory, so a folder could not be moved.
    """
    if not name.startswith("local-dir:"):
        return {}
    folder = Path(name.removeprefix("local-dir:"))
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"].get("text_cfg", {})
    if text.get("hf_model_name") != ".":
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}}


def _cannot_load(name: str, pretrained: str | None, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
    config = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if config:
        source = config.get("hf_hub", "").rstrip("/") or config.get("url", "")
        return UserError(
            f"the weights {pretrained!r} of {name} could not be fetched ({reason}). Without a network, download "
            f"open_clip_model.safetensors (or open_clip_pytorch_model.bin) from {source} elsewhere and pass "
            f"--model.pretrained PATH/TO/FILE."
        )
    tags = [tag for architecture, tag in open_clip.list_pretrained() if architecture == name]
    if pretrained and not Path(pretrained).exists():
        return UserError(
            f"{pretrained!r} is neither a file nor a pretrained tag of {name}. {nearest(pretrained, tags)}"
        )
    return UserError(f"{name} could not be loaded: {reason}")


class _quiet_open_clip:
    """open_clip logs each step of loading, and warns about weights that are loaded a moment later."""

    def __enter__(self) -> None:
        self.level = logging.getLogger().level
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
