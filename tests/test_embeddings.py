"""The cache: what comes out of it equals what was computed, and nothing of another tower ever does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pc_clip.core.errors import UserError
from pc_clip.data import embedding_shards, embeddings
from pc_clip.data.encoding import Options, encode
from pc_clip.data.example_sets import example
from pc_clip.data.registry import open_dataset
from pc_clip.models.clip import Clip


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
    start = 8 + int.from_bytes(content[:8], "little")  # where the header ends
    first, last = (start + at for at in json.loads(content[8:start])["z"]["data_offsets"])
    at = {"first row": first + 2, "last row": last - 1, "header": content.index(b"example/val")}[how]
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
    path, z = tmp_path / "e.safetensors", torch.arange(256.0).reshape(2, 128)
    made_by = {"image_tower": example_clip.image_tower_hash(), "by": "somebody", "ids": json.dumps(["a", "b"])}
    save_file({"z": z}, path, made_by)
    found = embeddings.load_embeddings(path, example_clip)
    assert torch.equal(found.z, z) and found.ids == ["a", "b"]
    save_file({"y": z}, path, made_by)
    with pytest.raises(UserError, match="is no file of embeddings made by pc_clip"):
        embeddings.load_embeddings(path, example_clip)


@pytest.mark.parametrize(
    "ids, said",
    [
        ("[]", "2 rows, but 0 ids"),
        ("nope", "no list of names"),
        ("3", "no list of names"),
        ('{"a": 1, "b": 2}', "no list of names"),
        ("[1, 2]", "no list of names"),
        ("[" * 100_000, "no list of names"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([2, 1])), "do not end where they should"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([-1, 2])), "do not end where they should"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([1, 3])), "do not end where they should"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([1, 1])), "do not end where they should"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([1.0, 2.0])), "not bytes and their ends"),
        ((torch.tensor([97, 98]), torch.tensor([1, 2])), "not bytes and their ends"),
        ((torch.tensor([97, 98]).byte(), torch.tensor([[1], [2]])), "not bytes and their ends"),
        ((torch.tensor([97]).byte(), torch.tensor([1])), "2 rows, but 1 ids"),
    ],
)
def test_ids_that_are_no_list_of_names_are_an_error_with_the_path(example_clip, tmp_path, ids, said):
    path, made_by = tmp_path / "e.safetensors", {"image_tower": example_clip.image_tower_hash()}
    if isinstance(ids, str):
        save_file({"z": torch.ones(2, 128)}, path, made_by | {"ids": ids})
    else:
        save_file({"z": torch.ones(2, 128), "ids.bytes": ids[0], "ids.ends": ids[1]}, path, made_by)
    with pytest.raises(UserError, match=rf"e\.safetensors is damaged: .*{said}"):
        embeddings.load_embeddings(path, example_clip)


def test_rows_of_another_width_than_the_models_are_refused(example_clip, tmp_path):
    path = tmp_path / "e.safetensors"
    for tower in (example_clip.image_tower_hash(), embeddings.claim("example", None)):
        save_file({"z": torch.ones(2, 64)}, path, {"image_tower": tower, "ids": '["a", "b"]'})
        with pytest.raises(UserError, match="has 64 numbers an image, but example makes 128"):
            embeddings.load_embeddings(path, example_clip)


def test_what_is_saved_by_name_has_checksums(example_clip, tmp_path):
    path = tmp_path / "e.safetensors"
    made_by = {"image_tower": embeddings.claim("example", None)}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(2, 128), ["a", "b"]), made_by)
    with safe_open(path, "pt") as file:
        assert {"checksum", "head"} <= file.metadata().keys()
    assert embeddings.load_embeddings(path, example_clip).ids == ["a", "b"]


def test_names_that_are_not_utf8_come_back_as_they_were(example_clip, tmp_path):
    """As a folder or a tar gives them: bytes that are no UTF-8 as lone surrogates. The data set's name may be one."""
    data = example("val", 3)
    odd = dataclasses.replace(data, split="caf\udce9", ids=["caf\udce9.png", "café.png", ""])
    made = embeddings.embed_images(example_clip, odd, cache=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert embeddings.load_embeddings(path, example_clip).ids == odd.ids == made.ids
    path.name.encode()


def test_a_file_has_room_for_any_number_of_ids(example_clip, tmp_path):
    """safetensors takes no header above 100 MB."""
    path, ids = tmp_path / "e.safetensors", [str(n).zfill(100_000) for n in range(1_100)]
    made_by = {"image_tower": example_clip.image_tower_hash()}
    embeddings.save_embeddings(path, embeddings.Embeddings(torch.ones(1_100, 128), ids), made_by)
    assert embeddings.load_embeddings(path, example_clip).ids == ids


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


# -- faults and settings -------------------------------------------------------------------------------


def test_a_large_file_is_read_in_full_only_where_that_is_asked_for(example_clip, tmp_path, monkeypatch, caplog):
    data = example("val", 10)
    good = embeddings.embed_images(example_clip, data, cache=tmp_path).z.clone()
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damaged(path.read_bytes(), "first row"))
    monkeypatch.setattr(embedding_shards, "VERIFY_UP_TO", 0)
    assert not torch.equal(embeddings.load_embeddings(path, example_clip).z, good)
    with pytest.raises(UserError, match="is damaged: its content .* the command that made it makes it again"):
        embeddings.load_embeddings(path, example_clip, verify=True)
    assert not torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path).z, good) and not caplog.text
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=tmp_path, verify=True).z, good)
    assert "is damaged" in caplog.text


def test_where_the_cache_cannot_be_written_the_embeddings_are_used_all_the_same(example_clip, tmp_path, caplog):
    data, cache = example("val", 10), tmp_path / "cache"
    good = embeddings.embed_images(example_clip, data, cache=tmp_path / "other").z
    cache.write_text("a file where the folder should be")
    assert torch.equal(embeddings.embed_images(example_clip, data, cache=cache).z, good)
    assert "cannot be kept" in caplog.text and "the next run computes them again" in caplog.text


def test_the_command_that_is_there_to_write_stops_where_it_cannot(small_example, example_clip):
    Path("full").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        embeddings.main(["--device", "cpu", "--data.split", "val", "--cache", "full"])


@pytest.mark.parametrize("wrong, said", [({"workers": -1}, "workers is -1"), ({"batch_size": 0}, "batch_size is 0")])
def test_a_number_of_workers_or_images_that_means_nothing_is_refused(example_clip, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        embeddings.embed_images(example_clip, example("val", 3), cache=tmp_path, **wrong)


def test_images_are_encoded_without_dropout_and_a_model_in_training_stays_so(example_clip, tmp_path):
    data, clip = example("val", 10), Clip.create("example")
    clip.model.visual = nn.Sequential(clip.model.visual, nn.Dropout(0.5))
    clip.model.train()
    expected = embeddings.embed_images(example_clip, data, cache=tmp_path).z
    assert torch.allclose(encode(clip, data, Options(4)).z, expected, atol=1e-5)
    assert clip.model.training
    with pytest.raises(UserError, match="cannot be read"):
        encode(clip, dataclasses.replace(data, load=lambda row: 1 // 0), Options(4))
    assert clip.model.training
