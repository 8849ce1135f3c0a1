"""The cache: what comes out of it equals what was computed, and nothing of another tower ever does."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pc_clip import embeddings
from pc_clip.clip import Clip
from pc_clip.datasets import open_dataset
from pc_clip.datasets.embedded import example
from pc_clip.errors import UserError


def test_cached_equals_uncached_and_no_image_is_encoded_twice(example_clip, tmp_path, monkeypatch):
    data = example("val", 20)
    fresh = embeddings.embed_images(example_clip, data, cache=tmp_path, batch_size=7)
    with torch.no_grad():
        pixels = torch.stack([example_clip.preprocess(data.load(n)) for n in range(20)])
        assert torch.allclose(fresh.z, example_clip.encode_image(pixels), atol=1e-5)
    monkeypatch.setattr(Clip, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    again = embeddings.embed_images(example_clip, data, cache=tmp_path)
    assert torch.equal(fresh.z, again.z)
    assert fresh.ids == again.ids == data.ids


def test_a_second_checkpoint_with_the_same_image_tower_uses_the_cache(example_clip, tmp_path, monkeypatch):
    data, other = example("val", 10), Clip.create("example")
    with torch.no_grad():
        other.model.text_projection += 1
    embeddings.embed_images(example_clip, data, cache=tmp_path)
    monkeypatch.setattr(Clip, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    embeddings.embed_images(other, data, cache=tmp_path)


def test_another_tower_other_data_or_another_split_never_share_a_file(example_clip, tmp_path):
    other = Clip.create("example")
    with torch.no_grad():
        other.model.visual.attnpool.c_proj.bias += 1
    for clip in (example_clip, other):
        for split, n in (("val", 10), ("val", 11), ("test", 10)):
            embeddings.embed_images(clip, example(split, n), cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_cache_file_cut_short_is_computed_again(example_clip, tmp_path, keep):
    data = example("val", 10)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good.z)


def damaged(content: bytes, how: str) -> bytes:
    start = 8 + int.from_bytes(content[:8], "little")  # of the rows
    at = {"first row": start + 2, "last row": len(content) - 1, "header": content.index(b"val-00003")}[how]
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("how", ["first row", "last row", "header"])
def test_a_cache_file_with_a_flipped_bit_is_computed_again_and_a_named_one_stops(example_clip, tmp_path, caplog, how):
    data = example("val", 10)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path).z.clone()
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(UserError, match=r"is damaged: its (content|header) has another checksum"):
        embeddings.load_embeddings(path, example_clip)
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good)
    assert "is damaged" in caplog.text and "computing it again" in caplog.text
    assert torch.equal(embeddings.load_embeddings(path, example_clip).z, good)


def test_a_cache_file_of_another_model_or_other_images_moved_to_the_name_is_computed_again(
    example_clip, tmp_path, caplog
):
    data, other = example("val", 10), Clip.create("example")
    with torch.no_grad():
        other.model.visual.attnpool.c_proj.bias += 1
    good = embeddings.embed_images(example_clip, data, cache=tmp_path / "a").z.clone()
    (path,) = (tmp_path / "a").glob("*.safetensors")
    for clip, images in ((other, data), (example_clip, example("test", 10))):
        embeddings.embed_images(clip, images, cache=tmp_path / "b")
        (wrong,) = (tmp_path / "b").glob("*.safetensors")
        wrong.replace(path)
        assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path / "a").z, good)
    assert caplog.text.count("is of another model or of other images than its name says") == 2


def test_a_cache_file_whose_ids_are_not_those_of_the_data_is_computed_again(example_clip, tmp_path, caplog):
    data = example("val", 10)
    wrong = dataclasses.replace(data, ids=data.ids[::-1], load=lambda row: data.load(9 - row))
    reversed_z = embeddings.embed_images(example_clip, wrong, cache=tmp_path).z.clone()
    found = embeddings.embed_images(example_clip, data, cache=tmp_path)
    assert "holds other images than example/val" in caplog.text
    assert torch.allclose(found.z, reversed_z.flip(0), atol=1e-5) and found.ids == data.ids


def test_what_a_dying_process_left_half_written_is_ignored(example_clip, tmp_path, monkeypatch):
    data = example("val", 10)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path).z.clone()
    (path,) = tmp_path.glob("*.safetensors")
    torn = path.with_name(f"{path.name}.123.partial")
    torn.write_bytes(path.read_bytes()[:500])
    path.unlink()
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good)
    torn.write_bytes(b"")
    monkeypatch.setattr(Clip, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good)


def test_a_file_without_checksums_can_be_read_by_name(example_clip, tmp_path):
    """An older one, or one that somebody else wrote; it need not have been this cache's."""
    path, z = tmp_path / "e.safetensors", torch.arange(6.0).reshape(2, 3)
    made_by = {"image_tower": example_clip.image_tower_hash(), "by": "somebody", "ids": json.dumps(["a", "b"])}
    save_file({"z": z}, path, made_by)
    found = embeddings.load_embeddings(path, example_clip)
    assert torch.equal(found.z, z) and found.ids == ["a", "b"]
    save_file({"z": z}, path, made_by | {"ids": "[]"})
    with pytest.raises(UserError, match="2 rows, but 0 ids"):
        embeddings.load_embeddings(path, example_clip)
    save_file({"y": z}, path, made_by)
    with pytest.raises(UserError, match="is no file of embeddings made by pc_clip"):
        embeddings.load_embeddings(path, example_clip)


def test_what_is_saved_by_name_has_checksums(example_clip, tmp_path):
    path = tmp_path / "e.safetensors"
    made_by = {"image_tower": embeddings.claim("example", None)}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 3), ["a", "b"]), made_by)
    with safe_open(path, "pt") as file:
        assert {"checksum", "head", "ids"} <= file.metadata().keys()
    assert embeddings.load_embeddings(path, example_clip).ids == ["a", "b"]


def test_a_named_file_of_another_tower_is_refused_with_both_names(example_clip, tmp_path):
    path = tmp_path / "e.safetensors"
    made_by = {"model": "ViT-L-14 (openai)", "image_tower": "0123456789abcdef"}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 128), ["a", "b"]), made_by)
    with pytest.raises(UserError, match=r"ViT-L-14 \(openai\) \(0123456789abcdef\).*that of example \([0-9a-f]{16}\)"):
        embeddings.load_embeddings(path, example_clip)
    with pytest.raises(UserError, match="no embeddings at"):
        embeddings.load_embeddings(tmp_path / "none.safetensors", example_clip)


def test_an_image_that_cannot_be_read_stops_with_its_path_and_leaves_no_file(example_clip, coco_folder, tmp_path):
    broken = coco_folder / "val2017" / "000000000003.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    data = open_dataset("coco", coco_folder, "val2017")
    with pytest.raises(UserError, match=r"000000000003\.jpg cannot be read as an image"):
        embeddings.embed_images(example_clip, data, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"000000000003\.jpg cannot be read as an image"):
        embeddings.embed_images(example_clip, data, cache=tmp_path / "cache", workers=2)
    assert not (tmp_path / "cache").exists()
