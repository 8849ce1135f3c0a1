"""Preparing photographs: which are found, how they are split, and that the split reads back as a data set."""

import json
from pathlib import Path

import pytest
from conftest import SHARED

from pc_clip.core.errors import UserError
from pc_clip.data.registry import open_dataset
from pc_clip.data.statements import read_statements
from pc_clip.data.views import located
from pc_clip.example import photographs

needs_coco = pytest.mark.skipif(not (SHARED / "coco_mini").is_dir(), reason="the COCO sample is not at hand")


def test_held_out_photographs_are_all_in_test_and_no_two_splits_meet():
    ids = [str(n) for n in range(100)]
    held_out = set(ids[::3])
    found = photographs.split_ids(ids, held_out, seed=0)
    assert held_out <= set(found["test"])
    assert sorted([key for part in found.values() for key in part], key=int) == ids
    assert (len(found["val"]), len(found["test"])) == (11, 34)
    assert found == photographs.split_ids(ids, held_out, seed=0)
    assert found["train"] != photographs.split_ids(ids, held_out, seed=1)["train"]


def test_too_few_photographs_or_no_captions_are_said(coco_folder, tmp_path):
    with pytest.raises(UserError, match="12 photographs with captions; at least 100"):
        photographs.find_photographs(coco_folder)
    with pytest.raises(UserError, match=r"holds no captions_\*\.json"):
        photographs.find_photographs(tmp_path)


@needs_coco
def test_the_sample_of_coco_is_split_and_read_back(tmp_path):
    photographs.prepare(SHARED / "coco_mini", Path("out"), seed=0)
    splits = {split: open_dataset("coco", "out", split) for split in ("train", "val", "test")}
    assert sum(len(data) for data in splits.values()) == 363
    assert all(len(captions) >= 5 for data in splits.values() for captions in data.captions)
    assert splits["test"].load(0).mode == "RGB"
    asked = {name.lstrip("0") for file in (SHARED / "sugar_crepe").glob("*.json")
             for row in json.loads(file.read_text()).values() for name in [Path(row["filename"]).stem]}  # fmt: skip
    assert not asked & {*splits["train"].ids, *splits["val"].ids}
    assert len(asked & set(splits["test"].ids)) == 89
    found = located(read_statements(["out/vsr/random"]), open_dataset("folder", "out/pictures"))
    assert len(found.statements) == 51
    photographs.prepare(SHARED / "coco_mini", Path("out"), seed=0)  # again, where all is there already
