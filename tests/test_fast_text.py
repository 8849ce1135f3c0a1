"""The fast way through the text tower: open_clip's own values and gradients, and only for towers it knows."""

from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pc_clip.models import fast_text, loading
from pc_clip.models.fast_text import FastText
from pc_clip.models.loading import create_model
from pc_clip.models.packing import STEP, pack, pack_shared

END = 99  # the end-of-text token of the towers below: their largest


def tower(heads=2, layers=3, activation=nn.GELU, projection_bias=False, **options) -> nn.Module:
    """A text tower of open_clip's with small random weights, biases and gains included."""
    actual = open_clip.transformer.TextTransformer(
        context_length=40, vocab_size=100, width=32, heads=heads, layers=layers, output_dim=24, act_layer=activation,
        proj_bias=projection_bias, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in actual.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return actual


def texts(lengths, seed=0) -> torch.Tensor:
    """Random tokens, each text with its end at the length given; whatever follows the end is not zero."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, END, (len(lengths), 40))
    tokens[np.arange(len(lengths)), np.asarray(lengths) - 1] = END
    return torch.from_numpy(tokens)


def both_ways(encode, model, tokens):
    """Embeddings, and the gradients of a sum that no symmetry makes zero."""
    model.zero_grad()
    z = encode(tokens)
    (z.float() * torch.linspace(-1, 1, z.numel()).view(z.shape)).sum().backward()
    return z.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(one, other, tolerance):
    assert torch.allclose(one[0], other[0], atol=tolerance * float(other[0].abs().max()))
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        apart = (one[1][name] - gradient).norm()
        assert apart <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.slow
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(0, 20), st.booleans())
def test_values_and_every_gradient_are_open_clips(lengths, seed, recompute):
    model, tokens = tower(), texts(lengths, seed)
    fast = FastText(model, recompute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_text, "PART", 60)
        assert_equal(both_ways(fast, model, tokens), both_ways(model, model, tokens), 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"activation": open_clip.transformer.QuickGELU}, {"projection_bias": True}, {"heads": 1, "layers": 1}],
    ids=["quickgelu", "linear projection", "one block"],
)
def test_the_variants_it_knows(options):
    model, tokens = tower(**options), texts([3, 40, 17, 17, 9])
    assert_equal(both_ways(FastText.of(model), model, tokens), both_ways(model, model, tokens), 1e-5)


@pytest.mark.slow
def test_the_size_of_the_papers_tower_meets_the_bounds_that_training_needs():
    """On real widths: cosine 0.9999 in bf16 and an error below 1e-5 in float32, over the gradient of all blocks."""
    torch.manual_seed(0)
    model = open_clip.transformer.TextTransformer(width=512, heads=8, layers=4, output_dim=512)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(9.0, 5.0, 12).astype(int), 14, 77)
    tokens = rng.integers(256, 49000, (12, 77))
    tokens[np.arange(12), lengths - 1] = 49407
    tokens = torch.from_numpy(tokens)

    def gradient(encode):
        model.zero_grad()
        z = nn.functional.normalize(encode(tokens).float(), dim=-1)
        nn.functional.cross_entropy(z @ z.roll(1, 0).detach().T, torch.arange(12)).backward()
        return torch.cat([p.grad.flatten().double() for p in model.transformer.parameters()])

    fast, plain = FastText.of(model), gradient(model)
    assert (gradient(fast) - plain).norm() < 1e-5 * plain.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradient(fast)
    assert torch.cosine_similarity(mixed, plain, dim=0) > 0.9999 and not torch.equal(mixed, plain)
    assert all(p.grad.dtype == torch.float32 for p in model.transformer.parameters())


def test_frozen_parts_get_no_gradient_and_block_none():
    model, tokens = tower(), texts([5, 12])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    learning = {n: p.requires_grad_() for n, p in model.named_parameters() if n.startswith("transformer.")}
    actual = both_ways(FastText.of(model), model, tokens)
    assert actual[1].keys() == learning.keys()
    assert_equal(actual, both_ways(model, model, tokens), 1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_packing_keeps_every_token_once_and_no_padding(lengths):
    tokens = texts(lengths)
    packed = pack(tokens)
    begins, ends = packed.ends[:-1].tolist(), packed.ends[1:].tolist()
    assert len(packed.tokens) == sum(lengths)
    for n, length in enumerate(lengths):
        k = int(packed.back[n])
        assert packed.tokens[begins[k] : ends[k]].tolist() == tokens[n, :length].tolist()
        assert packed.positions[begins[k] : ends[k]].tolist() == list(range(length))
        assert packed.last[k] == ends[k] - 1
    assert sum(group.n for group in packed.groups) == len(lengths)
    assert sum(group.rows for group in packed.groups) == sum(lengths)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=12))
def test_without_gradients_texts_that_begin_alike_are_computed_once(parts):
    """A beginning of some length in common, then tokens of their own. As many rows as there are beginnings."""
    model, common = tower(), texts([40])[0]
    tokens = texts([shared + own + 1 for shared, own in parts])
    for row, (shared, _) in zip(tokens, parts):
        row[:shared] = common[:shared]
    packed = pack_shared(tokens)
    begins = set()
    for row, length in zip(tokens.tolist(), (tokens.argmax(-1) + 1).tolist()):
        begins |= {(-(-length // STEP), *row[: n + 1]) for n in range(length)}  # within a group
    assert len(packed.tokens) == sum(group.rows for group in packed.groups) == len(begins)
    with torch.no_grad():
        assert torch.allclose(FastText(model)(tokens), model(tokens), atol=1e-5)


def test_the_gpus_kernel_is_asked_for_the_same_attention(monkeypatch):
    """torch's attention over texts of any length, restated with loops, in place of the kernel that a CPU lacks."""

    def slow(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size=(-1, -1)):
        parts = []
        for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist())):
            assert b - a <= longest_q
            assert d - c <= longest_k
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            if window_size == (-1, 0):
                scores = scores + torch.full_like(scores, float("-inf")).triu(1)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
        return torch.cat(parts)

    model, tokens = tower(), texts([3, 40, 17, 17, 9])
    expected = both_ways(model, model, tokens)
    monkeypatch.setattr(fast_text, "varlen_attn", slow)
    monkeypatch.setattr(fast_text, "_has_kernel", lambda *_: True)
    assert_equal(both_ways(FastText.of(model), model, tokens), expected, 1e-5)


def test_gradients_of_weights_are_the_same_where_a_factor_is_copied(monkeypatch):
    g, x = torch.randn(300, 24).bfloat16(), torch.randn(300, 40).bfloat16()
    plain = fast_text._outer(g, x)
    monkeypatch.setattr(fast_text, "_AMX", True)
    for a, b, expected in ((g, x, plain), (x, g, plain.T)):
        assert torch.allclose(fast_text._outer(a, b).float(), expected.float(), rtol=0.02, atol=0.1)


def test_recomputing_keeps_less(monkeypatch):
    monkeypatch.setattr(fast_text, "PART", 100)
    model, tokens = tower(layers=6), texts([40] * 8)

    def kept(fast):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fast(tokens)
        return sum(sizes)

    assert kept(FastText(model, recompute=True)) < 0.05 * kept(FastText(model))


# -- choosing it -----------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """As LoRA's layers are: what they add would be passed over."""


def of_block(change):
    return lambda model: change(model.transformer.resblocks[1])


SPOILT = {  # name -> what is done to a tower, and the reason that is given
    "mask": (lambda model: model.attn_mask.__setitem__((0, 1), 0), "mask"),
    "MLP": (of_block(lambda block: setattr(block, "mlp", nn.Sequential(nn.Linear(32, 32)))), "other layers"),
    "adapter": (of_block(lambda block: setattr(block.mlp, "c_fc", Adapted(32, 128))), "other layers"),
    "activation": (of_block(lambda block: setattr(block.mlp, "gelu", nn.PReLU())), "other layers"),
    "norm": (of_block(lambda block: setattr(block, "ln_2", nn.Identity())), "other layers"),
    "scale": (of_block(lambda block: setattr(block, "ls_1", nn.Dropout())), "other layers"),
    "hook": (of_block(lambda block: block.register_forward_hook(lambda *_: None)), "hooks"),
}


def test_a_tower_it_does_not_know_is_refused_with_the_reason():
    for name, (spoil, reason) in SPOILT.items():
        model = tower()
        assert isinstance(FastText.of(model), FastText)
        spoil(model)
        assert reason in str(FastText.of(model)), name
    assert "not a plain causal transformer" in FastText.of(None)


def test_parametrized_weights_are_read_as_their_layer_computes_with_them():
    model, tokens = tower(), texts([3, 9, 40])
    layer = nn.utils.parametrizations.weight_norm(model.transformer.resblocks[1].mlp.c_fc)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert_equal(both_ways(FastText.of(model), model, tokens), both_ways(model, model, tokens), 1e-5)


def test_no_texts_give_no_embeddings():
    model = tower()
    assert FastText(model)(torch.zeros(0, 40, dtype=torch.long)).shape == (0, 24)


def test_it_is_chosen_by_itself_and_one_switch_turns_it_off():
    clip = create_model("example")
    tokens = clip.tokenize(["a large red circle", "two small stars on a dotted background"])
    assert "the fast way, values and gradients within" in clip.choose_text_way(True)
    fast = clip.encode_text(tokens)
    assert "as model.fast_text false asks" in clip.choose_text_way(False)
    plain = clip.encode_text(tokens)
    assert not torch.equal(fast, plain)
    assert torch.allclose(fast, plain, atol=1e-5)


@pytest.mark.slow
def test_other_towers_are_encoded_by_open_clip_and_the_log_says_why():
    clip = loading.complete(open_clip.create_model("coca_ViT-B-32", pretrained=None), "coca_ViT-B-32", None)
    assert "open_clip's own, because it is not a plain causal transformer" in clip.choose_text_way(True)
    assert clip.encode_text(clip.tokenize(["a dog"])).shape == (1, 512)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("fault", ["none", "attention", "failing", "values", "weights' gradients", "biases' gradients"])
def test_the_fast_path_is_not_taken_where_it_would_be_wrong(fault, precision, monkeypatch):
    attend, encode, backward = fast_text._attend, FastText._encode, fast_text._Linear._gradients

    def failing(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    def scaled(ctx, g):
        before, weight, bias, *rest = backward(ctx, g)
        return (before, 5 * weight, bias, *rest) if "weights" in fault else (before, weight, -bias, *rest)

    if fault == "attention":
        monkeypatch.setattr(fast_text, "_attend", lambda *inputs: 1.5 * attend(*inputs))
    elif fault == "failing":
        monkeypatch.setattr(fast_text, "_attend", failing)
    elif fault == "values":
        monkeypatch.setattr(FastText, "_encode", lambda *inputs: 1.05 * encode(*inputs))
    elif "gradients" in fault:
        monkeypatch.setattr(fast_text._Linear, "_gradients", staticmethod(scaled))
    clip = create_model("example")
    for parameter in clip.model.parameters():
        parameter.requires_grad_(False)  # as after a run
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        message = clip.choose_text_way(True)
    assert clip.fast_text == (fault == "none"), message
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    if fault != "none":
        assert message.startswith("text tower: open_clip's own, because the fast one")
        assert ("no kernel image" if fault == "failing" else "is off by") in message
