"""The cache: what comes out of it equals what was computed, and nothing of another tower ever does."""

import pytest
import torch

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
