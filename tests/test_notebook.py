"""The notebook, run as it stands but for the number of steps."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(small_example):
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[4:]), "run it and keep its outputs"
    code = ["".join(cell["source"]) for cell in cells]
    assert sum("STEPS = 2400" in each for each in code) == 1
    smaller = {"STEPS = 2400": "STEPS = 4", '"notebook"])': '"notebook", "--n_images", "200", "--n_pairs", "300"])'}
    names: dict[str, object] = {}
    for each in code:
        for one, other in smaller.items():
            each = each.replace(one, other)
        exec(compile(each, str(NOTEBOOK), "exec"), names)
    assert names["table"].loc["unseen"].between(0, 100).all()
    plt.close("all")
