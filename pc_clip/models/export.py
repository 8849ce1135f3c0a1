"""Export a model for other programs: `python -m pc_clip export CHECKPOINT --out FOLDER`.

The folder loads in open_clip, and here, as `local-dir:FOLDER`; where transformers knows the architecture it also
holds a CLIPModel with its tokenizer and image processor. Two things of transformers' own differ from open_clip,
and no file can change that:

- Text is not cleaned. open_clip mends broken characters (ftfy: curly quotes, ligatures, full-width letters, wrongly
  decoded text) and HTML entities before it tokenizes; CLIPTokenizer takes them as they stand. It also lowercases
  letter by letter, so the last sigma of a Greek word comes out otherwise. With
  `open_clip.tokenizer.get_clean_fn("lower")` applied beforehand the tokens of real text are equal.
- The centre crop rounds down and open_clip's rounds half to even: one pixel apart where the longer side, resized, is
  3, 7, 11, ... pixels longer than the crop, as for a quarter of all photographs. Otherwise
  CLIPProcessor.from_pretrained(FOLDER, backend="pil") gives exactly open_clip's pixels of an RGB image;
  transformers' default backend resizes by other arithmetic and is up to one grey level (of 255) off.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pc_clip
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_json, write_tensors, write_text
from pc_clip.models import loading as checkpoints
from pc_clip.models.change_model import change_of
from pc_clip.models.clip import SHIPPED, Clip, model_folder

import open_clip  # isort: skip
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer  # isort: skip

FORMATS = ("open_clip", "transformers", "all")
ABOUT_FILE = "pc_clip.json"
TOLERANCE = 1e-5  # of a unit embedding's coordinate, between CLIPModel and open_clip
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's name: OpenAI's
PARTS = {  # open_clip's name inside a tower: CLIPModel's
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_pre": "pre_layrnorm",  # spelt so there
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
}
BLOCK_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class Exported(NamedTuple):
    """What a folder was given: formats, those left out with the reason, the largest difference of CLIPModel."""

    formats: list[str]
    left_out: dict[str, str]
    difference: float | None


def export(clip: Clip, out: Path, wanted: str = "all", *, source: str = "", overwrite: bool = False) -> Exported:
    """Write a model's folder, whole or not at all.

    wanted: open_clip, transformers, or all that can be written. source: what the weights came from, a name to keep.
    Raises UserError for a folder that is there (unless it is an export and `overwrite` is set), and for an
    architecture that transformers does not know when nothing else was asked for.
    """
    check_choice("format", wanted, FORMATS)
    check_place(out, overwrite)
    reason = why_not_transformers(clip) if wanted != "open_clip" else None
    if wanted == "transformers" and reason:
        raise UserError(f"{clip.name} cannot be a CLIPModel of transformers: {reason}. Use --format open_clip.")
    formats = [kind for kind in FORMATS[:2] if wanted in (kind, "all") and not (kind == "transformers" and reason)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        (new := Path(temporary) / "new").mkdir()
        if "open_clip" in formats:
            write_open_clip(clip, new)
        difference = write_transformers(clip, new) if "transformers" in formats else None
        write_json(new / ABOUT_FILE, describe(clip, formats, source))
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)
    return Exported(formats, {"transformers": reason} if reason else {}, difference)


def check_place(out: Path, overwrite: bool) -> None:
    """Raise UserError unless a folder may be written at `out`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ABOUT_FILE).is_file():
        raise UserError(f"{out} holds something else than an export; give --out another folder")
    if not overwrite:
        raise UserError(f"{out} is there already; --overwrite replaces it, or give --out another folder")


def describe(clip: Clip, formats: list[str], source: str) -> dict[str, Any]:
    """What made an export. Names only: a path would mean nothing on another machine."""
    return {
        "pc_clip": pc_clip.__version__,
        "checkpoint": source or None,
        "model": _without_path(clip.name),
        "pretrained": _without_path(clip.pretrained),
        "weights": clip.weights_hash(),
        "image_tower": clip.image_tower_hash(),
        "formats": formats,
    }


def _without_path(name: str | None) -> str | None:
    if not name or name.startswith("hf-hub:"):
        return name
    scheme = "local-dir:" if name.startswith("local-dir:") else ""
    return scheme + Path(name.removeprefix("local-dir:")).name


# -- open_clip -----------------------------------------------------------------------------------------


def write_open_clip(clip: Clip, folder: Path) -> None:
    """The files of a `local-dir:` model: configuration, weights, and what its tokenizer and text tower need."""
    name = f"local-dir:{model_folder(clip.name)}" if clip.name in SHIPPED else clip.name
    preprocess = {key: value for key, value in clip.model.visual.preprocess_cfg.items() if key not in ("size", "mode")}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", config)
    write_tensors(folder / "open_clip_model.safetensors", clip.model.state_dict(), {"format": "pt"})
    if hasattr(clip.tokenizer, "save_pretrained"):  # a Hugging Face tokenizer; open_clip's own comes with it
        clip.tokenizer.save_pretrained(folder)
    if config["model_cfg"]["text_cfg"].get("hf_model_name") == ".":  # the tower's architecture lies in the folder
        clip.model.text.config.save_pretrained(folder)
    if name.startswith("local-dir:"):  # what the weights come from may ask that its licence stays with them
        for path in Path(name.removeprefix("local-dir:")).iterdir():
            if path.is_file() and re.match(r"LICENSE|LICENCE|NOTICE|README", path.name, re.IGNORECASE):
                shutil.copyfile(path, folder / path.name)


# -- transformers --------------------------------------------------------------------------------------


def write_transformers(clip: Clip, folder: Path) -> float:
    """The files of a CLIPModel with tokenizer and image processor.

    Returns the largest difference between its unit embeddings and the model's own, loaded again and tried on
    made-up images and texts; RuntimeError when it is above TOLERANCE.
    """
    state = rename_weights(clip.model.state_dict())
    clip_config(clip).save_pretrained(folder)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_tokenizer(clip, folder)
    image_processor(clip).save_pretrained(folder)
    difference = compare(clip, folder)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported CLIPModel differs from {clip.name} by {difference:.1e}")
    return difference


def why_not_transformers(clip: Clip) -> str | None:
    """What of this model transformers' CLIPModel has no place for; None when there is nothing."""
    image, text = clip.model.visual, _text_tower(clip.model)
    if not isinstance(image, VisionTransformer):
        return f"its image tower is a {type(image).__name__}, and CLIPModel has a plain vision transformer"
    if not isinstance(text, (open_clip.CLIP, TextTransformer)):
        return f"its text tower is a {type(text).__name__}, and CLIPModel has a plain causal transformer"
    if hasattr(clip.model, "text_decoder"):
        return "it has a caption decoder"
    tokenizer, preprocess = clip.tokenizer, clip.model.visual.preprocess_cfg
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    at_end = pool == "argmax" or (pool == "eos" and _end(text) == getattr(tokenizer, "eot_token_id", None))
    found = {
        "its image tower has no norm before its blocks": not isinstance(image.ln_pre, nn.LayerNorm),
        "its image tower does not read its class token alone": image.attn_pool is not None or image.pool_type != "tok",
        "its images or patches are not square": any(len(set(s)) > 1 for s in (image.image_size, image.patch_size)),
        "its blocks are not CLIP's": not all(_is_plain(block) for tower in (image, text) for block in _blocks(tower)),
        "its text tower is not causal": text.attn_mask is None,
        "its text tower has a class token": getattr(text, "cls_emb", None) is not None,
        "its text tower does not read the end-of-text token": not at_end,
        "its text projection is not one matrix": not isinstance(text.text_projection, nn.Parameter),
        "its logits have a bias": getattr(clip.model, "logit_bias", None) is not None,
        "its tokenizer is not CLIP's": not _is_clip_tokenizer(tokenizer),
        "it pads its images": preprocess.get("resize_mode") == "longest",
    }
    return next((reason for reason, true in found.items() if true), None)


def _text_tower(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "transformer") else model.text


def _end(text: nn.Module) -> int:
    return text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id


def _blocks(tower: nn.Module) -> nn.ModuleList:
    return tower.transformer.resblocks


def _is_plain(block: nn.Module) -> bool:
    scaled = not all(isinstance(scale, nn.Identity) for scale in (block.ls_1, block.ls_2))
    return isinstance(block, ResidualAttentionBlock) and not scaled and _activation(block) is not None


def _activation(block: nn.Module) -> str | None:
    """transformers' name of the activation."""
    if isinstance(block.mlp.gelu, QuickGELU):
        return "quick_gelu"
    kinds = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    return kinds.get(block.mlp.gelu.approximate) if isinstance(block.mlp.gelu, nn.GELU) else None


def _is_clip_tokenizer(tokenizer: Any) -> bool:
    plain = isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None
    lowers = plain and tokenizer.clean_fn("A  B!") == "a b!"
    return lowers and [tokenizer.decoder[i] for i in tokenizer.all_special_ids] == list(SPECIAL)


def clip_config(clip: Clip) -> Any:
    """transformers' CLIPConfig of a model, read off its modules."""
    from transformers import CLIPConfig

    image, text = clip.model.visual, _text_tower(clip.model)
    width = text.text_projection.shape[1]
    vision_config = {
        **_tower_config(image, image.ln_post), "projection_dim": width,
        "image_size": image.image_size[0], "patch_size": image.patch_size[0],
    }  # fmt: skip
    text_config = {
        **_tower_config(text, text.ln_final), "projection_dim": width,
        "vocab_size": text.token_embedding.num_embeddings, "max_position_embeddings": len(text.positional_embedding),
        # The text is read at its first end-of-text token. (An eos_token_id of 2 would mean the highest token.)
        "bos_token_id": clip.tokenizer.sot_token_id, "eos_token_id": clip.tokenizer.eot_token_id,
        "pad_token_id": clip.tokenizer.eot_token_id,
    }  # fmt: skip
    return CLIPConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=width,
        logit_scale_init_value=clip.model.logit_scale.item(),
        architectures=["CLIPModel"],
        dtype="float32",
    )


def _tower_config(tower: nn.Module, norm: nn.LayerNorm) -> dict[str, Any]:
    first = _blocks(tower)[0]
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(_blocks(tower)),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first),
        "layer_norm_eps": norm.eps,
    }


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain CLIP model of open_clip's under CLIPModel's names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text.")
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        name = name.removeprefix("visual.")
        if name == "logit_scale":
            renamed[name] = value.reshape(())
        elif name in ("proj", "text_projection"):  # a matrix there, the weight of a linear layer here
            renamed[f"{'visual' if name == 'proj' else 'text'}_projection.weight"] = value.T
        elif found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", name):
            for part, rows in zip("qkv", value.chunk(3)):
                renamed[f"{tower}.encoder.layers.{found[1]}.self_attn.{part}_proj.{found[2]}"] = rows
        elif found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", name):
            renamed[f"{tower}.encoder.layers.{found[1]}.{BLOCK_PARTS[found[2]]}.{found[3]}"] = value
        elif name in PARTS:
            renamed[f"{tower}.{PARTS[name]}"] = value
        else:
            norm, leaf = name.rsplit(".", 1)
            renamed[f"{tower}.{PARTS[norm]}.{leaf}"] = value
    return {name: value.float() for name, value in renamed.items()}


def write_tokenizer(clip: Clip, folder: Path) -> None:
    """CLIPTokenizer's files: those of today, and vocab.json and merges.txt for other readers."""
    from transformers import CLIPTokenizer

    vocabulary = {SPECIAL.get(token, token): number for token, number in clip.tokenizer.encoder.items()}
    merges = sorted(clip.tokenizer.bpe_ranks, key=clip.tokenizer.bpe_ranks.get)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.context_length)
    tokenizer.save_pretrained(folder)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")


def image_processor(clip: Clip) -> Any:
    """CLIPImageProcessor with a model's image transform."""
    from transformers import CLIPImageProcessorPil

    settings = clip.model.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    square = {"height": size, "width": size}
    squash = settings["resize_mode"] == "squash"
    return CLIPImageProcessorPil(
        size=square if squash else {"shortest_edge": size},
        crop_size=square,
        do_center_crop=not squash,
        resample=2 if settings["interpolation"] == "bilinear" else 3,  # PIL's numbers; 3 is bicubic
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


@torch.no_grad()
def compare(clip: Clip, folder: Path) -> float:
    """The largest difference of a coordinate between unit embeddings of a model and of its CLIPModel folder."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    exported = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, exported.config.vision_config.image_size, exported.config.vision_config.image_size,
                         generator=noise)  # fmt: skip
    tokens = clip.tokenizer(["a photo of a cat", "two large dogs, one of which is asleep"])
    pairs: list[tuple[Tensor, Callable[..., Any], Tensor]] = [
        (clip.model.encode_image(pixels.to(clip.device)), exported.get_image_features, pixels),
        (clip.model.encode_text(tokens.to(clip.device)), exported.get_text_features, tokens),
    ]
    differences = [
        F.normalize(own.float().cpu(), dim=-1) - F.normalize(encode(given).pooler_output, dim=-1)
        for own, encode, given in pairs
    ]
    return max(float(difference.abs().max()) for difference in differences)


# -- the command ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a run's folder, a .safetensors or a .pt file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--format", choices=FORMATS, default="all", help="all (the default): whatever can be written")
    parser.add_argument("--model", help="the architecture, for a checkpoint that does not say; guessed by its shapes")
    parser.add_argument("--pretrained", help="the tag whose image transform such a checkpoint was trained with")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    arguments = parser.parse_args(argv)
    check_place(arguments.out, arguments.overwrite)  # before a large checkpoint is read
    clip = checkpoints.load_model(arguments.checkpoint, arguments.model, arguments.pretrained)
    source = checkpoints.describe_checkpoint(arguments.checkpoint) or arguments.checkpoint
    done = export(clip, arguments.out, arguments.format, source=source, overwrite=arguments.overwrite)
    print(f"wrote {arguments.out}")
    if "open_clip" in done.formats:
        print(f"  open_clip: open_clip.create_model_and_transforms('local-dir:{arguments.out}')")
        if (arguments.out / "config.json").is_file() and "transformers" not in done.formats:
            print("  (its text tower lies in the folder: open_clip finds it only when started inside; run.py anywhere)")
    if "transformers" in done.formats:
        print(f"  transformers: CLIPModel.from_pretrained('{arguments.out}'), equal to within {done.difference:.0e}")
    for kind, reason in done.left_out.items():
        print(f"  {kind}: not written, {reason}")
    if change_of(clip) is not None:
        print("  what reads pairs of images and writes about them is not part of it; run.py takes the run itself")
