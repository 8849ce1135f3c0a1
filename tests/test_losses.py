"""Each loss against a few lines of NumPy, and the properties it is used for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pc_clip.train import losses


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
    actual = losses.info_nce(torch.from_numpy(a), torch.from_numpy(b), temperature)
    assert actual.item() == pytest.approx((rows + columns) / 2, rel=1e-9)


def test_the_loss_bounds_at_temperature_one_are_the_papers():
    """log(512) = 6.24 for nothing learnt; 5.24 when every pair is at cosine 1 and all others at 0."""
    same, perfect = torch.ones(512, 4), torch.eye(512, dtype=torch.float64)
    assert losses.info_nce(same, same, 1.0).item() == pytest.approx(math.log(512), rel=1e-5)
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
    actual = losses.unit_differences(torch.from_numpy(10 * a), torch.from_numpy(0.1 * b)).numpy()
    assert np.allclose(actual, unit(unit(a) - unit(b)))


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
        actual = sum(losses.info_nce(a, b, temperature, s) for s in own) / parts
        gradients = torch.autograd.grad(actual, (a, b, temperature))
    assert actual.item() == pytest.approx(whole.item(), rel=1e-12)
    assert all(torch.allclose(g, e, atol=1e-12) for g, e in zip(gradients, expected))


def test_info_nce_holds_a_block_of_similarities_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", 8)
    a, b = (torch.randn(64, 4, requires_grad=True) for _ in range(2))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        losses.info_nce(a, b, 1.0).backward()
    assert max(sizes) <= 64 * 8


# -- preferences ---------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


cosine_pairs = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=6)


@given(cosine_pairs, st.floats(0.5, 100))
def test_log_odds_are_the_difference_of_the_pairs_log_probabilities(pairs, scale):
    cosines = torch.tensor(pairs, dtype=torch.float64)
    log_p = (scale * cosines).log_softmax(-1)
    actual = losses.log_odds(cosines[:, 0], cosines[:, 1], scale)
    assert torch.allclose(actual, log_p[:, 0] - log_p[:, 1], atol=1e-9)


@given(cosine_pairs, st.floats(0.01, 3), st.sampled_from([0.0, 0.2]))
def test_preference_losses_are_their_equations(pairs, beta, smoothing):
    policy, reference = (10 * np.array(pairs)).T
    moved = policy - reference
    of = [torch.from_numpy(x.copy()) for x in (policy, reference)]
    expected = -np.mean((1 - smoothing) * np.log(sigmoid(beta * moved)) + smoothing * np.log(sigmoid(-beta * moved)))
    assert losses.dpo(*of, beta, smoothing).item() == pytest.approx(expected, rel=1e-9)
    assert losses.ipo(*of, beta).item() == pytest.approx(np.mean((moved - 1 / (2 * beta)) ** 2), rel=1e-9)
    rewards = -np.mean(np.log(sigmoid(beta * moved)))
    assert losses.bradley_terry(*of, beta).item() == pytest.approx(rewards, rel=1e-9)


def test_reference_free_dpo_begins_at_log_2():
    policy, even = torch.tensor([0.3, -1.2]), torch.zeros(2)
    assert losses.dpo(policy, None, 0.7, 0.1) == losses.dpo(policy, even, 0.7, 0.1)
    assert losses.ipo(policy, None, 0.7) == losses.ipo(policy, even, 0.7)
    assert losses.dpo(policy, policy, 0.7, 0.1).item() == pytest.approx(math.log(2))


def test_ipo_stops_at_its_margin_where_dpo_goes_on():
    at_margin = torch.tensor([1 / (2 * 0.25)], requires_grad=True)
    (by_ipo,) = torch.autograd.grad(losses.ipo(at_margin, None, 0.25), at_margin)
    (by_dpo,) = torch.autograd.grad(losses.dpo(at_margin, None, 0.25), at_margin)
    assert by_ipo.item() == pytest.approx(0) and by_dpo.item() < -0.01


@pytest.fixture(scope="module")
def trl_loss():
    """Loss of trl's DPOTrainer for log-odds: its own code, around a model that says these log-probabilities."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl needs Python 3.11")
    from collections import defaultdict
    from types import SimpleNamespace

    def found(kind: str, policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0) -> float:
        halves = torch.cat([policy / 2, -policy / 2])[:, None]  # one token each, chosen before rejected
        tokens = torch.ones(len(halves), 2, dtype=torch.long)
        nothing = torch.zeros_like(halves, dtype=torch.bool)
        about = dict.fromkeys(("entropy", "mean_logits", "is_top1"), nothing)  # what it logs
        inputs = {
            "input_ids": tokens,
            "attention_mask": tokens,
            "completion_mask": torch.tensor([[0, 1]] * len(halves)),
            "ref_chosen_logps": reference / 2,
            "ref_rejected_logps": -reference / 2,
        }
        asked = SimpleNamespace(device=halves.device, gather_for_metrics=lambda x: x, gather=lambda x: x)
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=asked,
            aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=smoothing,
            use_weighting=False, _total_train_tokens=0, _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        )  # fmt: skip

        def model(**_):
            return SimpleNamespace(log_probs=halves, loss=None, **about)

        return dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False).item()

    return found


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_dpo_and_ipo_are_those_of_trl(trl_loss, beta):
    policy, reference = torch.from_numpy(random(2, 7, seed=3))
    assert losses.dpo(policy, reference, beta).item() == pytest.approx(trl_loss("sigmoid", policy, reference, beta))
    assert losses.ipo(policy, reference, beta).item() == pytest.approx(trl_loss("ipo", policy, reference, beta))


def test_smoothed_dpo_is_trls_sorted_loss_of_one_pair(trl_loss):
    """trl has no conservative DPO of its own; its "aot" smooths alike, and sorts, which changes nothing of one pair."""
    policy, reference = torch.tensor([[0.4], [-0.3]], dtype=torch.float64)
    expected = trl_loss("aot", policy, reference, 0.5, 0.2)
    assert losses.dpo(policy, reference, 0.5, 0.2).item() == pytest.approx(expected)


def test_contrastive_loss_with_rejected_texts_by_hand():
    """Rows 0 and 2 are of one image: the text of one is no negative of the other, but its rejected text is.

    Rows 1 and 3 have one text, which row 0 rejects: none of these is a negative of another for them.
    """
    text, rejected, image = (random(4, 4, seed=n) for n in (1, 2, 3))
    image[2], text[3], rejected[0], scale = image[0], text[1], text[1], 5.0
    numbers = [(7, 0, 1), (8, 1, 3), (7, 4, 5), (9, 1, 6)]
    u, r, v = unit(text), unit(rejected), unit(image)
    expected = 0.0
    for i, (owner, sentences, _) in enumerate(numbers):
        others = [j for j in range(4) if j == i or (numbers[j][0] != owner and numbers[j][1] != sentences)]
        texts = np.array(
            [scale * v[i] @ u[j] for j in others]
            + [scale * v[i] @ r[j] for j in range(4) if numbers[j][2] != sentences]
        )
        images = np.array([scale * u[i] @ v[j] for j in others])
        own = scale * v[i] @ u[i]
        expected += (np.log(np.exp(texts).sum()) - own + np.log(np.exp(images).sum()) - own) / 2
    tensors = [torch.from_numpy(x) for x in (text, rejected, image)]
    actual = losses.info_nce_with_negatives(*tensors, torch.tensor(numbers), scale)
    assert actual.item() == pytest.approx(expected / 4, rel=1e-5)
    parts = [
        losses.info_nce_with_negatives(*tensors, torch.tensor(numbers), scale, part) for part in (slice(1), slice(1, 4))
    ]
    assert (parts[0] + 3 * parts[1]).item() / 4 == pytest.approx(actual.item(), rel=1e-5)
