"""The tools beside the three scripts: `python -m pc_clip NAME ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pc_clip.core.errors import UserError, nearest, run_script

TOOLS = {  # name -> (module with a main(argv), what it does)
    "datasets": ("pc_clip.data.registry", "the data sets: found or not, what to fetch; --download NAME"),
    "embeddings": ("pc_clip.data.embed", "embed the images of a data set once, on many processes"),
    "audit": ("pc_clip.write.audit", "what sentences are like: lengths, duplicates, words from nowhere"),
    "blind": ("pc_clip.evals.blind_baselines", "what statements give away without an image"),
    "report": ("pc_clip.report.page", "results and runs as one page, Markdown and CSV"),
    "study": ("pc_clip.report.study", "variants x seeds -> one table"),
    "demo": ("pc_clip.demo.page", "a page in the browser: rank, compare and classify pictures"),
    "export": ("pc_clip.models.export", "a checkpoint for open_clip and transformers"),
    "release": ("pc_clip.release.authors", "the PC-CLIP authors' checkpoint, embeddings and differences"),
    "benchmark": ("pc_clip.release.benchmark", "the package clip-benchmark on a model of ours"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a tool by its name, or list them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m pc_clip NAME ...   (NAME --help says more)\n")
        print("\n".join(f"  {name:<12}{line}" for name, (_, line) in TOOLS.items()))
        return
    if argv[0] not in TOOLS:
        raise UserError(f"there is no tool {argv[0]!r}. {nearest(argv[0], TOOLS)}")
    importlib.import_module(TOOLS[argv[0]][0]).main(argv[1:])


def command() -> None:
    run_script(main)


if __name__ == "__main__":
    command()
