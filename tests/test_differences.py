"""Differences: reading them, choosing pairs, exchanging the roles."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_clip.core.errors import UserError
from pc_clip.data.differences import Difference, _unrank, choose_pairs, read, rows, to_line

DOG_CAT = "The first image shows a dog on a sofa, while the second shows a cat."
QUICK = settings(deadline=None, max_examples=60)
line = json.dumps({"first": "1", "second": "2", "text": DOG_CAT})


def write(folder, content):
    path = folder / "some.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- files ---------------------------------------------------------------------------------------------

plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]))


@QUICK
@given(st.lists(st.builds(Difference, plain, plain, plain.filter(str.strip)), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("files") / "some.jsonl"
    path.write_text("".join(map(to_line, items)), encoding="utf-8")
    assert read(path) == items


def test_blank_lines_extra_keys_and_line_separators_are_fine(tmp_path):
    items = [
        Difference("1", "2", f"The first image shows a dog,{mark}the second a cat.") for mark in "\u2028\u2029\x85"
    ]
    assert read(write(tmp_path, "".join(map(to_line, items)))) == items
    path = write(tmp_path, '\n{"first": 1, "second": "2", "text": "a", "reason": "kept"}\n\n' + line + "\r\n")
    assert read(path) == [("1", "2", "a"), ("1", "2", DOG_CAT)]


def test_a_bad_file_says_why_and_a_bad_line_its_number(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl.*generate_diffs\.py"):
        read(tmp_path / "absent.jsonl")
    for content, message in [
        ("", "holds no differences"),
        ("\n \n", "holds no differences"),
        (line.replace("sofa", "café").encode("latin-1"), "is not UTF-8 text"),
        (f'{line}\n\n{line}\n{{"first": "1", "second"\n', "line 4 is not JSON"),
        (f'{line}\n\n{line}\n{{"first": "1", "text": "a"}}\n', "line 4 must be an object with first, second, text"),
        (f'["1", "2", "a"]\n{line}', "line 1 must be an object"),
        ('{"first": "1", "second": "2", "text": " "}', "line 1: text must be a text"),
        ('{"first": "1", "second": "2", "text": null}', "line 1: text must be a text"),
    ]:
        with pytest.raises(UserError, match=rf"some\.jsonl {message}"):
            read(write(tmp_path, content))


def test_rows_are_places_among_the_ids():
    actual = rows([Difference("c", "a", "x"), Difference("b", "c", "y")], ["a", "b", "c"], "f")
    assert actual.tolist() == [[2, 0], [1, 2]]
    assert actual.dtype == np.int64
    assert rows([], ["a"], "f").shape == (0, 2)


def test_an_unknown_image_is_named_with_its_line():
    with pytest.raises(UserError, match=r"difference 2 of f\.jsonl .*'zebra'.*4 images: a, b, c,"):
        rows([Difference("a", "b", "x"), Difference("a", "zebra", "y")], ["a", "b", "c", "d"], "f.jsonl")


# -- pairs ---------------------------------------------------------------------------------------------


def test_unranking_counts_through_the_combinations():
    for n in (2, 3, 4, 17, 60):
        assert [_unrank(k, n) for k in range(n * (n - 1) // 2)] == list(itertools.combinations(range(n), 2))


@QUICK
@given(st.data(), st.integers(2, 10**6))
def test_unranking_is_exact_for_data_sets_of_any_size(data, n):
    i = data.draw(st.integers(0, n - 2))
    j = data.draw(st.sampled_from([i + 1, n - 1]) | st.integers(i + 1, n - 1))
    assert _unrank(i * (2 * n - i - 1) // 2 + j - i - 1, n) == (i, j)


@QUICK
@given(st.data(), st.integers(2, 12), st.integers(0, 99), st.booleans())
def test_drawn_pairs_are_distinct_pairs_of_different_images(data, n, seed, both):
    ids = [f"im{k}" for k in range(n)]
    everything = set(itertools.combinations(ids, 2))
    wanted = data.draw(st.integers(0, len(everything)))
    pairs = choose_pairs(ids, wanted, seed, both)
    assert pairs == choose_pairs(ids, wanted, seed, both)
    drawn = pairs[::2] if both else pairs
    assert not both or pairs[1::2] == [(b, a) for a, b in drawn]
    assert len({tuple(sorted(p, key=ids.index)) for p in drawn} & everything) == len(drawn) == wanted


def test_without_a_number_all_pairs_are_taken():
    assert choose_pairs(list("dbca"), None, 0, both_orders=False) == list(itertools.combinations("dbca", 2))
    both = choose_pairs(list("dbca"), None, 0, both_orders=True)
    assert sorted(both) == sorted(itertools.permutations("dbca", 2))


def test_a_drawn_pair_comes_in_either_order_about_as_often():
    ids = [f"{k:06}" for k in range(118_287)]  # COCO train2017
    pairs = choose_pairs(ids, 1000, 0, both_orders=False)
    assert 430 < sum(a < b for a, b in pairs) < 570
    assert pairs != choose_pairs(ids, 1000, 1, both_orders=False)


def test_more_pairs_than_there_are_is_an_error_with_both_numbers():
    with pytest.raises(UserError, match=r"\b7 pairs .*4 images .*\b6\b"):
        choose_pairs(list("abcd"), 7, 0, both_orders=False)
