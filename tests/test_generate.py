"""Generating sentences: interrupted anywhere it continues, and what it leaves says how it was made."""

import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import jsonargparse
import pytest

from pc_clip import differences, generate
from pc_clip.config import DataConfig, GenerateConfig, configure
from pc_clip.datasets import read_captions
from pc_clip.errors import UserError
from pc_clip.writers import RulesWriter

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "coco_mini"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real captions are not part of the project")

THINGS = [
    "dog",
    "café",
    "bus",
    "kite",
    "red sofa",
    "zebra",
    "狗",
    "plate",
    "man's hat",
    'so-called "cat"',
    "sign",
    "tree",
]
N_PAIRS = 66  # of 12 images


@pytest.fixture
def config(tmp_path):
    table = tmp_path / "captions.tsv"
    lines = [f"{n}\t{n}.jpg\tA {thing} on a table.\tTwo {thing}s, far away" for n, thing in enumerate(THINGS)]
    table.write_text("\n".join(["id\timage\tcaption1\tcaption2", *lines]) + "\n", encoding="utf-8")
    return GenerateConfig(name="some", captions=str(table), out=str(tmp_path / "out"), chunk=8)


def whole(config, tmp_path):
    """What an uninterrupted run writes."""
    return generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole"))).read_bytes()


def interrupt(monkeypatch, config, at, error=KeyboardInterrupt):
    """Run until the writer is asked for its `at`-th chunk, counted from 0; leaves the working file."""
    calls, write = [], RulesWriter.write

    def stops(self, jobs):
        calls.append(len(jobs))
        if len(calls) > at:
            raise error
        return write(self, jobs)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(RulesWriter, "write", stops)
        generate.generate(config)
    return Path(config.out) / f"{config.name}.partial.jsonl"


def meta(path):
    return json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))


# -- interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 4, 8])
@pytest.mark.parametrize("both_orders", [False, True])
def test_interrupted_and_continued_it_writes_the_same_bytes(config, tmp_path, monkeypatch, at, both_orders):
    config.both_orders = both_orders
    partial = interrupt(monkeypatch, config, at)
    assert not (Path(config.out) / "some.jsonl").exists()
    path = generate.generate(config)
    assert path.read_bytes() == whole(config, tmp_path)
    assert sum(meta(path)["counts"].values()) == N_PAIRS * (1 + both_orders)
    assert not partial.exists()


def test_interrupted_many_times_it_does_no_chunk_twice(config, tmp_path, monkeypatch):
    for _ in range(4):
        partial = interrupt(monkeypatch, config, 2)
    assert partial.read_bytes().count(b"\n") == 1 + 4 * 2 * config.chunk
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


def test_a_line_torn_at_any_byte_is_written_again(config, tmp_path, monkeypatch):
    partial = interrupt(monkeypatch, config, 3)
    content, expected = partial.read_bytes(), whole(config, tmp_path)
    cuts = {0, 1, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 1, content.index("é".encode()) + 1}
    for cut in sorted(cuts | set(random.Random(0).sample(range(len(content)), 25))):
        partial.write_bytes(content[:cut])
        path = generate.generate(config)
        assert path.read_bytes() == expected, cut
        path.unlink()


@pytest.mark.parametrize("at", [1, 2])
def test_interrupted_while_it_puts_the_files_into_place_it_continues(config, tmp_path, monkeypatch, at):
    moves, replace = [], os.replace

    def stops(*where):
        moves.append(where)
        if len(moves) == at:
            raise KeyboardInterrupt
        replace(*where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stops)
        generate.generate(config)
    path = generate.generate(config)
    assert path.read_bytes() == whole(config, tmp_path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.jsonl", "some.meta.json"]


def test_after_a_writer_failed_what_was_done_is_kept(config, tmp_path, monkeypatch):
    partial = interrupt(monkeypatch, config, 5, RuntimeError)
    assert partial.read_bytes().count(b"\n") == 1 + 5 * config.chunk
    config.chunk = 3  # no setting the sentences depend on
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


def test_a_rejected_answer_with_an_odd_line_break_does_no_harm(config, monkeypatch):
    write = RulesWriter.write
    monkeypatch.setattr(RulesWriter, "write", lambda self, jobs: ["狗。\u2028猫", *write(self, jobs)[1:]])
    assert len(differences.read(generate.generate(config))) < N_PAIRS


# -- settings ------------------------------------------------------------------------------------------

OTHERS = [{"seed": 1}, {"n_pairs": 5}, {"n_images": 11}, {"both_orders": True}, {"split": "val"}]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_file_written_with_other_settings_is_left_alone(config, other):
    path = generate.generate(config)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"some\.jsonl exists .*other settings.*--overwrite"):
        generate.generate(dataclasses.replace(config, **other))
    assert path.read_bytes() == before


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_working_file_begun_with_other_settings_is_left_alone(config, monkeypatch, other):
    partial = interrupt(monkeypatch, config, 2)
    before = partial.read_bytes()
    with pytest.raises(UserError, match=r"some\.partial\.jsonl .*other settings.*--overwrite"):
        generate.generate(dataclasses.replace(config, **other))
    assert partial.read_bytes() == before


def test_with_the_same_settings_nothing_is_written_again(config, monkeypatch):
    path = generate.generate(config)
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())]
    monkeypatch.setattr(RulesWriter, "write", None)
    assert generate.generate(dataclasses.replace(config, chunk=5)) == path
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())] == before


def test_a_file_of_unknown_origin_is_left_alone(config):
    path = generate.generate(config)
    path.with_suffix(".meta.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        generate.generate(config)


def test_overwrite_starts_again(config, tmp_path, monkeypatch):
    path = generate.generate(dataclasses.replace(config, seed=1))
    interrupt(monkeypatch, dataclasses.replace(config, seed=2, overwrite=True), 3)
    generate.generate(dataclasses.replace(config, overwrite=True))
    assert path.read_bytes() == whole(config, tmp_path)
    assert meta(path)["settings"]["seed"] == config.seed


def test_other_captions_under_the_same_name_are_other_settings(config):
    generate.generate(config)
    table = Path(config.captions)
    table.write_text(table.read_text(encoding="utf-8").replace("dog", "horse"), encoding="utf-8")
    with pytest.raises(UserError):
        generate.generate(config)


# -- what comes out ------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "generate_diffs.py"), "--seed", "3"])
    return generate.generate(
        GenerateConfig(name="val", split="val", n_images=40, n_pairs=120, seed=3, out=str(tmp_path / "out"))
    )


def test_every_line_is_a_clean_sentence_about_two_images_of_the_data_set(example):
    found = differences.read(example)
    ids = [f"val-{n:05d}" for n in range(1000)]
    pairs = differences.rows(found, ids, "val")
    assert len(found) == 120 == len({tuple(sorted(pair)) for pair in pairs.tolist()})
    assert (pairs[:, 0] != pairs[:, 1]).all() and len(set(pairs.ravel().tolist())) <= 40
    assert all(differences.clean(d.text) == (d.text, "kept") for d in found)


def test_the_file_beside_it_says_how_it_was_made(example, tmp_path):
    said = meta(example)
    assert said["settings"]["seed"] == 3 and said["settings"]["n_pairs"] == 120 and said["settings"]["split"] == "val"
    assert said["counts"] == {"kept": 120}
    assert said["writer"] == {"writer": "rules"}
    assert said["versions"]["torch"] and said["pc_clip"] and said["command"] == ["generate_diffs.py", "--seed", "3"]
    text = example.with_suffix(".meta.json").read_text(encoding="utf-8")
    assert not any(str(path) in text for path in (tmp_path, ROOT, Path.home()))


def test_rejected_sentences_are_counted_by_reason_and_left_out(config, monkeypatch):
    odd = {0: "```", 1: "", 2: f"Sure! The first image shows a {THINGS[0]}, the second another."}
    write = RulesWriter.write
    monkeypatch.setattr(
        RulesWriter, "write", lambda self, jobs: [odd.get(n, text) for n, text in enumerate(write(self, jobs))]
    )
    path = generate.generate(config)
    chunks = -(-N_PAIRS // config.chunk)
    left = N_PAIRS - 3 * chunks + (3 - N_PAIRS % config.chunk)  # the last chunk is two long
    assert meta(path)["counts"] == {"kept": left, "markup": chunks, "empty": chunks, "trimmed": chunks - 1}
    assert len(differences.read(path)) == N_PAIRS - 2 * chunks


def test_when_nothing_can_be_used_the_error_counts_the_reasons(config, monkeypatch):
    monkeypatch.setattr(
        RulesWriter, "write", lambda self, jobs: ["I cannot see the first or second image."] * len(jobs)
    )
    with pytest.raises(UserError, match=r"none of the 66 .*refusal.*66.*some\.partial\.jsonl"):
        generate.generate(config)
    assert not (Path(config.out) / "some.jsonl").exists()


# -- what goes in --------------------------------------------------------------------------------------


def test_both_captions_of_an_image_are_used(config):
    text = generate.generate(config).read_text(encoding="utf-8")
    for thing in ("dog", "狗", "man's hat"):
        assert f"a {thing} on a table" in text and f"two {thing}s, far away" in text


@pytest.mark.parametrize(
    "other, said",
    [
        ({"n_pairs": N_PAIRS + 1}, r"67 pairs.*12 images.*66"),
        ({"n_images": 13}, r"n_images is 13.* 12 images"),
        ({"n_images": 4, "n_pairs": 7}, r"7 pairs.*4 images.*6"),
        ({"writer": "transformer"}, r"Did you mean 'transformers'"),
        ({"captions": "absent.tsv"}, r"absent\.tsv"),
        ({"captions": "absent.json"}, r"absent\.json"),
        ({"captions": None, "split": "vall"}, r"'vall'.*Did you mean 'val'"),
        ({"n_images": 1}, r"none of the 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_that_says_so(config, other, said):
    with pytest.raises(UserError, match=said):
        generate.generate(dataclasses.replace(config, **other))


@pytest.mark.parametrize("other", [{"n_pairs": -1}, {"n_images": -1}, {"chunk": 0}], ids=str)
def test_a_number_that_makes_no_sense_is_an_error_of_the_user(config, other):
    with pytest.raises(UserError, match=next(iter(other))):
        generate.generate(dataclasses.replace(config, **other))


@real_data
def test_coco_captions_as_published_are_compared(tmp_path):
    path = DATA / "captions_val2017.json"
    captions = {key: texts for key, (_, texts) in read_captions(path).items()}
    config = GenerateConfig(name="coco", captions=str(path), n_images=40, n_pairs=200, out=str(tmp_path))
    found = differences.read(generate.generate(config))
    assert len(found) > 190
    for d in found:
        said = " ".join(d.text.lower().split())
        for key in (d.first, d.second):
            assert any(c.lower().rstrip(" .!")[-20:] in said for c in captions[key]), (d, captions[key])


@real_data
def test_a_table_of_simclip_is_compared(tmp_path):
    path = DATA / "simclip_example.tsv"
    found = differences.read(generate.generate(GenerateConfig(name="s", captions=str(path), out=str(tmp_path))))
    ids = list(read_captions(path))
    assert {frozenset((d.first, d.second)) for d in found} <= {frozenset((a, b)) for a in ids for b in ids if a != b}
    assert len(found) == len(ids) * (len(ids) - 1) / 2


def test_the_config_of_the_example_is_the_one_that_training_asks_for():
    parser = jsonargparse.ArgumentParser()
    path = ROOT / "configs" / "diffs_example.yaml"
    assert configure(GenerateConfig, parser, [], default=path) == generate.EXAMPLE


def test_training_on_the_example_writes_its_sentences_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dataclasses.replace(generate.EXAMPLE, split="val", n_images=20, n_pairs=30)
    monkeypatch.setattr(generate, "EXAMPLE", small)
    path = Path("llm_diffs/example.jsonl")
    for data in (DataConfig(differences="llm_diffs/other.jsonl"), DataConfig(dataset="coco", differences=str(path))):
        generate.write_missing_example(data)
        assert not Path("llm_diffs").exists()
    generate.write_missing_example(DataConfig(differences=str(path)))
    assert len(differences.read(path)) == 30
    path.write_text("mine")
    generate.write_missing_example(DataConfig(differences=str(path)))
    assert path.read_text() == "mine"
