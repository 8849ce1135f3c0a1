"""Compensated summation: Adam's own steps, of which float32 weights lose nothing; learning rates, precision."""

import pytest
import torch
from torch import nn

from pc_clip.core.config.train import TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.train import optim
from pc_clip.train.optim import CHUNK, CompensatedAdam, add_compensated, make_optimizer

RATE = 5e-9  # the paper's after seven of its twenty epochs


def run(make, start, steps, dtype=torch.float32):
    """Where weights end that follow random gradients for some steps. start: tensors"""
    weights = [nn.Parameter(value.to(dtype, copy=True)) for value in start]
    optimizer = make(weights)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.grad = (noise + 0.5).to(dtype)
        optimizer.step()
    return [weight.detach().double() for weight in weights]


def displacement_error(actual, exact, start):
    moved = torch.cat([(e - s.double()).flatten() for e, s in zip(exact, start)])
    off = torch.cat([(f - e).flatten() for f, e in zip(actual, exact)])
    return float(off.norm() / moved.norm())


@pytest.fixture
def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(120, 300, generator=generator) * 0.05, torch.ones(20)]  # a matrix; gains, which start at 1


@pytest.mark.slow
@pytest.mark.parametrize("decoupled, decay", [(False, 0.0), (True, 0.1)])
def test_compensated_adam_keeps_updates_that_float32_loses(start, decoupled, decay):
    """Displacement against float64 after 600 steps."""
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    exact = run(lambda w: kind(w, lr=RATE, weight_decay=decay), start, 600, torch.float64)
    plain = run(lambda w: kind(w, lr=RATE, weight_decay=decay, fused=True), start, 600)
    ours = run(lambda w: CompensatedAdam(w, lr=RATE, weight_decay=decay, decoupled=decoupled), start, 600)
    assert torch.equal(plain[1], start[1].double())  # gains of 1 never move: a step is less than half their ulp
    assert displacement_error(plain, exact, start) > 0.1
    assert displacement_error(ours, exact, start) < 1e-3


def test_at_ordinary_rates_it_is_adam(start):
    plain = run(lambda w: torch.optim.Adam(w, lr=1e-2, weight_decay=0.1), start, 20, torch.float64)
    ours = run(lambda w: CompensatedAdam(w, lr=1e-2, weight_decay=0.1), start, 20)
    assert displacement_error(ours, plain, start) < 1e-5


def test_an_addition_and_what_it_rounds_off_are_together_exact():
    generator = torch.Generator().manual_seed(0)
    weight = 1 + torch.rand(2 * CHUNK + 5, generator=generator)
    carry = 1e-7 * torch.randn(2 * CHUNK + 5, generator=generator)
    whole, expected = weight.double() + carry.double(), weight + carry
    add_compensated(weight, carry)
    assert torch.equal(weight, expected)
    assert torch.equal(weight.double() + carry.double(), whole)
    assert carry.abs().max() <= 2**-23  # half the distance between float32 numbers from 1 to 4


def test_weights_in_half_precision_are_refused_and_told_why():
    with pytest.raises(
        UserError, match=r"must be float32, found torch.bfloat16: at small learning rates .*bf16 multip"
    ):
        make_optimizer(TrainConfig(), [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))])


def test_auto_is_bf16_where_the_processor_multiplies_in_it(monkeypatch, caplog):
    cases = [
        ({"avx512_bf16": True}, "auto", "bf16"),
        ({"bf16": True, "architecture": "aarch64"}, "auto", "bf16"),
        ({"avx2": True, "avx512_bf16": False}, "auto", "no"),
        ({}, "bf16", "bf16"),
        ({"avx512_bf16": True}, "no", "no"),
    ]
    for capabilities, asked, expected in cases:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert optim.resolve_precision(asked, torch.device("cpu")) == expected, (capabilities, asked)
    assert caplog.text.count("no instructions for it") == 1  # of bf16 that was asked for by name


def test_learning_rates():
    train = TrainConfig(lr=1.0, schedule="cosine", warmup_share=0.1)
    rates = [optim.learning_rate(train, step, 10, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[55] == pytest.approx(0.5)
    for schedule, expected in (
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("exponential", [0.5, 1, 1, 0.9, 0.9, 0.9, 0.81, 0.81, 0.81, 0.729]),
    ):
        train = TrainConfig(schedule=schedule, lr=1.0, decay=0.9, warmup_steps=2)
        assert [optim.learning_rate(train, step, 3, 10) for step in range(10)] == pytest.approx(expected)
