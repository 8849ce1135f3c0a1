"""LoRA and what learns: nothing changes at the start, adapters alone learn, and they end in ordinary weights."""

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest
import sample_differences
import torch
from safetensors.torch import load_file
from test_distributed import succeed
from torch.nn.functional import normalize

from pc_clip.core import environment
from pc_clip.core.config.settings import ModelConfig
from pc_clip.core.config.train import ContrastiveConfig, FinetuneConfig, PairwiseConfig, TrainConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.data import example_sets
from pc_clip.models import loading, lora
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.fast_text import FastText
from pc_clip.models.parameters import TRAINABLE, image_tower_learns
from pc_clip.train import loop
from pc_clip.train.loop import finetune

import transformers  # isort: skip

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
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


def build(kind: str, folder: Path) -> Clip:
    """The example model, or a small one of another architecture with random weights."""
    if kind == "example":
        return Clip.create("example")
    folder.mkdir()
    vision = TIMM if kind == "timm" else VISION
    text = hugging_face_tower(folder) if kind == "hugging face" else TEXT
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    write_json(folder / "open_clip_config.json", {"model_cfg": config})
    return Clip.create(f"local-dir:{folder}", SCRATCH)


KINDS = ["example", "vit", "timm", "hugging face"]


@pytest.fixture(params=KINDS)
def clip(request, tmp_path) -> Clip:
    return build(request.param, tmp_path / "model")


def options_of(train: str = "both", rank: int = 2, **options) -> ModelConfig:
    return ModelConfig(train=train, lora_rank=rank, **options)


def adapt(clip: Clip, options: ModelConfig, seed: int = 0) -> list[str]:
    names = lora.weights_to_adapt(clip.model, options.train, clip.name)
    lora.add(clip.model, names, options.lora_rank, options.lora_alpha, seed)
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

ATTENTION = {
    "example": {
        "visual": {f"visual.attnpool.{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")},
        "text": {f"transformer.resblocks.{n}.attn.in_proj_{y}" for n in range(3) for y in ("weight", "bias")},
    },
    "vit": {
        "visual": {f"visual.transformer.resblocks.{n}.attn.in_proj_{y}" for n in range(2) for y in ("weight", "bias")},
        "text": {f"transformer.resblocks.{n}.attn.in_proj_{y}" for n in range(2) for y in ("weight", "bias")},
    },
    "timm": {
        "visual": {f"visual.trunk.blocks.{n}.attn.qkv.{y}" for n in range(6) for y in ("weight", "bias")},
        "text": {f"transformer.resblocks.{n}.attn.in_proj_{y}" for n in range(2) for y in ("weight", "bias")},
    },
    "hugging face": {
        "visual": {f"visual.transformer.resblocks.{n}.attn.in_proj_{y}" for n in range(2) for y in ("weight", "bias")},
        "text": {
            f"text.transformer.encoder.layer.{n}.attention.self.{x}.{y}"
            for n in range(2)
            for x in ("query", "key", "value")
            for y in ("weight", "bias")
        },
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_what_makes_queries_keys_and_values(kind, tmp_path):
    clip, expected = build(kind, tmp_path / "model"), ATTENTION[kind]
    assert set(lora.trainable(clip, "attention")) == expected["visual"] | expected["text"]
    assert set(lora.trainable(clip, "text_attention")) == expected["text"]


def test_a_tower_without_attention_is_told_of(example_clip):
    clip = Clip(copy.deepcopy(example_clip.model), None, None, "mine")
    clip.model.visual.attnpool = torch.nn.Identity()
    with pytest.raises(UserError, match=r"image tower of mine has no attention.*--model\.train text_attention or both"):
        lora.trainable(clip, "attention")
    lora.trainable(clip, "text_attention")
    clip.model.transformer = torch.nn.Identity()
    with pytest.raises(UserError, match=r"text tower of mine has no attention.*--model\.train text"):
        lora.trainable(clip, "text_attention")


def test_the_image_tower_learns_where_any_of_its_parameters_does(example_clip):
    for which in TRAINABLE:
        names = lora.trainable(example_clip, which)
        assert image_tower_learns(which) == any(name.startswith("visual.") for name in names), which


# -- adapters on a model -------------------------------------------------------------------------------


def test_at_the_start_adapters_change_nothing(clip):
    with torch.no_grad():
        before = outputs(clip)
        adapt(clip, options_of())
        assert lora.parameters(clip.model)
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(clip)))


def test_every_adapter_is_used_and_has_a_gradient(clip):
    names = adapt(clip, options_of())
    learn = lora.trainable(clip, "both")
    assert set(learn) == {f"{name}.{which}" for name in names for which in ("lora_A", "lora_B")}
    disturb(clip)
    sum(normalize(z, dim=-1)[:, 0].sum() for z in outputs(clip)).backward()
    assert [name for name, p in learn.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("train", TRAINABLE)
def test_adapters_are_on_the_matrices_that_train_names(train, tmp_path):
    clip = build("vit", tmp_path / "model")
    named = lora.trainable(clip, train)
    matrices = {n for n, p in named.items() if p.ndim >= 2 and "embedding" not in n}
    assert set(lora.weights_to_adapt(clip.model, train, clip.name)) == matrices


def test_merged_weights_give_what_the_adapters_gave_under_the_names_of_the_base(clip):
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    classes = [type(module) for module in clip.model.modules()]
    names = adapt(clip, options_of())
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


def test_what_is_added_is_the_product_of_the_two_times_alpha_by_rank(tmp_path):
    clip = build("vit", tmp_path / "model")
    weight = clip.model.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    patches = clip.model.visual.conv1.weight.detach().clone()
    adapt(clip, options_of(rank=2, lora_alpha=3.0))
    disturb(clip)
    found = lora.parameters(clip.model)
    a, b = (found[f"transformer.resblocks.0.attn.in_proj_weight.{which}"] for which in ("lora_A", "lora_B"))
    assert (a.shape, b.shape) == ((2, 16), (48, 2))
    assert torch.allclose(clip.model.transformer.resblocks[0].attn.in_proj_weight, weight + 1.5 * b @ a, atol=1e-6)
    a, b = (found[f"visual.conv1.weight.{which}"] for which in ("lora_A", "lora_B"))
    assert torch.allclose(clip.model.visual.conv1.weight, patches + 1.5 * (b @ a).view_as(patches), atol=1e-6)


def test_adapters_are_drawn_by_their_seed_and_by_nothing_else(tmp_path):
    clips = [build("vit", tmp_path / name) for name in "abc"]
    generator = torch.get_rng_state()
    for clip, seed in zip(clips, (5, 5, 6)):
        adapt(clip, options_of(), seed)
        assert torch.equal(torch.get_rng_state(), generator)
        torch.rand(3)
        generator = torch.get_rng_state()
    first, same, other = (lora.parameters(clip.model) for clip in clips)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if name.endswith("lora_A")]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_adapters_are_added_in_float32_under_autocast(tmp_path):
    clip = build("vit", tmp_path / "model")
    adapt(clip, options_of())
    disturb(clip)
    exact = clip.model.text_projection.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip.model.text_projection.detach(), exact)


def test_the_fast_way_through_the_text_tower_knows_adapters():
    clip = Clip.create("example")
    adapt(clip, options_of("text"))
    disturb(clip)
    assert isinstance(FastText.of(clip._causal_tower), FastText)
    assert "the fast way" in clip.choose_text_way(True)
    tokens, learn = clip.tokenize(SENTENCES), list(lora.trainable(clip, "text").values())
    fast, plain = clip.encode_text(tokens), clip._encode_text_plainly(tokens)
    assert torch.allclose(fast, plain, atol=1e-5)
    gradients = [torch.autograd.grad(normalize(z, dim=-1)[:, 0].sum(), learn) for z in (fast, plain)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# -- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, r"model\.lora_rank is -1; it must be at least 0"),
        ({"lora_alpha": 4.0}, r"model\.lora_alpha 4 means nothing without model\.lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, r"model\.lora_alpha is 0; it must be above 0"),
        ({"lora_rank": 2, "lora_alpha": float("inf")}, r"model\.lora_alpha is inf; it must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(options, message):
    config = FinetuneConfig(model=ModelConfig(**options), device="cpu")
    config.data.dataset = "nothing of the kind"
    with pytest.raises(UserError, match=message):
        finetune(config)


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not there
    lora.check(0, None)
    with pytest.raises(UserError, match=r"model\.lora_rank needs the package peft.*`pip install peft`"):
        lora.check(2, None)


def test_where_nothing_fits_the_message_says_what_was_looked_at(example_clip):
    model = torch.nn.Module()
    model.token_embedding, model.ln_final = torch.nn.Embedding(4, 2), torch.nn.LayerNorm(2)
    with pytest.raises(UserError, match=r"model\.train text names no weight of mine that adapters fit, of 3 param"):
        lora.weights_to_adapt(model, "text", "mine")


# -- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch) -> FinetuneConfig:
    """A run of six steps that trains adapters of the example model's text blocks."""
    monkeypatch.setattr(example_sets, "EXAMPLE_SIZES", {"train": 60, "val": 8, "test": 8})
    monkeypatch.setattr(environment, "commit", lambda: None)  # a process of git a run
    sample_differences.write(Path("d.jsonl"))
    found = FinetuneConfig(name="a", out="runs", device="cpu", model=options_of("text_blocks"))
    found.data.split, found.data.differences = "train", "d.jsonl"
    found.train = TrainConfig(batch_size=8, steps=6, lr=1e-2, save_every=2, log_every=2, threads=1)
    found.pairwise, found.contrastive = PairwiseConfig(), ContrastiveConfig()
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def changed(run: dict[str, torch.Tensor]) -> set[str]:
    start = Clip.create("example").model.state_dict()
    assert run.keys() == start.keys()
    return {name for name in start if not torch.equal(run[name], start[name])}


def rank_of_change(run: dict[str, torch.Tensor], name: str) -> int:
    change = run[name] - Clip.create("example").model.state_dict()[name]
    return int(torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3))


def test_a_run_changes_the_adapted_weights_alone_and_by_their_rank(config):
    run = weights(finetune(config))
    clip = Clip.create("example")
    expected = lora.weights_to_adapt(clip.model, config.model.train, "example")
    assert changed(run) == set(expected) and len(expected) == 4 * 3  # of three blocks
    assert {rank_of_change(run, name) for name in expected} == {2}
    about = json.loads(Path("runs/a/environment.json").read_text())
    assert "adapters of rank 2 on 12 weights" in about["notes"]
    assert about["start"] == clip.weights_hash()
    assert loading.load_model("runs/a").weights_hash() != clip.weights_hash()


def test_with_both_towers_adapters_change_what_train_names(config):
    config.method, config.model.train, config.train.steps = "contrastive", "attention", 2
    config.train.precision = "bf16"
    run = weights(finetune(config))
    assert changed(run) == {n for n in lora.trainable(Clip.create("example"), "attention") if n.endswith("weight")}


def test_a_run_of_attention_without_adapters_changes_weights_and_biases(config):
    config.method, config.model, config.train.steps = "contrastive", ModelConfig(train="attention"), 2
    assert changed(weights(finetune(config))) <= set(lora.trainable(Clip.create("example"), "attention"))
    assert "visual.attnpool.q_proj.weight" in changed(weights(Path("runs/a")))


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(config, monkeypatch):
    straight = weights(finetune(config))
    config.name = "b"
    original = loop.batches

    def interrupted(*args):
        yield from itertools.islice(original(*args), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(loop, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    state = load_file("runs/b/state.safetensors")
    learnt = {key.removeprefix("weight.") for key in state if key.startswith("weight.")}
    assert "transformer.resblocks.0.attn.in_proj_weight.lora_A" in learnt
    assert {name.rpartition(".")[2] for name in learnt} == {"lora_A", "lora_B"}
    config.resume = True
    resumed = weights(finetune(config))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_blend_takes_half_of_what_the_adapters_add(config):
    whole = weights(finetune(config))
    config.name, config.train.blend = "b", 0.5
    half = weights(finetune(config))
    start = Clip.create("example").model.state_dict()
    for name in changed(whole):
        assert torch.allclose(half[name] - start[name], (whole[name] - start[name]) / 2, atol=1e-6), name
    assert changed(half) == changed(whole)


def test_two_processes_train_the_adapters_that_one_does(config):
    one = weights(finetune(config))
    config.name = "two"
    succeed(2, lambda rank: finetune(config))
    two = weights(Path("runs/two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    name = "transformer.resblocks.0.attn.in_proj_weight"
    moved = (one[name] - Clip.create("example").model.state_dict()[name]).norm()
    assert (one[name] - two[name]).norm() < 0.02 * moved
