"""Checkpoints: a whole model in one safetensors file, and the state a run continues from.

Files are written beside their place and moved into it once they are on the disk, so an interrupted save leaves the
last good one, and no older copies need be kept.
Nothing is unpickled freely: other people's .pt files are read with torch's weights-only loader.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import pc_clip
from pc_clip.change.model import PREFIX, ChangeModel
from pc_clip.clip import Clip, guess_architecture, preprocess_of_tag
from pc_clip.errors import UserError
from pc_clip.files import write_tensors

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"


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
    weights = dict(clip.model.state_dict())
    if clip.change is not None:
        about["change"] = clip.change.describe()
        weights |= {PREFIX + name: value for name, value in clip.change.state_dict().items()}
    write_tensors(path, weights, {"format": "pt", "pc_clip": json.dumps(about)})


def find(path: str | Path) -> Path:
    """The file of a checkpoint: a run's, or the one that is named. Raises UserError where there is none."""
    path = Path(path)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file() and (path / STATE_FILE).is_file():
            raise UserError(f"the run {path} is not finished; continue it with finetune.py --resume true")
        path = path / MODEL_FILE
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}. Give a run's folder, a .safetensors or a .pt file.")
    return path


def load_model(path: str | Path, name: str | None = None, pretrained: str | None = None, device: str = "cpu") -> Clip:
    """A model from a checkpoint: a run's folder, a safetensors file of ours, or anybody's state dict.

    name: the architecture, for files that do not say; guessed from the shapes when not given.
    Raises UserError for a file that is absent, cut short, of another architecture, or not only weights.
    """
    path = find(path)
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
        clip.change = ChangeModel.build(clip, about["change"], beside, path)
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


# -- the state of a run --------------------------------------------------------------------------------


class State(NamedTuple):
    """What was put back: the number of steps done, and what the method keeps besides its weights."""

    step: int
    memory: dict[str, Tensor]


def save_state(
    run: Path,
    step: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """All that the next step depends on: the trained weights, the optimizer's moments, the method's memory, the step.

    It does not depend on the number of processes. A checksum lies with it, which safetensors has none of.
    """
    tensors = {f"weight.{name}": value for name, value in parameters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors |= {f"memory.{name}": value for name, value in memory.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(run / STATE_FILE, tensors, {"step": str(step), "checksum": _checksum(tensors, str(step))})


def load_state(run: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    """Put a saved state back: weights and optimizer here, the memory by whom it belongs to. Step 0 where none is saved.

    Raises UserError for a file that is cut short, damaged or of other parameters; nothing has been put back then.
    """
    path = run / STATE_FILE
    if not path.is_file():
        return State(0, {})
    step, tensors = _read_state(path)
    saved = {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")}
    if saved != parameters.keys():
        other = sorted(saved ^ parameters.keys())[0]
        raise UserError(f"{path} was trained with other parameters ({other}); continue it with its own config.yaml")
    for name, parameter in parameters.items():
        if tensors[f"weight.{name}"].shape != parameter.shape:
            shapes = f"{list(tensors[f'weight.{name}'].shape)} there, {list(parameter.shape)} here"
            raise UserError(f"{path} is of another model: {name} is {shapes}; continue it with its own config.yaml")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return State(step, {key.removeprefix("memory."): v for key, v in tensors.items() if key.startswith("memory.")})


def _read_state(path: Path) -> tuple[int, dict[str, Tensor]]:
    instead = "put a copy of it back, or start again with --overwrite true"
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole file ({error}); {instead}") from error
    step = about.get("step", "")
    # Files of earlier versions have no checksum.
    found = _checksum(tensors, step)
    if not step.isdecimal() or about.get("checksum", found) != found:
        raise UserError(f"{path} is damaged: its content is not what was written; {instead}")
    return int(step), tensors


def _checksum(tensors: dict[str, Tensor], step: str) -> str:
    """CRC-32 of the step and of names, shapes, types and values. A GiB takes 0.16 s (its writing: 2.2 s)."""
    found = zlib.crc32(step.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found = zlib.crc32(f"{name}{tuple(value.shape)}{value.dtype}".encode(), found)
        if value.numel():
            found = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def describe_checkpoint(path: str | Path | None) -> str:
    """A short name for results: the run's, or the file's."""
    if path is None:
        return "pretrained"
    path = Path(path)
    return path.name if path.is_dir() else path.parent.name if path.name == MODEL_FILE else path.stem
