"""A difference: two images and a sentence on how the first differs from the second.

Reading, writing, mirroring, which pairs to write about, and the arrays training reads. One JSON object a line:

    {"first": "000000000139", "second": "000000000285", "text": "The first image shows ..."}

`first` and `second` are image ids of the data set; the file beside it, NAME.meta.json, says what wrote it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pc_clip.core import cache
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import tokens
from pc_clip.data.wordings import swap_roles


class Difference(NamedTuple):
    """`text` says how image `first` differs from image `second`. The ids are those of the data set."""

    first: str
    second: str
    text: str


# -- files ---------------------------------------------------------------------------------------------


def read(path: str | Path) -> list[Difference]:
    """All differences of a file, in order.

    Raises UserError for a missing or empty file, and for a line that is no difference (with its number).
    """
    path = find(path)
    return _parse_all(path.read_bytes(), path)


def _parse_all(content: bytes, path: Path) -> list[Difference]:
    found = [_parse(line, f"{path} line {n}") for n, line in enumerate(_lines(content, path), 1) if line.strip()]
    if not found:
        raise UserError(f"{path} holds no differences; write them again with generate_diffs.py")
    return found


def find(path: str | Path) -> Path:
    """The path of a file of differences that is there."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no differences at {path}. Write them with generate_diffs.py, or name a file that exists.")
    return path


def _lines(content: bytes, path: Path) -> Iterator[str]:
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        yield from text.split("\n")  # splitlines() would also split at U+2028
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parse(line: str, where: str) -> Difference:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); mend or delete the line"
        ) from error
    if not isinstance(item, dict) or not {"first", "second", "text"} <= item.keys():
        raise UserError(f'{where} is no difference: expected {{"first", "second", "text"}}, found {line[:80]}')
    if not isinstance(item["text"], str) or not item["text"].strip():
        raise UserError(f"{where} has no text")
    return Difference(str(item["first"]), str(item["second"]), item["text"])


def to_line(difference: Difference) -> str:
    return json.dumps(difference._asdict(), ensure_ascii=False) + "\n"


# -- pairs ---------------------------------------------------------------------------------------------


MOST_PAIRS = 20_000_000


def choose_pairs(ids: list[str], n_pairs: int | None, seed: int, both_orders: bool) -> list[tuple[str, str]]:
    """Which images to write about: all unordered pairs, or `n_pairs` distinct ones drawn without replacement.

    A drawn pair comes in a random order; with `both_orders` its mirror image follows it directly, so
    the list is twice as long. Raises UserError when fewer pairs exist than were asked for.
    """
    n = len(ids)
    total = n * (n - 1) // 2
    rng = stream(seed, "pairs")
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


def rows(differences: Iterable[Difference], ids: Collection[str], source: str) -> np.ndarray:
    """Differences as row numbers into `ids`.  -> [N, 2] int64

    Raises UserError for the first difference whose image is not among them.
    """
    differences = list(differences)
    row = _rows_of((key for difference in differences for key in difference[:2]), ids)
    pairs = []
    for n, difference in enumerate(differences, 1):
        for key in difference[:2]:
            if key not in row:
                raise _unknown(n, key, ids, source)
        pairs.append((row[difference.first], row[difference.second]))
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _rows_of(wanted: Iterable[str], ids: Iterable[str]) -> dict[str, int]:
    """The rows of some ids. A table of these alone, because there may be very many others."""
    wanted = set(wanted)
    return {key: n for n, key in enumerate(ids) if key in wanted}


def _unknown(n: int, key: str, ids: Collection[str], source: str | Path) -> UserError:
    known = ", ".join(itertools.islice(ids, 3))
    return UserError(
        f"difference {n} of {source} is about image {key!r}, which the data set does not hold "
        f"({len(ids)} images: {known}, ...). Use the data set the differences were written for."
    )


# -- compiled ------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """N differences as numbers, U of their texts distinct.

    pairs: [N, 2] int64, rows of the images; text: [N] int32, rows of tokens; mirror: [N] int32, rows of tokens of the
    texts with their roles exchanged, -1 where that cannot be done (`swap_roles`), None unless it was asked for;
    tokens: [U, L], as `pc_clip.data.tokens.tokenize` gives them.
    """

    pairs: np.ndarray
    text: np.ndarray
    mirror: np.ndarray | None
    tokens: np.ndarray


def compiled(path: str | Path, ids: Sequence[str], tokenizer: Any, *, mirror: bool) -> Compiled:
    """The differences of a file as rows of `ids` and of a table of tokens.

    Raises what `read` and `rows` raise. All that is slow is kept by `pc_clip.core.cache`, under a key of the
    file's content, the tokenizer and `mirror`; images are kept by name, so that other images are no matter.
    """
    path = find(path)
    content = path.read_bytes()  # once, so that what is parsed is what the key names

    def make() -> dict[str, np.ndarray]:
        found = _parse_all(content, path)
        rows(found, ids, str(path))  # said before a minute goes into tokens
        return _compile(found, tokenizer, mirror)

    made_by = tokens.identity(tokenizer)
    key = {"file": hashlib.sha256(content).hexdigest(), "tokenizer": made_by or "", "mirror": str(mirror)}
    told = cache.cached("differences", key, make) if made_by else make()
    names = json.loads(told["names"].tobytes())
    row = _rows_of(names, ids)
    places = np.array([row.get(name, -1) for name in names], dtype=np.int64)
    pairs = places[told["pairs"]]  # [N, 2]
    for n, side in np.argwhere(pairs < 0)[:1]:
        raise _unknown(n + 1, names[told["pairs"][n, side]], ids, path)
    return Compiled(pairs, told["text"], told.get("mirror"), told["tokens"])


def _compile(found: list[Difference], tokenizer: Any, mirror: bool) -> dict[str, np.ndarray]:
    """What `compiled` keeps. names: the images' as JSON; pairs: [N, 2] rows of them; text, mirror, tokens."""
    names = {key: None for difference in found for key in difference[:2]}
    texts = [difference.text for difference in found]
    swapped = [swap_roles(text) for text in texts] if mirror else []
    distinct = list(dict.fromkeys(texts + [text for text in swapped if text is not None]))
    row = {text: n for n, text in enumerate(distinct)}
    made = {
        "names": np.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=np.uint8),
        "pairs": rows(found, names, "").astype(np.int32),
        "text": np.array([row[text] for text in texts], dtype=np.int32),
        "tokens": tokens.make(tokenizer, distinct),
    }
    return made | ({"mirror": np.array([row.get(text, -1) for text in swapped], dtype=np.int32)} if mirror else {})
