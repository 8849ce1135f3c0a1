"""What statements give away to who does not look, told without an image."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pc_clip.core.errors import UserError
from pc_clip.evals import blind_baselines
from pc_clip.report.study import COLUMNS


def write(path: str, *labels: int, text: str = "The cat is under the table.") -> Path:
    rows = [
        {"image": f"{n}.jpg", "caption": text, "label": label, "relation": "under"} for n, label in enumerate(labels)
    ]
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    return Path(path)


def test_the_same_sentence_is_right_as_often_as_it_is_true(example_clip):
    """Of one and the same text all that do not look say one and the same."""
    actual = blind_baselines.audit(example_clip, write("a.jsonl", 1, 1, 1, 0))
    assert actual["true"][0] == actual["majority"][0] == 0.75
    assert actual["blind"][0] in (0.25, 0.75)
    assert actual["blind_prefers_caption_as_written"][0] in (0.0, 1.0)
    assert actual["majority"][1] <= 0.75 <= actual["majority"][2]
    assert "text_only" not in actual  # of four photographs nothing can be learnt
    with pytest.raises(UserError, match="all 2 statements of a.jsonl are true; this is for files with both kinds"):
        blind_baselines.audit(example_clip, write("a.jsonl", 1, 1))


def test_texts_that_give_the_label_away_are_found_out(example_clip):
    rows = [
        {"image": f"{n}.jpg", "caption": f"The {'red' if n % 2 else 'blue'} cat is under the table.", "label": n % 2}
        for n in range(60)
    ]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    actual = blind_baselines.audit(example_clip, "a.jsonl")
    assert actual["text_only"][0] > 0.95 and actual["majority"][0] == 0.5


def test_the_table_has_a_studys_columns(capsys):
    Path("split").mkdir()
    blind_baselines.main([str(write("split/a.jsonl", 1, 0, 1)), "--out", "b.csv"])
    table = pd.read_csv("b.csv")
    assert list(table) == COLUMNS and set(table.variant) == {"example split/a"}
    assert capsys.readouterr().out.startswith("split/a: true 66.7 [")
