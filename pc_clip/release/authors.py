"""The PC-CLIP authors' own files, converted: `python -m pc_clip release {checkpoint,embeddings,differences}`.

Their README links three files on Google Drive: the finetuned model, image embeddings of COCO, and the sentences
of their language model. Each command fetches one (or takes a local copy with --from), reads it without running
anything in it, and writes what the rest of this package reads. Nothing of theirs comes with this project.

The sentences are about numbers that only the embeddings file explains, so embeddings come before differences.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
import torch
from torch import Tensor

from pc_clip.core import environment
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json, write_text
from pc_clip.core.paths import MODEL_FILE
from pc_clip.data.differences import Difference, to_line
from pc_clip.data.download import file_digest, is_web_page
from pc_clip.data.embeddings import Embeddings, claim, save_embeddings
from pc_clip.models.clip import SHIPPED, model_folder, open_clip
from pc_clip.models.loading import load_model, save_model
from pc_clip.release import safe_pickle
from pc_clip.write.cleaning import clean

DRIVE = "https://drive.google.com/uc?id={id}"
IDS = {  # https://github.com/dsam99/pc_clip, README
    "checkpoint": "1OZGQ8f6N4WuSQFn4-e7kzcEZdpKPbEfp",
    "embeddings": "1dRap0Ses7SajnGoj8hczvJ_o2Ze6JztX",
    "differences": "1yYzHizjCy9ewfagL4uG-iZHQXsWLz48p",
}
NAMES = {"checkpoint": "checkpoint.pt", "embeddings": "embeddings.pkl", "differences": "differences.pkl"}
FOLDER = Path("data/release")
MODEL, PRETRAINED = "ViT-L-14", "datacomp_xl_s13b_b90k"  # the paper's
BLOCK = 1024  # rows handled at a time
SAME = 1e-2  # rows of one image may differ by this part of their length: half precision, another batch on a GPU


# -- the files -----------------------------------------------------------------------------------------


def obtain(what: str, source: str | None) -> Path:
    """A local copy of one of the three files: the one named, the one fetched before, or a new one.

    Raises UserError when it cannot be had, with where to get it by hand.
    """
    path = Path(source) if source else FOLDER / "downloads" / NAMES[what]
    if source and not path.is_file():
        raise UserError(f"no file at {path}. Leave --from out to fetch it from {DRIVE.format(id=IDS[what])}")
    if not path.is_file():
        _download(what, path)
    if is_web_page(path):
        if not source:
            path.unlink()
        raise UserError(f"{path} is a web page. {_by_hand(what)}")
    return path


def _download(what: str, path: Path) -> None:
    import gdown  # knows Google Drive's questions before large files

    path.parent.mkdir(parents=True, exist_ok=True)
    url = DRIVE.format(id=IDS[what])
    quiet = not sys.stderr.isatty()
    try:
        gdown.download(url, str(path), quiet=quiet, use_cookies=False, resume=True, timeout=60, retries=2)
    except (gdown.exceptions.DownloadError, requests.RequestException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{url} could not be fetched ({reason}). {_by_hand(what)}") from error


def _by_hand(what: str) -> str:
    return (
        "Google's daily quota for this file may be used up, or the network may be down. Try again later, or open "
        f"{DRIVE.format(id=IDS[what])} in a browser, save the file, and give its path with --from."
    )


def _check_free(paths: Sequence[Path], overwrite: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{' and '.join(there)} {'are' if len(there) > 1 else 'is'} there already; --overwrite replaces"
        )


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    found = safe_pickle.load(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; a dict with {', '.join(keys)} was expected")
    if missing := [key for key in keys if key not in found]:
        has = ", ".join(str(key)[:40] for key in list(found)[:8]) or "nothing"
        raise UserError(f"{path} has no {' and no '.join(missing)}; it has {has}. Is it another of the three files?")
    return found


def _whole(value: Any) -> int | None:
    """An int, also of numpy or of a tensor with one element; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def _whole_list(values: Any, what: str) -> list[int]:
    """A list, tensor or array of whole numbers.  [N] -> N ints"""
    if isinstance(values, Tensor | np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise UserError(f"{what} is a {type(values).__name__}; a list of whole numbers was expected")
    found = [_whole(value) for value in values]
    if None in found:
        at = found.index(None)
        raise UserError(f"{what}[{at}] is {str(values[at])[:40]!r}; a whole number was expected")
    return found


# -- the model -----------------------------------------------------------------------------------------


def convert_checkpoint(source: str | None, out: Path, model: str, pretrained: str | None, overwrite: bool) -> Path:
    """The authors' state dict as a checkpoint of ours, which says what it is. Every weight must fit `model`."""
    file = out if out.suffix == ".safetensors" else out / MODEL_FILE
    _check_free([file], overwrite)
    path = obtain("checkpoint", source)
    try:
        clip = load_model(path, model, pretrained)
    except UserError as error:
        raise UserError(str(error).replace("--model.name", "--model")) from error
    save_model(file, clip)
    weights = sum(value.numel() for value in clip.model.state_dict().values())
    print(f"{file}: {clip.describe()}, {weights:,} weights")
    print(f"next: python run.py --dataset cifar100 --checkpoint {out}")
    return file


# -- the embeddings ------------------------------------------------------------------------------------


class _Captions(NamedTuple):
    """One entry a caption: the image it is of, what it says, and the row of that image's embedding."""

    images: list[int]
    texts: list[str]
    rows: list[int]


def convert_embeddings(source: str | None, out: Path, model: str, pretrained: str | None, overwrite: bool) -> Path:
    """The authors' embeddings as ours, their captions as a COCO file, and what their image numbers mean.

    Their tensor is converted where it lies: rows move up in place, and are written from there.
    """
    captions_file, indices_file = out.with_name("captions_release.json"), out.with_name("indices.json")
    _check_free([out, captions_file, indices_file], overwrite)
    path = obtain("embeddings", source)
    found = _read(path, ("clip_embedding", "captions", "inds"))
    z = _check_tensor(found.pop("clip_embedding"), path, model)
    inds = _whole_list(found["inds"], f"{path}: inds")
    if len(inds) > len(z):
        raise UserError(f"{path}: inds has {len(inds)} entries, but clip_embedding only {len(z)} rows")
    captions = _read_captions(found["captions"], len(z), inds, path)
    image_of_row = _images_of_rows(captions, path)
    images = _images_of_indices(inds, image_of_row, path)
    first, repeated = _first_rows(z, image_of_row, path)
    unknown = len(z) - len(image_of_row)
    z = _keep_rows(z, list(first.values()), path)

    sha256 = file_digest(path, "sha256")
    made_by = {
        "model": f"{model} ({pretrained})" if pretrained else model,
        "image_tower": claim(model, pretrained),
        "data": "COCO, as the PC-CLIP authors released it",
        "fingerprint": sha256[:16],
    }
    write_text(captions_file, json.dumps(_coco_captions(captions, first), ensure_ascii=False))
    about = {"embeddings": out.name, "sha256": sha256, "images": {str(k): str(v) for k, v in images.items()}}
    write_json(indices_file, about)
    save_embeddings(out, Embeddings(z, [str(image) for image in first]), made_by)
    print(f"{out}: {z.shape[0]} images, {z.shape[1]} numbers each, said to be of {made_by['model']}")
    if repeated or unknown:
        print(f"left out: {repeated} rows that repeat an image, {unknown} rows without a caption")
    print(f"{captions_file}: {len(captions.texts)} captions")
    print(f"{indices_file}: what the numbers in the differences mean")
    print("next: python -m pc_clip release differences")
    return out


def _check_tensor(z: Any, path: Path, model: str) -> Tensor:
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or not z.numel():
        shape = f" {list(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else ""
        raise UserError(
            f"{path}: clip_embedding is a {type(z).__name__}{shape}; a tensor [images, numbers] was expected"
        )
    width = _embed_dim(model)
    if width is not None and z.shape[1] != width:
        raise UserError(
            f"{path} has {z.shape[1]} numbers an image, and {model} gives {width}; name the model that made it with "
            "--model and --pretrained"
        )
    return z.contiguous()


def _embed_dim(model: str) -> int | None:
    """How long a model's embeddings are, from its config; None when that cannot be told without loading it."""
    if model in SHIPPED or model.startswith("local-dir:"):
        folder = model_folder(model) if model in SHIPPED else Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{folder} is no open_clip model folder: it has no open_clip_config.json")
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    else:
        config = open_clip.get_model_config(model)
    return config["embed_dim"] if config else None


def _read_captions(entries: Any, n_rows: int, inds: list[int], path: Path) -> _Captions:
    """Captions and the row of each.

    `clip_embedding` of an entry is a row of the tensor. A file cut out of a larger one may still have the larger
    one's numbers there, which are then those in `inds`, entry by entry; the entries are in the rows' order.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise UserError(f"{path}: captions is a {type(entries).__name__} without entries; a list of dicts was expected")
    found = _Captions([], [], [])
    for n, entry in enumerate(entries):
        where = f"{path}: captions[{n}]"
        if not isinstance(entry, dict) or not {"image_id", "caption", "clip_embedding"} <= entry.keys():
            raise UserError(f"{where} lacks image_id, caption or clip_embedding: {str(entry)[:80]}")
        image, text, row = entry["image_id"], entry["caption"], _whole(entry["clip_embedding"])
        image = int(image) if isinstance(image, str) and image.isdecimal() else _whole(image)
        if image is None or image < 0:
            raise UserError(f"{where} has the image_id {str(entry['image_id'])[:40]!r}; COCO's are whole numbers")
        if not isinstance(text, str):
            raise UserError(f"{where} has a {type(text).__name__} for a caption")
        if row is None:
            raise UserError(f"{where} has the clip_embedding {str(entry['clip_embedding'])[:40]!r}, which is no row")
        found.images.append(image)
        found.texts.append(text)
        found.rows.append(row)
    if len(found.rows) == len(inds) == n_rows and found.rows == inds:
        return found._replace(rows=list(range(n_rows)))
    for n, row in enumerate(found.rows):
        if not 0 <= row < n_rows:
            raise UserError(f"{path}: captions[{n}] is of row {row}, but clip_embedding has {n_rows} rows")
    return found


def _images_of_rows(captions: _Captions, path: Path) -> dict[int, int]:
    """Row -> image id, in the rows' order."""
    found: dict[int, int] = {}
    for image, row in zip(captions.images, captions.rows):
        if found.setdefault(row, image) != image:
            raise UserError(f"{path}: row {row} is given to two images, {found[row]}, {image}")
    return dict(sorted(found.items()))


def _images_of_indices(inds: list[int], image_of_row: dict[int, int], path: Path) -> dict[int, int]:
    """What the numbers in the differences mean: index -> image id."""
    found: dict[int, int] = {}
    for row, index in enumerate(inds):
        if row not in image_of_row:
            continue
        image = image_of_row[row]
        if found.setdefault(index, image) != image:
            raise UserError(f"{path}: inds gives the number {index} to two images, {found[index]}, {image}")
    return found


def _first_rows(z: Tensor, image_of_row: dict[int, int], path: Path) -> tuple[dict[int, int], int]:
    """Image id -> its first row, in the rows' order, and how many rows repeat one. Those must be equal."""
    first: dict[int, int] = {}
    repeats = []
    for row, image in image_of_row.items():
        if first.setdefault(image, row) != row:
            repeats.append((row, first[image]))
    for start in range(0, len(repeats), BLOCK):
        pairs = torch.tensor(repeats[start : start + BLOCK])  # [B, 2]
        again, once = z[pairs[:, 0]].float(), z[pairs[:, 1]].float()
        other = (again - once).norm(dim=-1) > SAME * once.norm(dim=-1)
        if other.any():
            row, kept = pairs[int(other.nonzero()[0])].tolist()
            raise UserError(f"{path}: rows {kept} and {row} are both of image {image_of_row[row]}, but they differ")
    return first, len(repeats)


def _keep_rows(z: Tensor, rows: list[int], path: Path) -> Tensor:
    """The rows named, in ascending order, moved up within the tensor's own memory.  [N, D] -> [len(rows), D] float32"""
    index = torch.tensor(rows)
    for start in range(0, len(rows), BLOCK):
        block = z[index[start : start + BLOCK]]  # never a row that was overwritten: rows[k] >= k
        if not torch.isfinite(block).all():
            bad = rows[start + int((~torch.isfinite(block).all(-1)).nonzero()[0])]
            raise UserError(f"{path}: row {bad} of clip_embedding is not finite")
        z[start : start + BLOCK][: len(block)] = block
    return z[: len(rows)].float()


def _coco_captions(captions: _Captions, images: dict[int, int]) -> dict[str, Any]:
    return {
        "info": {"description": "captions of COCO, from the embeddings file of the PC-CLIP authors"},
        "images": [{"id": image, "file_name": f"{image:012d}.jpg"} for image in images],
        "annotations": [
            {"id": n, "image_id": image, "caption": text}
            for n, (image, text) in enumerate(zip(captions.images, captions.texts))
        ],
    }


# -- the differences -----------------------------------------------------------------------------------


def convert_differences(source: str | None, out: Path, indices: Path, keep_all: bool, overwrite: bool) -> Path:
    """The authors' sentences as JSONL. Those that cannot be used are left out and counted by reason.

    Reasons are those of `cleaning.clean`, and same_image (both numbers are of one image: there is no
    difference to learn), unknown_image (the embeddings have no such number), not_text.
    keep_all: also keep what the filter would reject or trim; an empty text is still left out.
    """
    meta = out.with_suffix(".meta.json")
    _check_free([out, meta], overwrite)
    images, embeddings = _read_indices(indices)
    path = obtain("differences", source)
    found = _read(path, ("indices", "llm_diffs"))
    pairs, texts = _read_pairs(found["indices"], path), found["llm_diffs"]
    if not isinstance(texts, list | tuple) or len(texts) != len(pairs):
        has = f"{len(texts)} entries" if isinstance(texts, list | tuple) else f"a {type(texts).__name__}"
        raise UserError(
            f"{path}: llm_diffs is {has} for {len(pairs)} indices; which text is of which pair is not known"
        )
    reasons: Counter[str] = Counter()
    lines = []
    for (i, j), text in zip(pairs, texts):
        kept, reason = _judge(images.get(i), images.get(j), text, keep_all)
        reasons[reason] += 1
        if kept is not None:
            lines.append(to_line(Difference(images[i], images[j], kept)))
    counts = dict(reasons.most_common())
    told = ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "there are none"
    if not lines:
        raise UserError(
            f"none of the {len(pairs)} differences in {path} can be used: {told}; {indices} must be of the same release"
        )
    about = {
        "source": DRIVE.format(id=IDS["differences"]), "sha256": file_digest(path, "sha256"),
        "writer": {"name": "the PC-CLIP authors' language model"}, "keep_all": keep_all, "counts": counts,
        **environment.describe(),
    }  # fmt: skip
    write_json(meta, about)
    write_text(out, "".join(lines))
    print(f"{out}: {len(lines)} of {len(pairs)} differences ({told})")
    print(
        "next: python finetune.py --config configs/pc_clip_coco.yaml --name pc_clip_release "
        f"--data.root {embeddings.parent} --data.split release --data.embeddings {embeddings} "
        f"--data.differences {out}"
    )
    return out


def _read_indices(path: Path) -> tuple[dict[int, str], Path]:
    """What `convert_embeddings` wrote: index -> image id, and the embeddings it belongs to."""
    if not path.is_file():
        raise UserError(
            f"no {path}, which says what images the differences are about. "
            "Run first: python -m pc_clip release embeddings"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return {int(index): str(image) for index, image in about["images"].items()}, path.parent / about["embeddings"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not what `python -m pc_clip release embeddings` writes; run that again with --overwrite"
        ) from error


def _read_pairs(pairs: Any, path: Path) -> list[tuple[int, int]]:
    if isinstance(pairs, Tensor | np.ndarray) and pairs.ndim == 2:
        pairs = pairs.tolist()
    if not isinstance(pairs, list | tuple):
        raise UserError(f"{path}: indices is a {type(pairs).__name__}; a list of pairs was expected")
    found = []
    for n, pair in enumerate(pairs):
        pair = pair.tolist() if isinstance(pair, Tensor | np.ndarray) and pair.ndim == 1 else pair
        ends = [_whole(end) for end in pair] if isinstance(pair, list | tuple) else []
        if len(ends) != 2 or None in ends:
            raise UserError(f"{path}: indices[{n}] is {str(pair)[:40]!r}; two whole numbers were expected")
        found.append((ends[0], ends[1]))
    return found


def _judge(first: str | None, second: str | None, text: Any, keep_all: bool) -> tuple[str | None, str]:
    """The text to keep, or None, and the reason."""
    if first is None or second is None:
        return None, "unknown_image"
    if first == second:
        return None, "same_image"
    if not isinstance(text, str):
        return None, "not_text"
    if not keep_all:
        return clean(text)
    return (text, "kept") if text.strip() else (None, "empty")


# -- the command ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _parser().parse_args(argv)
    out = Path(arguments.out)
    if arguments.what == "differences":
        convert_differences(arguments.source, out, Path(arguments.indices), arguments.keep_all, arguments.overwrite)
        return
    # The tag belongs to the paper's model: another one has none unless it is named.
    pretrained = arguments.pretrained or (PRETRAINED if arguments.model == MODEL else None)
    convert = convert_checkpoint if arguments.what == "checkpoint" else convert_embeddings
    convert(arguments.source, out, arguments.model, pretrained, arguments.overwrite)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="{checkpoint,embeddings,differences}")
    for what, made, out in (
        ("checkpoint", "the finetuned model, as a folder that run.py takes", FOLDER / "pc_clip"),
        ("embeddings", "image embeddings of COCO with their captions", FOLDER / "coco_embeddings.safetensors"),
        ("differences", "the sentences of their language model, as JSONL", Path("llm_diffs/coco_release.jsonl")),
    ):
        command = commands.add_parser(what, help=made, description=f"Fetch and convert {made}.")
        command.add_argument(
            "--from", dest="source", metavar="PATH", help="a copy of their file, in place of fetching it"
        )
        command.add_argument("--out", default=str(out), metavar="PATH", help="where it is written (%(default)s)")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
        if what == "differences":
            command.add_argument(
                "--indices",
                default=str(FOLDER / "indices.json"),
                metavar="PATH",
                help="written by the command embeddings (%(default)s)",
            )
            command.add_argument(
                "--keep_all", action="store_true", help="keep sentences as they are, without the filter"
            )
        else:
            command.add_argument("--model", default=MODEL, help="open_clip's name or local-dir:FOLDER (%(default)s)")
            command.add_argument(
                "--pretrained", metavar="TAG",
                help=f"what its weights were before finetuning ({PRETRAINED} for {MODEL})",
            )  # fmt: skip
    return parser
