"""LoRA and what learns: nothing changes at the start, adapters alone learn, and they end in ordinary weights."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import weights
from torch.nn.functional import normalize

from pc_clip.core.config.settings import ModelConfig
from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.models import loading, lora
from pc_clip.models.clip import Clip
from pc_clip.models.fast_text import FastText
from pc_clip.models.loading import create_model
from pc_clip.models.parameters import TRAINABLE, image_tower_learns
from pc_clip.train.loop import finetune

import transformers  # isort: skip

pytestmark = pytest.mark.usefixtures("small_runs")
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_proj": "linear"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "one", "two"]
SENTENCES = ["a dog", "one red dog", "a"]


def hugging_face_tower(folder: Path) -> dict:
    """A small BERT with random weights and its tokenizer, as the photo model has one."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(folder)
    return {"hf_model_name": ".", "hf_tokenizer_name": ".", "hf_proj_type": "linear", "context_length": 12}


KINDS = ["resnet", "vit", "timm", "hugging face"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Clip]:
    """Small models of four architectures, with random weights."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "bert").mkdir()
    tower = hugging_face_tower(folder / "bert")
    parts = {"resnet": {"vision_cfg": tiny_runs.RESNET | {"image_size": 64}}, "vit": {}, "timm": {"vision_cfg": TIMM}}
    names = {kind: tiny_runs.tiny_clip(folder / kind, **part) for kind, part in parts.items()}
    names["hugging face"] = tiny_runs.tiny_clip(folder / "hf", copied=folder / "bert", text_cfg=tower)
    clips = {kind: create_model(name) for kind, name in names.items()}
    for name, p in clips["resnet"].model.named_parameters():
        if name.endswith("bn3.weight"):  # zero at first, so that nothing before it has a gradient
            torch.nn.init.ones_(p)
    return clips


@pytest.fixture(params=KINDS)
def clip(request, built) -> Clip:
    return copied(built[request.param])


@pytest.fixture
def vit(built) -> Clip:
    return copied(built["vit"])


def copied(clip: Clip) -> Clip:
    return dataclasses.replace(clip, model=copy.deepcopy(clip.model))


def adapt(clip: Clip, train: str = "both", alpha: float | None = None, seed: int = 0) -> list[str]:
    """Put adapters of rank 2 on weights."""
    names = lora.weights_to_adapt(clip.model, train, clip.name)
    lora.add(clip.model, names, 2, alpha, seed)
    return names


def outputs(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a few texts and of two random images."""
    size = clip.model.visual.preprocess_cfg["size"]
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return clip.encode_text(clip.tokenize(SENTENCES)), clip.encode_image(pixels)


def disturb(clip: Clip) -> None:
    """Adapters as after some learning: each adds something that is seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in lora.parameters(clip.model).values():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))


# -- which parameters ----------------------------------------------------------------------------------

IN_PROJ = [f"attn.in_proj_{y}" for y in ("weight", "bias")]
TEXT = {f"transformer.resblocks.{n}.{x}" for n in range(2) for x in IN_PROJ}
VIT = {f"visual.{name}" for name in TEXT}
QKV = [f"{x}.{y}" for x in ("query", "key", "value") for y in ("weight", "bias")]
ATTENTION = {  # of the image and the text tower
    "resnet": ({f"visual.attnpool.{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")}, TEXT),
    "vit": (VIT, TEXT),
    "timm": ({f"visual.trunk.blocks.{n}.attn.qkv.{y}" for n in range(6) for y in ("weight", "bias")}, TEXT),
    "hugging face": (VIT, {f"text.transformer.encoder.layer.{n}.attention.self.{x}" for n in range(2) for x in QKV}),
}


@pytest.mark.slow
def test_attention_is_what_makes_queries_keys_and_values(built):
    for kind, (image, text) in ATTENTION.items():
        assert set(lora.trainable(built[kind], "attention")) == image | text, kind
        assert set(lora.trainable(built[kind], "text_attention")) == text, kind


def test_a_tower_without_attention_is_told_of(example_clip):
    clip = Clip(copy.deepcopy(example_clip.model), None, None, "mine")
    clip.model.visual.attnpool = torch.nn.Identity()
    with pytest.raises(UserError, match=r"image tower of mine has no attention.*--model\.train text_attention or both"):
        lora.trainable(clip, "attention")
    lora.trainable(clip, "text_attention")
    clip.model.transformer = torch.nn.Identity()
    with pytest.raises(UserError, match=r"text tower of mine has no attention.*--model\.train text"):
        lora.trainable(clip, "text_attention")


# -- adapters on a model -------------------------------------------------------------------------------


def test_at_the_start_adapters_change_nothing_and_every_one_has_a_gradient(clip):
    with torch.no_grad():
        before = outputs(clip)
        names = adapt(clip)
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(clip)))
    learn = lora.trainable(clip, "both")
    assert set(learn) == {f"{name}.{which}" for name in names for which in ("lora_A", "lora_B")}
    disturb(clip)
    sum(normalize(z, dim=-1)[:, 0].sum() for z in outputs(clip)).backward()
    assert [name for name, p in learn.items() if p.grad is None or not p.grad.any()] == []


def test_adapters_are_on_the_matrices_that_train_names(vit):
    for train in TRAINABLE:
        names = lora.trainable(vit, train)
        assert image_tower_learns(train) == any(name.startswith("visual.") for name in names), train
        matrices = {n for n, p in names.items() if p.ndim >= 2 and "embedding" not in n}
        assert set(lora.weights_to_adapt(vit.model, train, vit.name)) == matrices, train


def test_merged_weights_equal_the_adapters_under_base_names(clip):
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    classes = [type(module) for module in clip.model.modules()]
    names = adapt(clip)
    disturb(clip)
    with torch.no_grad():
        adapted = outputs(clip)
        lora.merge(clip.model)
        merged = outputs(clip)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(adapted, merged))
    state = clip.model.state_dict()
    assert state.keys() == start.keys()
    assert {name for name in state if not torch.equal(state[name], start[name])} == set(names)
    assert [type(module) for module in clip.model.modules()] == classes
    assert lora.parameters(clip.model) == {}


def test_lora_adds_scaled_b_a_in_float32(vit):
    clip = vit
    weight = clip.model.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    patches = clip.model.visual.conv1.weight.detach().clone()
    adapt(clip, alpha=3.0)
    disturb(clip)
    exact, actual = clip.model.text_projection.detach(), lora.parameters(clip.model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip.model.text_projection.detach(), exact)
    a, b = (actual[f"transformer.resblocks.0.attn.in_proj_weight.{which}"] for which in ("lora_A", "lora_B"))
    assert (a.shape, b.shape) == ((2, 16), (48, 2))
    assert torch.allclose(clip.model.transformer.resblocks[0].attn.in_proj_weight, weight + 1.5 * b @ a, atol=1e-6)
    a, b = (actual[f"visual.conv1.weight.{which}"] for which in ("lora_A", "lora_B"))
    assert torch.allclose(clip.model.visual.conv1.weight, patches + 1.5 * (b @ a).view_as(patches), atol=1e-6)


def test_adapters_are_drawn_by_their_seed_and_by_nothing_else(vit):
    clips = [copied(vit) for _ in "abc"]
    generator = torch.get_rng_state()
    for clip, seed in zip(clips, (5, 5, 6)):
        adapt(clip, seed=seed)
        assert torch.equal(torch.get_rng_state(), generator)
        torch.rand(3)
        generator = torch.get_rng_state()
    first, same, other = (lora.parameters(clip.model) for clip in clips)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if name.endswith("lora_A")]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_the_fast_way_through_the_text_tower_knows_adapters(vit):
    clip = vit
    adapt(clip, "text")
    disturb(clip)
    assert isinstance(FastText.of(clip._causal_tower), FastText)
    assert "the fast way" in clip.choose_text_way(True)
    tokens, learn = clip.tokenize(SENTENCES), list(lora.trainable(clip, "text").values())
    fast, plain = clip.encode_text(tokens), clip._encode_text_plainly(tokens)
    assert torch.allclose(fast, plain, atol=1e-5)
    gradients = [torch.autograd.grad(normalize(z, dim=-1)[:, 0].sum(), learn) for z in (fast, plain)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# -- errors --------------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_refused(example_clip, monkeypatch):
    for alpha in (0.0, float("inf")):
        with pytest.raises(UserError, match=r"model\.lora_alpha is .*; it must be above 0"):
            lora.check(2, alpha)
    model = torch.nn.Module()
    model.token_embedding, model.ln_final = torch.nn.Embedding(4, 2), torch.nn.LayerNorm(2)
    with pytest.raises(UserError, match=r"model\.train text names no weight of mine that adapters fit, of 3 param"):
        lora.weights_to_adapt(model, "text", "mine")
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not there
    lora.check(0, None)
    with pytest.raises(UserError, match=r"model\.lora_rank needs the package peft.*`pip install peft`"):
        lora.check(2, None)


# -- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny) -> FinetuneConfig:
    """A run of six steps that trains adapters of the text blocks."""
    config = tiny_runs.settings("pairwise", tiny, lr=1e-2)
    config.model = ModelConfig(name=tiny, train="text_blocks", lora_rank=2)
    return config


def test_a_run_changes_the_adapted_weights_alone_and_by_their_rank(config):
    run, clip = weights(finetune(config)), create_model(config.model.name)
    start = clip.model.state_dict()
    expected = lora.weights_to_adapt(clip.model, config.model.train, "tiny")
    assert run.keys() == start.keys()
    assert tiny_runs.changed(run, start) == set(expected) and len(expected) == 4 * 2  # of two blocks
    assert {int(torch.linalg.matrix_rank(run[name] - start[name], rtol=1e-3)) for name in expected} == {2}
    about = json.loads(Path("runs/a/environment.json").read_text())
    assert "adapters of rank 2 on 8 weights" in about["notes"]
    assert about["start"] == clip.weights_hash() != loading.load_model("runs/a").weights_hash()


def test_with_both_towers_adapters_change_what_train_names(config):
    config.method, config.model.train, config.train.steps = "contrastive", "attention", 2
    config.train.precision, config.contrastive = "bf16", ContrastiveConfig()
    named = {n for n in lora.trainable(create_model(config.model.name), "attention") if n.endswith("weight")}
    assert tiny_runs.changed(weights(finetune(config)), tiny_runs.start(config)) == named
