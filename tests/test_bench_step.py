"""The benchmarks of training time the same computation on both sides, and count what is computed."""

import os
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import gpu
import step as steps

WIDTH, LAYERS, DIMENSIONS = 32, 3, 24
CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Module:
    """A tower that a test may change; its image tower sees 32 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = open_clip.CLIP(
            embed_dim=DIMENSIONS,
            vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
        )
    return steps.roughened(found)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- the two steps -------------------------------------------------------------------------------------


def test_both_steps_give_the_same_loss_and_gradient(model):
    for seed in range(3):
        some = steps.batch(model, 12, seed)
        published, ours, again = (
            make(model, update=False)
            for make in (
                steps.published,
                lambda model, **options: steps.ours(model, bf16=False, **options),
                lambda model, **options: steps.ours(model, bf16=False, recompute=True, **options),
            )
        )
        loss, exact = published(*some), steps.gradient(model, published, some)
        assert exact.norm() > 0.01
        for step in (ours, again):
            assert step(*some) == pytest.approx(loss, abs=1e-5)
            assert (steps.gradient(model, step, some) - exact).norm() < 1e-5 * exact.norm()


def test_gradient_errors_are_small_here_and_large_where_a_step_is_another_one(model, monkeypatch):
    some = steps.batch(model, 12, 0)
    turned, error = steps.gradient_errors(model, some)
    assert 0 < turned < 1e-3
    assert 0 < error < 1e-5
    monkeypatch.setattr(steps.losses, "info_nce", lambda text, *rest: steps.losses.squared_distance(text, rest[0]))
    turned, error = steps.gradient_errors(model, some)
    assert turned > 1e-3
    assert error > 0.01


def test_figures_of_the_gradient_are_in_millionths_with_upper_limits(model, monkeypatch):
    monkeypatch.setattr(steps, "gradient_errors", lambda model, some: (2e-4, 3e-6))
    bf16, fp32 = steps.of_gradient("tiny", model, steps.batch(model, 2, 0))
    assert (bf16.ratio, bf16.most) == (pytest.approx(200), 100)
    assert (fp32.ratio, fp32.most) == (pytest.approx(3), 10)


@pytest.mark.parametrize(
    "make",
    [steps.published, lambda m: steps.ours(m, bf16=False), lambda m: steps.ours(m, bf16=True, compensated=True)],
)
def test_a_step_moves_the_blocks_and_nothing_else(make, model, monkeypatch):
    monkeypatch.setattr(steps, "RATE", 1e-3)
    before, step = state(model), make(model)
    step(*steps.batch(model, 8, 0))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("transformer.")}


def test_two_updates_lead_to_the_same_loss(model, monkeypatch):
    """Ours and the published one, each from the same start."""
    monkeypatch.setattr(steps, "RATE", 1e-3)
    before, some, found = state(model), steps.batch(model, 12, 0), []
    for make in (steps.published, lambda m: steps.ours(m, bf16=False)):
        model.load_state_dict(before)
        step = make(model)
        found.append([step(*some) for _ in range(3)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][2] < found[0][0] - 0.01


def test_texts_are_as_long_as_is_said(model):
    first, second, tokens = steps.batch(model, 2000, 0)
    assert first.shape == second.shape == (2000, DIMENSIONS)
    lengths = gpu._lengths(tokens)
    assert torch.equal(lengths, (tokens != 0).sum(1))
    assert 47 < lengths.double().mean() < 51
    assert 0.10 < (lengths == 77).double().mean() < 0.14
    assert all(torch.equal(a, b) for a, b in zip(steps.batch(model, 20, 3), steps.batch(model, 20, 3)))


def test_two_steps_are_timed_in_turn_and_the_first_turn_is_left_out(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])

    def step_of(name, seconds):
        def step(turn):
            asked.append((name, turn))
            now[0] += 100 if turn == 0 else seconds

        return step

    found = steps.in_turn({"a": step_of("a", 3.0), "b": step_of("b", 1.0)}, [(0,), (1,), (2,)])
    assert asked == [(name, turn) for turn in (0, 1, 2) for name in ("a", "b")]
    assert found == {"a": 3.0, "b": 1.0}


def test_building_a_tower_leaves_the_random_numbers_alone(monkeypatch, model):
    monkeypatch.setattr(steps.open_clip, "create_model", lambda name, pretrained: torch.randn(1) is not None and model)
    before = torch.get_rng_state()
    assert steps.tower("any") is model
    assert torch.equal(torch.get_rng_state(), before)


# -- displacement and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("lr", steps.RATES)
def test_float32_loses_much_of_the_way_and_compensation_next_to_nothing(lr):
    plain, compensated = steps.displacement_errors(lr, width=48)
    assert plain > 0.05
    assert compensated < 1e-3


def test_figures_of_the_displacement_are_for_both_rates(monkeypatch):
    monkeypatch.setattr(steps, "displacement_errors", lambda lr: (lr * 1e8, 2e-3))
    monkeypatch.setattr(steps, "_cost_of_compensation", lambda name: steps.Figure("cost", 1, 0, "%"))
    found = {figure.name: figure for figure in steps.of_compensation("any")}
    assert found["displacement lost by float32, lr 1e-08"].ratio == pytest.approx(1000)
    assert found["displacement lost by float32, lr 5e-09"].ratio == pytest.approx(500)
    for lr in ("1e-08", "5e-09"):
        figure = found[f"displacement lost with compensation, lr {lr}"]
        assert (figure.ratio, figure.most, figure.unit) == (2, 1, "e-3")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_is_that_of_the_work_and_not_of_what_was_before():
    def work(megabytes):
        return lambda: np.ones(megabytes * 1_000_000 // 8).sum()

    assert steps.peak_above(work(300)) == pytest.approx(0.3, abs=0.05)
    assert steps.peak_above(work(60)) == pytest.approx(0.06, abs=0.03)


def test_the_published_loops_memory_is_carried_on_in_a_line(monkeypatch):
    peaks = {("published", 16): 2.0, ("published", 32): 3.0, ("bf16", 512): 7.0, ("bf16, recompute", 512): 4.0}
    monkeypatch.setattr(steps, "_peak_of", lambda name, kind, n: peaks[kind, n])
    published, plain, recompute = steps.of_memory("any", 512)
    assert published.ratio == 33.0  # 1 GB and 1 GB for each 16
    assert (plain.ratio, plain.most) == (7.0, 8)
    assert (recompute.ratio, recompute.most) == (4.0, 3)


# -- what runs on a GPU, here on a CPU -----------------------------------------------------------------


class Count(TorchDispatchMode):
    """Operations by torch's own formulas. FlopCounterMode's hooks on modules fail in our backward passes."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*arguments, **(options or {}), out_val=made)
        return made


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_torch_counts(model, recompute):
    """Of equal lengths, which need no padding. A CPU computes all of l^2 scores, a causal kernel half of them."""
    texts, length = 6, 32
    some = steps.batch(model, texts, 0)
    tokens = some.tokens.clamp(max=49405)
    tokens[:, length - 1], tokens[:, length:] = 49407, 0
    step = steps.ours(model, bf16=False, recompute=recompute, update=False)
    with Count() as count:
        step(some.first, some.second, tokens)
    projection = 4 * WIDTH * DIMENSIONS * texts  # it does not learn
    loss = 2 * 4 * DIMENSIONS * texts**2  # nor do images
    not_causal = 3 * 4 * WIDTH * texts * length**2 / 2 * (LAYERS - 1)
    expected = gpu.operations(model, torch.full((texts,), length))
    if not recompute:
        assert count.total == expected + not_causal + projection + loss
    else:  # the first of three passes is made twice
        assert count.total == pytest.approx((expected + not_causal + projection) * 4 / 3, rel=0.02)


def test_operations_by_hand():
    """Width 2, two blocks: 48 weights a token in the first; 8 a token and 40 a text in the last."""
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.width, model.transformer.resblocks = 2, [None, None]
    linear = 6 * (3 * 48 + 3 * 8 + 40)  # of a text of three tokens
    attention = 3 * (2 * 4 * 9 / 2 + 2 * 4 * 3)  # half of nine scores in the first block, three in the last
    assert gpu.operations(model, torch.tensor([3])) == linear + attention
    one, two = (gpu.operations(model, torch.tensor([n])) for n in (3, 5))
    assert gpu.operations(model, torch.tensor([3, 5])) == one + two


@pytest.mark.parametrize("way", gpu.WAYS, ids=lambda way: way.name)
def test_each_way_of_training_gives_its_figures(model, way):
    batches = [steps.batch(model, 6, seed) for seed in range(2)]
    speed, minutes, memory = gpu.of_training(model, batches, way, rounds=3)
    assert speed.ratio > 0
    assert minutes.ratio == pytest.approx(560_000 * 20 / speed.ratio / 60)
    assert np.isnan(memory.ratio)  # of a CPU
    assert "not in it" in speed.note


def test_the_share_of_the_peak_is_of_what_the_lengths_need(model, monkeypatch):
    monkeypatch.setattr(gpu, "_card", lambda device: "NVIDIA H200")
    monkeypatch.setattr(gpu, "_seconds", lambda device, work: 4.0)  # of 2 rounds
    batches = [steps.batch(model, 6, seed) for seed in range(3)]
    needed = np.mean([gpu.operations(model, gpu._lengths(batch.tokens)) for batch in batches])
    for way, floor, most in zip(gpu.WAYS[:2], (40, np.nan), (20, 20)):
        speed, minutes, _, share = gpu.of_training(model, batches, way, rounds=2)
        assert speed.ratio == 3.0  # 6 texts in 2 s
        assert share.ratio == pytest.approx(100 * needed / 2.0 / 989e12)
        assert (minutes.most, share.floor) == (most, pytest.approx(floor, nan_ok=True))
    assert len(gpu.of_training(model, batches, gpu.WAYS[2], rounds=2)) == 3  # fp32 has no share of a bf16 rate


@pytest.mark.parametrize(
    ("card", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA H200 NVL", None), ("a card of next year", None), ("", None)],
)  # fmt: skip
def test_the_peak_of_a_card_is_known_or_not_said(card, rate):
    assert gpu._peak_rate(card) == rate


def test_images_are_counted(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "encode_image", lambda pixels: seen.append(pixels.shape))
    monkeypatch.setattr(gpu, "_seconds", lambda device, work: work() and 2.0)
    found = gpu.of_images(model, 4, 32, rounds=5)
    assert [figure.ratio for figure in found] == [10.0, 10.0]  # 20 images in 2 s
    assert seen == [(4, 3, 32, 32)] * 2 * 6


def test_images_are_encoded(model):
    assert all(figure.ratio > 0 for figure in gpu.of_images(model.eval(), 2, 32, rounds=1))
