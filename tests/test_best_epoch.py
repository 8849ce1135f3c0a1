"""The weights of the best epoch: what is kept, and what a run that was killed and continued makes of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pc_clip.core.errors import UserError
from pc_clip.train import state
from pc_clip.train.state import BestCheckpoint

RUN = Path("run")


def begin(done: int = 0) -> tuple[BestCheckpoint, nn.Parameter]:
    """A run of one weight, which is the number of steps done."""
    weight = nn.Parameter(torch.tensor([float(done)]))
    return BestCheckpoint(RUN, done, {"w": weight}, "score"), weight


def train(best: BestCheckpoint, weight: nn.Parameter, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        weight.data.fill_(step)
        best.after(step, lambda score=score: {"score": score})


def restored(best: BestCheckpoint, weight: nn.Parameter) -> float:
    best.restore()
    return weight.item()


def test_the_best_is_taken_the_earlier_of_equals_and_nan_is_worst():
    best, weight = begin()
    train(best, weight, {10: math.nan, 20: 0.6, 30: 0.6, 40: 0.5})
    assert "step 20, the best of 4 on validation images (score 0.6000)" in best.restore()
    assert weight.item() == 20
    rows = [json.loads(line) for line in (RUN / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]


@pytest.mark.parametrize("again", [0.9, 0.1])
def test_a_run_continued_from_before_its_best_epoch_keeps_it(again):
    """Whether or not that epoch comes out the same: on a GPU it may not."""
    best, weight = begin()
    train(best, weight, {10: 0.5, 20: 0.3, 30: 0.9})
    best, weight = begin(done=15)
    train(best, weight, {20: 0.3, 30: again, 40: 0.6})
    assert restored(best, weight) == 30


def test_killed_between_the_weights_and_the_line(monkeypatch):
    best, weight = begin()
    train(best, weight, {10: 0.5})
    with monkeypatch.context() as context:
        context.setattr(state, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(best, weight, {20: 0.7})
    best, weight = begin(done=12)
    train(best, weight, {20: 0.4, 30: 0.6})
    assert restored(best, weight) == 20


def test_a_run_that_starts_anew_knows_nothing_of_what_was():
    train(*begin(), {10: 0.9})
    best, weight = begin(done=0)
    train(best, weight, {20: 0.1})
    assert restored(best, weight) == 20


@pytest.mark.parametrize("damage", ["absent", "cut short"])
def test_weights_that_cannot_be_read_stop_the_continued_run(damage):
    train(*begin(), {10: 0.9})
    path = RUN / "best.safetensors"
    path.unlink() if damage == "absent" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"best\.safetensors, the weights of the best epoch so far, cannot be read"):
        begin(done=15)
