"""Draws docs/pictures/idea.png: two pictures, their embeddings' difference, sentences before and after training.

    python -m docs.idea runs/example

An arrow's angle to the difference is the true one: the arc cosine of their cosine. Nothing else of the space is shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import pc_clip
from pc_clip.data.registry import open_dataset

FIRST, SECOND = 4, 3  # test scenes: a large red heart, a small cyan square
SENTENCES = {  # of the pair, in a trained and an untrained family of wordings, and the opposite: colour, width
    "The first image shows larger objects, while the second shows smaller objects.": ("C0", 4),
    "Unlike the second image, which has smaller objects, the first image has larger objects.": ("C1", 1.5),
    "The first image shows smaller objects, while the second shows larger objects.": ("C3", 2),
}


def main(checkpoint: str) -> None:
    scenes = open_dataset("example", split="test")
    pictures = [scenes.load(FIRST), scenes.load(SECOND)]
    figure = plt.figure(figsize=(9, 3.1), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[0.8, 2, 2])
    for row, (picture, name) in enumerate(zip(pictures, ("first", "second"))):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(picture)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    for column, (title, model) in enumerate((("before", "example"), ("after finetuning", checkpoint)), start=1):
        axes = figure.add_subplot(grid[:, column])
        scores = pc_clip.load(model).difference(pictures[:1], pictures[1:], list(SENTENCES))[0].numpy()
        _arrow(axes, 0, "black", 2.5)
        axes.text(1.04, 0, "z(first)\n− z(second)", fontsize=8, va="center")
        for angle, (color, width) in zip(np.arccos(scores), SENTENCES.values()):
            _arrow(axes, angle, color, width)
        axes.set_title(title, fontsize=10)
        axes.set(xlim=(-1.15, 1.5), ylim=(-0.15, 1.1), aspect="equal")
        axes.axis("off")
    lines = [plt.Line2D([], [], color=color, linewidth=width, label=text) for text, (color, width) in SENTENCES.items()]
    figure.legend(handles=lines, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(Path(__file__).parent / "pictures" / "idea.png", dpi=130)


def _arrow(axes: plt.Axes, angle: float, color: str, width: float) -> None:
    """An arrow of length 1 from the origin, at an angle to the difference."""
    end = (np.cos(angle), np.sin(angle))
    axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": width})


if __name__ == "__main__":
    main(sys.argv[1])
