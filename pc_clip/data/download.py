"""Download archives that torchvision does not provide, with pooch: hash-checked, unpacked, then deleted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import BadZipFile

import pooch
import requests

from pc_clip.core.errors import UserError

COCO = "http://images.cocodataset.org"
ARCHIVES: dict[str, list[tuple[str, str, str | None]]] = {  # address, the folder it makes, its hash where published
    "coco": [  # SHA-256 as TensorFlow Datasets keeps them
        (f"{COCO}/annotations/annotations_trainval2017.zip", "annotations",
         "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
        (f"{COCO}/zips/val2017.zip", "val2017",
         "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        (f"{COCO}/zips/train2017.zip", "train2017",
         "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ],
    "cub": [("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "CUB_200_2011",
             "md5:97eceeb196236b17998738112f37df78")],
    "awa2": [("https://cvml.ista.ac.at/AwA2/AwA2-data.zip", "Animals_with_Attributes2", None)],
}  # fmt: skip


def fetch(name: str, root: Path) -> None:
    """Fetch and unpack into `root` what is not there yet. Raises UserError with the address and a `wget -c` line."""
    for url, makes, known_hash in ARCHIVES[name]:
        packed = root / url.rsplit("/", 1)[1]
        if (root / makes).exists() and not packed.exists():  # the archive goes when all of it is unpacked
            continue
        unpack = (pooch.Unzip if packed.suffix == ".zip" else pooch.Untar)(extract_dir=".")
        try:
            pooch.retrieve(url, known_hash, packed.name, root, processor=unpack, progressbar=True)
        except (requests.RequestException, OSError, ValueError, BadZipFile) as error:
            raise UserError(
                f"{url} was not fetched: {error}. Give the same command again, or where connections break: "
                f"wget -c -P {root} {url}, then the same command, which unpacks it."
            ) from error
        packed.unlink()


def file_digest(path: Path, kind: str) -> str:
    """md5 or sha256 of a file, in hexadecimal; of a folder of captions, of the names and contents of its text files."""
    if path.is_dir():
        each = [(file.relative_to(path).as_posix(), file_digest(file, kind)) for file in sorted(path.rglob("*.txt"))]
        return hashlib.new(kind, repr(each).encode()).hexdigest()
    return pooch.file_hash(str(path), alg=kind)


def is_web_page(path: Path) -> bool:
    """Whether a file is HTML: what servers send in place of a file they will not give."""
    with path.open("rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))
