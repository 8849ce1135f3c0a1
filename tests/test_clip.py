"""The model: trimmed texts, towers that train, hashes, averaging, and guessing an architecture."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from pc_clip.core.errors import UserError
from pc_clip.models import clip as clip_module
from pc_clip.models import lora
from pc_clip.models.clip import Clip, hash_tensors
from pc_clip.models.loading import blend, create_model, guess_architecture
from pc_clip.models.weight_files import read_weights
from pc_clip.train import losses

TEXTS = ["a red circle", "two large striped blue stars on a light background", "an object"]


def test_trimmed_texts_embed_as_whole_ones_do(example_clip):
    whole = example_clip.tokenizer(TEXTS)
    trimmed = example_clip.trim(whole)
    assert trimmed.shape[1] < whole.shape[1] == 77
    with torch.no_grad():
        expected = example_clip.model.encode_text(whole)
        assert torch.allclose(example_clip.encode_text(trimmed), expected, atol=1e-5)
        assert torch.allclose(example_clip.encode_text(whole), expected, atol=1e-5)


def test_embed_texts_keeps_the_order_and_does_not_depend_on_the_batch(example_clip):
    together = example_clip.embed_texts([*TEXTS, TEXTS[0]])
    alone = torch.cat([example_clip.embed_texts([text]) for text in [*TEXTS, TEXTS[0]]])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(together[0], together[3])
    assert torch.allclose(together.norm(dim=-1), torch.ones(4), atol=1e-6)


def test_towers_that_cannot_be_cut_short_go_through_open_clip():
    """CoCa appends its class token after the text, so no column may be dropped."""
    model = open_clip.model.CustomTextCLIP(
        8,
        dict(image_size=32, layers=1, width=16, patch_size=16, head_width=8),
        dict(context_length=12, vocab_size=50, width=16, heads=2, layers=1, embed_cls=True),
    ).eval()
    clip = Clip(model, None, None, "x")
    tokens = torch.randint(1, 50, (3, 12))
    assert clip.trim(tokens).shape == tokens.shape
    with torch.no_grad():
        assert torch.equal(clip.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-CLIPA", "ViT-H-14-worldwide", "coca_ViT-B-32"])
def test_the_size_of_embeddings_is_known_of_every_kind_of_tower(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    assert Clip(model, None, None, name).embed_dim == open_clip.get_model_config(name)["embed_dim"]


def test_what_trains_is_what_its_name_says(example_clip):
    counts = {
        which: set(lora.trainable(example_clip, which))
        for which in ("text_blocks", "all_text_but_embeddings", "text", "both")
    }
    assert all("resblocks" in name and not name.startswith("visual") for name in counts["text_blocks"])
    assert counts["text_blocks"] < counts["all_text_but_embeddings"] < counts["text"] < counts["both"]
    last = {"ln_final.weight", "ln_final.bias", "text_projection"}
    assert counts["all_text_but_embeddings"] - counts["text_blocks"] == last
    assert counts["text"] - counts["all_text_but_embeddings"] == {"token_embedding.weight", "positional_embedding"}
    with pytest.raises(UserError, match=r"model\.train is 'text_block'.*'text_blocks'"):
        lora.trainable(example_clip, "text_block")


def test_vit_l_14_has_the_block_parameters_design_counts():
    """85.1 of 123.7 million text parameters (the PC-CLIP authors' code trains the blocks alone)."""
    with torch.device("meta"):
        model = open_clip.create_model("ViT-L-14", load_weights=False, device="meta")
    clip = Clip(model, None, None, "ViT-L-14")
    count = {which: sum(p.numel() for p in lora.trainable(clip, which).values()) for which in ("text_blocks", "text")}
    assert round(count["text_blocks"] / 1e6, 1) == 85.1
    assert round(count["text"] / 1e6, 1) == 123.7


CHANGES = {  # not all raise the version that torch keeps of a tensor
    "fused Adam": lambda weight: torch.optim.Adam([weight], lr=1e-3, fused=True).step(),
    "one number of data": lambda weight: weight.data.view(-1)[-1:].add_(1e-6),
    "other data": lambda weight: setattr(weight, "data", weight.data + 1),
    "through numpy": lambda weight: weight.detach().numpy().fill(0.5),
}


def test_the_image_tower_hash_sees_every_way_in_which_weights_change():
    clip = create_model("example")
    weight = clip.model.visual.attnpool.c_proj.weight
    weight.grad = torch.ones_like(weight)
    old, hashes = weight.detach().clone(), (clip.image_tower_hash(), clip.weights_hash())
    for name, change in CHANGES.items():
        change(weight)
        assert clip.image_tower_hash() != hashes[0] and clip.weights_hash() != hashes[1], name
        weight.data.copy_(old)
        assert (clip.image_tower_hash(), clip.weights_hash()) == hashes, name
    clip.preprocess = create_model("example", preprocess={"mean": (0.0, 0.0, 0.0)}).preprocess
    assert clip.image_tower_hash() != hashes[0]


def test_the_image_tower_hash_ignores_the_text_tower():
    clip = create_model("example")
    hashes = clip.image_tower_hash(), clip.weights_hash()
    with torch.no_grad():
        clip.model.text_projection += 1
    assert clip.image_tower_hash() == hashes[0] and clip.weights_hash() != hashes[1]


def test_hash_tensors_depends_on_names_shapes_and_values_but_not_on_order():
    a, b = torch.arange(6.0), torch.ones(2)
    assert hash_tensors({"a": a, "b": b}) == hash_tensors({"b": b, "a": a})
    assert hash_tensors({"a": a}) != hash_tensors({"b": a})
    assert hash_tensors({"a": a}) != hash_tensors({"a": a.view(2, 3)})
    assert hash_tensors({"a": a}) != hash_tensors({"a": a + 1})


def test_blend_is_the_average_of_weights():
    start, end = {"w": torch.zeros(3), "n": torch.tensor(1)}, {"w": torch.ones(3), "n": torch.tensor(5)}
    assert blend(start, end, 0.25)["w"].tolist() == [0.25] * 3
    assert blend(start, end, 1.0)["w"].tolist() == [1.0] * 3
    assert blend(start, end, 0.25)["n"] == 5
    with pytest.raises(UserError, match="two architectures"):
        blend(start, {"w": torch.zeros(4), "n": torch.tensor(1)}, 0.5)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_the_architecture_of_a_bare_state_dict_is_guessed(name):
    with torch.device("meta"):
        state = open_clip.create_model(name, load_weights=False, device="meta").state_dict()
    assert guess_architecture(state) == name


def test_settings_among_the_weights_of_openai_are_left_out(example_clip):
    settings = {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(example_clip.model.state_dict() | settings, "openai.pt")
    state, _ = read_weights(Path("openai.pt"))
    assert state.keys() == example_clip.model.state_dict().keys()


def test_models_that_cannot_be_had():
    refused = [
        (("ViT-L14", "openai"), "Did you mean 'ViT-L-14'"),
        (("ViT-L-14", "datacomp_xl_s13b"), "Did you mean 'datacomp_xl_s13b_b90k'"),
        (("ViT-B-32",), "without weights"),
        (("local-dir:nowhere",), r"no open_clip_config\.json"),
        (("hf-hub:laion/CLIP-ViT-B-32", "any"), "names weights too: take it as .* --checkpoint hf-hub:"),
        (("example", "openai"), "'openai' is not a file; example takes the weights in its folder"),
        (
            ("ViT-B-32", "laion2b_s34b_b79k"),
            r"could not be loaded.*fetch .*laion/CLIP-ViT-B-32.*--model\.pretrained PATH",
        ),
    ]
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            create_model(*arguments)
    with pytest.raises(UserError, match=r"not known: its first weights are fc\.weight \[2, 3\].*--model\.name"):
        guess_architecture({"fc.weight": torch.zeros(2, 3)})


def test_texts_that_reach_the_context_length_are_counted_and_said(example_clip, caplog):
    long = "very " * 100 + "long"
    example_clip.embed_texts(["a dog", long, "a cat"])
    assert (
        "1 of 3 texts reach the context length of 77 tokens; what comes after it is not read, first: very"
        in caplog.text
    )
    cases = {  # padding and end-of-text tokens of the tokenizer: the last columns -> whether the text fills the context
        (0, 2): {(0, 0): False, (2, 0): False, (5, 2): True},
        (1, 1): {(1, 1): False, (5, 1): True},  # SigLIP's: the end of a text looks like padding
    }
    for (padding, end), rows in cases.items():
        kind = SimpleNamespace(pad_token_id=padding, eos_token_id=end)
        clip = dataclasses.replace(example_clip, tokenizer=SimpleNamespace(tokenizer=kind, context_length=2))
        assert clip.fills_context(torch.tensor(list(rows))).tolist() == list(rows.values())


def test_recompute_has_the_gradient_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(clip_module, "PART", 3)
    clip = create_model("example_vit")
    pixels = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize([f"{n} red circles" for n in range(8)])
    gradients = []
    for recompute in (False, True):
        clip.choose_text_way(fast=False, recompute=recompute)
        clip.model.zero_grad()
        image, text = (F.normalize(z, dim=-1) for z in (clip.encode_image(pixels), clip.encode_text(tokens)))
        losses.info_nce(text, image, 0.1).backward()
        gradients.append({name: p.grad.clone() for name, p in clip.model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys() and len(whole) > 40
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
