"""CoCa: a caption's log-likelihood is the sum over its tokens, one after the other, whatever is padded to it."""

import math
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from torch.nn.functional import log_softmax

from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.data import example_sets
from pc_clip.data.training_data import load_dataset
from pc_clip.models import lora
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model
from pc_clip.train.loop import finetune
from pc_clip.train.methods import coca, preference

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
VISION |= {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
DECODER = TEXT | {"attn_pooler_heads": 2}
TEXT |= {"embed_cls": True, "output_tokens": True}
CAPTIONS = ["a dog", "a dog!% a red circle", "two blue stars on a light background", "a"]


def build(folder: Path, **text) -> Clip:
    """A small CoCa with random weights, large enough for tokens to differ in likelihood."""
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | text, "multimodal_cfg": DECODER}
    write_json(folder / "open_clip_config.json", {"model_cfg": config | {"custom_text": True}})
    clip = create_model(f"local-dir:{folder}", SCRATCH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clip.model.text_decoder.text_projection.zero_()  # open_clip leaves it as the memory is
        for p in clip.model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return clip


@pytest.fixture
def clip(tmp_path) -> Clip:
    return build(tmp_path / "coca")


def pixels(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def likelihood(clip: Clip, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p of captions, one an image.  -> [B]"""
    model = clip.model
    return coca.log_likelihood(model, coca.encode_image(model, images)[1], tokens, coca.encode_text(model, tokens)[1])


def token_by_token(clip: Clip, image: torch.Tensor, tokens: list[int]) -> float:
    """log p of one caption: a pass of open_clip's own forward for each token, which sees those before it alone."""
    total = 0.0
    for n in range(1, len(tokens)):
        before = torch.tensor([tokens[:n]])
        logits = clip.model(image[None], before, output_labels=False)["logits"]  # [1, n, vocabulary]
        total += log_softmax(logits[0, -1], dim=-1)[tokens[n]].item()
    return total


@torch.no_grad()
def test_the_log_likelihood_sums_its_tokens_with_any_padding(clip):
    images, tokens = pixels(len(CAPTIONS)), clip.tokenize(CAPTIONS)
    actual = likelihood(clip, images, tokens)
    rows = [row[: row.index(49407) + 1] for row in tokens.tolist()]
    expected = torch.tensor([token_by_token(clip, image, row) for image, row in zip(images, rows)])
    assert actual.shape == (4,) and actual.dtype == torch.float32
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-4)
    assert (actual < 0).all() and actual.std() > 1
    for n, row in enumerate(tokens):
        for length in (len(rows[n]), len(rows[n]) + 1, 12):
            alone = likelihood(clip, images[n : n + 1], row[None, :length])
            assert alone.item() == pytest.approx(actual[n].item(), abs=1e-3)


def test_gradients_reach_decoder_and_text_tower_and_not_an_image_without_them(clip):
    clip.model.requires_grad_(False)
    learn = lora.trainable(clip, "text")
    for p in learn.values():
        p.requires_grad_(True)
    likelihood(clip, pixels(len(CAPTIONS)), clip.tokenize(CAPTIONS)).sum().backward()
    without = {name for name, p in learn.items() if p.grad is None or not p.grad.any()}
    # The class token and what makes an embedding of it have no part in the likelihood.
    assert without == {"text.cls_emb", "text.ln_final.weight", "text.ln_final.bias", "text.text_projection"}
    assert "text_decoder.cross_attn.0.attn.in_proj_weight" in learn.keys() - without
    assert all(p.grad is None for p in clip.model.visual.parameters())


def test_a_model_that_gives_captions_no_likelihood_is_refused(example_clip, clip, tmp_path):
    coca.check(clip)
    for other in (example_clip, build(tmp_path / "both-ways", no_causal_mask=True)):
        with pytest.raises(UserError, match=r"is not a CoCa model with a causal text tower.*preference\.captioning 0"):
            coca.check(other)


# -- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(small_runs, monkeypatch) -> FinetuneConfig:
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 40, "val": 8, "test": 8})
    content = build(Path("coca-run")).model.state_dict()
    save_file({name: value.contiguous() for name, value in content.items()}, "coca-run/open_clip_model.safetensors")
    config = tiny_runs.settings("preference", "local-dir:coca-run", steps=3, lr=1e-2)
    config.preference = PreferenceConfig(captioning=0.5, beta=1.0)
    return config


@torch.no_grad()
def test_log_odds_are_of_cosines_and_of_captions(config):
    clip, data = create_model(config.model.name), load_dataset(config.data)
    method = preference.Method(clip, data, config)
    batch = next(method.loader(0))
    scores = method.score(clip, batch)
    for n, key in enumerate(batch.ids):
        image = clip.preprocess(data.load(data.ids.index(key)))[None]
        texts = batch.tokens[batch.text[n]]
        z = [torch.nn.functional.normalize(z, dim=-1) for z in (clip.encode_image(image), clip.encode_text(texts))]
        captions = likelihood(clip, image.expand(2, -1, -1, -1), texts)
        expected = method.logit_scale * (z[0] @ z[1].T)[0] + 0.5 * captions
        assert scores.log_odds[n].item() == pytest.approx((expected[0] - expected[1]).item(), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("train, crop, rank", [("text", 1.0, 2), ("both", 0.5, 0), ("text_blocks", 1.0, 0)])
def test_it_begins_at_log_2_and_learns_what_model_train_names(config, train, crop, rank):
    config.model.train, config.data.min_crop, config.model.lora_rank = train, crop, rank
    run = finetune(config)
    first, *_, last = [row["loss"] for row in tiny_runs.rows(run)]
    assert abs(first - math.log(2)) < 1e-3 < abs(last - math.log(2))
    changed = {name.split(".")[0] for name in tiny_runs.changed(tiny_runs.weights(run), tiny_runs.start(config))}
    assert ("text_decoder" in changed) == (train != "text_blocks") and ("visual" in changed) == (train == "both")


def test_the_coca_decoder_is_adapted_only_where_it_is_used(config):
    config.data.embeddings = "some.safetensors"
    with pytest.raises(UserError, match="reads the images in each step; leave data.embeddings out"):
        finetune(config)
    config.data.embeddings, config.preference.captioning, config.model.lora_rank = "", 0.0, 2
    changed = tiny_runs.changed(tiny_runs.weights(finetune(config)), tiny_runs.start(config))
    assert changed and not any(name.startswith("text_decoder.") for name in changed)
