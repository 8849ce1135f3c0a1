"""The weights of the best epoch, by a figure found on validation images: kept while a run goes on, taken at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors, write_text

BEST_FILE = "best.safetensors"
FIGURES_FILE = "validation.jsonl"


class Best:
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
        self.row = self._kept(known) if there else None  # of the weights in the file

    def _kept(self, known: list[dict[str, float]]) -> dict[str, float]:
        path, why = self.run / BEST_FILE, "it does not say of which epoch it is"
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            if "row" in about:
                return json.loads(about["row"])
            for row in known:  # an earlier version wrote the step alone
                if str(row["step"]) == about.get("step"):
                    return row
        except (OSError, SafetensorError) as error:
            why = str(error)
        raise UserError(
            f"{path}, the weights of the best epoch so far, cannot be read ({why}); put a copy of it back, or start "
            "again with --overwrite true"
        )

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
        row = self.row or self._kept(self.rows)
        with safe_open(self.run / BEST_FILE, "pt") as file, torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(name))
        found = f"{self.chosen_by} {row[self.chosen_by]:.4f}"
        return f"the model is that of step {row['step']}, the best of {len(self.rows)} on validation images ({found})"

    def _value(self, row: Mapping[str, float]) -> float:
        value = row[self.chosen_by]
        return value if math.isfinite(value) else -math.inf
