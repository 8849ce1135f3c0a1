"""Images with captions: COCO's layout, and SimCLIP's table."""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from pathlib import Path

from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, digest, first_file, read_image

TABLES = (".tsv", ".csv", ".txt")  # endings of tables in any case; columns are apart by tabs whatever the ending


def read_coco_captions(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """A COCO captions file: image id -> (file name, its captions). Images without a caption are left out.

    Raises UserError when the file is missing, is not JSON, or holds no captions.
    """
    if not path.is_file():
        raise UserError(f"no captions file at {path}. COCO's are in annotations_trainval2017.zip of cocodataset.org.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again, it may have been cut short") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("images"), list)
        or not isinstance(content.get("annotations"), list)
    ):
        raise UserError(f'{path} is no COCO captions file: it needs the lists "images" and "annotations"')
    captions: dict[str, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            caption = annotation["caption"].encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
            key, text = annotation["image_id"], " ".join(caption.split())
            if text:
                captions.setdefault(str(key), []).append(text)
        files = {str(image["id"]): image["file_name"] for image in content["images"]}
    except (KeyError, TypeError, AttributeError):
        raise _bad_entry(content, path) from None
    found = {key: (file, tuple(captions[key])) for key, file in files.items() if key in captions}
    if not found:
        raise UserError(f"{path} holds no captions: {len(files)} images, {len(content['annotations'])} annotations")
    return found


def _bad_entry(content: dict, path: Path) -> UserError:
    """Names the first entry of a captions file that is not what it should be."""
    for kind, key in (("annotations", "image_id"), ("images", "id"), ("images", "file_name")):
        for n, entry in enumerate(content[kind]):
            if not isinstance(entry, dict) or key not in entry:
                return UserError(f"{path}: entry {n} of {kind} has no {key}: {str(entry)[:80]}")
    return UserError(f"{path} has annotations without captions (COCO's instances file? captions_*.json is wanted)")


def read_simclip_tsv(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """SimCLIP's table, `image caption1 caption2 ...`, tab-separated: image id -> (file name, its captions).

    The id is the column `id` where there is one, else the file's name. A missing caption is left out, never "nan".
    Fields are taken as they stand, or without the quotes that pandas and csv put around them.
    Raises UserError when the file or its columns are missing, for a row that does not fit, or without any captions.
    """
    if not path.is_file():
        raise UserError(f"no captions file at {path}; give --captions a tab-separated file")
    (_, head), *rows = _fields(path)
    columns = [n for n, name in enumerate(head) if name.startswith("caption")]
    if "image" not in head or not columns:
        apart = " (one column: separate them by tabs)" if len(head) == 1 else ""
        raise UserError(
            f"{path} needs a column image and columns caption1, caption2, ...; found {', '.join(head)}{apart}"
        )
    image = head.index("image")
    named = head.index("id") if "id" in head else image
    found = {}
    for line, row in rows:
        if any(field.strip() for field in row[len(head) :]):
            raise UserError(f"{path}, line {line}: {len(row)} fields, but the first line names {len(head)} columns")
        row += [""] * (len(head) - len(row))
        if not row[image].strip():
            raise UserError(f"{path}, line {line}: no image is named, in {' '.join(row).strip()[:80]!r}")
        texts = tuple(" ".join(row[n].split()) for n in columns if row[n].strip())
        key = row[named] or row[image]
        if key in found:
            raise UserError(f"{path}, line {line}: a second row for {key!r}; put all captions of an image into one row")
        if texts:
            found[key] = (row[image], texts)
    if not found:
        raise UserError(f"{path} holds no captions: {len(rows)} rows, all without one")
    return found


def _fields(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a table that hold anything, the head first, each with the number of its line, from 1.

    Quotes are read as characters: SimCLIP's tables have captions with a lone one, which would swallow the lines after.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found = [(lines.line_num, [_unquoted(field) for field in row]) for row in lines if any(map(str.strip, row))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no tab-separated UTF-8 table: {error}") from error
    if not found:
        raise UserError(f"{path} is no tab-separated UTF-8 table: it is empty")
    return found


def _unquoted(field: str) -> str:
    """A field that a writer of CSV put into quotes, as it was; any other as it is.

    Such a field begins and ends with a quote, and those within are doubled.
    """
    if len(field) < 2 or not field[0] == field[-1] == '"' or '"' in field[1:-1].replace('""', ""):
        return field
    return field[1:-1].replace('""', '"')


def read_rewritten(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Captions that generate_diffs.py --task rewrite wrote, a JSON a line with image and text; no file names.

    Raises UserError for a line that is none.
    """
    if not path.is_file():
        raise UserError(f"no captions file at {path}; generate_diffs.py --task rewrite writes one")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            captions.setdefault(str(row["image"]), []).append(row["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: wanted JSON with image and text, found {line[:80]!r}") from error
    if not captions:
        raise UserError(f"{path} holds no captions")
    return {key: ("", tuple(texts)) for key, texts in captions.items()}


def read_captions(path: str | Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Captions by image id from any of the formats, told apart by the file's ending."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_rewritten(path)
    return read_simclip_tsv(path) if path.suffix.lower() in TABLES else read_coco_captions(path)


def open_coco(root: Path, split: str, missing: str = "error") -> Dataset:
    """COCO's layout: {root}/[annotations/]captions_{split}.json, pictures in {root}/{split}/.

    missing: an absent picture is an "error", or its image is left out ("skip"), or kept until it is looked at
    ("keep", for embeddings that were made elsewhere).
    """
    candidates = [folder / f"captions_{split}.json" for folder in (root / "annotations", root)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        present = sorted(
            p.stem.removeprefix("captions_") for f in (root / "annotations", root) for p in f.glob("captions_*.json")
        )
        raise UserError(f"{root} has no captions_{split}.json; splits found there: {', '.join(present) or 'none'}")
    return _with_pictures(
        "coco", split, path, read_coco_captions(path), root, missing, f"Get {split}.zip of cocodataset.org"
    )


def open_tsv(root: Path, split: str, missing: str = "error") -> Dataset:
    """SimCLIP's table, and its pictures below {root}, in the folders where COCO's may be.

    split: NAME for {root}/NAME.tsv (or .csv, .txt), or the path of a table that lies anywhere. missing: as for COCO. A
    column `image` with whole paths is taken at its word. A table that is not {root}/NAME.tsv has six digits of its path
    in the label, so that results of two tables of one name are kept apart.
    """
    path = next((p for p in [*_named(root, split), Path(split), root / split] if is_table(p)), None)
    if path is None:
        present = sorted({p.stem for p in root.glob("*") if is_table(p)})
        file = split if Path(split).suffix.lower() in TABLES else f"{split}.tsv"
        raise UserError(
            f"{root} has no {file}; tables found there: {', '.join(present) or 'none'}. "
            "A table elsewhere is named by its path: --data.split FILE.tsv (--split for run.py)."
        )
    first = next((p for p in _named(root, path.stem) if is_table(p)), None)  # what its bare name would open
    label = path.stem
    if first is None or first.resolve() != path.resolve():
        label += f"-{digest(str(path.resolve()))[:6]}"
    return _with_pictures("tsv", label, path, read_simclip_tsv(path), root, missing, "Put them there", split, path.stem)


def is_table(path: Path) -> bool:
    """Whether there is a file whose name ends as a table's does."""
    return path.suffix.lower() in TABLES and path.is_file()


def _named(root: Path, name: str) -> list[Path]:
    """Where a table may be that is named without its ending."""
    return [root / f"{name}{ending}" for ending in (*TABLES, *map(str.upper, TABLES))]


def _with_pictures(
    name: str, split: str, path: Path, entries: dict[str, tuple[str, tuple[str, ...]]], root: Path, missing: str,
    get: str, part: str = "", inner: str = "",
) -> Dataset:  # fmt: skip
    """A data set of captions by image id, and of pictures that are looked for below `root`.

    path: the file that has the captions. missing: an absent picture is an "error", or its image is left out ("skip"),
    or kept until it is looked at ("keep"). get: how the pictures are had, for the error. part: as it was asked for,
    where that is not `split`. inner: the folder below `root` where they are looked for first, where it is not `split`.
    """
    inner = inner or split
    folders = [str(folder) for folder in (root / inner, root / "images" / inner, root / "images", root)]
    files = {key: first_file(os.path.join(folder, file) for folder in folders) for key, (file, _) in entries.items()}
    absent = [entries[key][0] for key, file in files.items() if file is None]
    if absent and missing != "keep" and (missing == "error" or len(absent) == len(files)):
        raise UserError(
            f"{len(absent)} of the {len(files)} pictures in {path} are not in {root / inner}, first {absent[0]}. "
            f"{get}, or use only those that are there with --data.missing skip."
        )
    kept = [key for key, file in files.items() if file is not None or missing == "keep"]
    places = [files[key] or (os.path.join(folders[0], entries[key][0]),) for key in kept]
    return Dataset(
        name=name,
        split=split,
        ids=kept,
        load=partial(_read_place, [place[0] for place in places]),  # says which one is absent
        fingerprint=digest(*[(key, *place[1:]) for key, place in zip(kept, places)]),
        captions=[entries[key][1] for key in kept],
        note=f"{len(absent)} pictures named in {path.name} are absent{'' if missing == 'keep' else ' and left out'}"
        if absent
        else "",
        part=part or split,
    )


def _read_place(places: list[str], row: int) -> Image.Image:
    return read_image(Path(places[row]))
