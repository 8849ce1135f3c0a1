"""Prepare real photographs for the example's scripts: `python -m examples.photographs FOLDER`.

FOLDER is in COCO's layout: captions_*.json, here or in annotations/, and pictures. Builds the photo model
(examples.photo_model), then splits the photographs that are there into train, val and test: caption files
in data/photo/annotations that point at the pictures where they are. Where SugarCrepe's files lie beside
FOLDER, the photographs they ask about are held out, so that every one of its rows is a test. VSR's statements
are taken from beside FOLDER as well; data/photo/pictures leads to FOLDER: they ask about photographs without captions.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from examples import photo_model
from pc_clip.core.errors import UserError, run_script
from pc_clip.core.files import write_json
from pc_clip.data.captions import read_coco_captions
from pc_clip.data.statements import read_statements

OUT = Path("data/photo")
TEST_SHARE, VAL_SHARE = 0.23, 0.11


def find_photographs(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Captioned photographs that are there: id -> (path, captions). Raises UserError where there are too few."""
    files = sorted([*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json")])
    if not files:
        raise UserError(f"{folder} holds no captions_*.json; make photo DATA=FOLDER wants a folder in COCO's layout")
    results = {}
    for file in files:
        split = file.stem.removeprefix("captions_")
        for key, (name, captions) in read_coco_captions(file).items():
            places = [folder / split / name, folder / "images" / split / name, folder / "images" / name, folder / name]
            if path := next((p for p in places if p.is_file()), None):
                results[key] = (path, captions)
    if len(results) < 100:
        raise UserError(f"{folder} holds {len(results)} photographs with captions; at least 100 are needed")
    return results


def split_ids(ids: list[str], held_out: set[str], seed: int) -> dict[str, list[str]]:
    """train, val and test ids; `held_out` are in test, which is filled up to its share by chance."""
    rng = np.random.default_rng(seed)
    order = [ids[n] for n in rng.permutation(len(ids))]
    order.sort(key=lambda key: key not in held_out)  # stable: those first, the rest still in random order
    n_test = max(round(TEST_SHARE * len(ids)), len(held_out))
    n_val = round(VAL_SHARE * len(ids))
    return {"test": order[:n_test], "val": order[n_test : n_test + n_val], "train": order[n_test + n_val :]}


def write_split(out: Path, split: str, ids: list[str], photographs: dict[str, tuple[Path, tuple[str, ...]]]) -> None:
    """A COCO captions file whose file names lead from out/SPLIT to the pictures where they are."""
    place = out / split
    place.mkdir(parents=True, exist_ok=True)
    images = [{"id": key, "file_name": os.path.relpath(photographs[key][0].resolve(), place.resolve())} for key in ids]
    annotations = [{"image_id": key, "caption": text} for key in ids for text in photographs[key][1]]
    write_json(out / "annotations" / f"captions_{split}.json", {"images": images, "annotations": annotations})


def write_captions_alone(out: Path, folder: Path, photographs: dict[str, tuple[Path, tuple[str, ...]]]) -> None:
    """captions_alone.json: the captions of all images whose picture is not there, or of the training photographs."""
    images, annotations = [], []
    for file in sorted([*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json")]):
        for key, (name, captions) in read_coco_captions(file).items():
            if key not in photographs:
                images.append({"id": key, "file_name": name})
                annotations += [{"image_id": key, "caption": text} for text in captions]
    alone = out / "annotations" / "captions_alone.json"
    if images:
        write_json(alone, {"images": images, "annotations": annotations})
    else:
        shutil.copy(alone.with_name("captions_train.json"), alone)


def prepare(folder: Path, out: Path, seed: int) -> None:
    photographs = find_photographs(folder)
    beside = folder.resolve().parent / "sugar_crepe"
    asked: set[str] = set()
    if beside.is_dir():
        asked = {Path(sentences.image).stem.lstrip("0") for sentences in read_statements([beside])} & photographs.keys()
        shutil.copytree(beside, out / "sugar_crepe", dirs_exist_ok=True)
    if (statements := folder.resolve().parent / "vsr").is_dir():
        shutil.copytree(statements, out / "vsr", dirs_exist_ok=True)
    link = out / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve(), target_is_directory=True)
    splits = split_ids(sorted(photographs), asked, seed)
    for split, ids in splits.items():
        write_split(out, split, ids, photographs)
    write_captions_alone(out, folder, photographs)
    counts = {split: len(ids) for split, ids in splits.items()}
    write_json(out / "split.json", {"seed": seed, "counts": counts, "held_out_for_sugar_crepe": len(asked)})
    print(f"{folder}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + f" photographs, in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.folder.is_dir():
        raise UserError(f"no folder {arguments.folder}; make photo DATA=FOLDER wants pictures and captions_*.json")
    prepare(arguments.folder, arguments.out, arguments.seed)
    photo_model.build(arguments.out / "model", arguments.out / "wheels")
    photo_model.build_llm(arguments.out / "llm", arguments.out / "wheels")


if __name__ == "__main__":
    run_script(main)
