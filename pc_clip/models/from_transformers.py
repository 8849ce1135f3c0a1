"""A folder of transformers' CLIPModel as a model of open_clip's: the way back from models/export.py."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.core.paths import CONFIG_FILE
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # isort: skip

RENAMED = {  # open_clip's names inside a tower: CLIPModel's
    "transformer.resblocks": "encoder.layers",
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding",
    "ln_pre": "pre_layrnorm",  # spelt so there
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.": "self_attn.",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


class Read(NamedTuple):
    """state: weights under open_clip's names. quick: whether its activation is QuickGELU."""

    state: dict[str, Tensor]
    preprocess: dict[str, Any]
    quick: bool


def read(folder: Path) -> Read:
    """The weights, whole or in shards, safetensors or .bin. Raises UserError unless every one of them is there."""
    from transformers import CLIPModel

    kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise UserError(f"{folder} holds a model of transformers of the kind {kind!r}; of these only clip can be read")
    try:
        model, loaded = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"{folder} is not a whole CLIPModel of transformers: {reason}") from error
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        absent = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        raise UserError(f"{folder} lacks {len(absent)} weights of its CLIPModel, first {absent[0]}")
    return Read(_under_open_clips_names(model.state_dict()), _transform(folder), _is_quick(folder, model.config))


def _is_quick(folder: Path, config: Any) -> bool:
    activations = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        named = ", ".join(sorted(activations))
        raise UserError(f"{folder} has the activation {named}; open_clip's towers have both gelu or both quick_gelu")
    return activations == {"quick_gelu"}


def _transform(folder: Path) -> dict[str, Any]:
    """The image transform that the folder says; OpenAI's where it says none, as transformers'.

    A processor is saved as preprocessor_config.json, and since transformers 5 in processor_config.json.
    """
    paths = (folder / "preprocessor_config.json", folder / "processor_config.json")
    path = next((path for path in paths if path.is_file()), paths[0])
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = known.get("image_processor", known)
    size = known.get("size", {})  # a number in files of before transformers 4.20: the shorter side
    resample = known.get("resample", 3)
    if resample not in INTERPOLATIONS:
        raise UserError(f"{path} has resample {resample!r}; open_clip resizes by 2 (bilinear) or 3 (bicubic)")
    return {
        "mean": tuple(known.get("image_mean", OPENAI_DATASET_MEAN)),
        "std": tuple(known.get("image_std", OPENAI_DATASET_STD)),
        "interpolation": INTERPOLATIONS[resample],
        "resize_mode": "squash" if isinstance(size, dict) and "height" in size else "shortest",
    }


def _under_open_clips_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}  # of the query, key and value projections, one matrix in open_clip
    for name, value in state.items():
        if name in PROJECTIONS:
            renamed[PROJECTIONS[name]] = value.T.contiguous()
            continue
        tower, _, part = name.partition(".")
        prefix = {"vision_model": "visual.", "text_model": ""}.get(tower)
        if prefix is None:  # logit_scale
            renamed[name] = value
            continue
        for ours, theirs in RENAMED.items():
            part = part.replace(theirs, ours)
        if match := re.search(r"([qkv])_proj\.", part):
            thirds.setdefault(prefix + part.replace(match.group(), "in_proj_"), {})[match[1]] = value
        else:
            renamed[prefix + part] = value
    return renamed | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in thirds.items()}
