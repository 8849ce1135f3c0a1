"""Checkpoints: a whole model in one safetensors file, and the state a run continues from.

Files are written beside their place and moved into it once they are on the disk, so an interrupted save leaves the
last good one, and no older copies need be kept.
Nothing is unpickled freely: other people's .pt files are read with torch's weights-only loader.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import pc_clip
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors
from pc_clip.core.paths import MODEL_FILE, checkpoint_file
from pc_clip.models.change_model import PREFIX, ChangeClip, ChangeModel
from pc_clip.models.clip import Clip, guess_architecture, preprocess_of_tag

# -- models --------------------------------------------------------------------------------------------


def save_model(path: Path, clip: Clip) -> None:
    """Every weight of a model under open_clip's names, and what it was made from, in one file.

    What reads pairs of images lies beside them, under names that begin with change.
    """
    preprocess = clip.model.visual.preprocess_cfg
    about = {
        "model": clip.name,
        "pretrained": clip.pretrained,
        "preprocess": preprocess,
        "pc_clip": pc_clip.__version__,
    }
    weights = clip.model.state_dict() | clip.extra_weights()
    write_tensors(path, weights, {"format": "pt", "pc_clip": json.dumps(about | clip.about())})


def load_model(path: str | Path, name: str | None = None, pretrained: str | None = None, device: str = "cpu") -> Clip:
    """A model from a checkpoint: a run's folder, a safetensors file of ours, or anybody's state dict.

    name: the architecture, for files that do not say; guessed from the shapes when not given.
    Raises UserError for a file that is absent, cut short, of another architecture, or not only weights.
    """
    path = checkpoint_file(path)
    state, about = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    _check_name(path, name, about.get("model"))
    name = name or about.get("model") or guess_architecture(state)
    pretrained = pretrained or about.get("pretrained")
    preprocess = about.get("preprocess") or preprocess_of_tag(name, pretrained)
    clip = Clip.create(name, load_weights=False, device=device, preprocess=preprocess)
    clip.pretrained = pretrained
    beside = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
    _load_strictly(clip, state, path)
    if beside and "change" not in about:
        raise UserError(
            f"{path} has {len(beside)} weights for pairs of images, but not what describes them: it was written again "
            "by a program that dropped the file's metadata; take the file as it was"
        )
    if "change" in about:
        clip = ChangeClip.of(clip, ChangeModel.build(clip, about["change"], beside, path))
    return clip


def _check_name(path: Path, asked: str | None, said: str | None) -> None:
    """What differs in its activations alone has weights of the same shapes, and would be loaded without a word."""
    elsewhere = any((name or "").startswith("local-dir:") for name in (asked, said))  # folders may have been moved
    if asked and said and asked != said and not elsewhere:
        raise UserError(f"{path} says that it is of {said}, not {asked}; leave --model.name out")


def _load_strictly(clip: Clip, state: dict[str, Tensor], path: Path) -> None:
    own = clip.model.state_dict()
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        found = []
        if shapes:
            k = sorted(shapes)[0]
            found.append(f"{k} has shape {list(state[k].shape)} there and {list(own[k].shape)} here")
        if missing:
            found.append(f"{len(missing)} weights are missing (first {sorted(missing)[0]})")
        if extra:
            found.append(f"{len(extra)} are not of this architecture (first {sorted(extra)[0]})")
        raise UserError(
            f"{path} does not fit {clip.name}: {'; '.join(found)}. Name its architecture with --model.name."
        )
    clip.model.load_state_dict(state)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("pc_clip", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); it may have been cut short") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} holds more than weights and was not opened, because such a file can run code: {reason[:200]}. "
            "Ask for it as safetensors, or as a plain state dict."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "it ends too early"
        raise UserError(f"{path} is not a whole checkpoint ({reason}); it may have been cut short") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} is no state dict of a model: it holds {type(found).__name__}")
    for prefix in ("module.", "_orig_mod."):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def describe_checkpoint(path: str | Path | None) -> str:
    """A short name for results: the run's, or the file's."""
    if path is None:
        return "pretrained"
    path = Path(path)
    return path.name if path.is_dir() else path.parent.name if path.name == MODEL_FILE else path.stem
