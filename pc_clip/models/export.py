"""Export a model for other programs: `python -m pc_clip export CHECKPOINT --out FOLDER`.

The folder loads in open_clip, and here, as `local-dir:FOLDER`; where transformers knows the architecture it also
holds a CLIPModel with its tokenizer and image processor, compared with the model before it is handed out. Two things
of transformers' own differ from open_clip, and no file can change that:

- Text is not cleaned. open_clip repairs broken characters (ftfy: curly quotes, ligatures, full-width letters, wrongly
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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from torch import Tensor, nn

import pc_clip
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json, write_tensors, write_text
from pc_clip.models.card import write_card
from pc_clip.models.change_model import change_of
from pc_clip.models.clip import SHIPPED, Clip, model_folder
from pc_clip.models.from_transformers import RENAMED
from pc_clip.models.loading import describe_checkpoint, load_model

import open_clip  # isort: skip
from open_clip.push_to_hf_hub import save_config_for_hf  # isort: skip
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer  # isort: skip

TOLERANCE = 1e-5  # of a unit embedding's coordinate, between CLIPModel and open_clip
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's name: OpenAI's


class Unfit(Exception):
    """Why a model cannot be a CLIPModel."""


def export(clip: Clip, out: Path, source: str = "", results: Path = Path("results")) -> float | str:
    """Write a model's folder with its card, whole or not at all.

    source: what the weights came from, a name to keep. results: where figures of these weights are.
    Returns the largest difference between the CLIPModel's unit embeddings and the model's own, or why there is no
    CLIPModel in the folder. Raises UserError where `out` is there and not empty.
    """
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "new"
        try:
            outcome: float | str = write_transformers(clip, folder)
        except Unfit as unfit:
            outcome = str(unfit)
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        write_open_clip(clip, folder)
        about = {
            "pc_clip": pc_clip.__version__, "checkpoint": source or None, "model": _without_path(clip.name),
            "pretrained": _without_path(clip.pretrained), "weights": clip.weights_hash(),
            "start": clip.start and {"weights": clip.start["weights"]},
        }  # fmt: skip
        write_json(folder / "pc_clip.json", about)
        base = " ".join(filter(None, (about["model"], about["pretrained"])))
        write_card(folder, clip, source or out.name, base, results, not isinstance(outcome, str))
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors' files are readable by their owner alone
        folder.rename(out)
    return outcome


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub; returns its address. Raises UserError where the hub refuses it."""
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="pc_clip export")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repository} could not be written: {reason}. The folder is whole in {folder}") from error
    return str(address)


def check_place(out: Path) -> None:
    """Raise UserError unless a folder may be written at `out`."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; give --out another folder")


def _without_path(name: str | None) -> str | None:
    """A path would mean nothing on another machine."""
    return name and Path(name).name


# -- open_clip -----------------------------------------------------------------------------------------


def write_open_clip(clip: Clip, folder: Path) -> None:
    """The files of a `local-dir:` model: configuration, weights, and what its tokenizer and text tower need.

    A Hugging Face text tower is named "." in it: open_clip finds it when started inside of the folder, we anywhere.
    """
    name = f"local-dir:{model_folder(clip.name)}" if clip.name in SHIPPED else clip.name
    config = open_clip.get_model_config(name)
    save_config_for_hf(clip.model, folder / "open_clip_config.json", config)
    write_tensors(folder / "open_clip_model.safetensors", clip.model.state_dict(), {"format": "pt"})
    if hasattr(clip.tokenizer, "save_pretrained"):  # open_clip's own comes with it and is in no folder
        clip.tokenizer.save_pretrained(folder)
    if config["text_cfg"].get("hf_model_name") == ".":
        clip.model.text.config.save_pretrained(folder)
    if name.startswith("local-dir:"):  # what the weights come from may ask that its licence stays with them
        for path in Path(name.removeprefix("local-dir:")).iterdir():
            if path.is_file() and re.match(r"LICENSE|LICENCE|NOTICE|README", path.name, re.IGNORECASE):
                shutil.copyfile(path, folder / path.name)


# -- transformers --------------------------------------------------------------------------------------


def write_transformers(clip: Clip, folder: Path) -> float:
    """The files of a CLIPModel with tokenizer and image processor.

    Returns the largest difference between its unit embeddings and the model's own.
    Raises Unfit where that is above TOLERANCE, and where weights have no place.
    """
    from transformers import CLIPModel

    model = CLIPModel(clip_config(clip)).eval()
    try:
        model.load_state_dict(rename_weights(clip.model.state_dict()))
    except RuntimeError as error:
        raise Unfit(f"CLIPModel has other weights: {' '.join(str(error).partition(':')[2].split())[:200]}") from error
    model.save_pretrained(folder)
    write_tokenizer(clip, folder)
    image_processor(clip).save_pretrained(folder)
    difference = compare(clip, model, folder)
    if not difference <= TOLERANCE:
        raise Unfit(f"its embeddings as a CLIPModel differ by {difference:.1e}")
    return difference


def clip_config(clip: Clip) -> Any:
    """transformers' CLIPConfig of a model, read off its modules. Raises Unfit where CLIPModel has no such part."""
    from transformers import CLIPConfig

    image, tokenizer = clip.model.visual, clip.tokenizer
    text = clip.model if hasattr(clip.model, "transformer") else clip.model.text
    if not isinstance(image, VisionTransformer):
        raise Unfit(f"its image tower is a {type(image).__name__}, and CLIPModel has a plain vision transformer")
    if not isinstance(text, (open_clip.CLIP, TextTransformer)):
        raise Unfit(f"its text tower is a {type(text).__name__}, and CLIPModel has a plain causal transformer")
    if not isinstance(tokenizer, open_clip.SimpleTokenizer) or tokenizer.reduction_fn is not None:
        raise Unfit("its tokenizer is not CLIP's")
    vision_config = {
        **_tower_config(image, image.ln_post), "projection_dim": image.output_dim,
        "image_size": image.image_size[0], "patch_size": image.patch_size[0],
    }  # fmt: skip
    text_config = {
        **_tower_config(text, text.ln_final), "projection_dim": image.output_dim,
        "vocab_size": text.token_embedding.num_embeddings, "max_position_embeddings": len(text.positional_embedding),
        # The text is read at its first end-of-text token. (An eos_token_id of 2 would mean the highest token.)
        "bos_token_id": tokenizer.sot_token_id, "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }  # fmt: skip
    return CLIPConfig(
        vision_config=vision_config, text_config=text_config, projection_dim=image.output_dim, dtype="float32"
    )


def _tower_config(tower: nn.Module, norm: nn.LayerNorm) -> dict[str, Any]:
    first = tower.transformer.resblocks[0]
    gelu = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(getattr(first.mlp.gelu, "approximate", None))
    activation = "quick_gelu" if isinstance(first.mlp.gelu, QuickGELU) else gelu
    if activation is None:
        raise Unfit("CLIPModel does not have its activation")
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": norm.eps,
    }


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain CLIP model of open_clip's under CLIPModel's names; those it does not know as they are."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        tower, part = ("vision_model", name[7:]) if name.startswith("visual.") else ("text_model", name)
        part = part.removeprefix("text.")
        if part == "logit_scale":
            renamed[part] = value.reshape(())
        elif part in ("proj", "text_projection"):  # a matrix there, the weight of a linear layer here
            renamed[f"{'visual' if part == 'proj' else 'text'}_projection.weight"] = value.T
        else:
            for ours, theirs in RENAMED.items():
                part = part.replace(ours, theirs)
            if ".in_proj_" in part:
                for letter, rows in zip("qkv", value.chunk(3)):
                    renamed[f"{tower}.{part.replace('in_proj_', f'{letter}_proj.')}"] = rows
            else:
                renamed[f"{tower}.{part}"] = value
    return renamed


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
def compare(clip: Clip, model: nn.Module, folder: Path) -> float:
    """The largest difference of a coordinate between unit embeddings of a model and of its CLIPModel.

    Both begin with a picture and with texts, so that the transform and the tokenizer in the folder are compared too.
    The picture is one that both crop at the same place.
    """
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    side = model.config.vision_config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side + 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    texts = ["a photo of a cat", "Two LARGE dogs: one sleeps, isn't it?"]
    inputs = processor(text=texts, images=picture, padding="max_length", truncation=True, return_tensors="pt")
    pairs = [
        (clip.model.encode_image(clip.preprocess(picture)[None].to(clip.device)),
         model.get_image_features(inputs.pixel_values)),
        (clip.model.encode_text(clip.tokenizer(texts).to(clip.device)),
         model.get_text_features(inputs.input_ids)),
    ]  # fmt: skip
    return max(
        float((F.normalize(own.float().cpu(), dim=-1) - F.normalize(other.pooler_output, dim=-1)).abs().max())
        for own, other in pairs
    )


# -- the command ---------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run's folder, a .safetensors or a .pt file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--model", help="the architecture, for a checkpoint that does not say; guessed by its shapes")
    parser.add_argument("--pretrained", help="the tag whose image transform such a checkpoint was trained with")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the card's figures are")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub (HF_TOKEN)")
    arguments = parser.parse_args(argv)
    check_place(arguments.out)  # before a large checkpoint is read
    clip = load_model(arguments.checkpoint, arguments.model, arguments.pretrained)
    outcome = export(clip, arguments.out, describe_checkpoint(arguments.checkpoint), arguments.results)
    print(f"wrote {arguments.out}")
    print(f"  open_clip: open_clip.create_model_and_transforms('local-dir:{arguments.out}')")
    if isinstance(outcome, str):
        print(f"  transformers: not written, {outcome}")
    else:
        print(f"  transformers: CLIPModel.from_pretrained('{arguments.out}'), equal to within {outcome:.0e}")
    if change_of(clip) is not None:
        print("  what reads pairs of images and writes about them is not part of it; run.py takes the run itself")
    if arguments.push:
        print(f"  the hub: {push(arguments.out, arguments.push)}")
