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
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core.cache import CorruptFileError, read_checked, write_checked
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.paths import STATE_FILE


class State(NamedTuple):
    """Restored training state: step and method state."""

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
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    tensors |= {f"memory.{name}": value for name, value in memory.items()}
    write_checked(run / STATE_FILE, tensors, {"step": str(step)})


def load_state(run: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    """Put a saved state back: weights and optimizer here, the memory by whom it belongs to. Step 0 where none is saved.

    Raises UserError for a file that is cut short, damaged or of other parameters; nothing has been put back then.
    """
    path = run / STATE_FILE
    if not path.is_file():
        return State(0, {})
    try:
        tensors, about = read_checked(path, verify=True)
    except CorruptFileError as error:
        raise UserError(f"{error}; put a copy of it back, or start again with --overwrite true") from error
    saved: dict[str, dict[str, Tensor]] = {"weight": {}, "optimizer": {}, "memory": {}}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        saved[kind][name] = value
    shapes = {name: value.shape for name, value in parameters.items()}
    if shapes != (there := {name: value.shape for name, value in saved["weight"].items()}):
        other = min(name for name in shapes.keys() | there.keys() if shapes.get(name) != there.get(name))
        raise UserError(f"{path} was trained with other parameters ({other}); continue it with its own config.yaml")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in saved["optimizer"].items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved["weight"][name])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return State(int(about["step"]), saved["memory"])


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
        """Raises UserError where the weights that the lines speak of are not there, or cannot be read."""
        self.run, self.parameters, self.chosen_by = run, parameters, chosen_by
        path = run / FIGURES_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() and done else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= done]
        self.row: dict[str, float] | None = None  # of the weights in the file
        if done and (self.rows or (run / BEST_FILE).is_file()):
            self.row = json.loads(read_checked(run / BEST_FILE)[1]["row"])

    def after(self, step: int, validate: Callable[[], dict[str, float]]) -> None:
        """Find the figures after a step, and keep the weights if they are the best so far; the earlier wins a tie."""
        row = {"step": step, **validate()}
        tqdm.write(f"step {step}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "step"))
        if self.row is None or self._value(row) > self._value(self.row):
            write_checked(self.run / BEST_FILE, self.parameters, {"format": "pt", "row": json.dumps(row)})
            self.row = row
        self.rows.append(row)
        write_text(self.run / FIGURES_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))

    def restore(self) -> str:
        """Restore the best weights.  -> a sentence that says which they are"""
        weights, about = read_checked(self.run / BEST_FILE)
        row = json.loads(about["row"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        value = f"{self.chosen_by} {row[self.chosen_by]:.4f}"
        return f"the model is that of step {row['step']}, the best of {len(self.rows)} on validation images ({value})"

    def _value(self, row: Mapping[str, float]) -> float:
        value = row[self.chosen_by]
        return value if math.isfinite(value) else -math.inf
