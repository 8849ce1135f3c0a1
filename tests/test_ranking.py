"""Ranking data: candidates known by hand, orders that parse or are refused, files that survive interruptions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from writing_runs import meta, names

from pc_clip.core import environment
from pc_clip.core.config.write import GenerateConfig, RankDataConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.statements import read_statements
from pc_clip.write import generate, rank
from pc_clip.write.candidates import draw_queries, retrieve
from pc_clip.write.rank import overlap, parse_order
from pc_clip.write.rules import RulesWriter


@pytest.fixture
def config(small_example, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "describe", lambda: {"versions": {}})  # without the date
    options = RankDataConfig(n_queries=12, margin=0.5, most=6)
    return GenerateConfig(task="rank", split="val", out=str(tmp_path / "out"), rank=options)


def made(captions, n=5):
    return Dataset("made", "all", [f"i{k}" for k in range(n)], lambda row: None, "0", captions=captions)


def test_candidates_are_within_the_margin_and_include_the_own_image():
    cosines = (0.80, 0.90, 0.86, 0.84, 0.10)
    text, z = torch.tensor([[1.0, 0.0]]), torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])
    cases = {  # own, margin, most: rows, the most similar first
        (1, 0.05, 9): [1, 2],
        (1, 0.101, 9): [1, 2, 3, 0],
        (1, 0.101, 3): [1, 2, 3],
        (1, 0, 3): [1],
        (4, 0.05, 9): [1, 2, 4],
        (4, 0.101, 4): [1, 2, 3, 4],  # the own in place of the last
    }
    actual = {case: [row for row, _ in retrieve(text, z, [case[0]], *case[1:])[0]] for case in cases}
    assert actual == cases
    twice = z[[0, 1, 1, 2]]  # one picture under two names is one candidate: the own where it is among them
    assert [row for row, _ in retrieve(text, twice, [2], 0.5, 9)[0]] == [2, 3, 0]


def test_queries_are_drawn_by_seed_one_an_image_and_no_caption_twice():
    data = made([("A dog.", "a long one"), ("b",), (), ("a  dog", "e"), ("f",)])
    assert [q.row for q in draw_queries(data, None, "longest", 0)] == [0, 1, 3, 4]
    assert draw_queries(data, None, "longest", 0)[0].caption == "a long one"
    drawn = {q.caption for seed in range(40) for q in draw_queries(data, 2, "random", seed)}
    assert drawn == {"A dog.", "a long one", "b", "a  dog", "e", "f"}
    same = made([("A dog.",), ("a  dog",), ("a cat",)], 3)
    assert {len(draw_queries(same, None, "random", seed)) for seed in range(9)} == {2}
    with pytest.raises(UserError, match=r"rank\.n_queries is 3, but only 2 captions of made/all differ"):
        draw_queries(same, 3, "random", 0)


@given(
    st.permutations(range(1, 10)),
    st.sampled_from([",", ", ", " ", "; ", " > ", ">", "\n"]),
    st.sampled_from(["{}", " [{}]\n", "Answer: {}.", "({})"]),
)
def test_any_permutation_survives_writing(order, separator, around):
    assert parse_order(around.format(separator.join(map(str, order))), 9) == list(order)


@given(st.text("0123459 ,;>-.([])²x\n", max_size=60))
def test_parsed_orders_are_permutations(text):
    if (order := parse_order(text, 3)) is not None:
        assert sorted(order) == [1, 2, 3] and re.findall("[0-9]+", text) == list(map(str, order))


def test_what_is_no_order_is_refused():
    texts = [
        " \n", "The second fits: 2, 1, 3", "2, 1, 3 because of the dog", "1. 2. 3.", "3 < 2 < 1", "2, 1, -3", "213",
        "2, 1, 3, 4", "0, 1, 2", "2, 1, 1, 3", "2, 1", "9" * 5000, "1" + " " * 10_000 + "x", "²,1,3",
    ]  # fmt: skip
    assert [text for text in texts if parse_order(text, 3)] == []


def test_words_that_a_description_shares():
    caption = "Two brown dogs on a sofa"
    texts = {"A brown dog.": 0.5, "A sofa with two dogs, brown ones.": 1, "Sofa: two brown dog.": 1, "A cat.": 0}
    assert {text: overlap(caption, text) for text in texts} == texts
    assert overlap("one object", "a star") == 0  # nothing is asked, nothing is known
    assert overlap("three red objects", "three red stars") == overlap("one red star", "a red star") == 1


# -- the whole task ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_is_ranked_by_rule(config, tmp_path):
    path = generate.generate(config)
    assert path == Path(config.out) / "example_rank.parquet"
    table, counts = pd.read_parquet(path), meta(path)["counts"]
    assert counts["pairs"] == len(table) > 20 and counts["queries"] == 12
    assert (table.preferred_rank < table.rejected_rank).all() and (table.rejected_image != table.query_image).all()
    for row in table.itertuples():
        assert overlap(row.caption, row.preferred_text) > overlap(row.caption, row.rejected_text)
    statements = read_statements([path])
    assert [(s.text, s.image, s.rejected_image) for s in statements] == list(
        zip(table.caption, table.preferred_image, table.rejected_image)
    )
    assert names(path.parent) == ["example_rank.meta.json", "example_rank.parquet"]
    before = path.stat().st_mtime_ns
    assert generate.generate(config) == path and path.stat().st_mtime_ns == before
    with pytest.raises(
        UserError, match=r"example_rank\.parquet has the same name"
    ):  # both would have the one .meta.json
        generate.generate(GenerateConfig(name="example_rank", split="val", n_pairs=5, out=config.out))
    other = dataclasses.replace(config, rank=dataclasses.replace(config.rank, pairs_each=1))
    with pytest.raises(UserError, match="written with other settings; choose another --name or --overwrite"):
        generate.generate(other)
    assert pd.read_parquet(generate.generate(dataclasses.replace(other, overwrite=True))).query_image.is_unique


def test_images_that_have_the_caption_too_are_not_rejected(config):
    rows = [f"val-{n:05d}\tx.png\tA {word} thing." for n, word in enumerate(["red", "blue", "green", "RED"])]
    Path("c.tsv").write_text("\n".join(["id\timage\tcaption1", *rows]) + "\n")
    table = pd.read_parquet(
        generate.generate(dataclasses.replace(config, captions="c.tsv", rank=RankDataConfig(margin=2.0)))
    )
    red = table[table.caption.str.lower() == "a red thing."]
    assert set(red.preferred_image) == {"val-00000", "val-00003"}
    assert set(red.rejected_image) == {"val-00001", "val-00002"}


class Judge(RulesWriter):
    """In place of a language model: describes an image by its captions, and orders by length, then by text."""

    def stream(self, jobs):
        for n, job in enumerate(jobs):
            lines = [line.split(". ", 1)[1] for line in job.second.split("\n")] if job.second else []
            order = sorted(range(len(lines)), key=lambda k: (len(lines[k]), lines[k]))
            yield n, ", ".join(str(k + 1) for k in order) if lines else f"It shows {job.first}"


@pytest.fixture
def by_model(config, monkeypatch):
    monkeypatch.setattr(rank, "make_writer", lambda config, task=None: Judge())
    return dataclasses.replace(config, writer="transformers")


def test_a_language_model_describes_and_orders(by_model):
    path = generate.generate(by_model)
    table, about = pd.read_parquet(path), meta(path)
    assert about["answers"]["orders"] == {"kept": 11} and about["counts"]["queries"] == 12  # one has one candidate
    assert list(about["answers"]["descriptions"]) == ["kept"]
    assert table.preferred_text.str.startswith("It shows ").all()
    assert (table.preferred_text.str.len() <= table.rejected_text.str.len()).all()
    assert about["counts"]["own_image_rejected"] > 0 and (table.rejected_image != table.query_image).all()


@pytest.mark.slow
@pytest.mark.parametrize("after", [5, 40])
def test_interrupted_in_either_phase_and_continued_it_is_as_uninterrupted(by_model, monkeypatch, tmp_path, after):
    whole = generate.generate(dataclasses.replace(by_model, out=str(tmp_path / "whole"))).read_bytes()
    stream, asked = Judge.stream, itertools.count()

    def stops(self, jobs):
        for answer in stream(self, jobs):
            if next(asked) == after:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Judge, "stream", stops)
        generate.generate(by_model)
    with pytest.raises(UserError, match=r"rank\.parts was begun with other settings.*--overwrite true"):
        generate.generate(dataclasses.replace(by_model, seed=1))
    path = generate.generate(by_model)
    assert path.read_bytes() == whole and not list(path.parent.glob("*.parts*"))


def test_answers_that_are_no_order_are_counted_and_kept_apart(by_model, monkeypatch):
    stream = Judge.stream

    def some(self, jobs):
        for n, text in stream(self, jobs):
            yield n, "1, 1" if jobs[n].second and n % 3 == 0 else text

    monkeypatch.setattr(Judge, "stream", some)
    path = generate.generate(by_model)
    about = meta(path)
    assert about["answers"]["orders"] == {"kept": 7, "no_order": 4}
    assert about["counts"]["queries_without_order"] == 4 and about["counts"]["queries"] == 8
    rejected = [json.loads(line) for line in path.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["reason"], row["raw"]) for row in rejected] == [("orders", "no_order", "1, 1")] * 4


def test_a_server_is_shown_the_pictures(config, monkeypatch):
    class Eyes(Judge):
        def stream(self, jobs):
            for n, job in enumerate(jobs):
                if not job.picture:
                    yield from super().stream(jobs)
                    return
                assert job.first == rank.THE_PICTURE
                yield n, f"A picture of {self.look(job.picture).size}, {job.picture}."

    monkeypatch.setattr(rank, "make_writer", lambda config, task=None: Eyes())
    table = pd.read_parquet(generate.generate(dataclasses.replace(config, writer="server")))
    assert table.preferred_text.str.startswith("A picture of (").all()


# -- what is refused -----------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused(config):
    cases = [
        ({"rank": {"most": 1}}, r"rank\.most is 1; it must be at least 2"),
        ({"rank": {"n_queries": 0}}, r"rank\.n_queries is 0; it must be at least 1"),
        ({"rank": {"n_queries": 99}}, r"rank\.n_queries is 99, but only \d+ captions of example/val differ"),
        ({"rank": {"pictures": False}}, r"--rank\.pictures false has no effect with --writer rules"),
        ({"rank": {"order_prompt": "x.yaml"}}, r"--rank\.order_prompt has no effect with --writer rules"),
        ({"rank": {"missing": "maybe"}}, r"missing is 'maybe'"),
        (
            {"rank": {"order_prompt": "order.yaml"}, "writer": "transformers"},
            r"order\.yaml: the instruction has no \{second\}",
        ),
        ({"n_pairs": 5}, r"--n_pairs has no effect in --task rank"),
        ({"task": "describe", "rank": {"most": 5}}, r"--rank has no effect in --task describe"),
        ({"dataset": "folder", "root": "pictures", "split": None}, "has no captions to rank its images by"),
    ]
    Path("order.yaml").write_text("{system: s, instruction: 'Which fits {first}?'}")
    Path("pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/0.png")
    for settings, message in cases:
        options = RankDataConfig(**settings.pop("rank", {}))
        other = dataclasses.replace(config, **{"rank": options, **settings})
        other.model = dataclasses.replace(other.model, name="example" if other.dataset == "folder" else "")
        with pytest.raises(UserError, match=message):
            generate.generate(other)


def test_captions_that_say_nothing_give_no_pairs_and_no_file(config):
    Path("c.tsv").write_text("id\timage\tcaption1\nval-00000\ta.png\tthe of\nval-00001\tb.png\tis a\n")
    with pytest.raises(UserError, match="no two candidates could be told apart"):
        generate.generate(dataclasses.replace(config, captions="c.tsv", rank=RankDataConfig(margin=2.0)))
    assert not list(Path(config.out).glob("*.parquet"))
