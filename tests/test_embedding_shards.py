"""Large image sets in shards: the same rows however many processes, kills and faults it took to make them."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from pc_clip.data.embedding_units import Part, blocks, embed_units, tars
from pc_clip.data.encoding import PIECE, Options
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pc_clip.core.config.settings import EmbedConfig
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.data import embedding_shards, embedding_units, embeddings
from pc_clip.data.dataset import BrokenImage, Dataset
from pc_clip.data.embedding_shards import (
    INDEX,
    Ids,
    Rows,
    Shards,
    index_of,
    read_file,
    read_head,
    read_index,
    write,
    write_index,
)
from pc_clip.data.registry import open_dataset
from pc_clip.data.webdataset import unopened
from pc_clip.models.clip import Clip
from pc_clip.train.methods._batches import Images

forks = multiprocessing.get_context("fork")
MADE_BY = {"image_tower": "t", "fingerprint": "f"}


# -- a model whose embeddings are known by arithmetic, and images for it --------------------------------


class Corner:
    """The upper left pixel of an image. [3, 1, 1]"""

    wait = 0.0  # seconds

    def __call__(self, image):
        time.sleep(Corner.wait)
        return torch.from_numpy(np.asarray(image)[:1, :1].copy()).permute(2, 0, 1).float()

    def __repr__(self):
        return "Corner()"


class Model(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.visual = nn.Linear(3, 5, bias=False)
        self.visual.weight.data = factor * torch.arange(15.0).reshape(5, 3)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.text = SimpleNamespace(output_dim=5)

    def encode_image(self, pixels):
        return self.visual(pixels.flatten(1))


def make_clip(factor=1.0):
    return Clip(Model(factor), None, Corner(), "tiny")


def paint(row):
    return Image.new("RGB", (4, 3), (row % 256, row // 256, 7))


def make_data(n, fingerprint="0123456789abcdef", broken=()):
    def load(row):
        if row in broken:
            raise BrokenImage(f"pictures/{row}.png cannot be read")
        return paint(row)

    return Dataset("some", "train", [f"é{row}" for row in range(n)], load, fingerprint)


def truth(rows, factor=1.0):
    corners = torch.tensor([[row % 256, row // 256, 7] for row in rows]).float()
    return corners @ make_clip(factor).model.visual.weight.detach().T


def write_tar(path, rows, beside=(), broken=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row in rows:
            buffer = BytesIO()
            paint(row).save(buffer, "png")
            content = b"no image" if row in broken else buffer.getvalue()
            for ending, inside in (("png", content), *((name, b"1") for name in beside)):
                member = tarfile.TarInfo(f"s{row:05}.{ending}")
                member.size = len(inside)
                tar.addfile(member, BytesIO(inside))
    os.utime(path, (1, 1))
    return path


def run(data, folder, clip=None, *, options=None, part=None, **more):
    """Blocks of 10 of a data set, or tars, through the whole of the work."""
    work = data if isinstance(data, tuple) else blocks(data, 10)
    options = options or Options(batch_size=5)
    return embed_units(work, clip or make_clip(), folder, options, part=Part.parse(part or ""), **more)


def found(folder, clip=None):
    return embeddings.load_embeddings(folder / INDEX, clip or make_clip())


def shards(folder):
    """All that the shards hold, byte by byte. Only the order of names in a header is safetensors' own choice."""
    return {path.name: content(path) for path in sorted(folder.glob("*.safetensors"))}


def content(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


# -- the same rows, however it is cut and shared ---------------------------------------------------------


def test_blocks_give_the_rows_of_the_one_file_in_order(tmp_path):
    data = make_data(43)
    one = embeddings.embed_images(make_clip(), data, cache=tmp_path / "one", batch_size=5)
    assert run(data, tmp_path / "many")
    many = found(tmp_path / "many")
    assert torch.equal(one.z, truth(range(43))) and torch.equal(many.z.whole(), one.z)
    assert list(many.ids) == one.ids == data.ids and many.z.shape == (43, 5) and len(many.z) == 43
    assert [len(load_file(path)["z"]) for path in sorted((tmp_path / "many").glob("*.safetensors"))] == [10] * 4 + [3]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_tar_is_counted_once_by_any_number_of_processes(tmp_path, size):
    for n in range(7):
        write_tar(tmp_path / "data" / "train" / f"{n:05}.tar", range(20 * n, 20 * n + 5 + n))
    work, barrier = tars(tmp_path / "data", None), forks.Barrier(size)

    def one(rank):
        run(work, tmp_path / "out", processes=Processes(rank, size, rank, barrier.wait))

    processes = [forks.Process(target=one, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    rows = [row for n in range(7) for row in range(20 * n, 20 * n + 5 + n)]
    assert torch.equal(found(tmp_path / "out").z.whole(), truth(rows))
    assert list(found(tmp_path / "out").ids) == [f"{row // 20:05}/s{row:05}.png" for row in rows]
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".json"] + [".safetensors"] * 7


def test_parts_that_never_meet_merge_when_the_last_is_done(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = make_data(43)
    assert not run(data, tmp_path / "out", part="3/3") and not run(data, tmp_path / "out", part="1/3")
    assert "3 of 5 units are done" in caplog.text and not (tmp_path / "out" / INDEX).exists()
    assert run(data, tmp_path / "out", part="2/3")
    assert torch.equal(found(tmp_path / "out").z.whole(), truth(range(43)))


def test_a_part_without_units_does_nothing_and_leaves_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert not run(make_data(15), tmp_path / "out", part="3/3")
    assert "0 of 2 units are done" in caplog.text and not (tmp_path / "out").exists()


def test_processes_that_meet_a_damaged_index_all_end_well(tmp_path, monkeypatch):
    """The others must not read the index that the main process is about to replace."""
    for n in range(3):
        write_tar(tmp_path / "laion" / f"{n:05}.tar", range(5 * n, 5 * n + 5))
    monkeypatch.setattr(Clip, "create", lambda *_, **__: make_clip())
    config = EmbedConfig(device="cpu", cache=str(tmp_path / "cache"))
    config.data.dataset, config.data.root = "webdataset", str(tmp_path / "laion")
    path = embeddings.embed(config).path
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    real, barrier = embedding_units.write_index, forks.Barrier(2)

    def slowly(*args):
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(embedding_units, "write_index", slowly)

    def one(rank):
        made = embeddings.embed(config, Processes(rank, 2, rank, barrier.wait))
        assert made is None if rank else (made.path, made.images) == (path, 15)

    processes = [forks.Process(target=one, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert path.read_text() == good


def test_another_runs_unit_is_waited_for_and_that_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data, folder = make_data(15), tmp_path / "out"
    run(data, tmp_path / "whole")
    folder.mkdir()
    lock = FileLock(folder / f"{blocks(data, 10).units[0].name}.lock")
    lock.acquire()
    thread = threading.Thread(target=run, args=(data, folder))
    thread.start()
    while "1 units are being embedded by another run; waiting for them" not in caplog.text:
        assert thread.is_alive()
        time.sleep(0.01)
    lock.release()
    thread.join(60)
    assert shards(folder) == shards(tmp_path / "whole")


@pytest.mark.parametrize("number, goes_on", [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EROFS, False)])
def test_a_file_system_without_locks_is_used_without_and_one_without_writing_stops(
    tmp_path, monkeypatch, number, goes_on
):
    def fail(self, *_, **__):
        raise OSError(number, os.strerror(number), self.lock_file)

    data, seen = make_data(15), []
    encode = Model.encode_image
    monkeypatch.setattr(Model, "encode_image", lambda self, pixels: seen.append(1) or encode(self, pixels))
    monkeypatch.setattr(FileLock, "acquire", fail)
    if goes_on:
        assert run(data, tmp_path / "out") and torch.equal(found(tmp_path / "out").z.whole(), truth(range(15)))
    else:
        with pytest.raises(OSError, match=r"\.lock"):
            run(data, tmp_path / "out")
        assert not seen


def test_shards_without_an_index_are_merged_and_none_is_made_again(tmp_path, monkeypatch):
    data = make_data(43)
    run(data, tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    before = shards(tmp_path / "out")
    monkeypatch.setattr(Model, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    assert run(data, tmp_path / "out")
    assert run(data, tmp_path / "out")
    assert shards(tmp_path / "out") == before and len(found(tmp_path / "out").z) == 43


def test_two_runs_at_once_share_the_work_and_both_end_right(tmp_path, monkeypatch):
    monkeypatch.setattr(Corner, "wait", 0.002)
    data, barrier, counted = make_data(100), forks.Barrier(2), forks.Value("i", 0)
    encode = Model.encode_image

    def count(self, pixels):
        with counted.get_lock():
            counted.value += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(Model, "encode_image", count)

    def one():
        barrier.wait()
        assert run(data, tmp_path / "out")
        assert torch.equal(found(tmp_path / "out").z.whole(), truth(range(100)))

    processes = [forks.Process(target=one) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counted.value == 100
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


def test_workers_pieces_and_batches_change_nothing(tmp_path):
    data = make_data(2 * PIECE + 9)
    for batch_size, workers in ((7, 0), (PIECE + 3, 0), (1000, 2), (PIECE, 2)):
        folder = tmp_path / f"{batch_size}-{workers}"
        assert embed_units(blocks(data, 60), make_clip(), folder, Options(batch_size, workers))
        assert torch.equal(found(folder).z.whole(), truth(range(len(data))))
    pixels = list(embeddings.pixels(make_clip(), data, PIECE + 3, 0))
    assert [len(batch) for batch in pixels] == [PIECE + 3, PIECE + 3, 3]
    assert torch.cat(pixels)[:, 0, 0, 0].tolist() == list(range(len(data)))


def test_what_is_kept_in_half_precision_comes_back_as_float32(tmp_path):
    data, exact = make_data(30), truth(range(30))
    run(data, tmp_path / "half", options=Options(5, dtype="float16"))
    run(data, tmp_path / "mixed", options=Options(5, precision="bf16"))
    half, mixed = found(tmp_path / "half").z, found(tmp_path / "mixed").z
    assert half.whole().dtype == half[torch.tensor([3])].dtype == torch.float32
    assert torch.equal(half.whole(), exact.half().float())
    assert torch.allclose(mixed.whole(), exact, rtol=0.02) and not torch.equal(mixed.whole(), exact)
    assert len({Options().suffix, Options(dtype="float16").suffix, Options(precision="bf16").suffix}) == 3
    path = min((tmp_path / "half").glob("*.safetensors"))
    assert torch.equal(embeddings.load_embeddings(path, make_clip()).z, exact[:10].half().float())


# -- rows where they lie ---------------------------------------------------------------------------------

SIZES = [4, 0, 1, 7, 0, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six shards, two of them empty, and what they hold."""
    folder, z = tmp_path_factory.mktemp("store"), torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(0))
    ids = [f"image {n} ü" * (n % 3) + str(n) for n in range(len(z))]
    for k, stop in enumerate(np.cumsum(SIZES).tolist()):
        start = stop - SIZES[k]
        write(folder / f"{k}.safetensors", z[start:stop], ids[start:stop], MADE_BY)
    heads = [read_head(folder / f"{k}.safetensors") for k in range(len(SIZES))]
    write_index(folder, heads, MADE_BY)
    shards = Shards(heads)
    return SimpleNamespace(rows=Rows(shards), ids=Ids(shards), z=z, names=ids, folder=folder)


@given(st.lists(st.integers(0, sum(SIZES) - 1), max_size=40))
def test_the_row_store_is_the_concatenated_tensor(store, rows):
    wanted = torch.tensor(rows, dtype=torch.long)
    assert torch.equal(store.rows[wanted], store.z[wanted])
    assert torch.equal(store.rows[wanted.numpy()], store.z[wanted])
    assert [store.ids[row] for row in rows] == [store.names[row] for row in rows]


def test_all_rows_all_ids_and_what_is_no_row(store):
    assert torch.equal(store.rows.whole(), store.z) and list(store.ids) == store.names
    assert (len(store.rows), len(store.ids), store.rows.shape) == (15, 15, (15, 3))
    for bad in ([15], [-1]):
        with pytest.raises(IndexError, match="there are 15"):
            store.rows[torch.tensor(bad)]
    for bad in (torch.tensor([0.0]), torch.tensor([True]), torch.tensor(3)):
        with pytest.raises(TypeError, match="whole numbers"):
            store.rows[bad]
    with pytest.raises(IndexError):
        store.ids[15]


def test_opening_reads_no_row_and_a_row_only_its_own_shard(store, monkeypatch):
    mapped, summed = [], []
    read, check = embedding_shards._map, embedding_shards._checksum
    monkeypatch.setattr(embedding_shards, "_map", lambda path: mapped.append(path.stem) or read(path))
    monkeypatch.setattr(embedding_shards, "_checksum", lambda tensors: summed.append(1) or check(tensors))
    monkeypatch.setattr(embedding_shards, "VERIFY_UP_TO", 0)
    _, heads = read_index(store.folder / INDEX)
    rows = Rows(Shards(heads))
    assert not mapped and not summed
    assert torch.equal(rows[torch.tensor([14, 5, 12])], store.z[[14, 5, 12]])
    assert sorted(mapped) == ["3", "5"]
    read_index(store.folder / INDEX, verify=True)
    assert len(summed) == len(SIZES)


def test_rows_and_ids_share_their_shards_and_only_some_stay_mapped(store, monkeypatch):
    mapped, read = [], embedding_shards._map
    monkeypatch.setattr(embedding_shards, "_map", lambda path: mapped.append(path.stem) or read(path))
    monkeypatch.setattr(embedding_shards, "MAPPED", 2)
    z, ids = embeddings.load_embeddings(
        store.folder, SimpleNamespace(image_tower_hash=lambda: "t", name="", pretrained="")
    )
    mapped.clear()
    order = [0, 5, 0, 5, 14, 5, 0]  # in the shards 0, 3, 0, 3, 5, 3, 0
    for row in order:
        assert torch.equal(z[torch.tensor([row])], store.z[[row]]) and ids[row] == store.names[row]
    assert mapped == ["0", "3", "5", "0"]
    assert torch.equal(z.whole(), store.z) and list(ids) == store.names


def test_what_is_read_is_the_file_itself_and_writing_to_it_does_not_reach_the_disk(store):
    with Path("/proc/self/maps").open() if Path("/proc/self/maps").exists() else pytest.skip("no /proc") as maps:
        z, _ = read_file(read_head(store.folder / "3.safetensors"))
        address = z.data_ptr()
        lines = [line.split() for line in maps]
    spans = {tuple(int(end, 16) for end in line[0].split("-")): line[-1] for line in lines}
    assert next(path for (a, b), path in spans.items() if a <= address < b) == str(store.folder / "3.safetensors")
    z[0] = 9
    assert torch.equal(read_file(read_head(store.folder / "3.safetensors"))[0], store.z[5:12])


# -- kills -----------------------------------------------------------------------------------------------


def start(data, folder, prepare=lambda: None):
    def target():
        prepare()
        run(data, folder)

    process = forks.Process(target=target)
    process.start()
    return process


def test_killed_at_eight_random_moments_and_continued_each_time(tmp_path, monkeypatch):
    data, rng = make_data(400), np.random.default_rng(0)
    run(data, tmp_path / "whole")
    monkeypatch.setattr(Corner, "wait", 0.001)
    there = {}
    for _ in range(8):
        process = start(data, tmp_path / "out")
        time.sleep(rng.uniform(0.02, 0.09))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done too early for this test to mean anything"
        before, there = there, shards(tmp_path / "out")
        assert all(there[name] == before[name] for name in before)
        assert not (tmp_path / "out" / INDEX).exists()
    assert 0 < len(there) < 40
    monkeypatch.setattr(Corner, "wait", 0)
    assert run(data, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert (tmp_path / "out" / INDEX).read_bytes() == (tmp_path / "whole" / INDEX).read_bytes()


def test_killed_before_any_step_of_the_writing(tmp_path):
    data = make_data(15)
    run(data, tmp_path / "whole")
    expected, kept = shards(tmp_path / "whole"), 0

    def deadly(k):
        count = itertools.count()

        def wrap(call):
            def wrapped(*args, **options):
                if next(count) == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return wrapped

        def prepare():
            for name in ("replace", "unlink", "fsync", "chmod"):
                setattr(os, name, wrap(getattr(os, name)))

        return prepare

    for k in itertools.count():
        folder = tmp_path / f"killed-{k}"
        process = start(data, folder, deadly(k))
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        there = shards(folder)
        assert all(there[name] == expected[name] for name in there)
        kept += bool(there)
        if (folder / INDEX).exists():
            assert torch.equal(found(folder).z.whole(), truth(range(15)))
        assert run(data, folder) and shards(folder) == expected
        shutil.rmtree(folder)
    assert k > 8 and kept > 3


def test_what_a_dying_process_left_half_written_is_ignored(tmp_path):
    data = make_data(15)
    run(data, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        torn = path.read_bytes()[:100]
        (tmp_path / "out" / f"{path.name}.123.partial").write_bytes(torn)
        folder = tmp_path / "out" / f"{path.name}.abc-xyz.partial"
        folder.mkdir()
        (folder / "content").write_bytes(torn)
    assert run(data, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


# -- damage ----------------------------------------------------------------------------------------------


def damage(kind, path):
    found = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(found[:8], "little")
    if kind == "empty":
        found.clear()
    elif kind == "cut":
        del found[start + 20 :]
    elif kind == "longer":
        found += b"\0" * 20
    elif kind == "flipped":
        found[start + 1] ^= 4
    elif kind == "flipped at the end":
        found[-1] ^= 1
    elif kind == "flipped in the header":
        found[found.index(b"tiny") + 1] ^= 1
    path.write_bytes(found)


KINDS = ["empty", "cut", "longer", "flipped", "flipped at the end", "flipped in the header"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [True, False])
def test_a_damaged_shard_is_made_again_with_a_warning(tmp_path, caplog, kind, index):
    data, clip, seen = make_data(30), make_clip(), []
    run(data, tmp_path / "out")
    before = shards(tmp_path / "out")
    if not index:
        (tmp_path / "out" / INDEX).unlink()
    victim = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    damage(kind, victim)
    if index:
        with pytest.raises(UserError, match=victim.name):
            found(tmp_path / "out")
    encode = clip.model.encode_image
    clip.model.encode_image = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    assert run(data, tmp_path / "out", clip)
    assert shards(tmp_path / "out") == before and sum(seen) == 10
    assert f"{victim.name}" in caplog.text and "computing it again" in caplog.text


def test_a_shard_cut_at_any_byte_or_with_any_byte_flipped_is_refused(tmp_path):
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    write(path, torch.arange(6.0).reshape(3, 2), ["a", "bc", ""], MADE_BY)
    good = path.read_bytes()

    def is_refused(changed):
        path.write_bytes(changed)
        try:
            head = read_head(path)
            read_file(head)
        except UserError:
            return True
        return not head.is_checked  # a name in the header is another: the caches take that for damage

    assert not is_refused(good)
    assert all(is_refused(good[:n]) for n in range(len(good)))
    for n in range(len(good)):
        flipped = bytearray(good)
        flipped[n] ^= 1 << rng.integers(8)
        assert is_refused(flipped), (n, flipped[n])


def test_a_shard_of_another_model_or_other_images_under_its_name_is_made_again(tmp_path, caplog):
    data = make_data(20)
    for folder, clip, of in (
        ("out", make_clip(), data), ("other", make_clip(2.0), data), ("images", make_clip(), make_data(20, "fedcba98")),
    ):  # fmt: skip
        run(of, tmp_path / folder, clip)
    expected = shards(tmp_path / "out")
    first, second = sorted(expected)
    shutil.copy(tmp_path / "other" / first, tmp_path / "out" / first)
    shutil.copy(tmp_path / "images" / second, tmp_path / "out" / second)
    with pytest.raises(UserError, match="is another one than"):
        found(tmp_path / "out")
    assert run(data, tmp_path / "out")
    assert caplog.text.count("is of another model or of other images; computing it again") == 2
    assert shards(tmp_path / "out") == expected
    with pytest.raises(UserError, match=r"made by the image tower of tiny \([0-9a-f]{16}\)"):
        found(tmp_path / "other")


def test_a_part_reads_the_shards_of_the_others_before_it_merges(tmp_path, monkeypatch, caplog):
    """However large they are; and says what is wrong with them, and what to do."""
    data = make_data(30)
    run(data, tmp_path / "whole")
    monkeypatch.setattr(embedding_shards, "VERIFY_UP_TO", 0)
    assert not run(data, tmp_path / "out", part="1/2")
    victim = min((tmp_path / "out").glob("*.safetensors"))
    damage("flipped at the end", victim)
    assert not run(data, tmp_path / "out", part="2/2") and not (tmp_path / "out" / INDEX).exists()
    assert f"{victim} is damaged" in caplog.text
    assert "the same command makes it again, or that of the part it belongs to" in caplog.text
    assert not run(data, tmp_path / "out", part="2/2")
    assert run(data, tmp_path / "out", part="1/2")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_each_part_verifies_its_own_shards_where_there_is_an_index(tmp_path, monkeypatch):
    data, looked = make_data(30), []
    run(data, tmp_path / "out")
    good = shards(tmp_path / "out")
    monkeypatch.setattr(embedding_shards, "VERIFY_UP_TO", 0)
    damage("flipped at the end", max((tmp_path / "out").glob("*.safetensors")))
    real = embedding_units.read_file
    monkeypatch.setattr(
        embedding_units, "read_file", lambda head, **more: looked.append(head.path.stem) or real(head, **more)
    )
    assert run(data, tmp_path / "out", part="2/2", verify=True)
    assert looked == ["000000010-000000020"] and shards(tmp_path / "out") != good
    assert run(data, tmp_path / "out", part="1/2", verify=True)
    assert set(looked) == {path.removesuffix(".safetensors") for path in good} and shards(tmp_path / "out") == good


EXACT, HALF, MIXED = Options(5), Options(5, dtype="float16"), Options(5, precision="bf16")


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "other, factor, options",
    [(make_data(20, "fedcba98"), 1.0, EXACT), (make_data(20), 2.0, EXACT), (make_data(20), 1.0, HALF),
     (make_data(20), 1.0, MIXED)],
    ids=["other images", "another tower", "float16", "bf16"],
)  # fmt: skip
def test_a_whole_folder_of_something_else_under_the_name_is_made_again(
    tmp_path, monkeypatch, caplog, index, other, factor, options
):
    """By the command; and by evaluations, which find it in the cache and take what they need of it or nothing."""
    data, name = make_data(20), f"some-train-0123456789abcdef-{make_clip().image_tower_hash()}"
    run(data, tmp_path / "right")
    run(other, tmp_path / name, make_clip(factor), options=options)
    if not index:
        (tmp_path / name / INDEX).unlink()
    z = embeddings.embed_images(make_clip(), data, cache=tmp_path).z
    assert torch.equal(z, truth(range(20)))
    assert ("is of another model or of other images than its name says" in caplog.text) == index
    assert run(data, tmp_path / name)
    assert shards(tmp_path / name) == shards(tmp_path / "right")
    assert (tmp_path / name / INDEX).read_text() == (tmp_path / "right" / INDEX).read_text()
    (path,) = tmp_path.glob("*.safetensors")
    path.unlink()
    monkeypatch.setattr(Model, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    assert torch.equal(embeddings.embed_images(make_clip(), data, cache=tmp_path).z, z)


def test_an_index_of_fewer_images_is_not_read_into_memory(tmp_path, monkeypatch, caplog):
    data, name = make_data(20), f"some-train-0123456789abcdef-{make_clip().image_tower_hash()}"
    run(make_data(20, broken={3}), tmp_path / name, options=Options(5, broken="skip"))
    monkeypatch.setattr(Rows, "whole", lambda self: pytest.fail("all of it was read"))
    assert len(embeddings.embed_images(make_clip(), data, cache=tmp_path).z) == 20
    assert "holds other images than some/train" in caplog.text


def test_a_large_set_is_read_in_full_only_where_that_is_asked_for(tmp_path, monkeypatch):
    data = make_data(30)
    run(data, tmp_path / "out")
    expected, victim = shards(tmp_path / "out"), min((tmp_path / "out").glob("*.safetensors"))
    monkeypatch.setattr(embedding_shards, "VERIFY_UP_TO", 0)
    damage("flipped", victim)
    assert len(found(tmp_path / "out").z) == 30
    with pytest.raises(UserError, match=rf"{victim.name} is damaged"):
        embeddings.load_embeddings(tmp_path / "out", make_clip(), verify=True)
    assert run(data, tmp_path / "out") and shards(tmp_path / "out") != expected
    assert run(data, tmp_path / "out", verify=True) and shards(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"rows": 10', '"rows": 11', 1),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "\x00" * len(text),
    ],
)
def test_a_damaged_index_is_refused_and_written_again_from_the_shards(tmp_path, caplog, change):
    data, path = make_data(30), tmp_path / "out" / INDEX
    run(data, tmp_path / "out")
    good = path.read_text()
    path.write_text(change(good))
    with pytest.raises(UserError, match=r"index\.json is damaged, or no index"):
        found(tmp_path / "out")
    assert run(data, tmp_path / "out")
    assert path.read_text() == good and "looking at all shards" in caplog.text


def test_an_index_whose_shard_is_absent_names_it(tmp_path):
    run(make_data(30), tmp_path / "out")
    victim = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=rf"1 of the 3 shards .* absent, first {victim.name}"):
        found(tmp_path / "out")


def test_the_folder_can_be_moved_and_named_itself(tmp_path):
    run(make_data(30), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert len(embeddings.load_embeddings(tmp_path / "elsewhere", make_clip()).z) == 30
    assert index_of(tmp_path / "elsewhere") == index_of(tmp_path / "elsewhere" / INDEX)
    assert index_of("one.safetensors") == Path("one.safetensors")


def test_a_folder_of_unfinished_parts_says_so(tmp_path):
    run(make_data(30), tmp_path / "out", part="1/2")
    for path in (tmp_path / "out", tmp_path / "out" / INDEX):
        with pytest.raises(UserError, match=r"no index\.json: either its parts are not all done"):
            embeddings.load_embeddings(path, make_clip())
    with pytest.raises(UserError, match="no embeddings at"):
        embeddings.load_embeddings(tmp_path, make_clip())


# -- broken images and tars of all kinds -------------------------------------------------------------------


def test_a_broken_image_stops_with_its_path_or_is_left_out_and_counted(tmp_path, caplog):
    data = make_data(30, broken={3, 14, 15})
    with pytest.raises(UserError, match=r"pictures/3\.png cannot be read"):
        run(data, tmp_path / "out")
    assert run(data, tmp_path / "out", options=Options(5, workers=2, broken="skip"))
    rows = [row for row in range(30) if row not in (3, 14, 15)]
    assert torch.equal(found(tmp_path / "out").z.whole(), truth(rows))
    assert list(found(tmp_path / "out").ids) == [f"é{row}" for row in rows]
    assert "3 broken images were left out in all" in caplog.text
    with pytest.raises(UserError, match=r"pictures/3\.png cannot be read"):  # what leaves some out is not all of them
        run(data, tmp_path / "out")


def test_whatever_a_decoder_raises_names_the_image(tmp_path):
    data = Dataset("some", "", ["a", "b"], lambda row: 1 // 0, "0")
    with pytest.raises(UserError, match="image a of some cannot be read .ZeroDivisionError"):
        run(data, tmp_path / "out")
    with pytest.raises(UserError, match="some holds no image that can be read"):
        run(data, tmp_path / "out", options=Options(broken="skip"))


def test_tars_of_images_alone_in_the_root_are_embedded_without_opening_them_all(tmp_path, monkeypatch):
    """The layout of LAION: no split, no labels, metadata beside each image; one broken."""
    for n in range(3):
        write_tar(tmp_path / "laion" / f"{n:05}.tar", range(5 * n, 5 * n + 5), beside=["json", "txt"], broken={7})
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *more: opened.append(Path(path).stem) or real(path, *more))
    work = tars(tmp_path / "laion", None)
    assert not opened and [unit.name for unit in work.units] == ["00000", "00001", "00002"]
    run(work, tmp_path / "out", part="1/3")
    assert opened == ["00000"]
    with pytest.raises(UserError, match=r"00001\.tar: s00007\.png cannot be read"):
        run(work, tmp_path / "out")
    assert run(work, tmp_path / "out", options=Options(broken="skip"))
    assert torch.equal(found(tmp_path / "out").z.whole(), truth([row for row in range(15) if row != 7]))


def test_a_tar_that_is_cut_short_or_a_folder_without_any_is_an_error(tmp_path):
    path = write_tar(tmp_path / "d" / "val" / "0.tar", range(4))
    assert tars(tmp_path / "d", "val").label == "webdataset/d-val"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"0\.tar is cut short or no tar file"):
        run(tars(tmp_path / "d", "val"), tmp_path / "out")
    with pytest.raises(UserError, match=r"no split 'train'; splits found there: val"):
        tars(tmp_path / "d", None)
    with pytest.raises(UserError, match=r"webdataset is not at .*none"):
        tars(tmp_path / "none", None)


def test_what_was_embedded_tar_by_tar_is_found_by_evaluations(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\n")
    for n in range(3):
        write_tar(tmp_path / "pets" / "test" / f"{n}.tar", range(4 * n, 4 * n + 4), beside=["cls"])
    monkeypatch.setattr(Clip, "create", lambda *_, **__: make_clip())
    config = EmbedConfig(device="cpu")
    config.data.dataset, config.data.root, config.data.split = "webdataset", str(tmp_path / "pets"), "test"
    made = embeddings.embed(config)
    assert (made.images, made.width, made.found_by_itself, made.path.name) == (12, 5, True, INDEX)
    monkeypatch.setattr(Model, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    data = open_dataset("webdataset", tmp_path / "pets", "test")
    again = embeddings.embed_images(make_clip(), data)
    assert torch.equal(again.z, truth(range(12))) and again.ids == data.ids


@pytest.fixture
def laion(tmp_path, monkeypatch):
    """Settings for tars that lie in a folder itself, and the tiny model for the command."""
    for n in range(2):
        write_tar(tmp_path / "laion" / f"{n:05}.tar", range(3 * n, 3 * n + 3))
    monkeypatch.setattr(Clip, "create", lambda *_, **__: make_clip())
    config = EmbedConfig(device="cpu")
    config.data.dataset, config.data.root = "webdataset", str(tmp_path / "laion")
    return config


def test_only_what_is_found_by_itself_is_said_to_be(laion, tmp_path):
    assert not embeddings.embed(laion).found_by_itself  # no reader opens tars that are in no split
    for n in range(2):
        write_tar(tmp_path / "pets" / "train" / f"{n}.tar", range(3 * n, 3 * n + 3), beside=["cls"])
    laion.data.root = str(tmp_path / "pets")
    assert embeddings.embed(laion).found_by_itself
    laion.cache = str(tmp_path / "elsewhere")
    assert not embeddings.embed(laion).found_by_itself
    laion.cache, laion.dtype = "", "float16"
    assert not embeddings.embed(laion).found_by_itself
    laion.dtype, laion.broken = "float32", "skip"
    assert embeddings.embed(laion).found_by_itself  # none of them is broken
    os.utime(write_tar(tmp_path / "pets" / "train" / "0.tar", range(3), beside=["cls"], broken={1}), (2, 2))
    made = embeddings.embed(laion)
    assert made.images == 5 and not made.found_by_itself


def test_each_process_of_a_machine_takes_its_own_gpu(laion, monkeypatch):
    asked = []
    monkeypatch.setattr(Clip, "create", lambda *_, device: asked.append(device) or make_clip())
    laion.device = "cuda"
    for processes in (Processes(), Processes(5, 8, 1), Processes(0, 8, 0)):
        embeddings.embed(laion, processes)
    assert asked == ["cuda", "cuda:1", "cuda:0"]


def test_tars_whose_names_are_not_utf8_are_embedded_and_read(laion, tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        (tmp_path / "laion").rename(root)
    except OSError:
        pytest.skip("no such names on this file system")
    (root / "00001.tar").rename(root / os.fsdecode(b"\xe9.tar"))
    laion.data.root = str(root)
    made = embeddings.embed(laion)
    stems = ["\udce9"] * 3 + ["00000"] * 3  # the shortest name comes first
    rows = [3, 4, 5, 0, 1, 2]
    assert list(found(made.path.parent).ids) == [f"{stem}/s{row:05}.png" for stem, row in zip(stems, rows)]
    assert torch.equal(found(made.path.parent).z.whole(), truth(rows))
    assert embeddings.embed(laion) == made
    str(made.path).encode()


def test_training_reads_an_index_as_it_reads_one_file(small_example, example_clip):
    config = FinetuneConfig(device="cpu")
    config.data.split = "train"
    one = Images(example_clip, open_dataset("example", split="train"), config)
    run(
        blocks(open_dataset("example", split="train"), 128), Path("many"), example_clip, options=Options(batch_size=128)
    )
    config.data.embeddings = f"many/{INDEX}"
    many = Images(example_clip, open_dataset("example", split="train"), config)
    rows = np.array([299, 0, 7, 7, 120])
    assert isinstance(many.z, Rows) and list(many.ids) == one.ids
    assert torch.allclose(next(many.batches([rows], 0)), next(one.batches([rows], 0)), atol=1e-5)


def test_a_webdataset_can_be_named_without_opening_a_tar(tmp_path, monkeypatch):
    for n in range(2):
        write_tar(tmp_path / "laion" / f"{n:05}.tar", range(2))
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("a tar was opened"))
    data, work = unopened(tmp_path / "laion", None), tars(tmp_path / "laion", None)
    assert (data.label, len(data), data.fingerprint) == ("webdataset/laion", 0, work.fingerprint)
    with pytest.raises(UserError, match="not opened"):
        data.load(0)


# -- the command -------------------------------------------------------------------------------------------


def command(*argv):
    embeddings.main(["--device", "cpu", *argv])


def test_the_command_writes_one_file_for_few_images_and_shards_for_many(
    small_example, example_clip, capsys, monkeypatch
):
    command("--data.split", "test")
    assert "80 images, 128 numbers each: data/cache/embeddings/example-test-" in capsys.readouterr().out
    command("--data.split", "val", "--shard_size", "25", "--batch_size", "25")
    assert "index.json names them; what opens this data set finds them by itself" in capsys.readouterr().out
    monkeypatch.setattr(Clip, "encode_image", lambda *_: pytest.fail("an image was encoded again"))
    for split in ("test", "val"):
        data = open_dataset("example", split=split)
        assert embeddings.embed_images(example_clip, data).ids == data.ids
        command("--data.split", split)
    assert len(list(Path("data/cache/embeddings").glob("*.safetensors"))) == 1


def test_a_set_that_is_one_block_is_the_work_of_part_1(small_example, caplog, capsys):
    caplog.set_level(logging.INFO)
    command("--data.split", "val", "--part", "2/3")
    assert "example/val is one block: part 1 does it" in caplog.text
    assert not capsys.readouterr().out and not Path("data").exists()
    command("--data.split", "val", "--part", "1/3")
    assert "60 images, 128 numbers each: data/cache/embeddings/example-val-" in capsys.readouterr().out


def test_rounded_embeddings_are_kept_apart_from_exact_ones(small_example, example_clip, capsys):
    command("--data.split", "val", "--dtype", "float16")
    rounded = Path(capsys.readouterr().out.split("--data.embeddings ")[1].removesuffix(" names them\n"))
    exact = embeddings.embed_images(example_clip, open_dataset("example", split="val")).z
    assert torch.equal(embeddings.load_embeddings(rounded, example_clip).z.whole(), exact.half().float())
    assert not torch.equal(exact, exact.half().float())


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--part", "3"], "part is '3'; write which of how many"),
        (["--part", "4/3"], "part is '4/3'"),
        (["--part", "0/3"], "part is '0/3'"),
        (["--shard_size", "0"], "shard_size is 0"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--dtype", "bfloat16"], "dtype is 'bfloat16'"),
        (["--broken", "ignore"], "broken is 'ignore'"),
        (["--data.dataset", "webdataset", "--data.captions", "c.jsonl"], "a WebDataset is embedded tar by tar"),
        (["--data.embeddings", "e.safetensors"], "data.embeddings names what is there already"),
        (["--data.dataset", "webdataset", "--data.root", "none"], "webdataset is not at none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(argv, said):
    with pytest.raises(UserError, match=said):
        command(*argv)


def test_a_file_from_before_checksums_is_read_by_name_and_made_again_in_the_cache(tmp_path, caplog):
    data, clip = make_data(4), make_clip()
    made_by = {"model": "tiny", "image_tower": clip.image_tower_hash(), "data": "some/train"}
    made_by |= {"fingerprint": data.fingerprint, "ids": json.dumps(data.ids)}
    path = tmp_path / f"some-train-{data.fingerprint}-{made_by['image_tower']}.safetensors"
    save_file({"z": truth(range(4))}, path, made_by)
    assert torch.equal(embeddings.load_embeddings(path, clip).z, truth(range(4)))
    assert torch.equal(embeddings.embed_images(clip, data, cache=tmp_path).z, truth(range(4)))
    assert "computing it again" in caplog.text
    with safe_open(path, "pt") as file:
        assert "checksum" in file.metadata()
