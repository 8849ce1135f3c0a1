"""Ranking data: candidates known by hand, orders that parse or are refused, and files that survive interruptions."""

import base64
import dataclasses
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from faulty_server import Server, as_json, closing
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pc_clip.core import environment
from pc_clip.core.config.write import GenerateConfig, RankDataConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.statements import read_statements
from pc_clip.data.views import views
from pc_clip.write import generate
from pc_clip.write.candidates import (
    KEPT,
    Candidate,
    Query,
    crops,
    draw_queries,
    find_candidates,
    one_a_picture,
    retrieve,
)
from pc_clip.write.progress import Parts
from pc_clip.write.ranking import (
    draw_pairs,
    numbered,
    overlap,
    own_first,
    pairs,
    parse_order,
    places_by_order,
    places_by_words,
    ranked,
    shuffled,
)
from pc_clip.write.rules import RulesWriter


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(environment, "describe", lambda: {"versions": {}})  # without the date


@pytest.fixture
def config(small_example, tmp_path):
    return GenerateConfig(
        task="rank",
        split="val",
        out=str(tmp_path / "out"),
        rank=RankDataConfig(n_queries=12, margin=0.5, least=5, most=6),
    )


def made(captions, n=5):
    pictures = [Image.new("RGB", (40, 20), (10 * k, 0, 0)) for k in range(n)]
    return Dataset("made", "all", [f"i{k}" for k in range(n)], pictures.__getitem__, "0", captions=captions)


def toward(*cosines):
    """A text and images of the plane that have these cosines with it."""
    return torch.tensor([[1.0, 0.0]]), torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])


def read(path):
    return pandas.read_parquet(path)


def meta(path):
    return json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))


def of(view, row, kept=1.0):
    return Candidate(view, row, kept, 0.5)


# -- candidates ----------------------------------------------------------------------------------------


def rows(found):
    return [[row for row, _ in each] for each in found]


def test_candidates_are_within_the_margin_of_the_best_the_most_similar_first():
    texts, z = toward(0.80, 0.90, 0.86, 0.84, 0.10)
    found = retrieve(texts, z, [1], margin=0.05, most=9)
    assert rows(found) == [[1, 2]]
    assert [cosine for _, cosine in found[0]] == pytest.approx([0.90, 0.86], abs=1e-6)
    assert rows(retrieve(texts, z, [1], margin=0.101, most=9)) == [[1, 2, 3, 0]]
    assert rows(retrieve(texts, z, [1], margin=0.101, most=3)) == [[1, 2, 3]]
    assert rows(retrieve(texts, z, [1], margin=0, most=3)) == [[1]]


def test_the_own_image_is_a_candidate_however_little_similar():
    texts, z = toward(0.80, 0.90, 0.86, 0.84, 0.10)
    assert rows(retrieve(texts, z, [4], margin=0.05, most=9)) == [[1, 2, 4]]
    assert rows(retrieve(texts, z, [4], margin=0.101, most=4)) == [[1, 2, 3, 4]]  # in place of the last
    assert rows(retrieve(texts, z, [3], margin=0.101, most=2)) == [[1, 3]]


def test_many_queries_are_each_compared_with_all_images():
    z = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(600, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    own = [n % 50 for n in range(600)]
    for n, found in enumerate(retrieve(texts, z, own, margin=0.2, most=50)):
        cosines = (z @ texts[n]).tolist()
        expected = {k for k, c in enumerate(cosines) if c >= max(cosines) - 0.2} | {own[n]}
        assert {row for row, _ in found} == expected
        assert [row for row, _ in found] == sorted(expected, key=lambda k: -cosines[k])


def test_crops_take_something_away_and_are_views():
    data = made([("a dog",)] * 5)
    found = crops(data, Query(0, "a dog"), [3, 1], 40, seed=0)
    assert [row for _, row, _ in found] == [3, 1] * 20
    pictures = views(data, [view for view, _, _ in found])
    for k, (view, row, kept) in enumerate(found):
        assert view.startswith(f"i{row}@crop=") and KEPT[0] - 0.01 <= kept <= KEPT[1] + 0.01
        width, height = pictures.load(k).size
        assert width * height / 800 == pytest.approx(kept, abs=0.08)  # whole pixels
    assert 5 < sum(view.endswith("+flip") for view, _, _ in found) < 35
    assert found == crops(data, Query(0, "a dog"), [3, 1], 40, seed=0)
    assert found != crops(data, Query(0, "a dog"), [3, 1], 40, seed=1)


@pytest.mark.parametrize(
    ("query", "own"),
    [
        ("a dog left of a cat", "a dog"),
        ("a dog", "A dog. The RIGHT one."),
        ("the leftmost dog", "a dog"),
        ("a dog", "a dog in the right-hand corner"),
        ("a dog looks leftwards", "a dog"),
    ],
)
def test_crops_are_not_mirrored_where_sides_are_spoken_of(query, own):
    assert not any("flip" in view for view, _, _ in crops(made([(own,)] * 5), Query(0, query), [0], 40, seed=0))


def test_queries_are_drawn_by_seed_one_an_image():
    data = made([("a", "a long one"), ("b",), (), ("d", "e"), ("f",)])
    assert [q.row for q in draw_queries(data, None, "random", 0)] == [0, 1, 3, 4]
    assert draw_queries(data, None, "longest", 0)[0] == Query(0, "a long one")
    drawn = {tuple(draw_queries(data, 2, "random", seed)) for seed in range(40)}
    assert {query for two in drawn for query in two} == {
        Query(0, "a"), Query(0, "a long one"), Query(1, "b"), Query(3, "d"), Query(3, "e"), Query(4, "f"),
    }  # fmt: skip
    assert draw_queries(data, 2, "random", 7) == draw_queries(data, 2, "random", 7)


def test_no_caption_is_asked_about_twice():
    data = made([("A dog.",), ("a  dog",), ("a cat",), ("a cow", "A DOG"), ("a hen",)])
    for seed in range(20):
        found = draw_queries(data, 3, "random", seed)
        assert len(found) == 3 and len({q.caption.lower().strip(".").replace("  ", " ") for q in found}) == 3
    assert {q.row for seed in range(20) for q in draw_queries(data, 3, "longest", seed)} == {0, 1, 2, 3, 4}
    assert draw_queries(made([("a dog left of a cat",), ("a cat left of a dog",)], 2), 2, "random", 0)
    with pytest.raises(UserError, match=r"rank\.n_queries is 5, but .* made/all have only 4 captions .* that differ"):
        draw_queries(data, 5, "longest", 0)


def test_a_picture_that_is_there_twice_is_one_candidate(config, example_clip):
    z = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.5], [1, 0], [1, 1], [1, 0.5000001]]), dim=1)
    assert one_a_picture(z, [0, 1, 2, 3, 4], 3) == [0, 1, 3]
    assert one_a_picture(z, [4, 2, 1, 0], 0) == [4, 0]  # of equal ones the query's own
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise[k]).resize((64, 64)) for k in (0, 1, 0, 2, 0)]
    data = dataclasses.replace(made([(f"a thing {k}",) for k in range(5)]), load=pictures.__getitem__)
    config.rank = RankDataConfig(margin=2.0, least=1)
    for query, candidates, same_picture in find_candidates(config, data, example_clip):
        own = query.row if query.row in (0, 2, 4) else None
        shown = {c.row for c in candidates}
        assert len(candidates) == 3 and same_picture == 2
        assert {1, 3} < shown and (own is None or own in shown)


def test_few_candidates_are_filled_up_to_the_least(config, example_clip):
    data = generate.open_dataset("example", split="val")
    config.rank.margin = 0.0
    for query, candidates, _ in find_candidates(config, data, example_clip):
        wholes = [c for c in candidates if c.is_whole]
        assert len(candidates) == 5 and 1 <= len(wholes) <= 2  # the best, and the query's own
        assert query.row in {c.row for c in wholes}
        assert {c.row for c in candidates} == {c.row for c in wholes}
        assert candidates[: len(wholes)] == wholes


# -- orders --------------------------------------------------------------------------------------------

SEPARATORS = [",", ", ", " ", "; ", " > ", ">", "\n", " -> ", " → ", ", and ", " then "]


@given(
    st.permutations(range(1, 10)),
    st.sampled_from(SEPARATORS),
    st.sampled_from(["{}", " [{}]\n", "Answer: {}.", "({})"]),
)
def test_any_permutation_survives_writing(order, separator, around):
    text = around.format(separator.join(map(str, order)))
    assert parse_order(text, 9) == (list(order), "kept")


@given(st.text(max_size=60))
def test_what_is_kept_of_any_text_is_a_permutation_of_its_own_numbers(text):
    order, reason = parse_order(text, 3)
    assert (order is None) == (reason != "kept")
    if order is not None:
        assert sorted(order) == [1, 2, 3] and re.findall("[0-9]+", text) == list(map(str, order))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("The second fits best: 2, 1, 3", "no_list"),
        ("2, 1, 3 because of the dog", "no_list"),
        ("1. 2. 3.", "no_list"),
        ("3 < 2 < 1", "no_list"),
        ("2, 1, -3", "no_list"),
        ("213", "unknown_number"),
        ("2, 1, 3, 4", "unknown_number"),
        ("0, 1, 2", "unknown_number"),
        ("2, 1, 1, 3", "twice"),
        ("2, 1", "not_all"),
        ("9" * 5000, "no_list"),
        ("1" + " " * 10_000 + "x", "no_list"),
        ("²,1,3", "no_list"),
    ],
)
def test_what_is_no_order_is_refused_with_its_reason(raw, reason):
    assert parse_order(raw, 3) == (None, reason)


@given(st.permutations(range(6)), st.integers(0, 1000))
def test_an_order_of_shuffled_descriptions_is_undone(best_first, seed):
    shown = shuffled(6, seed, Query(3, "a dog"))
    answer = [shown.index(candidate) + 1 for candidate in best_first]
    places = places_by_order(answer, shown)
    assert sorted(range(6), key=places.__getitem__) == list(best_first)


def test_descriptions_are_numbered_a_line_each():
    assert numbered(["A dog\nruns.", "A cat."]) == "1. A dog runs.\n2. A cat."


def test_the_words_that_a_description_shares_put_it_in_its_place_and_ties_stay():
    caption = "Two brown dogs on a sofa"
    candidates = [of("a", 0), of("b", 1), of("c", 2), of("d", 3), of("e", 4)]
    texts = [
        "A brown dog.",
        "A sofa with two dogs, brown ones.",
        "Sofa: two brown dog.",
        "A cat.",
        "The sofa is brown.",
    ]
    assert overlap(caption, texts[0]) == 0.5
    assert places_by_words(caption, texts) == [1, 0, 0, 2, 1]
    order = ranked(candidates, [1, 0, 0, 2, 1], texts, seen=False)
    assert [(r.candidate.view, r.rank) for r in order] == [("b", 1), ("c", 1), ("a", 2), ("e", 2), ("d", 3)]
    found = [(p.preferred.candidate.view, p.rejected.candidate.view) for p in pairs(order, seen=False)]
    assert found == [(x, y) for x, y in itertools.product("bcae", "aed") if (x in "bc" or y == "d")]


def test_words_for_anything_are_not_missed():
    assert overlap("one object", "a star") == 0  # nothing is asked, nothing is known
    assert overlap("three red objects", "three red stars") == 1
    assert overlap("one red star", "a red star") == 1


def test_crops_that_nobody_saw_come_after_their_whole_and_meet_it_alone():
    candidates = [of("a", 0), of("b", 1), of("a@crop", 0, 0.5), of("b@crop", 1, 0.6), of("a@crop+", 0, 0.7)]
    order = ranked(candidates, [0, 1, 0, 1, 0], "vwxyz", seen=False)
    assert [(r.candidate.view, r.rank) for r in order] == [
        ("a", 1), ("a@crop", 2), ("a@crop+", 2), ("b", 3), ("b@crop", 4),
    ]  # fmt: skip
    found = {(p.preferred.candidate.view, p.rejected.candidate.view) for p in pairs(order, seen=False)}
    assert found == {("a", "b"), ("a", "a@crop"), ("a", "a@crop+"), ("b", "b@crop")}


def test_crops_that_were_seen_have_their_own_place():
    candidates = [of("a", 0), of("b", 1), of("a@crop", 0, 0.5)]
    order = ranked(candidates, [0, 2, 1], "xyz", seen=True)
    assert [r.candidate.view for r in order] == ["a", "a@crop", "b"]
    assert len(pairs(order, seen=True)) == 3


def test_the_own_image_is_best_whatever_was_said():
    candidates = [of("a", 0), of("b", 1), of("b@crop", 1, 0.5)]
    assert own_first(Query(1, "x"), (), candidates, [0, 2, 1]) == ([0, -1, 1], False)
    assert own_first(Query(0, "x"), (), candidates, [0, 2, 1]) == ([0, 2, 1], True)
    assert own_first(Query(1, "x"), (), candidates, [0, 0, 1]) == ([0, 0, 1], True)  # tied is as good


def test_what_nobody_told_from_the_own_image_goes_with_it():
    candidates = [of("a", 0), of("b", 1), of("c", 2), of("c@crop", 2, 0.5)]
    assert own_first(Query(1, "x"), (), candidates, [0, 2, 2, 1]) == ([0, -1, -1, 1], False)  # tied
    assert own_first(Query(1, "x"), {2}, candidates, [0, 1, 3, 2]) == ([0, -1, -1, 2], False)  # has the caption, too
    assert own_first(Query(0, "x"), {2}, candidates, [0, 1, 3, 2]) == ([0, 1, 0, 2], True)


def test_pairs_are_drawn_by_seed():
    order = ranked([of(str(n), n) for n in range(6)], list(range(6)), "abcdef", seen=True)
    found, query = pairs(order, seen=True), Query(0, "x")
    assert draw_pairs(found, None, 0, query) == found == draw_pairs(found, 15, 0, query)
    some = draw_pairs(found, 4, 0, query)
    assert len(set(some)) == 4 and set(some) < set(found) and some == draw_pairs(found, 4, 0, query)
    assert {p for seed in range(60) for p in draw_pairs(found, 4, seed, query)} == set(found)


# -- the whole task, by rule ---------------------------------------------------------------------------


def test_the_example_is_ranked_by_rule(config):
    path = generate.generate(config)
    assert path == Path(config.out) / "example_rank.parquet"
    table, about = read(path), meta(path)
    assert about["counts"]["pairs"] == len(table) > 20 and about["counts"]["queries"] == 12
    assert (table.preferred_rank < table.rejected_rank).all()
    assert (table.rejected_image != table.query_image).all()
    own = table[table.preferred_image == table.query_image]
    assert len(own) and (own.preferred_rank == 1).all()
    captions = dict(zip(*(getattr(generate.open_dataset("example", split="val"), f) for f in ("ids", "captions"))))
    assert all(caption in captions[image] for caption, image in zip(table.caption, table.query_image))
    for row in table.itertuples():
        if "@" not in row.preferred_image + row.rejected_image:
            assert overlap(row.caption, row.preferred_text) > overlap(row.caption, row.rejected_text)
    assert not list(path.parent.glob("*.parts*"))


def test_the_file_reads_as_statements_about_views(config):
    config.rank.margin = 0.0
    path = generate.generate(config)
    table, found = read(path), read_statements([path])
    assert [(s.text, s.image, s.instead) for s in found] == list(
        zip(table.caption, table.preferred_image, table.rejected_image)
    )
    names = sorted({name for s in found for name in (s.image, s.instead)})
    assert any("@crop=" in name for name in names)
    pictures = views(generate.open_dataset("example", split="val"), names)
    assert all(pictures.load(n).size <= (64, 64) for n in range(len(pictures)))


def test_the_same_seed_writes_the_same_file_and_another_another(config, tmp_path):
    written = [
        generate.generate(dataclasses.replace(config, out=str(tmp_path / name), seed=seed)).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert written[0] == written[1] != written[2]


def test_finished_it_is_left_alone_and_other_settings_are_refused(config, caplog):
    path = generate.generate(config)
    before = path.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert generate.generate(config) == path
    assert path.stat().st_mtime_ns == before and "is complete" in caplog.text
    other = dataclasses.replace(config, rank=dataclasses.replace(config.rank, pairs_each=1))
    with pytest.raises(UserError, match="written with other settings; choose another --name or --overwrite"):
        generate.generate(other)
    table = read(generate.generate(dataclasses.replace(other, overwrite=True)))
    assert table.query_image.is_unique


def test_captions_may_come_from_a_file(config):
    lines = [f"val-{n:05d}.png\tA {word} thing." for n, word in enumerate(["red", "blue", "green", "red"])]
    rows = [f"val-{n:05d}\t{line}" for n, line in enumerate(lines)]
    Path("c.tsv").write_text("\n".join(["id\timage\tcaption1", *rows]) + "\n")
    config = dataclasses.replace(config, captions="c.tsv", rank=RankDataConfig(margin=2.0, least=2))
    path = generate.generate(config)
    assert path.name == "c_rank.parquet"
    table = read(path)
    red = table[table.caption == "A red thing."]
    assert set(table.query_image) - set(red.query_image) == {"val-00001", "val-00002"}
    assert len(set(red.query_image)) == 1  # two images have it; it is asked about once
    assert set(red.preferred_image) == {"val-00000", "val-00003"}  # which fits as well: no pair of the two
    assert set(red.rejected_image) == {"val-00001", "val-00002"}


# -- the whole task, by language models ----------------------------------------------------------------


class Judge(RulesWriter):
    """In place of a language model: describes a picture by its captions, and orders by length, then by text."""

    def stream(self, jobs):
        for n in range(len(jobs)):
            if jobs[n].second:
                lines = [line.split(". ", 1)[1] for line in jobs[n].second.split("\n")]
                yield (
                    n,
                    ", ".join(str(k + 1) for k in sorted(range(len(lines)), key=lambda k: (len(lines[k]), lines[k]))),
                )
            else:
                yield n, f"It shows {jobs[n].first}"


def by_model(config):
    return dataclasses.replace(config, writer="transformers")


@pytest.fixture
def judge(monkeypatch):
    made = []

    def make(config, task=None):
        made.append(Judge())
        return made[-1]

    monkeypatch.setattr("pc_clip.write.rank_answers.make_writer", make)
    return made


def test_a_language_model_describes_and_orders(config, judge):
    path = generate.generate(by_model(config))
    assert len(judge) == 1  # one for both phases
    table, about = read(path), meta(path)
    assert about["answers"]["orders"] == {"kept": 12} and list(about["answers"]["descriptions"]) == ["kept"]
    assert table.preferred_text.str.startswith("It shows ").all()
    counts = about["counts"]
    assert counts["own_said_to_be_first"] + counts["own_said_not_to_be_first"] == 12
    assert counts["own_said_not_to_be_first"] > 0
    said = table[(table.preferred_image != table.query_image) & ~table.rejected_image.str.contains("@")]
    lengths = [(len(row.preferred_text), len(row.rejected_text)) for row in said.itertuples()]
    assert len(said) and all(a <= b for a, b in lengths)
    assert set(table.query_image) == set(table[table.preferred_image == table.query_image].query_image)


def ranked_by_model(config, *captions):
    """The pairs of images by a language model, for a caption each of the first validation scenes."""
    rows = [f"val-{n:05d}\tx.png\t{caption}" for n, caption in enumerate(captions)]
    Path("c.tsv").write_text("\n".join(["id\timage\tcaption1", *rows]) + "\n")
    config = dataclasses.replace(by_model(config), captions="c.tsv", rank=RankDataConfig(margin=2.0, least=1))
    path = generate.generate(config)
    return [
        (row.caption, int(row.preferred_image[-1]), int(row.rejected_image[-1])) for row in read(path).itertuples()
    ], meta(path)


def test_images_with_the_very_caption_are_as_good_as_the_own(config, judge):
    found, _ = ranked_by_model(config, "A red thing.", "the blue thing", "a RED thing", "a")
    assert {(2, 3), (0, 3)} <= {(a, b) for caption, a, b in found if "red" in caption.lower()}
    assert not {(a, b) for caption, a, b in found if "red" in caption.lower()} & {(0, 2), (2, 0)}


def test_equal_descriptions_are_one_and_no_order_is_asked_of_them(config, judge):
    found, about = ranked_by_model(config, "a dog", "two cats", "two cats.", "a horse")
    assert {(0, 1), (0, 2), (3, 1), (3, 2)} <= {(a, b) for _, a, b in found}
    assert not {(a, b) for _, a, b in found} & {(1, 2), (2, 1)}
    assert about["answers"]["orders"] == {"kept": 3}
    (Path(config.out) / "c_rank.parquet").unlink()
    with pytest.raises(UserError, match="no two candidates could be told apart"):
        ranked_by_model(dataclasses.replace(config, overwrite=True), "two cats", "Two cats")


def test_a_language_model_is_not_asked_to_make_captions_up(config, judge, monkeypatch):
    data = generate.open_dataset("example", split="val")
    some = [texts if row % 2 else () for row, texts in enumerate(data.captions)]
    monkeypatch.setattr("pc_clip.write.rank.load_dataset", lambda _: dataclasses.replace(data, captions=some))
    stream = Judge.stream

    def strict(self, jobs):
        assert all(jobs[n].first for n in range(len(jobs)))
        return stream(self, jobs)

    monkeypatch.setattr(Judge, "stream", strict)
    table = read(generate.generate(by_model(config)))
    row_of = {image: row for row, image in enumerate(data.ids)}
    assert all(row_of[image.split("@")[0]] % 2 for image in [*table.preferred_image, *table.rejected_image])


@pytest.mark.parametrize("where", ["at once", "describing", "between", "ordering", "at the end"])
def test_interrupted_in_either_phase_and_continued_it_is_as_uninterrupted(config, judge, monkeypatch, where, tmp_path):
    config = by_model(config)
    uninterrupted = generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole")))
    described = meta(uninterrupted)["answers"]["descriptions"]["kept"]
    after = {"at once": 0, "describing": 5, "between": described, "ordering": described + 7}.get(where, 10_000)
    stream, before, later = Judge.stream, [], []

    def stops(self, jobs):
        for result in stream(self, jobs):
            if len(before) == after:
                raise KeyboardInterrupt
            before.append(jobs[result[0]])
            yield result

    def noted(self, jobs):
        for result in stream(self, jobs):
            later.append(jobs[result[0]])
            yield result

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, TypeError)):
        patch.setattr(Judge, "stream", stops)
        patch.setattr("pc_clip.write.rank.put_in_place", None)  # reached at the end alone
        generate.generate(config)
    monkeypatch.setattr(Judge, "stream", noted)
    path = generate.generate(config)
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert len(before) == min(after, described + 12) and len(before) + len(later) == described + 12
    assert not set(later) & set(before)  # nothing is asked twice
    assert not list(path.parent.glob("*.parts*"))


def test_begun_with_other_settings_it_is_not_continued_without_overwrite(config, judge, monkeypatch):
    config = by_model(config)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Judge, "stream", lambda self, jobs: 1 / 0)
        generate.generate(config)
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match=r"rank\.parts was begun with other settings.*--overwrite true"):
        generate.generate(other)
    assert len(read(generate.generate(dataclasses.replace(other, overwrite=True))))


def test_a_folder_in_which_nothing_was_done_stands_in_nobodys_way(config):
    with pytest.raises(UserError, match="batch_size"):
        generate.generate(dataclasses.replace(config, rank=dataclasses.replace(config.rank, batch_size=0)))
    assert len(read(generate.generate(dataclasses.replace(config, seed=1))))


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_working_folder_that_was_half_removed_goes_with_the_next_call(config, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        remove = Parts.remove

        def stops(self):
            if step == "rmtree":
                patch.setattr("pc_clip.write.progress.shutil.rmtree", lambda *_, **__: None)
                remove(self)
            raise KeyboardInterrupt

        patch.setattr(Parts, "remove", stops)
        generate.generate(config)
    path = Path(config.out) / "example_rank.parquet"
    before = path.read_bytes()
    assert len(list(path.parent.glob("*.parts*"))) == 1
    assert generate.generate(config) == path
    assert path.read_bytes() == before and not list(path.parent.glob("*.parts*"))


def test_answers_that_are_no_order_are_counted_and_kept_apart(config, judge, monkeypatch):
    stream = Judge.stream

    def some(self, jobs):
        for n, text in stream(self, jobs):
            yield n, "1, 1" if jobs[n].second and n % 3 == 0 else text

    monkeypatch.setattr(Judge, "stream", some)
    path = generate.generate(by_model(config))
    about = meta(path)
    assert about["answers"]["orders"] == {"kept": 8, "twice": 4}
    assert about["counts"]["queries_without_order"] == 4 and about["counts"]["queries"] == 8
    rejected = [json.loads(line) for line in path.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["reason"], row["raw"]) for row in rejected] == [("orders", "twice", "1, 1")] * 4
    assert not set(read(path).query_image) & {row["first"] for row in rejected}


def test_images_without_a_description_are_left_out_but_for_the_own(config, judge, monkeypatch):
    stream, silent = Judge.stream, set()

    def some(self, jobs):
        for n, text in stream(self, jobs):
            yield n, "" if not jobs[n].second and n % 3 == 0 else text
            if not jobs[n].second and n % 3 == 0:
                silent.add(jobs[n].first)

    monkeypatch.setattr(Judge, "stream", some)
    path = generate.generate(by_model(config))
    table = read(path)
    data = generate.open_dataset("example", split="val")
    told = {image: " ".join(f"{text}." for text in texts) for image, texts in zip(data.ids, data.captions)}
    wholes = {row.rejected_image for row in table.itertuples() if "@" not in row.rejected_image}
    assert not {told[image] for image in wholes} & silent
    unnamed = table[table.preferred_text == ""]
    assert len(unnamed) and (unnamed.preferred_image == unnamed.query_image).all()


def test_two_processes_write_what_one_does(config, judge, tmp_path):
    """The second process's turns are taken at the first one's barriers."""
    import threading

    config = by_model(config)
    whole = generate.generate(dataclasses.replace(config, out=str(tmp_path / "whole"))).read_bytes()
    barrier = threading.Barrier(2, timeout=60)
    second = threading.Thread(target=generate.generate, args=(config, Processes(1, 2, 1, barrier.wait)))
    second.start()
    path = generate.generate(config, Processes(0, 2, 0, barrier.wait))
    second.join()
    assert path.read_bytes() == whole and not list(path.parent.glob("*.parts*"))


# -- the whole task, by a server that sees -------------------------------------------------------------


def shown(body):
    """The picture in a request, and its text."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return None, content
    picture, text = content
    kind, data = picture["image_url"]["url"].split(",", 1)
    assert kind == "data:image/jpeg;base64" and text["type"] == "text"
    return Image.open(io.BytesIO(base64.b64decode(data))), text["text"]


def sees(path, headers, body):
    """Answers to a picture with its mean colour and size, to descriptions with their order by that."""
    if "complet" not in path:
        return None
    picture, text = shown(body)
    if picture is None:
        count = len(re.findall(r"^\d+\. ", text, re.MULTILINE))
        return reply(", ".join(map(str, range(1, count + 1))))
    mean = np.asarray(picture.convert("RGB")).mean((0, 1)).round().astype(int)
    return reply(f"A picture of {picture.width} by {picture.height} in the colour {mean.tolist()}.")


def reply(text):
    return as_json({"model": "eyes", "choices": [{"finish_reason": "stop", "message": {"content": text}}]})


@pytest.fixture
def server():
    with closing(found := Server(models=("eyes",))):
        found.instead = sees
        yield found


def by_server(config, server, **rank):
    config = dataclasses.replace(config, writer="server", rank=dataclasses.replace(config.rank, **rank))
    config.server = dataclasses.replace(config.server, url=[server.url], retries=1, timeout=5.0)
    return config


def test_a_server_is_shown_the_views_themselves(config, server):
    path = generate.generate(by_server(config, server, margin=0.0))
    table = read(path)
    assert table.preferred_text.str.startswith("A picture of ").all()
    names = sorted({*table.preferred_image, *table.rejected_image})
    assert any("@crop=" in name for name in names)
    pictures = views(generate.open_dataset("example", split="val"), names)
    text_of = {
        **dict(zip(table.preferred_image, table.preferred_text)),
        **dict(zip(table.rejected_image, table.rejected_text)),
    }
    for n, name in enumerate(names):
        view = pictures.load(n)
        width, height, *mean = map(int, re.findall(r"\d+", text_of[name]))
        assert (width, height) == view.size
        assert np.abs(np.asarray(view).mean((0, 1)) - mean).max() < 4  # a JPEG's colours
    asked = [shown(body)[1] for _, _, body in server.seen if "messages" in body]
    captions = {text for texts in generate.open_dataset("example", split="val").captions for text in texts}
    assert not any(text in said for said in asked if "Describe" in said for text in captions)  # it is to look
    crops_first = table[table.preferred_image.str.contains("@")]
    assert len(crops_first)  # a crop that was seen can be better than another image


def test_a_server_without_eyes_is_told_the_captions(config, server):
    def told(path, headers, body):
        if "complet" in path and "Descriptions" not in (text := shown(body)[1]):
            return reply(f"There is {re.search('Captions of one picture: (.*)', text)[1]}")
        return sees(path, headers, body)

    server.instead = told
    table = read(generate.generate(by_server(config, server, pictures=False)))
    assert all(isinstance(body["messages"][-1]["content"], str) for _, _, body in server.seen if "messages" in body)
    assert table.rejected_text.str.startswith("There is ").all()


def test_a_server_that_refuses_pictures_ends_it_with_the_way_out(config, server):
    def blind(path, headers, body):
        if "complet" in path and shown(body)[0] is not None:
            return as_json({"error": {"message": "eyes is not a multimodal model"}}, 400)
        return sees(path, headers, body)

    server.instead = blind
    with pytest.raises(UserError, match=r"not a multimodal model.*--rank\.pictures false"):
        generate.generate(by_server(config, server))


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": {"least": 7, "most": 5}}, r"rank\.least is 7 and rank\.most 5"),
        ({"rank": {"most": 1, "least": 1}}, r"rank\.most is 1; it must be at least 2"),
        ({"rank": {"least": 0}}, r"rank\.least is 0; it must be at least 1"),
        ({"rank": {"margin": -0.1}}, r"rank\.margin is -0\.1"),
        ({"rank": {"margin": float("nan")}}, r"rank\.margin is nan"),
        ({"rank": {"n_queries": 0}}, r"rank\.n_queries is 0; it must be at least 1"),
        ({"rank": {"n_queries": 99}}, r"rank\.n_queries is 99, but only 60 images of example/val have captions"),
        ({"rank": {"pairs_each": 0}}, r"rank\.pairs_each is 0"),
        ({"rank": {"pictures": False}}, r"--rank\.pictures false has no effect with --writer rules"),
        ({"rank": {"order_prompt": "x.yaml"}}, r"--rank\.order_prompt has no effect with --writer rules"),
        ({"rank": {"missing": "maybe"}}, r"rank\.missing is 'maybe'"),
        ({"rank": {"device": "tpu"}}, r"rank\.device is 'tpu'"),
        ({"writer": "ruler"}, r"writer is 'ruler'\. Did you mean 'rules'\?"),
        ({"n_pairs": 5}, r"--n_pairs has no effect in --task rank"),
        ({"question": "size"}, r"--question has no effect in --task rank"),
        ({"seed": -1}, r"seed is -1; it must be at least 0"),
        ({"prompt": "x.yaml"}, r"--prompt has no effect in --task rank --writer rules"),
        ({"dataset": "coco", "root": "nowhere"}, "coco is not at nowhere"),
        ({"task": "describe", "rank": {"most": 5}}, r"--rank\.most has no effect in --task describe"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, message):
    rank = RankDataConfig(**settings.pop("rank", {}))
    with pytest.raises(UserError, match=message):
        generate.generate(dataclasses.replace(config, **{"rank": rank, **settings}))


def test_a_question_that_shows_no_descriptions_is_refused(config):
    Path("order.yaml").write_text("{system: s, instruction: 'Which fits {first}?'}")
    config = by_model(config)
    config.rank.order_prompt = "order.yaml"
    with pytest.raises(UserError, match=r"order\.yaml: the instruction has no \{second\}"):
        generate.generate(config)


def test_a_data_set_without_captions_is_refused(config):
    for n in range(3):
        Path("pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(f"pictures/{n}.png")
    config = dataclasses.replace(config, dataset="folder", root="pictures", split=None)
    config.model.name = "example"
    with pytest.raises(UserError, match="has no captions to rank its images by; name a file of them with --captions"):
        generate.generate(config)


def test_a_name_that_sentences_have_is_refused_and_the_other_way_round(config):
    Path(config.out).mkdir()
    (Path(config.out) / "example_rank.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"example_rank\.jsonl is there.*choose another --name"):
        generate.generate(config)
    (Path(config.out) / "some.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"some\.parquet is there"):
        generate.generate(GenerateConfig(name="some", out=config.out))


def test_captions_that_say_nothing_give_no_pairs_and_no_file(config):
    Path("c.tsv").write_text("id\timage\tcaption1\nval-00000\ta.png\tthe of\nval-00001\tb.png\tis a\n")
    config = dataclasses.replace(config, captions="c.tsv", rank=RankDataConfig(margin=2.0, least=2))
    with pytest.raises(UserError, match="no two candidates could be told apart"):
        generate.generate(config)
    assert not list(Path(config.out).glob("*.parquet"))
