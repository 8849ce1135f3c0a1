"""A page in the browser to try a model on pictures: `python -m pc_clip demo [--checkpoint RUN] [--images FOLDER]`.

Three tabs: put pictures in the order of a sentence, ask how two pictures differ, classify one; by the model as it was
and the finetuned one side by side. The page is at a local address, and nothing leaves the machine unless --share asks
for a public link. A visitor cannot name files: pictures are those of --images, and those that are dropped on the page.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pc_clip.core.errors import UserError
from pc_clip.core.paths import MODEL_FILE
from pc_clip.demo.pictures import UPLOADS, Desk, Pictures
from pc_clip.evals import base_of
from pc_clip.interface.model import Model, load

RUNS = ("runs/quickstart/any_wording-seed0", "runs/example")  # what the quickstart and the second command leave
MOST = "20mb"  # of a picture that is dropped
TITLE = "# Differences between pictures, as a CLIP model sees them\n"
ABOUT = {  # by the models that are there
    "before finetuned": "*before* is the model as it was, *finetuned* the same model after finetuning.",
    "before": "This is the embedded example as it is, which knows drawn scenes and no photographs. `make demo` "
    "finetunes it first, which takes about three minutes once; `--checkpoint` shows a model of your own.",
    "finetuned": "The model that this one was finetuned from is not at hand, so it stands alone.",
}
SENTENCES = """The first image shows something larger than the second.
The first image shows a circle, while the second shows a square.
The second image is darker than the first."""


def models_of(checkpoint: str | None) -> dict[str, Model]:
    """The model as it was and the finetuned one, by name; of a finetuned one whose start is unknown, that one alone.

    checkpoint: a run or a file; the first of RUNS that is there unless given, and the example as it is without any.
    Raises UserError for anything but a checkpoint.
    """
    checkpoint = checkpoint or next((run for run in RUNS if (Path(run) / MODEL_FILE).is_file()), None)
    if checkpoint is None:
        return {"before": load("example")}
    tuned = load(checkpoint)
    start = base_of(tuned.clip)
    return ({"before": Model(start)} if start else {}) | {"finetuned": tuned}


def build(desk: Desk) -> Any:
    """The page of a desk, as gradio's Blocks. Raises UserError without gradio."""
    gradio = _gradio()
    names, folder = list(desk.models), tempfile.mkdtemp(prefix="pc_clip_demo_")

    def asked(function: Callable[..., Any]) -> Callable[..., Any]:
        """Show a UserError as a sentence on the page."""

        def answer(*values: Any, progress: Any = gradio.Progress()) -> Any:  # noqa: B008  (gradio finds it so)
            try:
                return function(*values, progress)
            except UserError as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from error

        return answer

    @asked
    def rank(sentence: str, against: str, files: list[str] | None, progress: Any) -> Any:
        galleries, agreement, table = desk.rank(sentence, against or "", files, progress)
        path = Path(folder) / "ranking.csv"
        table.to_csv(path, index=False, float_format="%.5f", quoting=csv.QUOTE_NONNUMERIC)
        return [*(galleries[name] for name in names), agreement, gradio.update(value=str(path), interactive=True)]

    @asked
    def compare(first: str | None, second: str | None, sentences: str, progress: Any) -> Any:
        rows = desk.compare(first, second, sentences)
        return bars_of(rows), rows

    @asked
    def classify(picture: str | None, classes: str, comparisons: str, progress: Any) -> Any:
        shares = desk.classify(picture, classes, comparisons or "")
        return [gradio.update(value=shares.get(title), visible=title in shares) for title in ways]

    ways = [f"{name}{how}" for name in names for how in ("", ", with comparisons")]
    with gradio.Blocks(title="pc_clip", analytics_enabled=False) as page:
        gradio.Markdown(TITLE + ABOUT[" ".join(names)])
        with gradio.Tab("Rank"):
            with gradio.Row():
                sentence = gradio.Textbox(label="A sentence or phrase", value="a large object")
                against = gradio.Textbox(label="Its opposite (optional)", value="a small object")
            files = gradio.File(
                label=f"Pictures to rank, at most {UPLOADS}; none for those of the page",
                file_count="multiple", file_types=["image"], height=120,
            )  # fmt: skip
            go = gradio.Button("Rank", variant="primary", elem_id="go-rank")
            agreement = gradio.Markdown()
            with gradio.Row():
                galleries = [gradio.Gallery(label=name, columns=4, height=420, object_fit="contain") for name in names]
            download = gradio.DownloadButton("Download the ranking (CSV)", interactive=False)
            go.click(rank, [sentence, against, files], [*galleries, agreement, download], api_visibility="private")
        with gradio.Tab("Compare two"):
            with gradio.Row():
                pair = [
                    gradio.Image(label=f"{which} picture", type="filepath", height=260) for which in ("First", "Second")
                ]
            sentences = gradio.Textbox(label="Sentences, one a line", value=SENTENCES, lines=4)
            go = gradio.Button("Compare", variant="primary", elem_id="go-compare")
            bars = gradio.Plot(label="Cosine with first minus second")
            scores = gradio.Dataframe(label="Scores", wrap=True, interactive=False)
            go.click(compare, [*pair, sentences], [bars, scores], api_visibility="private")
        with gradio.Tab("Classify"):
            with gradio.Row():
                picture = gradio.Image(label="Picture", type="filepath", height=260)
                with gradio.Column():
                    classes = gradio.Textbox(
                        label="Classes, one a line", value="circle\nsquare\ntriangle\nstar", lines=4
                    )
                    comparisons = gradio.Textbox(
                        label="Comparisons, one a line (optional): class | another class | how the first differs",
                        lines=2,
                    )
            go = gradio.Button("Classify", variant="primary", elem_id="go-classify")
            with gradio.Row():
                labels = [gradio.Label(label=title, num_top_classes=5) for title in ways]
            go.click(classify, [picture, classes, comparisons], labels, api_visibility="private")
    return page


def bars_of(rows: pd.DataFrame) -> Figure:
    """Scores of `Desk.compare`: a group of bars a sentence, in the order given, a colour a model."""
    table = rows.pivot_table(index="sentence", columns="model", values="score", sort=False)
    figure = Figure(figsize=(9, 0.9 + 0.55 * len(table)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(table.columns)
    for n, name in enumerate(table):
        axes.barh([row + n * height for row in range(len(table))], table[name], height, label=name)
    places = [row + (len(table.columns) - 1) * height / 2 for row in range(len(table))]
    axes.set_yticks(places, [textwrap.fill(sentence, 60) for sentence in table.index])
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("cosine with the difference, first picture minus second")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install 'pc_clip[demo]', or pip install gradio") from error
    return gradio


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="a run or a file of weights; the quickstart's unless given")
    parser.add_argument("--images", help="a folder of pictures; the example's scenes unless given")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also make a public link, by gradio's servers")
    arguments = parser.parse_args(argv)
    _gradio()
    page = build(Desk(models_of(arguments.checkpoint), Pictures.of(arguments.images)))
    page.queue().launch(
        server_name="127.0.0.1", server_port=arguments.port, share=arguments.share, max_file_size=MOST, footer_links=[]
    )
