"""The pair encoder, the caption decoder and its searches, each against a slow obvious version."""

from __future__ import annotations

import itertools

import pytest
import torch

from pc_clip.core.errors import UserError
from pc_clip.models import loading
from pc_clip.models.caption_decoder import Decoder, Shape
from pc_clip.models.change_model import ChangeClip, ChangeModel, Search, fresh
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model
from pc_clip.models.vocabulary import END, PAD, SPECIAL, START, Vocabulary

TEXTS = ["the red star turned blue", "nothing changed!", "a ring is gone"]


@pytest.fixture(scope="module")
def vit() -> Clip:
    return create_model("example_vit")


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # before and after of 3 pairs


def decoder(words: int = 9, dropout: float = 0.0, **shape: int) -> Decoder:
    """A small one whose choices are far from even, so that sentences end at different lengths."""
    torch.manual_seed(2)
    made = Decoder(words, 3, 6, Shape(**{"layers": 2, "heads": 2, "width": 8, "max_length": 7} | shape), dropout)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=1.0)
    return made.eval()


# -- the encoder ---------------------------------------------------------------------------------------


def test_pairs_go_through_the_tower_as_the_paper_says(vit, pictures):
    made = fresh(vit, None, seed=0).encoder
    visual, (before, after) = vit.model.visual, pictures
    alone = []
    for image, which in ((before, made.before), (after, made.after)):
        x = visual._embeds(image)
        for n in range(4):  # three quarters of six, rounded down
            x = visual.transformer.resblocks[n](x)
        alone.append(x + which)
    x = made.norm(torch.cat(alone, dim=1) + made.positional_embedding)
    for n in (4, 5):
        x = visual.transformer.resblocks[n](x)
    x = visual.ln_post(x)
    assert made.intra_layers == 4
    torch.testing.assert_close(made(before, after), x)
    z = (x[:, 0] + x[:, 65]) / 2 @ visual.proj  # 64 patches and a class token an image
    torch.testing.assert_close(made.embed(x), z)


def test_aligned_tokens_begin_at_zero_and_add_the_same_position(vit, pictures):
    plain, made = fresh(vit, None, seed=0).encoder, fresh(vit, None, seed=0, aligned_tokens=True).encoder
    assert torch.equal(plain(*pictures), made(*pictures))
    torch.nn.init.normal_(made.counterpart, generator=torch.Generator().manual_seed(1))
    blocks, entered = vit.model.visual.transformer.resblocks, []
    hooks = [blocks[4].ln_1.register_forward_pre_hook(lambda _, x: entered.append(x[0]))]
    hooks += [made.norm.register_forward_hook(lambda *_: entered.append("joined"))]
    made(*pictures)
    for hook in hooks:
        hook.remove()
    alone = [vit.model.visual._embeds(image) for image in pictures]
    for n in range(4):
        alone = [blocks[n](x) for x in alone]
    rows = []
    for mine, other, which in ((0, 1, made.before), (1, 0, made.after)):
        for place in range(65):
            token = alone[mine][:, place] + alone[other][:, place] @ made.counterpart + which
            rows.append(token + made.positional_embedding[len(rows)])
    joined, x = entered
    assert joined == "joined"
    torch.testing.assert_close(x, made.norm(torch.stack(rows, dim=1)), atol=1e-4, rtol=1e-4)


def test_weights_are_drawn_by_seed_and_torchs_generator_is_left_alone(vit):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made = [fresh(vit, None, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    first, same, other = (m.encoder.before for m in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# -- the vocabulary ------------------------------------------------------------------------------------


def test_sentences_come_back_and_padding_is_no_word(vit):
    words = Vocabulary.of(vit.tokenizer, TEXTS)
    rows = words.encode(TEXTS, 32)
    assert rows[:, 0].tolist() == [START] * 3
    assert [words.decode(row) for row in rows] == ["the red star turned blue", "nothing changed !", "a ring is gone"]
    assert vit.tokenizer.decode([0]) == "!"  # CLIP's own padding
    assert Vocabulary(vit.tokenizer, [0]).number[0] >= SPECIAL
    assert (rows == PAD).sum(1).tolist() == [0, 7 - 5, 7 - 6]
    assert words.words(rows[0][1:]) == ["the", "red", "star", "turned", "blue"]


# -- the decoder ---------------------------------------------------------------------------------------


def obvious_log_likelihoods(made: Decoder, prefix: list[int], seen: torch.Tensor) -> torch.Tensor:
    """Of each next word after a prefix, the whole decoder from the start. seen: [S, V] -> [words - END]"""
    return made(torch.tensor([prefix]), seen[None])[0, -1].log_softmax(-1)


@torch.no_grad()
def obvious_greedy(made: Decoder, seen: torch.Tensor) -> list[int]:
    prefix = [START]
    while len(prefix) < made.shape.max_length and prefix[-1] != END:
        prefix.append(int(obvious_log_likelihoods(made, prefix, seen).argmax()) + END)
    return prefix[1:]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_greedy_is_that_of_a_decoder_without_a_cache(scale):
    made, seen = decoder(), scale * torch.randn(12, 6, 6)
    actual = made.search(seen)
    sentences = [[n for n in row.tolist() if n != PAD] for row in actual.tokens]
    assert sentences == [obvious_greedy(made, each) for each in seen]
    assert len({len(row) for row in sentences}) > 1  # some ended earlier than others
    totals = [
        sum(obvious_log_likelihoods(made, [START, *row[:n]], each)[row[n] - END] for n in range(len(row)))
        for row, each in zip(sentences, seen)
    ]
    torch.testing.assert_close(actual.log_likelihood, torch.stack(totals), atol=1e-4, rtol=1e-4)


def test_search_stops_when_all_have_ended():
    made = decoder(max_length=30)
    with torch.no_grad():
        made.bias[0] = 100.0  # END
    assert made.search(torch.randn(4, 6, 6)).tokens.tolist() == [[END]] * 4
    assert made.search(torch.randn(4, 6, 6), 3).tokens.tolist() == [[END]] * 4


@torch.no_grad()
def every_sentence(made: Decoder, seen: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Log-likelihoods of all sentences up to the longest; those that are not whole at full length included."""
    actual = {}
    longest = made.shape.max_length - 1
    words = range(END, END + len(made.bias))
    for length in range(1, longest + 1):
        for words_before in itertools.product(range(SPECIAL, END + len(made.bias)), repeat=length - 1):
            each = made(torch.tensor([[START, *words_before]]), seen[None])[0].log_softmax(-1)
            total = sum(float(each[n, word - END]) for n, word in enumerate(words_before))
            for last in words if length == longest else [END]:
                actual[(*words_before, last)] = total + float(each[length - 1, last - END])
    return actual


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_wide_enough_finds_the_best_of_all_sentences(penalty):
    made = decoder(words=6, max_length=5)
    seen = 2 * torch.randn(4, 6, 6)
    actual = made.search(seen, 60, penalty)
    for row, total, each in zip(actual.tokens.tolist(), actual.log_likelihood.tolist(), seen):
        sentences = every_sentence(made, each)
        whole = {s: v for s, v in sentences.items() if s[-1] == END}
        best = max(whole, key=lambda s: whole[s] / len(s) ** penalty)
        assert tuple(n for n in row if n != PAD) == best
        assert total == pytest.approx(whole[best], abs=1e-4)


def test_beams_do_not_depend_on_the_rest_of_the_batch():
    made, seen = decoder(max_length=12), torch.randn(6, 6, 6)
    together = made.search(seen, 4).tokens.tolist()
    alone = [made.search(each[None], 4).tokens.tolist()[0] for each in seen]
    assert [[n for n in row if n] for row in together] == [[n for n in row if n] for row in alone]


def test_the_decoder_sees_where_and_in_which_image_a_token_is():
    """Of tokens that are all alike no two are alike to it, and what it says depends on where the others stand."""
    made = decoder()
    memory = made.memory(torch.ones(1, 6, 6))[0]
    assert torch.cdist(memory, memory).add(torch.eye(6)).min() > 0.1
    tokens, seen = torch.tensor([[START, 3, 4]]), torch.randn(1, 6, 6)
    for other in (seen.roll(1, dims=1), seen.roll(3, dims=1)):  # other places; before and after exchanged
        assert not torch.allclose(made(tokens, seen), made(tokens, other), atol=1e-3)


def test_attention_is_that_of_the_last_layer():
    made, seen = decoder(layers=1), torch.randn(2, 6, 6)
    tokens = torch.tensor([[3, 4, END], [5, END, PAD]])
    looks = made.attention(tokens, seen)
    assert looks.shape == (2, 3, 6)
    torch.testing.assert_close(looks.sum(-1), torch.ones(2, 3))
    # Of one layer: what it reads before each token, looked up by hand.
    layer, memory = made.layers[0], made.memory(seen)
    x = made._read(torch.tensor([[START, 3, 4]]), 0)
    h = layer.norm1(x)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(3)
    x = x + layer.self_attn(h, h, h, attn_mask=mask)[0]
    q, k = layer.norm2(x), memory[:1]
    weight, bias = layer.multihead_attn.in_proj_weight, layer.multihead_attn.in_proj_bias
    q, k = q @ weight[:8].T + bias[:8], k @ weight[8:16].T + bias[8:16]
    heads = [(q[..., 4 * n : 4 * n + 4] @ k[..., 4 * n : 4 * n + 4].mT / 2).softmax(-1) for n in range(2)]
    torch.testing.assert_close(looks[:1], sum(heads) / 2)


# -- the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned_tokens", [False, True])
def test_a_saved_captioner_says_the_same(vit, pictures, tmp_path, aligned_tokens):
    clip = create_model("example_vit")
    clip = ChangeClip.of(clip, fresh(clip, 2, seed=0, aligned_tokens=aligned_tokens))
    if aligned_tokens:
        torch.nn.init.normal_(clip.change.encoder.counterpart)
    clip.change.add_decoder(Vocabulary.of(clip.tokenizer, TEXTS), Shape(1, 2, 8, 9))
    clip.change.eval()
    loading.save_model(tmp_path / "model.safetensors", clip)
    again = loading.load_model(tmp_path / "model.safetensors")
    assert again.change.describe() == clip.change.describe()
    assert again.weights_hash() == clip.weights_hash() != vit.weights_hash()
    with torch.no_grad():
        seen = clip.change.encoder(*pictures)
        torch.testing.assert_close(again.change.encoder(*pictures), seen)
    assert torch.equal(again.change.write(seen, Search(3)).tokens, clip.change.write(seen, Search(3)).tokens)
    assert again.change.maps(torch.tensor([[3, END]] * 3), seen).shape == (3, 2, 2, 8, 8)


def test_impossible_shapes_weights_of_other_sizes_and_other_towers_are_refused(tmp_path):
    with pytest.raises(UserError, match="change.width 10 cannot be shared by 4 heads"):
        Shape(width=10, heads=4)
    with pytest.raises(UserError, match="change.layers is 0; it must be at least 1"):
        Shape(layers=0)
    clip = create_model("example_vit")
    clip = ChangeClip.of(clip, fresh(clip, 2, seed=0))
    clip.change.encoder.register_parameter("before", torch.nn.Parameter(torch.zeros(3)))
    loading.save_model(tmp_path / "model.safetensors", clip)
    with pytest.raises(UserError, match=r"model.safetensors does not fit example_vit: .*encoder.before"):
        loading.load_model(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="image tower of example is a ModifiedResNet"):
        ChangeModel(create_model("example"))
    with pytest.raises(UserError, match="change.intra_layers is 6; .* has 6 blocks"):
        ChangeModel(clip, 6)
