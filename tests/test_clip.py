"""The model: trimmed texts, towers that train, hashes, averaging, and guessing an architecture."""

import open_clip
import pytest
import torch

from pc_clip.core.errors import UserError
from pc_clip.models import lora
from pc_clip.models.clip import Clip, blend, guess_architecture, hash_tensors

TEXTS = ["a red circle", "two large striped blue stars on a light background", "an object"]


def test_trimmed_texts_embed_as_whole_ones_do(example_clip):
    whole = example_clip.tokenizer(TEXTS)
    trimmed = example_clip.trim(whole)
    assert trimmed.shape[1] < whole.shape[1] == 77
    with torch.no_grad():
        expected = example_clip.model.encode_text(whole)
        assert torch.allclose(example_clip.encode_text(trimmed), expected, atol=1e-5)
        assert torch.allclose(example_clip.encode_text(whole), expected, atol=1e-5)


def test_a_text_longer_than_the_context_is_cut_as_open_clip_cuts_it(example_clip):
    long = " ".join(["a red circle and"] * 40)
    tokens = example_clip.tokenize([long])
    with torch.no_grad():
        expected = example_clip.model.encode_text(example_clip.tokenizer([long]))
        assert torch.allclose(example_clip.encode_text(tokens), expected, atol=1e-5)


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


def test_what_trains_is_what_its_name_says(example_clip):
    counts = {
        which: set(lora.trainable(example_clip, which))
        for which in ("text_blocks", "all_text_but_embeddings", "text", "both")
    }
    assert all("resblocks" in name and not name.startswith("visual") for name in counts["text_blocks"])
    assert counts["text_blocks"] < counts["all_text_but_embeddings"] < counts["text"] < counts["both"]
    assert counts["all_text_but_embeddings"] - counts["text_blocks"] == {
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
    }
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


def test_vit_l_14_has_the_attention_parameters_its_widths_make():
    with torch.device("meta"):
        model = open_clip.create_model("ViT-L-14", load_weights=False, device="meta")
    clip = Clip(model, None, None, "ViT-L-14")
    count = {
        which: sum(p.numel() for p in lora.trainable(clip, which).values()) for which in ("text_attention", "attention")
    }
    text, image = 12 * (3 * 768 * 768 + 3 * 768), 24 * (3 * 1024 * 1024 + 3 * 1024)
    assert count == {"text_attention": text, "attention": text + image}


def test_the_image_tower_hash_ignores_the_text_tower_and_sees_one_changed_weight(example_clip):
    other = Clip.create("example")
    assert other.image_tower_hash() == example_clip.image_tower_hash()
    with torch.no_grad():
        other.model.text_projection += 1
    assert other.image_tower_hash() == example_clip.image_tower_hash()
    assert other.weights_hash() != example_clip.weights_hash()
    with torch.no_grad():
        other.model.visual.attnpool.c_proj.bias[0] += 1e-6
    assert other.image_tower_hash() != example_clip.image_tower_hash()


def fused_step(weight, optimizer=torch.optim.Adam):
    weight.grad = torch.ones_like(weight)
    optimizer([weight], lr=1e-3, fused=True).step()


def other_data(weight):
    weight.data = weight.data + 1


CHANGES = {
    "fused Adam": fused_step,
    "fused AdamW": lambda weight: fused_step(weight, torch.optim.AdamW),
    "in place": lambda weight: weight.detach().add_(1),
    "data in place": lambda weight: weight.data.add_(1),
    "one number of data": lambda weight: weight.data.view(-1)[-1:].add_(1e-6),
    "other data": other_data,
    "through numpy": lambda weight: weight.detach().numpy().fill(0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_image_tower_hash_sees_every_way_in_which_weights_change(example_clip, change):
    """Not all of them raise the version that torch keeps of a tensor, and memory may be used again."""
    clip = Clip.create("example")
    before, weight = clip.image_tower_hash(), clip.model.visual.attnpool.c_proj.weight
    old, whole = weight.detach().clone(), clip.weights_hash()
    change(weight)
    changed = clip.image_tower_hash()
    assert changed != before == example_clip.image_tower_hash()
    assert clip.weights_hash() != whole
    other = Clip.create("example")
    other.model.load_state_dict(clip.model.state_dict())
    assert other.image_tower_hash() == changed
    weight.data.copy_(old)
    assert (clip.image_tower_hash(), clip.weights_hash()) == (before, whole)


def test_the_image_tower_hash_sees_what_is_no_parameter_and_the_transform():
    clip = Clip.create("example")
    seen = [clip.image_tower_hash()]
    name, buffer = next((n, b) for n, b in clip.model.visual.named_buffers() if n.endswith("running_mean"))
    buffer.data[0] += 1e-3
    seen.append(clip.image_tower_hash())
    clip.preprocess = Clip.create("example", preprocess={"mean": (0.0, 0.0, 0.0)}).preprocess
    seen.append(clip.image_tower_hash())
    assert len(set(seen)) == 3, name


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


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-B-16"])
def test_the_architecture_of_a_bare_state_dict_is_guessed(name):
    with torch.device("meta"):
        state = open_clip.create_model(name, load_weights=False, device="meta").state_dict()
    assert guess_architecture(state) == name


def test_a_state_dict_of_something_else_is_refused():
    with pytest.raises(UserError, match=r"not known: its first weights are fc\.weight \[2, 3\].*--model\.name"):
        guess_architecture({"fc.weight": torch.zeros(2, 3)})


def test_unknown_models_and_tags_name_the_nearest():
    with pytest.raises(UserError, match="ViT-L-14"):
        Clip.create("ViT-L14", "openai")
    with pytest.raises(UserError, match="Did you mean 'datacomp_xl_s13b_b90k'"):
        Clip.create("ViT-L-14", "datacomp_xl_s13b")
    with pytest.raises(UserError, match="without weights"):
        Clip.create("ViT-B-32")
    with pytest.raises(UserError, match=r"no open_clip_config\.json"):
        Clip.create("local-dir:nowhere")


def test_weights_that_cannot_be_fetched_say_which_file_to_place_where():
    with pytest.raises(UserError, match=r"could not be fetched.*laion/CLIP-ViT-B-32.*--model\.pretrained PATH"):
        Clip.create("ViT-B-32", "laion2b_s34b_b79k")
