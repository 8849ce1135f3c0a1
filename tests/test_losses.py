"""Each loss against a few lines of NumPy, and the properties it is used for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pc_clip import losses


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float64)


@given(st.integers(2, 9), st.integers(2, 6), st.floats(0.05, 2.0), st.integers(0, 50))
def test_info_nce_is_the_mean_of_both_cross_entropies(n, d, temperature, seed):
    a, b = random(n, d, seed=seed), random(n, d, seed=seed + 1)
    logits = unit(a) @ unit(b).T / temperature
    rows = -np.mean([logits[k, k] - np.log(np.exp(logits[k]).sum()) for k in range(n)])
    columns = -np.mean([logits[k, k] - np.log(np.exp(logits[:, k]).sum()) for k in range(n)])
    found = losses.info_nce(torch.from_numpy(a), torch.from_numpy(b), temperature)
    assert found.item() == pytest.approx((rows + columns) / 2, rel=1e-9)


def test_info_nce_of_equal_similarities_is_log_of_the_batch():
    same = torch.ones(512, 4)
    assert losses.info_nce(same, same, 1.0).item() == pytest.approx(math.log(512), rel=1e-5)


def test_at_temperature_one_the_loss_at_batch_512_moves_between_the_papers_bounds():
    """log(512) = 6.24 for nothing learnt; 5.24 when every pair is at cosine 1 and all others at 0."""
    perfect = torch.eye(512, dtype=torch.float64)
    assert losses.info_nce(perfect, perfect, 1.0).item() == pytest.approx(5.24, abs=0.01)


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 50))
def test_squared_distance_is_two_minus_two_cosine(n, d, seed):
    a, b = random(n, d, seed=seed), random(n, d, seed=seed + 1)
    expected = np.mean(2 - 2 * (unit(a) * unit(b)).sum(-1))
    assert losses.squared_distance(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected, abs=1e-9)


def test_anchor_is_zero_at_the_start_and_two_when_turned_round():
    x = torch.from_numpy(random(5, 7))
    assert losses.anchor(x, 3 * x).item() == pytest.approx(0, abs=1e-9)
    assert losses.anchor(-x, x).item() == pytest.approx(2, abs=1e-9)


def test_unit_differences_are_of_unit_vectors_and_unit_themselves():
    a, b = random(6, 5), random(6, 5, seed=1)
    found = losses.unit_differences(torch.from_numpy(10 * a), torch.from_numpy(0.1 * b)).numpy()
    assert np.allclose(found, unit(unit(a) - unit(b)))


def test_equal_images_give_a_zero_difference_and_a_finite_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    target = losses.unit_differences(x, x.detach().clone())
    losses.info_nce(torch.eye(2, 3), target, 1.0).backward()
    assert target.abs().max() == 0
    assert torch.isfinite(x.grad).all()


@given(st.integers(1, 5), st.integers(2, 6), st.integers(1, 7), st.integers(0, 50))
def test_info_nce_in_parts_and_in_blocks_is_the_whole(parts, rows, block, seed):
    """The mean over parts of a batch is its loss, and so are the gradients; with few rows held at a time, too."""
    a, b = (torch.from_numpy(random(parts * rows, 5, seed=seed + k)).requires_grad_() for k in (0, 1))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    whole = losses.info_nce(a, b, temperature)
    expected = torch.autograd.grad(whole, (a, b, temperature))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "BLOCK", block)
        own = [slice(k * rows, (k + 1) * rows) for k in range(parts)]
        found = sum(losses.info_nce(a[s], b[s], temperature, a, b, s.start) for s in own) / parts
        gradients = torch.autograd.grad(found, (a, b, temperature))
    assert found.item() == pytest.approx(whole.item(), rel=1e-12)
    assert all(torch.allclose(g, e, atol=1e-12) for g, e in zip(gradients, expected))


def test_info_nce_holds_a_block_of_similarities_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", 8)
    a, b = (torch.randn(64, 4, requires_grad=True) for _ in range(2))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        losses.info_nce(a, b, 1.0).backward()
    assert max(sizes) <= 64 * 8
