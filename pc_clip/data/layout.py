"""Where a data set's files are, and which of them are not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pc_clip.core.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The files a reader cannot do without.

    folders: what the published archive unpacks to, below the data set's own folder; that folder itself may
    also be such a one. files: relative to it; a * stands for anything, a | for either of two.
    """

    folders: tuple[str, ...]
    files: tuple[str, ...]

    def folder(self, root: Path) -> Path:
        """The first of the folders that exists; otherwise `root` itself."""
        return next((root / inner for inner in self.folders if (root / inner).is_dir()), root)

    def missing(self, root: Path) -> list[str]:
        """Those of the files that are not there, as they are written above."""
        folder = self.folder(root)
        return [file for file in self.files if not any(_exists(folder, name) for name in file.split("|"))]

    def require(self, name: str, root: Path, fetch: str) -> Path:
        """The folder, or a UserError that says what is not there and how it is fetched."""
        missing = self.missing(root)
        if self.files and len(missing) == len(self.files):
            raise UserError(f"{name} is not at {root}. {fetch} Then name the folder with --root (--data.root).")
        if missing:
            raise UserError(f"{name} at {self.folder(root)} is incomplete: no {', '.join(missing)}. {fetch}")
        return self.folder(root)


NO_FILES = Layout((), ())  # any folder will do


def _exists(folder: Path, name: str) -> bool:
    return next(folder.glob(name), None) is not None if "*" in name else (folder / name).exists()
