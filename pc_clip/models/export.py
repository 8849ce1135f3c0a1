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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pc_clip
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_json, write_tensors, write_text
from pc_clip.models import loading as checkpoints
from pc_clip.models.change_model import change_of
from pc_clip.models.clip import SHIPPED, Clip, model_folder

import open_clip  # isort: skip
from open_clip.push_to_hf_hub import save_for_hf  # isort: skip
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer  # isort: skip

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
    left_out, difference = {}, None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        if wanted != "open_clip":
            try:
                difference = write_transformers(clip, new)
            except Unfit as unfit:
                if wanted == "transformers":
                    raise UserError(
                        f"{clip.name} cannot be a CLIPModel of transformers: {unfit}. Use --format open_clip."
                    ) from unfit
                left_out["transformers"] = str(unfit)
                shutil.rmtree(new)
                new.mkdir()
        if wanted != "transformers":
            write_open_clip(clip, new)
        formats = [kind for kind in FORMATS[:2] if wanted in (kind, "all") and kind not in left_out]
        write_json(new / ABOUT_FILE, describe(clip, formats, source))
        for path in new.iterdir():
            path.chmod(0o644)  # safetensors' files are readable by their owner alone
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)
    return Exported(formats, left_out, difference)


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
    config = open_clip.get_model_config(name)
    tokenizer = clip.tokenizer if hasattr(clip.tokenizer, "save_pretrained") else _Nothing()
    save_for_hf(clip.model, tokenizer, config, folder, safe_serialization=True)
    if config["text_cfg"].get("hf_model_name") == ".":  # the tower's architecture lies in the folder
        clip.model.text.config.save_pretrained(folder)
    if name.startswith("local-dir:"):  # what the weights come from may ask that its licence stays with them
        for path in Path(name.removeprefix("local-dir:")).iterdir():
            if path.is_file() and re.match(r"LICENSE|LICENCE|NOTICE|README", path.name, re.IGNORECASE):
                shutil.copyfile(path, folder / path.name)


class _Nothing:
    """In place of open_clip's own tokenizer, which comes with it and is in no folder."""

    def save_pretrained(self, folder: Path) -> None:
        pass


# -- transformers --------------------------------------------------------------------------------------


class Unfit(Exception):
    """Why a model cannot be a CLIPModel."""


def write_transformers(clip: Clip, folder: Path) -> float:
    """The files of a CLIPModel with tokenizer and image processor.

    Returns the largest difference between its unit embeddings and the model's own, loaded again and tried on a
    made-up picture and texts. Raises Unfit where that is above TOLERANCE, and where weights have no place.
    """
    if reason := why_not_transformers(clip):
        raise Unfit(reason)
    write_tensors(folder / "model.safetensors", rename_weights(clip.model.state_dict()), {"format": "pt"})
    clip_config(clip).save_pretrained(folder)
    write_tokenizer(clip, folder)
    image_processor(clip).save_pretrained(folder)
    difference = compare(clip, folder)
    if not difference <= TOLERANCE:
        raise Unfit(f"its embeddings as a CLIPModel differ by {difference:.1e}")
    return difference


def why_not_transformers(clip: Clip) -> str | None:
    """What of this model's parts transformers' CLIPModel has no place for; None when there is nothing obvious.

    The rest is found by trying: weights without a place, and embeddings that differ.
    """
    image, text, tokenizer = clip.model.visual, _text_tower(clip.model), clip.tokenizer
    if not isinstance(image, VisionTransformer):
        return f"its image tower is a {type(image).__name__}, and CLIPModel has a plain vision transformer"
    if not isinstance(text, (open_clip.CLIP, TextTransformer)):
        return f"its text tower is a {type(text).__name__}, and CLIPModel has a plain causal transformer"
    if any(len(set(size)) > 1 for size in (image.image_size, image.patch_size)):
        return "its images or patches are not square"
    plain = isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None
    if not plain or [tokenizer.decoder[i] for i in tokenizer.all_special_ids] != list(SPECIAL):
        return "its tokenizer is not CLIP's"
    if not all(_activation(tower.transformer.resblocks[0]) for tower in (image, text)):
        return "its activation is none that CLIPModel knows"
    return None


def _text_tower(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "transformer") else model.text


def _activation(block: nn.Module) -> str | None:
    """transformers' name of the activation."""
    if isinstance(block.mlp.gelu, QuickGELU):
        return "quick_gelu"
    kinds = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    return kinds.get(block.mlp.gelu.approximate) if isinstance(block.mlp.gelu, nn.GELU) else None


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
        architectures=["CLIPModel"],
        dtype="float32",
    )


def _tower_config(tower: nn.Module, norm: nn.LayerNorm) -> dict[str, Any]:
    first = tower.transformer.resblocks[0]
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": _activation(first),
        "layer_norm_eps": norm.eps,
    }


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain CLIP model of open_clip's under CLIPModel's names. Raises Unfit for others."""
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
            renamed[f"{tower}.encoder.layers.{found[1]}.{_part(BLOCK_PARTS, found[2])}.{found[3]}"] = value
        elif "." not in name or name in PARTS:
            renamed[f"{tower}.{_part(PARTS, name)}"] = value
        else:
            norm, leaf = name.rsplit(".", 1)
            renamed[f"{tower}.{_part(PARTS, norm)}.{leaf}"] = value
    return {name: value.float() for name, value in renamed.items()}


def _part(names: dict[str, str], name: str) -> str:
    if name not in names:
        raise Unfit(f"CLIPModel has no place for its weights {name}")
    return names[name]


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
    """The largest difference of a coordinate between unit embeddings of a model and of its CLIPModel folder.

    Both begin with a picture and with texts, so that transform and tokenizer are compared too. The picture is one
    that both crop at the same place. Raises Unfit for a CLIPModel that lacks weights.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, loading = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise Unfit(f"it lacks what CLIPModel has: {', '.join(sorted(loading['missing_keys']))[:200]}")
    processor = transformers.CLIPProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    side = model.config.vision_config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side + 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    texts = ["a photo of a cat", "Two LARGE dogs: one sleeps, isn't it?"]
    given = processor(text=texts, images=picture, padding="max_length", truncation=True, return_tensors="pt")
    model.eval()
    pairs = [
        (clip.model.encode_image(clip.preprocess(picture)[None].to(clip.device)),
         model.get_image_features(given.pixel_values)),
        (clip.model.encode_text(clip.tokenizer(texts).to(clip.device)),
         model.get_text_features(given.input_ids)),
    ]  # fmt: skip
    return max(
        float((F.normalize(own.float().cpu(), dim=-1) - F.normalize(other.pooler_output, dim=-1)).abs().max())
        for own, other in pairs
    )


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
