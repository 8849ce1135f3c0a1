"""Weights files: read safely, mapped to open_clip's names, loaded completely or not at all."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pc_clip.core.errors import UserError
from pc_clip.models.clip import open_clip  # noqa: F401  (fixes torchvision before open_clip is imported)

from open_clip.convert import convert_state_dict  # isort: skip
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed  # isort: skip

log = logging.getLogger(__name__)

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # settings among the weights of OpenAI's archives
WRAPPERS = ("module.", "_orig_mod.", "model.", "clip.")  # what DDP, torch.compile and others put before every name


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Every tensor of the model comes from `state`, and every tensor of `state` goes into the model, or UserError."""
    try:
        model.load_state_dict(_as_open_clip(model, state) if hasattr(model, "logit_scale") else state)
    except (RuntimeError, AssertionError) as error:  # load_state_dict raises the first, open_clip's resizing the second
        reason = textwrap.shorten(str(error).partition(":")[2] or f"{error}.", 300, placeholder=" ...")
        raise UserError(f"{path} does not fit {name}: {reason} Name its architecture with --model.name.") from error


def _as_open_clip(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under open_clip's names and in its shapes, as open_clip's own loader brings them there."""
    state = convert_state_dict(model, dict(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):
        there = getattr(model, scalar, None)
        if scalar in state and there is not None and there.ndim != state[scalar].ndim:
            state[scalar] = state[scalar].reshape(there.shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # of transformers before 4.31
    before = {name: value.shape for name, value in state.items()}
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    for name in (name for name, value in state.items() if value.shape != before[name]):
        log.warning("%s is resized from %s to %s", name, list(before[name]), list(state[name].shape))
    return state


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file without what wrappers put before their names, and what a file of ours says of itself."""
    state, about = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, about


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("pc_clip", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); it may have been cut short") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(40)
    if start and not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of before torch 1.6
        raise UserError(
            f"{path} was not written by torch.save: it begins with {start!r}. If that is a page or a pointer of "
            f"Git LFS, fetch the file itself; weights of safetensors need the ending .safetensors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        # What torch says before this is how to load it unsafely.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition(". Please use")[0].split("\n")[0]
        raise UserError(
            f"{path} holds more than weights and was not opened, because such a file can run code ({reason[:200]}). "
            "Ask for it as safetensors, or as a plain state dict."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, struct.error) as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript archive, a program and not a file of weights. If you trust it, convert it: "
                f'torch.save(torch.jit.load("{path}", "cpu").state_dict(), "weights.pt")'
            ) from error
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or "it ends too early"
        raise UserError(f"{path} is not a whole checkpoint ({reason}); it may have been cut short") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict of a model: it holds {type(state).__name__}")
    return {name: value for name, value in state.items() if name not in NO_WEIGHTS}
