"""Results as a table: `python -m pc_clip.report results/` reads every JSON below a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from pc_clip.errors import UserError, run_script


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All results in files and below folders. Raises UserError where there are none."""
    paths = list(paths)
    files = [f for path in paths for f in (sorted(path.rglob("*.json")) if path.is_dir() else [path]) if f.is_file()]
    results = []
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"model", "evaluation", "dataset", "metrics"} <= content.keys():
            results.append(content)
    if not results:
        raise UserError(f"no results in {', '.join(map(str, paths))}; run.py writes them")
    return results


def long_table(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure: model, evaluation, dataset, about (which sentences or attribute), metric, value, n."""
    rows = [
        (r["model"], r["evaluation"], r["dataset"], r.get("about", ""), metric, value, r["n"])
        for r in results
        for metric, value in r["metrics"].items()
    ]
    return pd.DataFrame(rows, columns=["model", "evaluation", "dataset", "about", "metric", "value", "n"])


def show(results: Iterable[dict[str, Any]]) -> None:
    """Print results: one block an evaluation, one column a model. Fractions are shown in per cent."""
    table = long_table(results)
    for (evaluation, dataset, about), block in table.groupby(["evaluation", "dataset", "about"], sort=False):
        wide = block.pivot_table(index="metric", columns="model", values="value", sort=False)
        print(f"\n{evaluation} on {dataset}{about and f', {about}'} (n = {block.n.max()})")
        print(
            wide.map(lambda v: f"{100 * v:.1f}" if abs(v) <= 1 else f"{v:g}")
            .rename_axis(None)
            .rename_axis(None, axis=1)
            .to_string()
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip.report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="*", default=[Path("results")])
    show(read(parser.parse_args().paths))


if __name__ == "__main__":
    run_script(main)
