"""Pictures for people, drawn by matplotlib: contact sheets, sheets of pairs before and after a change, maps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from pc_clip.data.dataset import Change, Dataset
from pc_clip.data.pairs import Caption
from pc_clip.evals.result import Picture

COLUMNS = 8  # of a contact sheet
REFERENCES, WORDS = 2, 2  # that are shown of a pair
MARKS = "osD^vP*X"  # shapes say the same as colours, for people who cannot tell these apart


def contact_sheet(images: Sequence[Image.Image], title: str, labels: Sequence[str]) -> Image.Image:
    """Images in reading order, each with its label below."""
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(12, 1.75 * rows + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, 110), fontsize=14)
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for axes, image, label in zip(all_axes, images, labels):
        axes.imshow(image)
        axes.set_title(label, y=-0.15, fontsize=10, color="dimgrey")
    return _rendered(figure)


def change_sheet(data: Dataset, shown: Sequence[tuple[Change, Caption, bool | None]], title: str) -> Picture:
    """A sheet of pairs: before, after, and the decoder's last-layer attention in both for two of the words.

    shown: of (change, what the model says, whether that was judged right, None for not judged). What the model says is
    green where it was judged right, red where wrong, else black; below it is what people say.
    """
    row = {key: n for n, key in enumerate(data.ids)}
    columns = 2 if all(caption.attention is None for _, caption, _ in shown) else 2 + 2 * WORDS
    rows = -(-len(shown) // 2)
    height = rows * (8 / columns + 1.2) + 1  # inches; two pairs a row, a line of text is 0.25
    figure = Figure(figsize=(16, height))
    figure.suptitle(f"{title}; bold: what the model says, below it: what people say", fontsize=14)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    figure.subplots_adjust(0.01, 1 / height, 0.99, 1 - 0.8 / height, wspace=0.05, hspace=1.2 * columns / 8)
    for axes in grid.ravel():
        axes.axis("off")
    for axes, (change, caption, right) in zip(grid.reshape(-1, columns), shown):
        images = [data.load(row[key]) for key in (change.before, change.after)]
        for place, image, name in zip(axes, images, ("before", f"after  {change.kind}")):
            place.imshow(image)
            place.set_title(name, fontsize=9, color="dimgrey")
        tokens, attention = caption.tokens, caption.attention
        for n, word in enumerate(chosen_words(tokens, attention) if attention is not None else ()):
            for place, image, looks in zip(axes[2 + 2 * n :], images, attention[word]):
                _overlay(place, image, looks, float(attention[word].max()))
                place.set_title(f"“{tokens[word]}”", fontsize=9)
        colour, mark = {True: ("green", "✓ "), False: ("red", "✗ "), None: ("black", "")}[right]
        texts = [(mark + (caption.text or "(nothing)"), {"color": colour, "weight": "bold"})]
        texts += [(f"– {reference}", {"color": "dimgrey"}) for reference in change.sentences[:REFERENCES]]
        for n, (text, look) in enumerate(texts):
            axes[0].annotate(
                text, (0, 0), (0, -6 - 14 * n), "axes fraction", "offset points", va="top", parse_math=False, **look
            )
    alt = f"{len(shown)} pairs of images before and after a change, what the model says and what people say"
    if judged := [right for *_, right in shown if right is not None]:
        alt += f"; {sum(judged)} of {len(judged)} sentences are right"
    return Picture(_rendered(figure), alt)


def chosen_words(tokens: Sequence[str], attention: np.ndarray) -> list[int]:
    """The places of two words in a sentence that name something, in its order: those looked at most sharply."""
    sharpness = attention.max(axis=(1, 2, 3)) / attention.mean(axis=(1, 2, 3))
    words = {  # the first place of each
        tokens[n]: n
        for n in reversed(range(len(tokens)))
        if tokens[n].isalpha() and len(tokens[n]) > 1 and tokens[n].lower() not in ENGLISH_STOP_WORDS
    }
    return sorted(sorted(words.values(), key=lambda n: -sharpness[n])[:WORDS])


def _overlay(axes: Axes, image: Image.Image, looks: np.ndarray, highest: float) -> None:
    """The middle square of an image, as CLIP's transform takes it, in grey, warm where it was looked at."""
    extent = (0, 1, 0, 1)
    axes.imshow(ImageOps.fit(image.convert("L"), (min(image.size),) * 2), cmap="gray", extent=extent)
    axes.imshow(looks, cmap="inferno", vmin=0, vmax=highest, alpha=0.6, interpolation="bicubic", extent=extent)


def draw_map(title: str, panels: Sequence[tuple], names: dict[int, str], note: str) -> Image.Image:
    """Points of images (small) and of texts (large) by class, panels side by side on one scale.

    panels: of (title, places of images [P, 2], their classes [P], places of texts [T, 2], their classes [T]);
    names: of the classes that have a colour. One that is itself called after a colour has that colour.
    """
    figure = Figure(figsize=(7.2, 5.4), dpi=125, layout="constrained")  # large letters, for a phone
    figure.suptitle(title, fontsize=16)
    handles = {}
    every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (when, images, image_class, texts, text_class) in zip(every, panels):
        axes.set_title(when, fontsize=14)
        axes.set(xticks=[], yticks=[])
        for places, target, size in ((images, image_class, 26), (texts, text_class, 210)):
            axes.scatter(*places[~np.isin(target, [*names])].T, s=size, color="lightgrey")
            for n, (number, name) in enumerate(names.items()):
                colour = name if is_color_like(name) else colormaps["tab10"](n)
                chosen = places[target == number]
                handles[name] = axes.scatter(
                    *chosen.T, s=size, color=colour, marker=MARKS[n], edgecolors="black", linewidths=0.5
                )
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, title=textwrap.fill(note, 90))
    return _rendered(figure)


def _rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
