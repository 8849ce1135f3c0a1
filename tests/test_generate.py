"""Generating sentences: interrupted anywhere it continues, and what it leaves says how it was made."""

import dataclasses
import errno
import io
import json
import sys
from pathlib import Path

import pytest
from writing_runs import PLAIN, interrupt, meta, names, on_captions, whole

from pc_clip.core import environment
from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError, run_script
from pc_clip.data import differences
from pc_clip.data.captions import read_captions
from pc_clip.data.wordings import as_phrase
from pc_clip.write import generate, progress, work
from pc_clip.write.cleaning import clean
from pc_clip.write.progress import Progress
from pc_clip.write.rules import RulesWriter

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "coco_mini"
THINGS = ["dog", "café", "bus", "kite", "sofa", "zebra", "žába", "plate", "man's hat", '"cat"', "tree", "sign"]
N_PAIRS = 66  # of 12 images


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(environment, "commit", lambda: None)  # two processes of git a file
    return on_captions([(f"A {thing} on a table.", f"Two {thing}s, far away") for thing in THINGS])


def answer(monkeypatch, change):
    """Have the writer answer job n with change(n, what the rules say)."""
    stream = RulesWriter.stream
    monkeypatch.setattr(RulesWriter, "needs_cleaning", True)  # in place of a language model
    monkeypatch.setattr(RulesWriter, "stream", lambda self, jobs: ((n, change(n, t)) for n, t in stream(self, jobs)))


# -- interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 30, N_PAIRS])
def test_interrupted_and_continued_it_writes_the_same_bytes(config, after):
    config.both_orders = after == 30
    path = interrupt(config, after, KeyboardInterrupt if after else RuntimeError)
    assert path.read_bytes().count(b"\n") == after
    assert not Path("out/some.jsonl").exists()
    path = generate.generate(config)
    assert path.read_bytes() == whole(config)
    assert sum(meta(path)["counts"].values()) == N_PAIRS * (1 + config.both_orders)
    assert names("out") == ["some.jsonl", "some.meta.json"]


def test_interrupted_while_it_puts_the_files_into_place_it_continues(config, monkeypatch):
    """After each of the files that are written at the end, over an older file."""
    older = generate.generate(dataclasses.replace(config, seed=1)).read_bytes()
    config.overwrite = True
    answer(monkeypatch, lambda n, text: "" if n == 7 else text)
    for place, name in ((progress, "write_text"), (progress, "write_json")):
        interrupt(config, 30)
        original = getattr(place, name)

        def stops(path, content, original=original):
            original(path, content)
            if path.parent == Path("out"):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, stops)
            generate.generate(config)
        path = generate.generate(dataclasses.replace(config, overwrite=False))
        assert path.read_bytes() != older and len(path.read_bytes().splitlines()) == N_PAIRS - 2
        assert names("out") == ["some.jsonl", "some.meta.json", "some.rejected.jsonl"]


def test_a_full_disk_ends_the_run_and_loses_no_sentence(config, monkeypatch, capsys):
    class Full(io.FileIO):
        def write(self, content):
            if Path(self.name).read_bytes().count(b"\n") >= 20:
                super().write(content[:9])  # the rest of the line finds no room
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Progress, "open", lambda self, rank: Full(self.folder / "0.jsonl", "xb"))
        run_script(lambda: generate.generate(config))
    assert stop.value.code == 2 and "no space left on device" in capsys.readouterr().err
    assert generate.generate(config).read_bytes() == whole(config)


def test_a_stream_is_closed_when_what_reads_it_fails(config, monkeypatch):
    """A writer may have requests under way and a thread for them."""
    streams, stream = [], RulesWriter.stream
    monkeypatch.setattr(RulesWriter, "stream", lambda *args: streams.append(stream(*args)) or streams[-1])
    monkeypatch.setattr(work, "_row", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate.generate(config)
    assert streams[0].gi_frame is None


# -- answers that cannot be used -----------------------------------------------------------------------


def test_all_rejected_is_an_error_and_the_next_run_retries(config, monkeypatch):
    with monkeypatch.context() as patch:
        answer(patch, lambda n, text: "I cannot see the first or second image.")
        for _ in range(2):
            with pytest.raises(UserError, match=r"none of the 66 .*refusal.*66.*'I cannot see .*asks again") as error:
                generate.generate(config)
        assert "\n" not in str(error.value) and not Path("out/some.jsonl").exists()
    assert generate.generate(config).read_bytes() == whole(config)


@pytest.mark.parametrize("begun", [0, 10])
def test_a_hundred_unusable_answers_stop_the_run(config, monkeypatch, begun):
    config.both_orders = True  # 132 pairs
    interrupt(config, begun)
    asked = []
    with monkeypatch.context() as patch:
        answer(patch, lambda n, text: asked.append(n) or "```")
        with pytest.raises(UserError, match=r"none of the first 100 answers.*\{'code': 100\}.*code: '```'; code:"):
            generate.generate(config)
    assert len(asked) == 100
    assert generate.generate(config).read_bytes() == whole(config)


def test_one_answer_that_can_be_used_is_enough_to_go_on(config, monkeypatch):
    config.both_orders = True
    answer(monkeypatch, lambda n, text: text if n == 99 else "```")
    assert meta(generate.generate(config))["counts"] == {"code": 131, "kept": 1}


@pytest.mark.parametrize("min_characters", [None, 85])
def test_the_shortest_sentence_that_is_kept_is_a_setting(config, min_characters, monkeypatch):
    answer(monkeypatch, lambda n, text: text)
    config.min_characters = min_characters
    lengths = [len(d.text) for d in differences.read(generate.generate(config))]
    assert (min_characters or 60) <= min(lengths)
    assert (len(lengths) < N_PAIRS) == (min_characters is not None)


def test_half_a_character_is_replaced(config, monkeypatch):
    answer(monkeypatch, lambda n, text: text.replace("while", "\ud83d while"))
    assert " ? while " in generate.generate(config).read_text(encoding="utf-8")


def test_with_all_sentences_there_the_writer_is_not_loaded_to_merge_them(config, monkeypatch):
    interrupt(config, N_PAIRS)
    expected = whole(config)
    monkeypatch.setattr(work, "make_writer", None)
    path = generate.generate(config)
    assert path.read_bytes() == expected
    assert meta(path)["writer"]["writer"] == "rules"


# -- settings ------------------------------------------------------------------------------------------


def test_what_was_written_or_begun_with_other_settings_is_left_alone(config):
    others = [{"seed": 1}, {"n_pairs": 5}, {"n_images": 11}, {"both_orders": True}, {"caption": "longest"}]
    for path, message in (
        (interrupt(config, 20), r"some\.parts was begun with other settings.*--overwrite"),
        (Path("out/some.jsonl"), r"some\.jsonl exists .*other settings.*--overwrite"),
    ):
        if not path.exists():
            generate.generate(config)
        before = path.read_bytes()
        for other in others:
            with pytest.raises(UserError, match=message):
                generate.generate(dataclasses.replace(config, **other))
            assert path.read_bytes() == before
    for damage in (b"\xff\xfe", b"[]", b"{"):  # of unknown origin
        path.with_suffix(".meta.json").write_bytes(damage)
        with pytest.raises(UserError, match=message):
            generate.generate(config)


def test_other_captions_under_the_same_name_are_other_settings(config):
    generate.generate(config)
    table = Path(config.captions)
    table.write_text(table.read_text(encoding="utf-8").replace("dog", "horse"), encoding="utf-8")
    with pytest.raises(UserError, match="exists and was written with other settings"):
        generate.generate(config)


def test_with_the_same_settings_nothing_is_written_again(config, monkeypatch):
    path = generate.generate(config)
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())]
    monkeypatch.setattr(RulesWriter, "stream", None)
    assert generate.generate(config) == path
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(path.parent.iterdir())] == before


def test_overwrite_starts_again(config):
    path = generate.generate(dataclasses.replace(config, seed=1))
    before = path.read_bytes()
    interrupt(dataclasses.replace(config, seed=2, overwrite=True), 30)
    assert path.read_bytes() == before  # until the new one is whole
    generate.generate(dataclasses.replace(config, overwrite=True))
    assert path.read_bytes() == whole(config)
    assert meta(path)["settings"]["seed"] == config.seed


# -- what comes out ------------------------------------------------------------------------------------


def test_every_line_is_clean_and_the_metadata_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "generate_diffs.py"), "--seed", "3"])
    path = generate.generate(
        GenerateConfig(name="val", split="val", n_images=40, n_pairs=120, seed=3, out="out", wording=PLAIN)
    )
    rows = differences.read(path)
    pairs = differences.rows(rows, [f"val-{n:05d}" for n in range(1000)], "val")
    assert len(rows) == 120 == len({tuple(sorted(pair)) for pair in pairs.tolist()})
    assert (pairs[:, 0] != pairs[:, 1]).all() and len(set(pairs.ravel().tolist())) <= 40
    assert all(clean(d.text) == (d.text, "kept") for d in rows)
    about = meta(path)
    assert {"seed": 3, "n_pairs": 120, "split": "val"}.items() <= about["settings"].items()
    assert about["counts"] == {"kept": 120} and about["writer"]["order"] == "both"
    assert about["versions"]["torch"] and about["pc_clip"] and about["command"] == ["generate_diffs.py", "--seed", "3"]
    assert not any(str(path) in json.dumps(about) for path in (tmp_path, ROOT, Path.home()))


def test_rejected_sentences_are_counted_by_reason_and_kept_apart(config, monkeypatch):
    odd = {0: "```", 11: "", 60: "```"}
    answer(monkeypatch, lambda n, text: odd.get(n, f"Sure! {text}" if n == 12 else text))
    path = generate.generate(config)
    assert meta(path)["counts"] == {"kept": N_PAIRS - 4, "code": 2, "empty": 1, "trimmed": 1}
    assert len(differences.read(path)) == N_PAIRS - 3
    lines = path.with_suffix(".rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(row["first"], row["second"], row["reason"], row["raw"]) for row in rejected] == [
        ("00", "01", "code", "```"),
        ("01", "02", "empty", ""),
        ("08", "09", "code", "```"),
    ]
    assert all(len(row["captions"]) == 2 for row in rejected)


def test_a_server_that_came_back_with_another_model_is_refused(config, monkeypatch):
    model = {"writer": "server", "model": "a", "answered_by": ["a-0"]}
    monkeypatch.setattr(RulesWriter, "describe", lambda self: dict(model))
    interrupt(config, 20)
    model["model"] = "b"
    with pytest.raises(UserError, match="are by a, and the writer is now b"):
        generate.generate(config)
    model.update(model="a", answered_by=["a-1"])
    assert meta(generate.generate(config))["writer"] == model | {"answered_by": ["a-0", "a-1"]}


# -- what goes in --------------------------------------------------------------------------------------


def test_both_captions_of_an_image_are_used(config):
    text = generate.generate(config).read_text(encoding="utf-8")
    for thing in ("dog", "žába", "man's hat"):
        assert f"a {thing} on a table" in text and f"two {thing}s, far away" in text


def test_what_cannot_be_is_refused(config):
    classes = GenerateConfig(out="out")
    cases = [
        (config, {"n_pairs": N_PAIRS + 1}, r"67 pairs.*12 images.*66"),
        (config, {"n_images": 13}, r"n_images is 13.* 12 images"),
        (config, {"writer": "rulez"}, "writer is 'rulez'.*Did you mean 'rules'"),
        (config, {"task": "pear"}, "task is 'pear'"),
        (config, {"captions": "absent.json"}, r"no captions file at absent\.json"),
        (config, {"captions": None, "split": "vall"}, "Did you mean 'val'"),
        (config, {"n_images": 1}, "no pairs to write about"),
        (config, {"n_pairs": -1}, "n_pairs is -1"),
        (config, {"n_each": 0}, "n_each is 0"),
        (config, {"prompt": "nope.yaml"}, "--prompt has no effect .*--writer rules"),
        (config, {"split": "val"}, "--split has no effect .*with --captions"),
        (config, {"n_each": 3}, "--n_each has no effect in --task pairs"),
        (classes, {"task": "describe", "n_pairs": 5}, "--n_pairs has no effect in --task describe"),
        (classes, {"task": "compare", "n_images": 5}, "--n_images has no effect in --task compare"),
    ]
    for base, settings, message in cases:
        with pytest.raises(UserError, match=message):
            generate.generate(dataclasses.replace(base, **settings))
    assert not Path("out").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real captions are not part of the project")
def test_coco_captions_as_published_are_compared():
    path = DATA / "captions_val2017.json"
    captions = {key: texts for key, (_, texts) in read_captions(path).items()}
    config = GenerateConfig(name="coco", captions=str(path), n_images=40, n_pairs=200, out="out", wording=PLAIN)
    rows = differences.read(generate.generate(config))
    assert len(rows) > 190
    for d in rows:
        text = " ".join(d.text.lower().split())
        for key in (d.first, d.second):
            assert any(as_phrase(c).lower()[-20:] in text for c in captions[key]), (d, captions[key])


def test_training_on_the_example_writes_its_sentences_once(monkeypatch):
    small = dataclasses.replace(generate.of_example("example"), split="val", n_images=20, n_pairs=30)
    monkeypatch.setattr(generate, "of_example", lambda name: dataclasses.replace(small, name=name))
    path = Path("llm_diffs/example.jsonl")
    for data in (DataConfig(differences="llm_diffs/other.jsonl"), DataConfig(dataset="coco", differences=str(path))):
        generate.write_missing_example(data)
        assert not Path("llm_diffs").exists()
    generate.write_missing_example(DataConfig(differences=str(path)))
    assert len(differences.read(path)) == 30
    path.write_text("mine")
    generate.write_missing_example(DataConfig(differences=str(path)))
    assert path.read_text() == "mine"
