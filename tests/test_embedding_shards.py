"""Large image sets in shards: the same rows however many processes and kills it took to make them."""

import dataclasses
import multiprocessing
import os
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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from tqdm import tqdm

from pc_clip.core.config.settings import EmbedConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.data import embed, embeddings
from pc_clip.data.dataset import BrokenImage, Dataset
from pc_clip.data.embedding_shards import INDEX, Rows, tars
from pc_clip.data.registry import open_dataset
from pc_clip.models.clip import Clip

forks = multiprocessing.get_context("fork")
tqdm.set_lock(threading.RLock())  # its own is shared with forks, and a killed one may hold it for ever


class Corner:
    """The upper left pixel of an image, [3, 1, 1], after a while."""

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

    return Dataset("some", "train", [f"é\udce9{row}" for row in range(n)], load, fingerprint)


def truth(rows):
    corners = torch.tensor([[row % 256, row // 256, 7] for row in rows]).float()
    return corners @ make_clip().model.visual.weight.detach().T


def write_tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row in rows:
            buffer = BytesIO()
            paint(row).save(buffer, "png")
            for ending, content in (("png", buffer.getvalue()), ("cls", b"1")):
                member = tarfile.TarInfo(f"s{row:05}.{ending}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def run(data, monkeypatch, clip=None, processes=None, **settings):
    """`python -m pc_clip embeddings` in blocks of 10 images."""
    monkeypatch.setattr(embed, "load_dataset", lambda config: data)
    monkeypatch.setattr(embed, "create_model", lambda *_, **__: clip or make_clip())
    config = EmbedConfig(device="cpu", shard_size=10, batch_size=5, cache="cache", **settings)
    return embed.embed(config, processes)


def load(made):
    return embeddings.load_embeddings(made, make_clip())


def no_encoding(monkeypatch):
    monkeypatch.setattr(Model, "encode_image", lambda *_: pytest.fail("an image was encoded again"))


def test_shards_hold_the_rows_in_order_and_are_found_by_evaluations(monkeypatch):
    data = make_data(43)
    made = run(data, monkeypatch)
    assert made.name == INDEX and len(list(made.parent.iterdir())) == 6
    z, ids = load(made)
    assert torch.equal(z.whole(), truth(range(43))) and ids == data.ids
    no_encoding(monkeypatch)
    assert run(data, monkeypatch) == made
    assert torch.equal(embeddings.embed_images(make_clip(), data, cache=made.parents[1]).z, truth(range(43)))


def join(processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_processes_share_the_units_and_main_writes_the_index(monkeypatch):
    data, barrier, counted = make_data(57), forks.Barrier(2, timeout=60), forks.Value("i", 0)
    encode = Model.encode_image

    def count(self, pixels):
        with counted.get_lock():
            counted.value += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(Model, "encode_image", count)

    def one(rank):
        made = run(data, monkeypatch, processes=Processes(rank, 2, rank, barrier.wait))
        assert (made is None) == (rank == 1)

    join([forks.Process(target=one, args=(rank,), daemon=True) for rank in range(2)])
    assert counted.value == 57
    assert torch.equal(load(run(data, monkeypatch)).z.whole(), truth(range(57)))


@pytest.mark.slow
def test_killed_at_random_moments_it_continues_and_ends_as_an_undisturbed_run(monkeypatch):
    data, rng = make_data(400), np.random.default_rng(0)
    monkeypatch.setattr(Corner, "wait", 0.001)
    seen = {}
    for _ in range(4):
        process = forks.Process(target=run, args=(data, monkeypatch))
        process.start()
        time.sleep(rng.uniform(0.03, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (folder,) = os.scandir("cache") if os.path.isdir("cache") else [None]
        shards = {f.name: f.stat().st_mtime_ns for f in os.scandir(folder) if f.is_file()} if folder else {}
        assert seen.items() <= shards.items() and INDEX not in shards  # what was done is not done again
        seen = shards
    monkeypatch.setattr(Corner, "wait", 0)
    z, ids = load(run(data, monkeypatch))
    assert torch.equal(z.whole(), truth(range(400))) and ids == data.ids


def test_damaged_or_foreign_shards_are_recomputed(monkeypatch, caplog):
    data = make_data(20)
    made = run(data, monkeypatch)
    other_images, other_tower = run(make_data(20, "fedcba98"), monkeypatch), run(data, monkeypatch, make_clip(2.0))
    first, second = sorted(path.name for path in made.parent.glob("*.safetensors"))
    whole = (made.parent / second).read_bytes()
    for name, content, message in [
        (second, whole[: len(whole) // 2], f"{second} is not a whole safetensors file"),
        (second, whole[:-1] + bytes([whole[-1] ^ 1]), f"{second} is damaged"),
        (first, (other_images.parent / first).read_bytes(), f"{first} is another one than"),
        (second, (other_tower.parent / second).read_bytes(), f"{second} is another one than"),
        (INDEX, made.read_bytes()[:50], "is not a whole embedding index"),
        (INDEX, b"", "is not a whole embedding index"),
    ]:
        (made.parent / name).write_bytes(content)
        caplog.clear()
        with pytest.raises(UserError, match=message):
            load(made)
        assert torch.equal(load(run(data, monkeypatch)).z.whole(), truth(range(20)))
        assert message in caplog.text and "computing it again" in caplog.text
        assert torch.equal(embeddings.embed_images(make_clip(), data, cache=Path("cache")).z, truth(range(20)))
    with pytest.raises(UserError, match=r"made by the image tower of tiny \([0-9a-f]{16}\), .* but this run uses"):
        load(other_tower)


def test_broken_images_stop_the_run_or_are_left_out_and_counted(monkeypatch, caplog):
    data = make_data(30, broken={3, 14, 15})
    with pytest.raises(UserError, match=r"pictures/3\.png cannot be read"):
        run(data, monkeypatch)
    made = run(data, monkeypatch, broken="skip")
    rows = [row for row in range(30) if row not in (3, 14, 15)]
    assert torch.equal(load(made).z.whole(), truth(rows)) and load(made).ids == [data.ids[row] for row in rows]
    assert "3 broken images were left out in all" in caplog.text
    with pytest.raises(UserError, match=r"pictures/3\.png cannot be read"):
        run(data, monkeypatch)


def test_rounded_embeddings_are_kept_apart_from_exact_ones(monkeypatch):
    data = make_data(30)
    made = run(data, monkeypatch, dtype="float16")
    assert torch.equal(load(made).z.whole(), truth(range(30)).half().float())
    assert torch.equal(embeddings.embed_images(make_clip(), data, cache=made.parents[1]).z, truth(range(30)))


def test_a_webdataset_is_embedded_by_tar_one_gpu_a_process(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\n")
    for n in range(3):
        write_tar(tmp_path / "pets" / "test" / f"{n}.tar", range(4 * n, 4 * n + 4))
    assert list(tars(tmp_path / "pets", "test").units) == ["0", "1", "2"]
    devices = []
    monkeypatch.setattr(embed, "resolve_device", lambda device: device)
    monkeypatch.setattr(embed, "create_model", lambda *_, device: devices.append(device) or make_clip())
    config = EmbedConfig(device="cuda")
    config.data.dataset, config.data.root, config.data.split = "webdataset", str(tmp_path / "pets"), "test"
    embed.embed(config)
    embed.embed(config, Processes(5, 8, 1))
    assert devices == ["cuda", "cuda:1"]
    no_encoding(monkeypatch)
    data = open_dataset("webdataset", tmp_path / "pets", "test")
    again = embeddings.embed_images(make_clip(), data)
    assert torch.equal(again.z, truth(range(12))) and again.ids == data.ids


PARTS = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 0, 1, 7, 0, 3)]


@given(st.lists(st.integers(0, 14), max_size=40))
def test_rows_are_those_of_the_concatenated_tensor(rows):
    rows = torch.tensor(rows, dtype=torch.long)
    assert torch.equal(Rows(PARTS)[rows], torch.cat(PARTS)[rows])
    assert torch.equal(Rows(PARTS).whole(), torch.cat(PARTS)) and Rows(PARTS).shape == (15, 3)


def test_a_row_that_is_not_there_is_an_error():
    for row in (-1, 15):
        with pytest.raises(IndexError, match="there are 15"):
            Rows(PARTS)[torch.tensor([row])]


def test_settings_that_mean_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(embed, "load_dataset", lambda config: make_data(3))
    for settings, message in [
        ({"shard_size": 0}, "shard_size is 0"),
        ({"precision": "fp8"}, "precision is"),
        ({"dtype": "int8"}, "dtype"),
        ({"broken": "ignore"}, "broken is 'ignore'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            embed.embed(dataclasses.replace(EmbedConfig(device="cpu"), **settings))
