"""The state that a run continues from: trained weights, optimizer moments, the method's memory, the step.

It is written beside its place and moved into it once it is on the disk, so that an interrupted save leaves the last
good one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors
from pc_clip.core.paths import STATE_FILE


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
