"""What can be downloaded, from where, and how it is unpacked. Nothing here runs unless it is asked for."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from pc_clip.core.errors import UserError


@dataclass(frozen=True)
class Archive:
    """A file on a server.

    makes: what is there when it has been dealt with, below the data set's folder; an archive is unpacked into
    the folder that has it, a file that is none gets its name. digest: "md5:..." or "sha256:..."; size: bytes.
    Either may be unknown.
    """

    url: str
    makes: str
    digest: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def packed(self) -> bool:
        return self.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


_COCO = "http://images.cocodataset.org"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"

# Addresses and MD5 of cifar, mnist, eurosat, sun397, flowers102 and food101 are those of torchvision 0.28.0; sizes and
# SHA-256 of coco are those TensorFlow Datasets keeps; CUB's are those of its record at Caltech.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "coco": (
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip", "annotations",
            "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", 252907541,
        ),
        Archive(
            f"{_COCO}/zips/val2017.zip", "val2017",
            "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", 815585330,
        ),
        Archive(
            f"{_COCO}/zips/train2017.zip", "train2017",
            "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", 19336861798,
        ),
    ),
    "cifar10": (
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py",
            "md5:c58f30108f718f92721af3b95e74349a", 170498071,
        ),
    ),
    "cifar100": (
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python",
            "md5:eb9058c3a382ffc7106e4002c42a8d85", 169001437,
        ),
    ),
    "mnist": (  # read as they are, so never unpacked
        Archive(
            f"{_MNIST}/train-images-idx3-ubyte.gz", "MNIST/raw/train-images-idx3-ubyte.gz",
            "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873", 9912422,
        ),
        Archive(
            f"{_MNIST}/train-labels-idx1-ubyte.gz", "MNIST/raw/train-labels-idx1-ubyte.gz",
            "md5:d53e105ee54ea40749a09fcbcd1e9432", 28881,
        ),
        Archive(
            f"{_MNIST}/t10k-images-idx3-ubyte.gz", "MNIST/raw/t10k-images-idx3-ubyte.gz",
            "md5:9fb629c4189551a2d022fa330f9573f3", 1648877,
        ),
        Archive(
            f"{_MNIST}/t10k-labels-idx1-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte.gz",
            "md5:ec29112dd5afa0611ce80d1b7f02629c", 4542,
        ),
    ),
    "eurosat": (
        Archive(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "2750", "md5:c8fa014336c82ac7804f0398fcb19387", 94280567,
        ),
    ),
    "sun397": (
        Archive(
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz", "SUN397",
            "md5:8ca2778205c41d23104230ba66911c7a",
        ),
    ),
    "flowers102": (
        Archive(f"{_FLOWERS}/imagelabels.mat", "flowers-102/imagelabels.mat", "md5:e0620be6f572b9609742df49c70aed4d"),
        Archive(f"{_FLOWERS}/setid.mat", "flowers-102/setid.mat", "md5:a5357ecc9cb78c4bef273ce3793fc85c"),
        Archive(
            f"{_FLOWERS}/102flowers.tgz", "flowers-102/jpg", "md5:52808999861908f626f3c1f4e79d11fa", 344862509,
        ),
    ),
    "food101": (
        Archive(
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "food-101",
            "md5:85eeb15f3717b99a5da872d97d918f87", 4996278331,
        ),
    ),
    "cub": (
        Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "CUB_200_2011",
            "md5:97eceeb196236b17998738112f37df78", 1150585339,
        ),
    ),
    "awa2": (Archive("https://cvml.ista.ac.at/AwA2/AwA2-data.zip", "Animals_with_Attributes2"),),
}  # fmt: skip


def bring(archive: Archive, root: Path) -> None:
    """Fetch one file into `root` and unpack it there, unless what it makes is there already.

    A packed file is deleted once it is unpacked. Raises UserError when it cannot be had, is damaged, or holds
    something that would land outside the folder; what was there before is then as it was.
    """
    from pc_clip.data.download import fetch

    target = root / archive.makes
    if target.exists():
        return
    path = root / archive.name if archive.packed else target
    path.parent.mkdir(parents=True, exist_ok=True)
    path = fetch(archive.url, path, digest=archive.digest, size=archive.size)
    if archive.packed:
        unpack(path, target.parent)
        if not target.exists():
            raise UserError(f"{path} does not hold {PurePosixPath(archive.makes).name}; the archive is not what it was")
        path.unlink()


def unpack(path: Path, folder: Path) -> None:
    """Unpack a .zip or .tar[.gz] into `folder`: beside it first, then moved, so that it is whole or not there.

    Raises UserError for a damaged archive (which is then deleted, to be fetched again), for a member that would
    land outside the folder, and where something that it holds is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{path.name}.{os.getpid()}.partial"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        (_unzip if path.suffix == ".zip" else _untar)(path, new)
        _move_all(new, folder)
    except (tarfile.FilterError, _Escape) as error:
        raise UserError(f"{path} is not unpacked: {error}. It is not the archive it should be.") from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged ({error}) and is deleted; the same command fetches it again") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


class _Escape(Exception):
    """A member of an archive that would be written somewhere else."""


def _untar(path: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError("unpacking safely needs Python 3.10.12 or newer; or unpack the archive by hand")
    with path.open("rb") as file, _bar(path, path.stat().st_size) as bar, tarfile.open(fileobj=file) as tar:
        for member in tar:
            tar.extract(member, folder, filter="data")
            bar.update(file.tell() - bar.n)
        while tar.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
            pass


def _unzip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive, _bar(path, sum(m.compress_size for m in archive.infolist())) as bar:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename:
                raise _Escape(f"{member.filename!r} lies outside the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _Escape(f"{member.filename!r} is a link")
            archive.extract(member, folder)
            bar.update(member.compress_size)


def _bar(path: Path, total: int) -> tqdm:
    return tqdm(desc=f"unpacking {path.name}", total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _move_all(new: Path, folder: Path) -> None:
    """Everything in `new` into `folder`: files first, since folders are what tells that it is there."""
    found = sorted(new.iterdir(), key=lambda p: (p.is_dir(), p.name))
    for path in found:
        there = folder / path.name
        if there.is_dir() and any(there.iterdir()):
            raise UserError(f"{there} is there already, but not whole; move it away, then the same command goes on")
    for path in found:
        os.replace(path, folder / path.name)
