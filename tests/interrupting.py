"""Runs that are interrupted and then continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.train import loop
from pc_clip.train.loop import finetune


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt training when a batch of that step is asked for."""
    original = loop.batches

    def interrupted(method, done, total):
        for n, batch in original(method, done, total):
            if n == step:
                raise KeyboardInterrupt
            yield n, batch

    monkeypatch.setattr(loop, "batches", interrupted)


def interrupted_and_continued(config: FinetuneConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the config's run, which is interrupted after `step` steps and then resumed."""
    with monkeypatch.context() as context:
        stop_at(context, step)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    config.resume = True
    return finetune(config)
