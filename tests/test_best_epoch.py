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


def train(scores: dict[int, float], done: int = 0) -> str:
    """Train a run of one weight, the number of steps done, from a step on; says which weights are taken."""
    weight = nn.Parameter(torch.tensor([float(done)]))
    best = BestCheckpoint(RUN, done, {"w": weight}, "score")
    for step, score in scores.items():
        weight.data.fill_(step)
        best.after(step, lambda score=score: {"score": score})
    message = best.restore()
    assert f"that of step {int(weight.item())}," in message
    return message


def test_the_best_is_taken_the_earlier_of_equals_and_nan_is_worst():
    message = train({10: math.nan, 20: 0.6, 30: 0.6, 40: 0.5})
    assert "step 20, the best of 4 on validation images (score 0.6000)" in message
    rows = [json.loads(line) for line in (RUN / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert "step 15," in train({15: 0.1})  # a run that starts anew knows nothing of what was


@pytest.mark.parametrize("again", [0.9, 0.1])
def test_a_run_continued_from_before_its_best_epoch_keeps_it(again):
    """Whether or not that epoch comes out the same: on a GPU it may not."""
    train({10: 0.5, 20: 0.3, 30: 0.9})
    assert "step 30," in train({20: 0.3, 30: again, 40: 0.6}, done=15)


def test_killed_between_the_weights_and_the_line(monkeypatch):
    train({10: 0.5})
    with monkeypatch.context() as context:
        context.setattr(state, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train({20: 0.7}, done=10)
    assert "step 20," in train({20: 0.4, 30: 0.6}, done=12)


@pytest.mark.parametrize("damage", ["absent", "cut short"])
def test_weights_that_cannot_be_read_stop_the_continued_run(damage):
    train({10: 0.9})
    path = RUN / "best.safetensors"
    path.unlink() if damage == "absent" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"best\.safetensors is not a whole safetensors file"):
        train({}, done=15)
