"""Which precision a training multiplies in."""

from __future__ import annotations

import logging
from types import MappingProxyType

import pytest
import torch

from pc_clip.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "able, asked, settled",
    [
        ({"avx512_bf16": True}, "auto", "bf16"),
        ({"bf16": True, "architecture": "aarch64"}, "auto", "bf16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "auto", "no"),
        ({}, "auto", "no"),
        ({}, "bf16", "bf16"),
        ({"avx512_bf16": True}, "no", "no"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_in_it(monkeypatch, able, asked, settled):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(able))
    assert precision.settle(asked, CPU) == settled


@pytest.mark.parametrize("able, told", [(False, True), (True, False)])
def test_slow_bf16_is_done_when_asked_for_and_said_to_be_slow(monkeypatch, caplog, able, told):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: able)
    with caplog.at_level(logging.WARNING):
        assert precision.settle("bf16", CPU) == "bf16"
    assert ("no instructions for it" in caplog.text) == told
