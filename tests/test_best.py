"""The weights of the best epoch: what is kept, and what a run that was killed and continued makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pc_clip.core.errors import UserError
from pc_clip.train import best
from pc_clip.train.best import Best

RUN = Path("run")


def begin(done: int = 0) -> tuple[Best, nn.Parameter]:
    """A run of one weight, which is the number of steps done."""
    weight = nn.Parameter(torch.tensor([float(done)]))
    return Best(RUN, done, {"w": weight}, "score"), weight


def go_on(kept: Best, weight: nn.Parameter, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        weight.data.fill_(step)
        kept.after(step, lambda score=score: {"score": score, "other": 1.0})


def end(kept: Best, weight: nn.Parameter) -> tuple[float, str]:
    said = kept.restore()
    return weight.item(), said


def rows() -> list[tuple[int, float]]:
    found = map(json.loads, (RUN / "validation.jsonl").read_text().splitlines())
    return [(row["step"], row["score"]) for row in found]


def test_the_best_is_taken_and_the_earlier_of_equals():
    kept, weight = begin()
    go_on(kept, weight, {10: 0.2, 20: 0.6, 30: 0.6, 40: 0.5})
    found, said = end(kept, weight)
    assert found == 20
    assert "that of step 20, the best of 4 on validation images (score 0.6000)" in said
    assert rows() == [(10, 0.2), (20, 0.6), (30, 0.6), (40, 0.5)]


def test_what_is_no_number_is_worse_than_any():
    kept, weight = begin()
    go_on(kept, weight, {10: math.nan, 20: -3.0, 30: math.nan})
    assert end(kept, weight)[0] == 20


@pytest.mark.parametrize("again", [0.9, 0.1])
def test_a_run_continued_from_before_its_best_epoch(again):
    """Whether or not that epoch comes out the same: on a GPU it may not."""
    kept, weight = begin()
    go_on(kept, weight, {10: 0.5, 20: 0.3, 30: 0.9})
    kept, weight = begin(done=15)
    assert kept.rows == [{"step": 10, "score": 0.5, "other": 1.0}]
    go_on(kept, weight, {20: 0.3, 30: again, 40: 0.6})
    found, said = end(kept, weight)
    assert found == 30  # with 0.1 it is the one of the first time, whose figure was 0.9
    assert "that of step 30" in said
    assert "0.9000" in said
    assert rows() == [(10, 0.5), (20, 0.3), (30, again), (40, 0.6)]


def test_killed_between_the_weights_and_the_line(monkeypatch):
    kept, weight = begin()
    go_on(kept, weight, {10: 0.5})
    with monkeypatch.context() as context:
        context.setattr(best, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go_on(kept, weight, {20: 0.7})
    assert load_file(RUN / "best.safetensors")["w"] == 20
    kept, weight = begin(done=12)
    go_on(kept, weight, {20: 0.4, 30: 0.6})
    found, said = end(kept, weight)
    assert found == 20
    assert "score 0.7000" in said


def test_a_run_that_starts_anew_knows_nothing_of_what_was():
    kept, weight = begin()
    go_on(kept, weight, {10: 0.9})
    kept, weight = begin(done=0)
    go_on(kept, weight, {20: 0.1})
    assert end(kept, weight)[0] == 20
    assert rows() == [(20, 0.1)]


def test_a_run_that_is_finished_but_for_its_model_takes_the_best():
    kept, weight = begin()
    go_on(kept, weight, {10: 0.9, 20: 0.1})
    assert end(*begin(done=20))[0] == 10


@pytest.mark.parametrize("damage", ["absent", "cut short"])
def test_weights_that_cannot_be_read_are_told_when_the_run_is_continued(damage):
    kept, weight = begin()
    go_on(kept, weight, {10: 0.9})
    path = RUN / "best.safetensors"
    path.unlink() if damage == "absent" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"best\.safetensors, the weights of the best epoch so far, cannot be read"):
        begin(done=15)
