"""The weights of the best epoch, by a figure found on validation images: kept while a run goes on, taken at its end."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from pc_clip.files import write_tensors, write_text

log = logging.getLogger(__name__)

BEST_FILE = "best.safetensors"
FIGURES_FILE = "validation.jsonl"


class Best:
    """A run's validation.jsonl, one line an epoch, and best.safetensors, the weights of the best of them.

    A run that is continued from step `done` forgets what came later. The file may then hold a later epoch; that one
    was better than all before it, and will be when it comes again.
    """

    def __init__(self, run: Path, done: int, parameters: Mapping[str, nn.Parameter], chosen_by: str) -> None:
        self.run, self.parameters, self.chosen_by = run, parameters, chosen_by
        path = run / FIGURES_FILE
        lines = path.read_text().splitlines() if path.is_file() and done else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.rows = [row for row in rows if row["step"] <= done]

    def after(self, step: int, validate: Callable[[], dict[str, float]]) -> None:
        """Find the figures after a step, and keep the weights if they are the best so far; the earlier wins a tie."""
        if any(row["step"] == step for row in self.rows):
            return
        figures = validate()
        row = {"step": step, **figures}
        tqdm.write(f"step {step}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        if not self.rows or _value(row, self.chosen_by) > max(_value(known, self.chosen_by) for known in self.rows):
            weights = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            write_tensors(self.run / BEST_FILE, weights, {"format": "pt", "step": str(step)})
        self.rows.append(row)
        write_text(self.run / FIGURES_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))

    def restore(self) -> str:
        """Put the best weights in the place of the last; says which they are."""
        best = max(self.rows, key=lambda row: (_value(row, self.chosen_by), -row["step"]))
        with safe_open(self.run / BEST_FILE, "pt") as file, torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(name))
        found = f"{self.chosen_by} {best[self.chosen_by]:.4f}"
        return f"the model is that of step {best['step']}, the best of {len(self.rows)} on validation images ({found})"


def _value(row: Mapping[str, float], name: str) -> float:
    return row[name] if math.isfinite(row[name]) else -math.inf
