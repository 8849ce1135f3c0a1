"""A difference: two images and a sentence on how the first differs from the second.

Reading, writing, mirroring, which pairs to write about, and the arrays training reads. One JSON object a line:

    {"first": "000000000139", "second": "000000000285", "text": "The first image shows ..."}

`first` and `second` are image ids of the data set; the file beside it, NAME.meta.json, says what wrote it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pc_clip.core import cache
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import tokens
from pc_clip.data.text_files import json_lines, words
from pc_clip.data.wordings import swap_roles


class Difference(NamedTuple):
    """`text` says how image `first` differs from image `second`. The ids are those of the data set."""

    first: str
    second: str
    text: str


def read(path: str | Path, content: bytes | None = None) -> list[Difference]:
    """All differences of a file, in order, or of its content.

    Raises UserError for a missing or empty file, and for a line that is not a difference (with its number).
    """
    path = find(path)
    differences = []
    for where, line in json_lines(path, Difference._fields, content):
        words(line["text"], where, "text")  # for its error: a sentence is kept as it is written
        differences.append(Difference(str(line["first"]), str(line["second"]), line["text"]))
    if not differences:
        raise UserError(f"{path} holds no differences; write them again with generate_diffs.py")
    return differences


def find(path: str | Path) -> Path:
    """The path of a file of differences that is there."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no differences at {path}. Write them with generate_diffs.py, or name a file that exists.")
    return path


def to_line(difference: Difference) -> str:
    return json.dumps(difference._asdict(), ensure_ascii=False) + "\n"


MOST_PAIRS = 20_000_000


def choose_pairs(ids: list[str], n_pairs: int | None, seed: int, both_orders: bool) -> list[tuple[str, str]]:
    """Which images to write about: all unordered pairs, or `n_pairs` distinct ones drawn without replacement.

    A drawn pair comes in a random order; with `both_orders` its mirror image follows it directly, so
    the list is twice as long. Raises UserError when fewer pairs exist than were asked for.
    """
    n, rng = len(ids), stream(seed, "pairs")
    total = n * (n - 1) // 2
    if (n_pairs or total) > MOST_PAIRS:
        raise UserError(f"{n} images make {total:,} pairs, too many to hold; set --n_images, or --n_pairs")
    if n_pairs is None:
        pairs = list(itertools.combinations(range(n), 2))
    elif n_pairs > total:
        raise UserError(
            f"{n_pairs} pairs were asked for, but {n} images make only {total}; ask for fewer or more images"
        )
    else:
        pairs = [_unrank(int(k), n) for k in rng.choice(total, n_pairs, replace=False)]
        flips = rng.random(n_pairs) < 0.5
        pairs = [(j, i) if flip else (i, j) for (i, j), flip in zip(pairs, flips)]
    if both_orders:
        pairs = [p for i, j in pairs for p in ((i, j), (j, i))]
    return [(ids[i], ids[j]) for i, j in pairs]


def _unrank(k: int, n: int) -> tuple[int, int]:
    """The k-th of the pairs (0,1), (0,2), ..., (n-2, n-1), without listing them."""
    i = int(n - 2 - np.floor((np.sqrt(float(4 * n * (n - 1) - 7 - 8 * k)) - 1) / 2))
    before = i * (2 * n - i - 1) // 2
    return i, k - before + i + 1


def rows(
    differences: Iterable[Difference],
    ids: Collection[str],
    source: str | Path,
    left_out: Collection[str] = frozenset(),
) -> np.ndarray:
    """Differences as row numbers into `ids`, -1 for an image in `left_out`.  -> [N, 2] int64

    Raises UserError for the first difference whose image is in neither.
    """
    names, places = _places(differences)
    return _rows(names, places, ids, source, left_out)


def _places(differences: Iterable[Difference]) -> tuple[list[str], np.ndarray]:
    """The distinct images of differences, and the two of each difference as rows of these.  -> names, [N, 2] int64"""
    place: dict[str, int] = {}
    pairs = [[place.setdefault(key, len(place)) for key in difference[:2]] for difference in differences]
    return list(place), np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _rows(
    names: list[str], places: np.ndarray, ids: Collection[str], source: str | Path, left_out: Collection[str]
) -> np.ndarray:
    """places: rows of `names`  ->  rows of `ids`, where there may be very many others; -1 for one in `left_out`."""
    wanted = set(names)
    row = {key: n for n, key in enumerate(ids) if key in wanted}
    pairs = np.array([row.get(name, -1) for name in names], dtype=np.int64)[places]
    unknown = np.array([name not in row and name not in left_out for name in names], dtype=bool)[places]
    for n, side in np.argwhere(unknown)[:1]:
        known = ", ".join(itertools.islice(ids, 3))
        raise UserError(
            f"difference {n + 1} of {source} is about image {names[places[n, side]]!r}, which the data set does not "
            f"hold ({len(ids)} images: {known}, ...). Use the data set the differences were written for."
        )
    return pairs


class Compiled(NamedTuple):
    """N differences as numbers, U of their texts distinct.

    pairs: [N, 2] int64, rows of the images, -1 for one that was left out; text: [N] int32, rows of tokens; mirror: [N]
    int32, rows of tokens of the texts with their roles exchanged, -1 where that cannot be done (`swap_roles`), None
    unless it was asked for; tokens: [U, L], as `pc_clip.data.tokens.tokenize` gives them.
    """

    pairs: np.ndarray
    text: np.ndarray
    mirror: np.ndarray | None
    tokens: np.ndarray


def compiled(
    path: str | Path, ids: Sequence[str], tokenizer: Any, *, mirror: bool, left_out: Collection[str] = frozenset()
) -> Compiled:
    """The differences of a file as rows of `ids` and of a table of tokens.

    Raises what `read` and `rows` raise. All that is slow is kept by `pc_clip.core.cache`, under a key of the
    file's content, the tokenizer and `mirror`; images are kept by name, so that other images do not matter.
    """
    path = find(path)
    content = path.read_bytes()  # once, so that what is parsed is what the key names

    def make() -> dict[str, np.ndarray]:
        differences = read(path, content)
        names, places = _places(differences)
        _rows(names, places, ids, path, left_out)  # its error before a minute goes into tokens
        texts = [difference.text for difference in differences]
        mirrored = [swap_roles(text) for text in texts] if mirror else []
        distinct = list(dict.fromkeys(texts + [text for text in mirrored if text is not None]))
        row = {text: n for n, text in enumerate(distinct)}
        arrays = {
            "names": np.frombuffer(bytearray(json.dumps(names).encode()), dtype=np.uint8),
            "places": places.astype(np.int32),
            "text": np.array([row[text] for text in texts], dtype=np.int32),
            "tokens": tokens.make(tokenizer, distinct),
        }
        return arrays | ({"mirror": np.array([row.get(text, -1) for text in mirrored], np.int32)} if mirror else {})

    made_by = tokens.identity(tokenizer)
    key = {"file": hashlib.sha256(content).hexdigest(), "tokenizer": made_by or "", "mirror": str(mirror)}
    arrays = cache.cached("compiled", key, make) if made_by else make()
    pairs = _rows(json.loads(arrays["names"].tobytes()), arrays["places"], ids, path, left_out)
    return Compiled(pairs, arrays["text"], arrays.get("mirror"), arrays["tokens"])
