"""The cache: what comes out of it equals what was computed, and nothing of another tower ever does."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from pc_clip.core import files
from pc_clip.core.errors import UserError
from pc_clip.data import embed, embeddings
from pc_clip.data.example_sets import example
from pc_clip.data.registry import open_dataset
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model


def other_tower():
    other = create_model("example")
    with torch.no_grad():
        other.model.visual.attnpool.c_proj.bias += 1
    return other


def test_cached_equals_uncached_and_no_image_is_encoded_twice(example_clip, tmp_path, monkeypatch):
    data, other_text = example("val", 20), create_model("example")
    with torch.no_grad():
        other_text.model.text_projection += 1
        expected = example_clip.encode_image(torch.stack([example_clip.preprocess(data.load(n)) for n in range(20)]))
    fresh = embeddings.embed_images(example_clip, data, cache=tmp_path, batch_size=7)
    assert torch.allclose(fresh.z, expected, atol=1e-5)
    monkeypatch.setattr(Clip, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    again = embeddings.embed_images(other_text, data, cache=tmp_path)
    assert torch.equal(fresh.z, again.z) and fresh.ids == again.ids == data.ids


@pytest.mark.slow
def test_another_tower_other_data_or_another_split_never_share_a_file(example_clip, tmp_path):
    for clip in (example_clip, other_tower()):
        for split, n in (("val", 4), ("val", 5), ("test", 4)):
            embeddings.embed_images(clip, example(split, n), cache=tmp_path)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 6


def test_a_damaged_file_is_computed_again_and_a_named_one_stops(example_clip, tmp_path, caplog):
    data = example("val", 6)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path).z.clone()
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()

    def flipped(place):
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    row, header = flipped(len(whole) - 9), flipped(whole.index(b"example/val"))
    for content in (b"", whole[:-100], b"something else", whole + bytes(20), row, header):
        path.write_bytes(content)
        caplog.clear()
        for named in (path, path.parent):
            with pytest.raises(UserError, match=f"{path.name} is (damaged|not a whole safetensors file)"):
                embeddings.load_embeddings(named, example_clip)
        assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good)
        assert "computing it again" in caplog.text
        assert torch.equal(embeddings.load_embeddings(path, example_clip).z, good)


def test_a_foreign_cache_file_is_recomputed(example_clip, tmp_path, caplog):
    data = example("val", 6)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path / "a").z.clone()
    (folder,) = (tmp_path / "a").iterdir()
    for clip, images in ((other_tower(), data), (example_clip, example("test", 6))):
        embeddings.embed_images(clip, images, cache=tmp_path / "b")
        (wrong,) = (tmp_path / "b").iterdir()
        shutil.rmtree(folder)
        wrong.replace(folder)
        assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path / "a").z, good)
    assert caplog.text.count("is of another model or of other images than its name says") == 4  # index and shard
    turned = dataclasses.replace(data, ids=data.ids[::-1], load=lambda row: data.load(5 - row))
    again = embeddings.embed_images(example_clip, turned, cache=tmp_path / "a").z
    assert torch.allclose(again, good.flip(0), atol=1e-5) and "holds other images than example/val" in caplog.text


def test_a_named_file_of_another_tower_is_refused_with_both_names(example_clip, tmp_path):
    path = tmp_path / "e.safetensors"
    made_by = {"model": "ViT-L-14 (openai)", "image_tower": "0123456789abcdef"}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 128), ["a", "b"]), made_by)
    with pytest.raises(UserError, match=r"ViT-L-14 \(openai\) \(0123456789abcdef\).*that of example \([0-9a-f]{16}\)"):
        embeddings.load_embeddings(path, example_clip)
    with pytest.raises(UserError, match="no embeddings at"):
        embeddings.load_embeddings(tmp_path / "none.safetensors", example_clip)


def test_a_named_model_is_trusted_unless_the_width_differs(example_clip, tmp_path):
    path, made_by = tmp_path / "e.safetensors", {"image_tower": embeddings.claim("example", None)}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 128), ["a\udce9", ""]), made_by)
    assert embeddings.load_embeddings(path, example_clip).ids == ["a\udce9", ""]  # bytes of a name that are not UTF-8
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 64), ["a", "b"]), made_by)
    with pytest.raises(UserError, match="with 64 numbers an image, but this run uses that of example .* with 128"):
        embeddings.load_embeddings(path, example_clip)


def test_an_unreadable_image_is_named_and_no_file_is_left(example_clip, coco_folder):
    broken = coco_folder / "val2017" / "000000000003.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    data = open_dataset("coco", coco_folder, "val2017")
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"000000000003\.jpg cannot be read as an image"):
            embeddings.embed_images(example_clip, data, workers=workers)
    assert not embeddings.CACHE.exists()


@pytest.mark.slow
def test_an_unwritable_cache_warns_and_the_command_fails(small_example, example_clip, caplog):
    Path("full").write_text("a file where the folder should be")
    data = example("val", 10)
    good = embeddings.embed_images(example_clip, data).z
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=Path("full")).z, good)
    assert "the next run computes them again" in caplog.text
    with pytest.raises(OSError):
        embed.main(["--device", "cpu", "--data.split", "val", "--cache", "full"])


def test_the_command_says_where_the_embeddings_are(small_example, capsys, caplog):
    caplog.set_level("INFO")
    embed.main(["--device", "cpu", "--data.split", "val"])
    assert "--data.embeddings data/cache/embeddings/example-val-" in capsys.readouterr().out
    assert "60 images, 128 numbers each" in caplog.text


# -- files -----------------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file_and_stale_partials_expire(tmp_path, monkeypatch):
    path, left = tmp_path / "a.json", tmp_path / "b.json.xyz.partial"
    files.write_json(path, [1])
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            files.write_json(path, [2])
    assert path.read_text() == "[\n 1\n]\n" and sorted(tmp_path.iterdir()) == [path, left]
    os.utime(left, (time.time() - 2 * files.DAY,) * 2)
    files.write_json(path, [2])
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path):
    lock = tmp_path / "run" / ".lock"
    with files.exclusive_lock(lock, "busy"), pytest.raises(UserError, match="busy"), files.exclusive_lock(lock, "busy"):
        pass
    with files.exclusive_lock(lock, "busy"):
        assert lock.exists()
    assert not lock.parent.exists()
