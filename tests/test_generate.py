"""Generating sentences: interrupted anywhere it continues, and what it leaves says how it was made."""

import dataclasses
import errno
import itertools
import json
import sys
from io import FileIO
from pathlib import Path

import pytest

from pc_clip.core import environment
from pc_clip.core.cli import configure
from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError, run_script
from pc_clip.core.files import write_text
from pc_clip.data import differences
from pc_clip.data.captions import read_captions
from pc_clip.write import generate, work
from pc_clip.write.cleaning import Checked, clean
from pc_clip.write.progress import Progress
from pc_clip.write.rules import RulesWriter

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
    "žába",
    "plate",
    "man's hat",
    'so-called "cat"',
    "tree",
    "sign",
]
N_PAIRS = 66  # of 12 images


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: None)  # two processes of git a file
    table = tmp_path / "captions.tsv"
    lines = [f"{n}\t{n}.jpg\tA {thing} on a table.\tTwo {thing}s, far away" for n, thing in enumerate(THINGS)]
    table.write_text("\n".join(["id\timage\tcaption1\tcaption2", *lines]) + "\n", encoding="utf-8")
    return GenerateConfig(name="some", captions=str(table), out=str(tmp_path / "out"))


def whole(config, tmp_path):
    """What an uninterrupted run writes."""
    return generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole"))).read_bytes()


def interrupt(monkeypatch, config, after, error=KeyboardInterrupt):
    """Run until the writer has given `after` sentences; leaves the working folder, whose last file is returned."""
    stream = RulesWriter.stream

    def stops(self, jobs):
        yield from itertools.islice(stream(self, jobs), after)
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(RulesWriter, "stream", stops)
        generate.generate(config)
    return max((Path(config.out) / f"{config.name}.parts").glob("[0-9]*.jsonl"))


def answer(monkeypatch, change):
    """Have the writer answer job n with change(n, what the rules say)."""
    stream = RulesWriter.stream
    monkeypatch.setattr(RulesWriter, "needs_cleaning", True)  # in place of a language model
    monkeypatch.setattr(RulesWriter, "stream", lambda self, jobs: ((n, change(n, t)) for n, t in stream(self, jobs)))


def meta(path):
    return json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# -- interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 30, N_PAIRS])
def test_interrupted_and_continued_it_writes_the_same_bytes(config, tmp_path, monkeypatch, after):
    config.both_orders = after == 30
    path = interrupt(monkeypatch, config, after, KeyboardInterrupt if after else RuntimeError)
    assert path.read_bytes().count(b"\n") == after
    assert not (Path(config.out) / "some.jsonl").exists()
    path = generate.generate(config)
    assert path.read_bytes() == whole(config, tmp_path)
    assert sum(meta(path)["counts"].values()) == N_PAIRS * (1 + config.both_orders)
    assert names(config.out) == ["some.jsonl", "some.meta.json"]


def test_interrupted_while_it_puts_the_files_into_place_it_continues(config, monkeypatch):
    """After each of the files that are written at the end, over an older file."""
    older = generate.generate(dataclasses.replace(config, seed=1)).read_bytes()
    config.overwrite = True
    answer(monkeypatch, lambda n, text: "" if n == 7 else text)
    for at in range(2):
        interrupt(monkeypatch, config, 30)
        count = itertools.count()

        def stops(path, content, count=count, at=at):
            write_text(path, content)
            if next(count) == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(work, "write_text", stops)
            generate.generate(config)
        path = generate.generate(dataclasses.replace(config, overwrite=False))
        assert path.read_bytes() != older and len(path.read_bytes().splitlines()) == N_PAIRS - 2
        assert names(config.out) == ["some.jsonl", "some.meta.json", "some.rejected.jsonl"]


def test_a_full_disk_is_the_end_of_the_run_and_of_no_sentence(config, tmp_path, monkeypatch, capsys):
    class Full(FileIO):
        def write(self, content):
            if Path(self.name).read_bytes().count(b"\n") >= 20:
                super().write(content[:9])  # the rest of the line finds no room
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Progress, "open", lambda self, rank: Full(self.folder / "0.jsonl", "xb"))
        run_script(lambda: generate.generate(config))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "0.jsonl (No space left on device)" in error and "the same command continues" in error
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


def test_a_stream_is_closed_when_what_reads_it_fails(config, monkeypatch):
    """A writer may have requests under way and a thread for them."""
    streams, stream = [], RulesWriter.stream
    monkeypatch.setattr(RulesWriter, "stream", lambda *args: streams.append(stream(*args)) or streams[-1])
    monkeypatch.setattr(work, "append", lambda file, row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate.generate(config)
    assert streams[0].gi_frame is None


# -- answers that cannot be used -----------------------------------------------------------------------


def test_when_nothing_can_be_used_the_error_shows_why_and_the_next_run_asks_again(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        answer(patch, lambda n, text: "I cannot see the first or second image.")
        for _ in range(2):
            with pytest.raises(UserError, match=r"none of the 66 .*refusal.*66.*'I cannot see .*asks again") as error:
                generate.generate(config)
        assert "\n" not in str(error.value) and not (Path(config.out) / "some.jsonl").exists()
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


def test_after_a_hundred_answers_that_cannot_be_used_no_more_are_asked_for(config, tmp_path, monkeypatch):
    config.both_orders = True  # 132 pairs
    asked = []
    with monkeypatch.context() as patch:
        answer(patch, lambda n, text: asked.append(n) or "```")
        with pytest.raises(UserError, match=r"none of the first 100 answers.*\{'code': 100\}.*code: '```'; code:"):
            generate.generate(config)
    assert len(asked) == 100
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


def test_one_answer_that_can_be_used_is_enough_to_go_on(config, monkeypatch):
    config.both_orders = True
    answer(monkeypatch, lambda n, text: text if n == 99 else "```")
    assert meta(generate.generate(config))["counts"] == {"code": 131, "kept": 1}


def test_after_the_first_hundred_of_a_continued_run_those_are_asked_for_again(config, tmp_path, monkeypatch):
    config.both_orders = True
    interrupt(monkeypatch, config, 10)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="none of the first 100"):
        answer(patch, lambda n, text: "```")
        generate.generate(config)
    assert generate.generate(config).read_bytes() == whole(config, tmp_path)


@pytest.mark.parametrize("min_characters", [None, 85, 90])
def test_the_shortest_sentence_that_is_kept_is_a_setting(config, min_characters, monkeypatch):
    answer(monkeypatch, lambda n, text: text)
    config.min_characters = min_characters
    lengths = [len(d.text) for d in differences.read(generate.generate(config))]
    assert (min_characters or 60) <= min(lengths)
    assert (len(lengths) < N_PAIRS) == (min_characters is not None)


def test_half_a_character_is_replaced(config, monkeypatch):
    answer(monkeypatch, lambda n, text: text.replace("while", "\ud83d while"))
    assert " ? while " in generate.generate(config).read_text(encoding="utf-8")


def test_with_all_sentences_there_the_writer_is_not_loaded_to_merge_them(config, tmp_path, monkeypatch):
    interrupt(monkeypatch, config, N_PAIRS)
    expected = whole(config, tmp_path)
    monkeypatch.setattr(work, "make_writer", None)
    path = generate.generate(config)
    assert path.read_bytes() == expected
    assert meta(path)["writer"] == {"writer": "rules"}


# -- settings ------------------------------------------------------------------------------------------

OTHERS = [{"seed": 1}, {"n_pairs": 5}, {"n_images": 11}, {"both_orders": True}, {"caption": "longest"}]


def test_what_was_written_or_begun_with_other_settings_is_left_alone(config, monkeypatch):
    path = interrupt(monkeypatch, config, 20)
    before = path.read_bytes()
    for other in OTHERS:
        with pytest.raises(UserError, match=r"some\.parts was begun with other settings.*--overwrite"):
            generate.generate(dataclasses.replace(config, **other))
        assert path.read_bytes() == before
    path = generate.generate(config)
    before = path.read_bytes()
    for other in OTHERS:
        with pytest.raises(UserError, match=r"some\.jsonl exists .*other settings.*--overwrite"):
            generate.generate(dataclasses.replace(config, **other))
        assert path.read_bytes() == before
    for damage in (b"\xff\xfe", b"[]", b"{", b""):  # of unknown origin
        path.with_suffix(".meta.json").write_bytes(damage)
        with pytest.raises(UserError, match="exists and was written with other settings"):
            generate.generate(config)


def test_other_captions_under_the_same_name_are_other_settings(config):
    generate.generate(config)
    table = Path(config.captions)
    table.write_text(table.read_text(encoding="utf-8").replace("dog", "horse"), encoding="utf-8")
    with pytest.raises(UserError):
        generate.generate(config)


def test_with_the_same_settings_nothing_is_written_again(config, monkeypatch):
    path = generate.generate(config)
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())]
    monkeypatch.setattr(RulesWriter, "stream", None)
    assert generate.generate(config) == path
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())] == before


def test_overwrite_starts_again(config, tmp_path, monkeypatch):
    path = generate.generate(dataclasses.replace(config, seed=1))
    before = path.read_bytes()
    interrupt(monkeypatch, dataclasses.replace(config, seed=2, overwrite=True), 30)
    assert path.read_bytes() == before  # until the new one is whole
    generate.generate(dataclasses.replace(config, overwrite=True))
    assert path.read_bytes() == whole(config, tmp_path)
    assert meta(path)["settings"]["seed"] == config.seed


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
    assert all(clean(d.text) == (d.text, "kept") for d in found)


def test_the_file_beside_it_says_how_it_was_made(example, tmp_path):
    said = meta(example)
    assert said["settings"]["seed"] == 3 and said["settings"]["n_pairs"] == 120 and said["settings"]["split"] == "val"
    assert said["counts"] == {"kept": 120}
    assert said["writer"] == {"writer": "rules"}
    assert said["versions"]["torch"] and said["pc_clip"] and said["command"] == ["generate_diffs.py", "--seed", "3"]
    text = example.with_suffix(".meta.json").read_text(encoding="utf-8")
    assert not any(str(path) in text for path in (tmp_path, ROOT, Path.home()))


def test_rejected_sentences_are_counted_by_reason_and_kept_apart(config, monkeypatch):
    judged = {"```": (None, "code"), "": (None, "empty"), "Sure! A dog.": ("A dog.", "trimmed")}
    monkeypatch.setattr(work, "_judge", lambda *_: lambda raw, job: Checked(*judged.get(raw, (raw, "kept")), ()))
    odd = dict(zip((0, 11, 12, 60), ["```", "", "Sure! A dog.", "```"]))
    answer(monkeypatch, lambda n, text: odd.get(n, text))
    path = generate.generate(config)
    assert meta(path)["counts"] == {"kept": N_PAIRS - 4, "code": 2, "empty": 1, "trimmed": 1}
    assert [d.text for d in differences.read(path)].count("A dog.") == 1
    assert len(differences.read(path)) == N_PAIRS - 3
    lines = path.with_suffix(".rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(row["first"], row["second"], row["reason"], row["raw"]) for row in rejected] == [
        ("0", "1", "code", "```"),
        ("1", "10", "empty", ""),
        ("6", "7", "code", "```"),
    ]
    assert all(len(row["captions"]) == 2 for row in rejected)


def test_a_server_that_came_back_with_another_model_is_refused(config, monkeypatch):
    model = {"writer": "server", "model": "a"}
    monkeypatch.setattr(RulesWriter, "describe", lambda self: dict(model))
    interrupt(monkeypatch, config, 20)
    model["model"] = "b"
    with pytest.raises(UserError, match="are by a, and the writer is now b"):
        generate.generate(config)
    model.update(model="a", answered_by=["a-1"])
    assert meta(generate.generate(config))["writer"] == model


# -- what goes in --------------------------------------------------------------------------------------


def test_both_captions_of_an_image_are_used(config):
    text = generate.generate(config).read_text(encoding="utf-8")
    for thing in ("dog", "žába", "man's hat"):
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
        ({"n_images": 1}, r"no pairs to write about"),
        ({"n_pairs": -1}, "n_pairs is -1"),
        ({"n_each": 0}, "n_each is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_that_says_so(config, other, said):
    with pytest.raises(UserError, match=said):
        generate.generate(dataclasses.replace(config, **other))
    assert not Path(config.out).exists()


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


def test_the_config_of_the_example_is_the_one_that_training_asks_for():
    path = ROOT / "configs" / "diffs_example.yaml"
    assert configure(GenerateConfig, "generate_diffs.py", "", [], default=path) == generate.EXAMPLE


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


# -- what would be ignored, and what is damaged -----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "coco"}, "--dataset has no effect in --task pairs .*give --captions"),
        ({"prompt": "nope.yaml"}, "--prompt has no effect .*--writer rules"),
        ({"split": "val"}, "--split has no effect .*with --captions"),
        ({"n_each": 3}, "--n_each has no effect in --task pairs"),
        ({"task": "describe", "captions": None, "n_pairs": 5}, "--n_pairs has no effect in --task describe"),
        ({"task": "compare", "captions": None, "n_images": 5}, "--n_images has no effect in --task compare"),
    ],
)
def test_a_setting_that_a_task_has_no_use_for_is_refused(config, settings, message):
    if settings.get("task"):
        config = GenerateConfig(out=config.out)
    with pytest.raises(UserError, match=message):
        generate.generate(dataclasses.replace(config, **settings))
