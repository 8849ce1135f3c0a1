"""How a figure is written: fractions in per cent with one decimal, all else as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

# Figures between -1 and 1 that are no share of anything, by a word of their name.
_PLAIN = {"alignment", "alpha", "cosine", "images", "modality", "spearman"}

# What finetune.py logs, where the name alone does not say it.
_LOGGED = {
    "mean_negative": "mean cosine of a batch's pairs that do not belong together",
    "hardest_negative": "cosine with the nearest of a batch that does not belong to it, on average",
    "likely_false_negatives": "share of a batch's wrong pairs that are likely right: all words of the caption are in "
    "the captions of the other image",
    "identical_negatives": "share of a batch's wrong pairs of which the very same sentence is told",
}


def logged(name: str) -> str:
    """A logged figure in plain words; empty for a name that says enough."""
    return _LOGGED.get(name, "")


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a figure is shown in per cent: all its values lie between -1 and 1, and its name is no other unit's.

    CIDEr always is, as papers print it, though it may be above 1.
    """
    words = set(metric.split("_"))
    small = all(abs(value) <= 1 for value in values if math.isfinite(value))
    return "cider" in words or (small and not _PLAIN & words)


def figure(value: float | None, share: bool) -> str:
    """A number as people read it: 87.6 for the share 0.876; 3 for 3.0, 0.17 for 0.1667; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    if share:
        text = f"{100 * value:.1f}"
    elif float(value).is_integer() and abs(value) < 1e6:
        text = f"{value:.0f}"
    else:
        text = f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"
    return "0" + text[2:] if text.startswith("-0") and not text.strip("-0.") else text.replace("-", "−")


def signed(value: float) -> str:
    """A change in points: +12, −8, 0."""
    text = f"{100 * value:+.0f}"
    return "0" if text in ("+0", "-0") else text.replace("-", "−")


def spread(std: float | None, low: float | None, high: float | None, share: bool) -> str:
    """What stands beside a mean: ± over seeds, else the interval, else nothing."""

    def written(value: float) -> str:
        return figure(value, share) if share else f"{value:.2f}".replace("-", "−")

    if std is not None:
        return f"± {written(std)}"
    return "" if low is None or high is None else f"[{written(low)}, {written(high)}]"


def listed(names: Iterable[str], most: int = 6) -> str:
    """a, b and c; the rest counted when they are many."""
    names = list(dict.fromkeys(names))
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def counted(number: int, one: str, many: str | None = None) -> str:
    """1 result, 2 results."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
