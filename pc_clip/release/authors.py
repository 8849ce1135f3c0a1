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
import operator
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import requests
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
SAME = 1e-2  # rows of one image may differ by this part of their length: half precision, another batch on a GPU


# -- the files -----------------------------------------------------------------------------------------


def obtain(what: str, source: str | None) -> Path:
    """A local copy of one of the three files: the named one, the one fetched before, or a new one.

    Raises UserError when it cannot be had, with where to get it by hand.
    """
    path, url = Path(source) if source else FOLDER / "downloads" / NAMES[what], DRIVE.format(id=IDS[what])
    by_hand = (
        "Google's daily quota for this file may be used up, or the network may be down. Try again later, or open "
        f"{url} in a browser, save the file, and give its path with --from."
    )
    if source and not path.is_file():
        raise UserError(f"no file at {path}. Leave --from out to fetch it from {url}")
    if not path.is_file():
        import gdown  # knows Google Drive's questions before large files

        path.parent.mkdir(parents=True, exist_ok=True)
        quiet = not sys.stderr.isatty()
        try:
            gdown.download(url, str(path), quiet=quiet, use_cookies=False, resume=True, timeout=60, retries=2)
        except (gdown.exceptions.DownloadError, requests.RequestException, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{url} could not be fetched ({reason}). {by_hand}") from error
    if is_web_page(path):
        if not source:
            path.unlink()
        raise UserError(f"{path} is a web page. {by_hand}")
    return path


def _check_free(*paths: Path) -> None:
    if there := [str(path) for path in paths if path.exists()]:
        raise UserError(f"already there: {', '.join(there)}; remove that, or choose another --out")


def _whole(value: Any) -> int:
    """A whole number, also of numpy, of a tensor with one element, or written out."""
    return int(value) if isinstance(value, str) else operator.index(value)


# -- the model -----------------------------------------------------------------------------------------


def convert_checkpoint(source: str | None, out: Path, model: str, pretrained: str | None) -> None:
    """The authors' state dict as a checkpoint of ours, which says what it is. Every weight must fit `model`."""
    file = out if out.suffix == ".safetensors" else out / MODEL_FILE
    _check_free(file)
    try:
        clip = load_model(obtain("checkpoint", source), model, pretrained)
    except UserError as error:
        raise UserError(str(error).replace("--model.name", "--model")) from error
    save_model(file, clip)
    print(f"{file}: {clip.describe()}, {sum(w.numel() for w in clip.model.state_dict().values()):,} weights")
    print(f"next: python run.py --dataset cifar100 --checkpoint {out}")


# -- the embeddings ------------------------------------------------------------------------------------


def convert_embeddings(source: str | None, out: Path, model: str, pretrained: str | None) -> None:
    """The authors' embeddings as ours, their captions as a COCO file, and what their image numbers mean.

    A caption names a row of the tensor, and rows may repeat an image, once a caption: the first one is kept. `inds`
    has the number of each row by which the differences name it.
    """
    captions_file, indices_file = out.with_name("captions_release.json"), out.with_name("indices.json")
    _check_free(out, captions_file, indices_file)
    path = obtain("embeddings", source)
    z, captions, inds = _read_embeddings(path, model)
    image_of_row = _one_each(((row, image) for image, row, _ in captions), f"{path}: row")
    numbers = ((number, image_of_row[row]) for row, number in enumerate(inds) if row in image_of_row)
    images = _one_each(numbers, f"{path}: inds number")
    first: dict[int, int] = {}  # image -> row
    for row in sorted(image_of_row):
        once = first.setdefault(image_of_row[row], row)
        if not (z[row] - z[once]).norm() <= SAME * z[once].norm():
            image = image_of_row[row]
            raise UserError(f"{path}: rows {once} and {row} are of image {image}, but they differ, or are not finite")

    sha256 = file_digest(path, "sha256")
    made_by = {
        "model": f"{model} ({pretrained})" if pretrained else model, "image_tower": claim(model, pretrained),
        "data": "COCO, as the PC-CLIP authors released it", "fingerprint": sha256[:16],
    }  # fmt: skip
    coco = {
        "info": {"description": "captions of COCO, from the embeddings file of the PC-CLIP authors"},
        "images": [{"id": image, "file_name": f"{image:012d}.jpg"} for image in first],
        "annotations": [{"id": n, "image_id": image, "caption": text} for n, (image, _, text) in enumerate(captions)],
    }
    write_text(captions_file, json.dumps(coco, ensure_ascii=False))
    about = {"embeddings": out.name, "sha256": sha256, "images": {str(k): str(v) for k, v in images.items()}}
    write_json(indices_file, about)
    save_embeddings(out, Embeddings(z[list(first.values())], [str(image) for image in first]), made_by)
    print(f"{out}: {len(first)} images, {z.shape[1]} numbers each, said to be of {made_by['model']}")
    repeated, unknown = len(image_of_row) - len(first), len(z) - len(image_of_row)
    print(f"left out: {repeated} rows that repeat an image, {unknown} rows without a caption")
    print(f"{captions_file}: {len(captions)} captions\n{indices_file}: what the numbers in the differences mean")
    print("next: python -m pc_clip release differences")


def _read_embeddings(path: Path, model: str) -> tuple[Tensor, list[tuple[int, int, str]], list[int]]:
    """[rows, numbers] float32; image id, row and text of each caption; the number of each row.

    A file cut out of a larger one has those numbers in its captions too, one caption a row.
    Raises UserError for another layout.
    """
    content = safe_pickle.load(path)
    try:
        z, inds = content["clip_embedding"].float(), [_whole(n) for n in content["inds"]]
        rows, width = z.shape
        captions = [(_whole(c["image_id"]), _whole(c["clip_embedding"]), c["caption"]) for c in content["captions"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not laid out as the authors' embeddings ({error})") from error
    if len(inds) == rows and [row for _, row, _ in captions] == inds:
        captions = [(image, row, text) for row, (image, _, text) in enumerate(captions)]
    wrong = [c for c in captions if not 0 <= c[1] < rows or not isinstance(c[2], str)]
    if wrong or not captions or len(inds) > rows:
        odd = f", of which one is {wrong[0]!r}" if wrong else ""
        raise UserError(f"{path} has {rows} rows of embeddings, {len(inds)} inds and {len(captions)} captions{odd}")
    config = open_clip.get_model_config(f"local-dir:{model_folder(model)}" if model in SHIPPED else model)
    if config and width != config["embed_dim"]:
        raise UserError(
            f"{path} has {width} numbers an image, and {model} gives {config['embed_dim']}; name the model that "
            "made it with --model and --pretrained"
        )
    return z, captions, inds


def _one_each(pairs: Iterable[tuple[Hashable, int]], what: str) -> dict[Any, int]:
    """Pairs as a dict. Raises UserError where a key has two values."""
    images: dict[Any, int] = {}
    for key, image in pairs:
        if images.setdefault(key, image) != image:
            raise UserError(f"{what} {key} is of two images, {images[key]} and {image}")
    return images


# -- the differences -----------------------------------------------------------------------------------


def convert_differences(source: str | None, out: Path, indices: Path) -> None:
    """The authors' sentences as JSONL. Those that cannot be used are left out and counted by reason.

    Reasons are those of `cleaning.clean`, and same_image (both numbers are of one image: there is no difference to
    learn), unknown_image (the embeddings have no such number), not_text.
    """
    meta = out.with_suffix(".meta.json")
    _check_free(out, meta)
    images, embeddings = _read_indices(indices)
    path = obtain("differences", source)
    content = safe_pickle.load(path)
    try:
        pairs = [(_whole(first), _whole(second)) for first, second in content["indices"]]
        texts = list(content["llm_diffs"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not laid out as the authors' differences ({error})") from error
    if len(texts) != len(pairs):
        raise UserError(f"{path} has {len(texts)} llm_diffs for {len(pairs)} indices; which is of which is not known")
    counts: Counter[str] = Counter()
    lines = []
    for pair, text in zip(pairs, texts):
        first, second = (images.get(number) for number in pair)
        if first is None or second is None:
            usable, reason = None, "unknown_image"
        elif first == second:
            usable, reason = None, "same_image"
        else:
            usable, reason = clean(text) if isinstance(text, str) else (None, "not_text")
        counts[reason] += 1
        if usable is not None:
            lines.append(to_line(Difference(first, second, usable)))
    summary = ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "there are none"
    if not lines:
        raise UserError(
            f"none of the {len(pairs)} differences in {path} can be used: {summary}; "
            f"{indices} must be of the same release"
        )
    about = {
        "source": DRIVE.format(id=IDS["differences"]), "sha256": file_digest(path, "sha256"),
        "writer": {"name": "the PC-CLIP authors' language model"},
        "counts": dict(counts.most_common()), **environment.describe(),
    }  # fmt: skip
    write_json(meta, about)
    write_text(out, "".join(lines))
    print(f"{out}: {len(lines)} of {len(pairs)} differences ({summary})")
    print(
        "next: python finetune.py --config configs/pc_clip_coco.yaml --name pc_clip_release "
        f"--data.root {embeddings.parent} --data.split release --data.embeddings {embeddings} --data.differences {out}"
    )


def _read_indices(path: Path) -> tuple[dict[int, str], Path]:
    """The indices that `convert_embeddings` wrote: index -> image id, and the embeddings they belong to."""
    command = "python -m pc_clip release embeddings"
    if not path.is_file():
        raise UserError(f"no {path}, which says what images the differences are about. Run first: {command}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return {int(index): str(image) for index, image in about["images"].items()}, path.parent / about["embeddings"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what `{command}` writes; remove it and run that again") from error


# -- the command ---------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m pc_clip release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="{checkpoint,embeddings,differences}")
    for what, made, out in (
        ("checkpoint", "the finetuned model, as a folder that run.py takes", FOLDER / "pc_clip"),
        ("embeddings", "image embeddings of COCO with their captions", FOLDER / "coco_embeddings.safetensors"),
        ("differences", "the sentences of their language model, as JSONL", Path("llm_diffs/coco_release.jsonl")),
    ):
        command = commands.add_parser(what, help=made, description=f"Fetch and convert {made}.")
        add = command.add_argument
        add("--from", dest="source", metavar="PATH", help="a copy of their file, in place of fetching it")
        add("--out", type=Path, default=out, metavar="PATH", help="where it is written (%(default)s)")
        if what == "differences":
            indices = FOLDER / "indices.json"
            add("--indices", type=Path, default=indices, help="written by the command embeddings (%(default)s)")
        else:
            add("--model", default=MODEL, help="open_clip's name or local-dir:FOLDER (%(default)s)")
            add("--pretrained", metavar="TAG", help=f"its weights before finetuning ({PRETRAINED} for {MODEL})")
    given = parser.parse_args(argv)
    if given.what == "differences":
        convert_differences(given.source, given.out, given.indices)
        return
    # The tag belongs to the paper's model: another one has none unless it is named.
    pretrained = given.pretrained or (PRETRAINED if given.model == MODEL else None)
    convert = convert_checkpoint if given.what == "checkpoint" else convert_embeddings
    convert(given.source, given.out, given.model, pretrained)
