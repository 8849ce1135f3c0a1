"""The state that a run continues from: trained weights, optimizer moments, the method's memory, the step.

It is written beside its place and moved into it once it is on the disk, so that an interrupted save leaves the last
good one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core.cache import tensor_checksum
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors, write_text
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
    write_tensors(
        run / STATE_FILE, tensors, {"step": str(step), "checksum": tensor_checksum(tensors, {"step": str(step)})}
    )


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
    if not step.isdecimal() or about.get("checksum") != tensor_checksum(tensors, {"step": step}):
        raise UserError(f"{path} is damaged: its content is not what was written; {instead}")
    return int(step), tensors


# -- the best epoch ---------------------------------------------------------------------------------------

BEST_FILE = "best.safetensors"
FIGURES_FILE = "validation.jsonl"


class BestCheckpoint:
    """A run's validation.jsonl, one line an epoch, and best.safetensors, the weights of the best of them.

    The file of weights says itself of which epoch they are, with the figures found then. A run that is continued from
    step `done` forgets the lines of what came later; the file may then hold a later epoch. That one was better than all
    before it, and stays until a better one comes.
    """

    def __init__(self, run: Path, done: int, parameters: Mapping[str, nn.Parameter], chosen_by: str) -> None:
        """Raises UserError where the weights that the lines speak of are not there."""
        self.run, self.parameters, self.chosen_by = run, parameters, chosen_by
        path = run / FIGURES_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() and done else []
        known = [json.loads(line) for line in lines]
        self.rows = [row for row in known if row["step"] <= done]
        there = done and (self.rows or (run / BEST_FILE).is_file())
        self.row = self._read_row() if there else None  # of the weights in the file

    def _read_row(self) -> dict[str, float]:
        path = self.run / BEST_FILE
        try:
            with safe_open(path, "pt") as file:
                return json.loads((file.metadata() or {})["row"])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}, the weights of the best epoch so far, cannot be read ({error}); put a copy of it back, or "
                "start again with --overwrite true"
            ) from error

    def after(self, step: int, validate: Callable[[], dict[str, float]]) -> None:
        """Find the figures after a step, and keep the weights if they are the best so far; the earlier wins a tie."""
        figures = validate()
        row = {"step": step, **figures}
        tqdm.write(f"step {step}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        if self.row is None or self._value(row) > self._value(self.row):
            weights = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            write_tensors(self.run / BEST_FILE, weights, {"format": "pt", "row": json.dumps(row)})
            self.row = row
        self.rows.append(row)
        write_text(self.run / FIGURES_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))

    def restore(self) -> str:
        """Put the best weights in the place of the last; says which they are."""
        row = self.row or self._read_row()
        with safe_open(self.run / BEST_FILE, "pt") as file, torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(name))
        found = f"{self.chosen_by} {row[self.chosen_by]:.4f}"
        return f"the model is that of step {row['step']}, the best of {len(self.rows)} on validation images ({found})"

    def _value(self, row: Mapping[str, float]) -> float:
        value = row[self.chosen_by]
        return value if math.isfinite(value) else -math.inf
