"""CoCa: a caption's log-likelihood is the sum over its tokens, one after the other, whatever is padded to it."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from safetensors.torch import save_file
from torch.nn.functional import log_softmax

from pc_clip.core.config.train import FinetuneConfig, PreferenceConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.data import example_sets
from pc_clip.data.registry import open_dataset
from pc_clip.models import lora
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model
from pc_clip.train.loop import finetune
from pc_clip.train.methods import coca, preference
from pc_clip.train.methods.base import Images, Texts

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
VISION |= {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TEXT |= {"embed_cls": True, "output_tokens": True}
DECODER = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, "attn_pooler_heads": 2}
CAPTIONS = ["a dog", "a dog!% a red circle", "two blue stars on a light background", "a"]


def build(folder: Path, **text) -> Clip:
    """A small CoCa with random weights, large enough for tokens to differ in likelihood."""
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": VISION,
        "text_cfg": TEXT | text,
        "multimodal_cfg": DECODER,
        "custom_text": True,
    }
    write_json(folder / "open_clip_config.json", {"model_cfg": config})
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


def token_by_token(clip: Clip, image: torch.Tensor, tokens: list[int]) -> float:
    """log p of one caption: a pass of open_clip's own forward for each token, which sees those before it alone."""
    total = 0.0
    for n in range(1, len(tokens)):
        before = torch.tensor([tokens[:n]])
        logits = clip.model(image[None], before, output_labels=False)["logits"]  # [1, n, vocabulary]
        total += log_softmax(logits[0, -1], dim=-1)[tokens[n]].item()
    return total


@torch.no_grad()
def test_the_log_likelihood_is_that_of_its_tokens_one_by_one(clip):
    images, tokens = pixels(len(CAPTIONS)), clip.tokenize(CAPTIONS)
    found = coca.caption_log_likelihood(clip.model, images, tokens)
    rows = [row[: row.index(49407) + 1] for row in tokens.tolist()]
    expected = [token_by_token(clip, image, row) for image, row in zip(images, rows)]
    assert found.shape == (4,) and found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert (found < 0).all() and found.std() > 1


@torch.no_grad()
def test_padding_and_company_do_not_matter(clip):
    images, tokens = pixels(len(CAPTIONS)), clip.tokenize(CAPTIONS)
    assert tokens.shape[1] == 12
    together = coca.caption_log_likelihood(clip.model, images, tokens)
    for n, row in enumerate(tokens):
        end = int(row.argmax())
        for length in (end + 1, end + 2, 12):
            alone = coca.caption_log_likelihood(clip.model, images[n : n + 1], row[None, :length])
            assert alone.item() == pytest.approx(together[n].item(), abs=1e-3)


def test_gradients_reach_decoder_and_text_tower_and_not_an_image_without_them(clip):
    clip.model.requires_grad_(False)
    learn = lora.trainable(clip, "text")
    for p in learn.values():
        p.requires_grad_(True)
    images, tokens = pixels(len(CAPTIONS)), clip.tokenize(CAPTIONS)
    coca.caption_log_likelihood(clip.model, images, tokens).sum().backward()
    without = {name for name, p in learn.items() if p.grad is None or not p.grad.any()}
    # The class token and what makes an embedding of it have no part in the likelihood.
    assert without == {"text.cls_emb", "text.ln_final.weight", "text.ln_final.bias", "text.text_projection"}
    assert "text_decoder.cross_attn.0.attn.in_proj_weight" in learn.keys() - without
    assert all(p.grad is None for p in clip.model.visual.parameters())


@torch.no_grad()
def test_a_batch_of_preferences_is_encoded_as_its_parts(clip):
    """Two texts about two images, and of ranking data one text and two images."""
    images, tokens = pixels(2), clip.tokenize(CAPTIONS[:3])
    rows = {"preferred": [0, 2, 1], "rejected": [1, 2, 0], "image": [0, 1, 1], "instead": [0, 0, 1]}
    batch = SimpleNamespace(images=images, tokens=tokens, **{name: torch.tensor(at) for name, at in rows.items()})
    text, image, likelier = preference.encode_captioning(clip.model, batch)
    assert torch.equal(text, clip.model.encode_text(tokens, normalize=False))
    assert torch.equal(image, clip.model.encode_image(images, normalize=False))
    each = {
        (i, t): coca.caption_log_likelihood(clip.model, images[[i]], tokens[[t]]) for i in range(2) for t in range(3)
    }
    expected = torch.cat([each[0, 0] - each[0, 1], each[1, 2] - each[0, 2], each[1, 1] - each[1, 0]])
    assert torch.allclose(likelier, expected, atol=1e-3)


def test_a_model_that_is_no_coca_is_refused(example_clip, clip, tmp_path):
    coca.check(clip)
    with pytest.raises(UserError, match=r"example is no CoCa model.*preference\.captioning 0"):
        coca.check(example_clip)
    with pytest.raises(UserError, match=r"the text tower of local-dir.* is not causal"):
        coca.check(build(tmp_path / "both-ways", no_causal_mask=True))


# -- many, with their images ---------------------------------------------------------------------------


def test_all_pairs_are_scored_as_each_alone(clip, monkeypatch):
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 9, "val": 2, "test": 2})
    monkeypatch.setattr(coca, "IMAGES", 2)
    monkeypatch.setattr(coca, "CAPTIONS", 3)
    data = open_dataset("example", split="train")
    images, texts = Images(clip, data, FinetuneConfig(device="cpu"), pixels=True), Texts(clip, CAPTIONS)
    assert images.z is None and not images.learns
    image = np.array([8, 0, 3, 3, 8, 5, 0, 3, 3, 3])
    text = np.array([1, 0, 2, 3, 1, 0, 3, 2, 0, 1])
    found = coca.log_likelihoods_of_all(clip, images, texts, image, text)
    with torch.no_grad():
        for n, (i, t) in enumerate(zip(image, text)):
            picture = clip.preprocess(data.load(int(i)))[None]
            alone = coca.caption_log_likelihood(clip.model, picture, clip.tokenize([CAPTIONS[t]]))
            assert found[n].item() == pytest.approx(alone.item(), abs=1e-3)
    assert found[0] == found[4] and found[2] == found[7]


# -- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(small_runs, monkeypatch) -> FinetuneConfig:
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 40, "val": 8, "test": 8})
    content = build(Path("coca-run")).model.state_dict()
    save_file({name: value.contiguous() for name, value in content.items()}, "coca-run/open_clip_model.safetensors")
    config = tiny_runs.settings("preference", "local-dir:coca-run", steps=3, lr=1e-2)
    config.preference = PreferenceConfig(captioning=0.5, beta=1.0)
    return config


@pytest.mark.parametrize("train, crop, rank", [("text", 1.0, 2), ("both", 0.5, 0), ("text_blocks", 1.0, 0)])
def test_it_begins_at_log_2_and_learns_what_model_train_names(config, train, crop, rank):
    config.model.train, config.data.min_crop, config.model.lora_rank = train, crop, rank
    run = finetune(config)
    first, *_, last = [row["loss"] for row in tiny_runs.rows(run)]
    assert abs(first - math.log(2)) < 1e-3 < abs(last - math.log(2))
    changed = {name.split(".")[0] for name in tiny_runs.changed(tiny_runs.weights(run), tiny_runs.start(config))}
    assert ("text_decoder" in changed) == (train != "text_blocks") and ("visual" in changed) == (train == "both")


def test_without_captions_to_weigh_the_decoder_gets_no_adapters(config):
    config.preference.captioning, config.model.lora_rank = 0.0, 2
    changed = tiny_runs.changed(tiny_runs.weights(finetune(config)), tiny_runs.start(config))
    assert changed and not any(name.startswith("text_decoder.") for name in changed)


def test_captions_are_not_weighed_without_images(config):
    config.data.embeddings = "some.safetensors"
    with pytest.raises(UserError, match="preference.captioning reads the images.*data.embeddings.*leave one of the tw"):
        finetune(config)
