"""Exports: other programs load them and see the same model. Tiny vision transformers of random weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors.torch import load_file, save_file

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.evals import base_of
from pc_clip.models import export, loading
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model, describe_checkpoint

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}
HALVES = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bilinear"}
SENTENCES = [
    "a photo of a cat",
    "Two LARGE dogs, one of which -- it's the older -- sleeps!",
    "a café in Zürich, naïve façade; e\u0301 in two characters",
    "10 o'clock: we'll see 1,234.5 things (don't ask) #why @home",
    "a smiling face 🙂 and a family 👩‍👩‍👧 in 日本",
    "snake_case\tand  white\nspace ",
    "",
    "very " * 100 + "long",
]
CLEANED = [  # what open_clip cleans or reads otherwise than CLIPTokenizer does
    "tom &amp; jerry",
    "“curly” and it’s",
    "a ﬁne ligature",
    "ＦＵＬＬ width",
    "schÃ¶n",
    "ΟΔΟΣ",
]


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """Makes architectures known to open_clip by name, for one test."""
    factory, folder = open_clip.factory, tmp_path / "architectures"
    folder.mkdir()
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))

    def register(name: str = "tiny-vit", vision: dict | None = None, text: dict | None = None, **top) -> str:
        config = {"embed_dim": 24, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **top}
        write_json(folder / f"{name}.json", config)
        open_clip.add_model_config(folder)
        return name

    return register


def random_clip(name: str, preprocess: dict | None = None) -> Clip:
    """A model no two of whose weights are equal, so that none can be taken for another unnoticed."""
    clip = create_model(name, load_weights=False, preprocess=preprocess)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture with something in every corner."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def embeddings(model, preprocess, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([preprocess(picture(40, 46)), preprocess(picture(97, 94))])
    return model.encode_image(images), model.encode_text(tokenizer(SENTENCES))


def assert_same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def load_in_open_clip(name: str, pretrained: str | None = None):
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


# -- open_clip -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_exports_for_open_clip_only(example_clip, capsys):
    loading.save_model(Path("runs/mine/model.safetensors"), example_clip)
    export.main(["runs/mine", "--out", "exported"])
    assert "transformers: not written, its image tower is a ModifiedResNet" in capsys.readouterr().out
    assert_same(
        embeddings(*load_in_open_clip("local-dir:exported")),
        embeddings(example_clip.model, example_clip.preprocess, example_clip.tokenizer),
    )
    about = json.loads(Path("exported/pc_clip.json").read_text())
    assert (about["checkpoint"], about["model"], about["weights"]) == ("mine", "example", example_clip.weights_hash())


def write_model_with_a_local_text_tower(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "LICENSE-tower").write_text("Take it.")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(folder)
    text = {"hf_model_name": ".", "hf_tokenizer_name": ".", "hf_proj_type": "linear", "context_length": 12}
    write_json(
        folder / "open_clip_config.json", {"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}}
    )


def test_a_text_tower_of_hugging_faces_goes_with_the_folder(tmp_path, monkeypatch, capsys):
    write_model_with_a_local_text_tower(tmp_path / "base")
    clip = random_clip(f"local-dir:{tmp_path / 'base'}")
    loading.save_model(Path("runs/mine/model.safetensors"), clip)
    export.main(["runs/mine", "--out", "exported"])
    assert "text tower is a HFTextEncoder" in capsys.readouterr().out
    texts = ["a red dog", "dog"]
    expected = clip.embed_texts(texts)
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(create_model("local-dir:exported").embed_texts(texts), expected)
    assert Path("exported/LICENSE-tower").read_text() == "Take it."
    assert not any(str(tmp_path) in p.read_text() for p in Path("exported").glob("*.json"))
    monkeypatch.chdir("exported")  # where open_clip finds a tower that is named "."
    model, _, tokenizer = load_in_open_clip("local-dir:.")
    with torch.no_grad():
        assert torch.allclose(model.encode_text(tokenizer(texts), normalize=True), expected, atol=1e-6)


# -- transformers --------------------------------------------------------------------------------------

ARCHITECTURES = {
    "like ViT-B-32": {},
    "quick_gelu": {"quick_gelu": True},
    "text in a module of its own": {"custom_text": True, "vision": {"patch_size": 16}},
    "other widths and depths": {
        "vision": {"image_size": 28, "patch_size": 7, "width": 60, "head_width": 20, "layers": 3, "mlp_ratio": 2.5},
        "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 20, "mlp_ratio": 3.0},
    },
    "other norms and gelu": {
        "vision": {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
        "text": {"norm_kwargs": {"eps": 1e-2}},
    },
    "more tokens, pooled at the end by its number": {
        "text": {"vocab_size": 49500, "pool_type": "eos", "eos_id": 49407}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_transformers_embeds_images_and_texts_as_open_clip_does(architecture, changes):
    clip = random_clip(architecture(**changes), HALVES)
    assert export.export(clip, Path("exported")) < 1e-5
    model = transformers.CLIPModel.from_pretrained("exported").eval()
    processor = transformers.CLIPProcessor.from_pretrained("exported", backend="pil")
    images, texts = embeddings(clip.model, clip.preprocess, clip.tokenizer)
    inputs = processor(
        text=SENTENCES, images=[picture(40, 46), picture(97, 94)], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        actual = model(**inputs)
        as_open_clip_pads = model.get_text_features(clip.tokenizer(SENTENCES)).pooler_output
    assert torch.allclose(actual.image_embeds, F.normalize(images, dim=-1), atol=1e-5)
    assert torch.allclose(actual.text_embeds, F.normalize(texts, dim=-1), atol=1e-5)
    assert torch.allclose(as_open_clip_pads, texts, atol=1e-5, rtol=1e-5)
    expected = clip.model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    assert torch.allclose(actual.logits_per_image, expected, atol=1e-3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """One folder with both formats."""
    folder = tmp_path_factory.mktemp("exported")
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}}
    (folder / "base").mkdir()
    write_json(folder / "base" / "open_clip_config.json", config)
    export.export(random_clip(f"local-dir:{folder / 'base'}"), folder / "both")
    return folder / "both"


def tokens_until_the_end(tokens: torch.Tensor) -> list[int]:
    row = tokens.tolist()
    return row[: row.index(49407) + 1]


@pytest.mark.slow
def test_the_tokens_are_open_clips_but_for_its_cleaning(exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    tokenize, clean = open_clip.get_tokenizer("ViT-B-32"), open_clip.tokenizer.get_clean_fn("lower")

    def pairs(texts: list[str]):
        rows = theirs(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        return [tuple(map(tokens_until_the_end, pair)) for pair in zip(tokenize(texts), rows)]

    assert all(a == b for a, b in pairs(SENTENCES))
    assert all(a != b for a, b in pairs(CLEANED))  # as the module says; should one become equal, it must say so
    assert all(a == b for a, b in pairs([clean(text) for text in CLEANED]))


# Width and height whose longer side, resized to 32, leaves 0, 2, 5, 1 and 12 pixels to crop ...
EXACT = [(32, 32), (34, 32), (40, 46), (97, 94), (200, 275)]
# ... and 3, 7, 15: where transformers rounds 1.5, 3.5, 7.5 down and torchvision up.
SHIFTED = [(64, 70), (110, 90), (47, 32)]


@pytest.mark.slow
def test_pixels_are_open_clips_but_for_the_rounding_of_the_crop(architecture):
    clip = random_clip(architecture(), HALVES)
    export.export(clip, Path("exported"))
    pil, default = (
        transformers.CLIPProcessor.from_pretrained("exported", backend=backend).image_processor
        for backend in ("pil", "torchvision")
    )
    for size in EXACT:
        expected = clip.preprocess(picture(*size))
        assert torch.equal(pil(picture(*size), return_tensors="pt").pixel_values[0], expected), size
        grey_level = 1 / 255 / min(HALVES["std"])
        other = default(picture(*size), return_tensors="pt").pixel_values[0]
        assert (other - expected).abs().max() < 1.001 * grey_level, size
    resize, _, *rest = clip.preprocess.transforms
    for size in SHIFTED:
        pixels = pil(picture(*size), return_tensors="pt").pixel_values[0]
        assert not torch.allclose(pixels, clip.preprocess(picture(*size)), atol=0.1), size
        resized = resize(picture(*size))
        left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
        shifted = resized.crop((left, top, left + 32, top + 32))
        for step in rest:
            shifted = step(shifted)
        assert torch.equal(pixels, shifted), size


@pytest.mark.slow
def test_a_squashing_and_a_bicubic_transform_are_kept(architecture):
    for n, transform in enumerate(({"resize_mode": "squash"}, {"interpolation": "bicubic"})):
        clip = random_clip(architecture(), HALVES | transform)
        export.export(clip, Path(f"exported{n}"))
        processor = transformers.CLIPProcessor.from_pretrained(f"exported{n}", backend="pil").image_processor
        for size in EXACT + (SHIFTED if "resize_mode" in transform else []):
            pixels = processor(picture(*size), return_tensors="pt").pixel_values[0]
            assert torch.equal(pixels, clip.preprocess(picture(*size))), (transform, size)


REFUSED = [  # the reason, and what is changed
    ("other weights: .*ls_1.gamma", {"vision": {"ls_init_value": 0.1}}),
    ("other weights: .*self_attn.ln_q", {"text": {"qk_norm": True}}),
    ("differ by", {"custom_text": True, "text": {"no_causal_mask": True}}),
    ("differ by", {"text": {"pool_type": "last"}}),
    ("differ by", {"vision": {"pool_type": "avg"}}),
    ("other weights: Missing key.*pre_layrnorm", {"vision": {"no_ln_pre": True}}),
    ("other weights: size mismatch", {"vision": {"image_size": [32, 64]}}),
    ("other weights: .*logit_bias", {"init_logit_bias": -10.0}),
    ("other weights: .*text_projection.bias", {"text": {"proj_bias": True}}),
    ("other weights: .*cls_emb", {"custom_text": True, "text": {"embed_cls": True}}),
    ("differ by", {"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}),
    ("TimmModel", {"vision": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}}),
]


@pytest.mark.slow
def test_what_a_clipmodel_has_no_place_for_is_named(architecture):
    for n, (reason, changes) in enumerate(REFUSED):
        clip = random_clip(architecture(f"tiny-{n}", **changes))
        assert re.search(reason, str(export.export(clip, Path(f"exported-{n}")))), changes
    padded = random_clip(architecture(), {"resize_mode": "longest"})
    assert "differ by" in str(export.export(padded, Path("exported")))
    assert sorted(p.name for p in Path("exported").iterdir()) == [
        "README.md", "open_clip_config.json", "open_clip_model.safetensors", "pc_clip.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14"])
def test_the_known_architectures_are_taken(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
        theirs = transformers.CLIPModel(export.clip_config(Clip(model, open_clip.get_tokenizer(name), None, name)))
    renamed = export.rename_weights(model.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


# -- the folder ----------------------------------------------------------------------------------------


def test_both_formats_share_a_folder_that_names_no_place(exported):
    model = transformers.AutoModel.from_pretrained(exported)
    clip = create_model(f"local-dir:{exported}")
    assert type(model) is transformers.CLIPModel
    assert torch.equal(model.text_projection.weight.T, clip.model.text_projection)
    for path in exported.iterdir():
        assert str(exported.parent).encode() not in path.read_bytes(), path.name
        assert path.stat().st_mode & 0o777 == (exported / "config.json").stat().st_mode & 0o777, path.name
    assert json.loads((exported / "pc_clip.json").read_text())["model"] == "base"


def test_what_is_there_is_kept_and_a_failed_export_leaves_nothing(example_clip, monkeypatch):
    export.export(example_clip, Path("exported"))
    before = {p: p.read_bytes() for p in Path("exported").iterdir()}
    with pytest.raises(UserError, match="exported is there already"):
        export.main(["nothing.pt", "--out", "exported"])
    with pytest.raises(UserError, match="no checkpoint at"):
        export.main(["nothing.pt", "--out", "another"])

    def full_disk(model, path, config):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "save_config_for_hf", full_disk)
    with pytest.raises(OSError, match="No space"):
        export.export(example_clip, Path("another"))
    assert {p: p.read_bytes() for p in Path("exported").iterdir()} == before
    assert [p.name for p in Path().iterdir()] == ["exported"]


@pytest.mark.slow
def test_a_clipmodel_that_differs_is_not_handed_out(architecture, monkeypatch):
    clip, original = random_clip(architecture()), export.rename_weights

    def swapped(state):
        exchanged = {"layer_norm1": "layer_norm2", "layer_norm2": "layer_norm1"}
        return {re.sub(r"layer_norm\d", lambda m: exchanged[m[0]], k): v for k, v in original(state).items()}

    monkeypatch.setattr(export, "rename_weights", swapped)
    assert "differ by" in str(export.export(clip, Path("exported")))
    assert not Path("exported/config.json").exists()


@pytest.mark.slow
def test_a_bare_state_dict_is_exported_by_the_name_given(architecture, capsys):
    clip = random_clip(architecture())
    torch.save(clip.model.state_dict(), "theirs.pt")
    export.main(["theirs.pt", "--model", "tiny-vit", "--out", "exported/theirs"])
    assert "CLIPModel.from_pretrained('exported/theirs'), equal to within" in capsys.readouterr().out
    assert create_model("local-dir:exported/theirs").weights_hash() == clip.weights_hash()


# -- the card ----------------------------------------------------------------------------------------------


def test_the_card_shows_what_was_measured_of_these_weights_with_the_baselines(architecture, monkeypatch):
    clip = random_clip(architecture())
    loading.save_model(Path("runs/mine/model.safetensors"), clip)
    figures = {"metrics": {"two_way": 0.912, "caption_subtraction": 0.99}, "intervals": {"two_way": [0.9, 0.92]}}
    result = {"evaluation": "difference", "dataset": "example/test", "weights": clip.weights_hash(), **figures}
    write_json(Path("results/mine/a.json"), result)
    write_json(Path("results/other/b.json"), result | {"weights": "another", "metrics": {"two_way": 0.1}})
    asked = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: asked.append(name) or f"hub/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **what: asked.append(Path(what["folder_path"])))
    export.main(["runs/mine", "--out", "exported", "--push", "me/mine"])
    assert asked == ["me/mine", Path("exported")]
    card = ModelCard.load("exported/README.md")
    assert "| difference | example/test | two_way | 91.2 [90.0, 92.0] |" in card.text
    assert "| difference | example/test | caption_subtraction | 99.0 |" in card.text and "10.0" not in card.text
    assert {each.metric_type: each.metric_value for each in card.data.eval_results}["two_way"] == 91.2
    assert "CLIPModel.from_pretrained" in card.text

    def refuse(self, name, exist_ok):
        raise HFValidationError("Repo id must be in the form namespace/name")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="a/b/c could not be written: Repo id must be .* The folder is whole in again"):
        export.main(["runs/mine", "--out", "again", "--push", "a/b/c"])


class _Hub(BaseHTTPRequestHandler):
    """Of the hub's interface what fetching a model asks for: which files there are, and each file."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        if self.path.startswith("/api/models/me/mine/tree/"):
            files = [(path.name, path.stat().st_size) for path in self.folder.iterdir()]
            content = json.dumps([{"type": "file", "path": n, "size": size, "oid": "0"} for n, size in files]).encode()
        elif self.path.startswith("/api/models/me/mine"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            content = json.dumps({"id": "me/mine", "sha": "a" * 40, "siblings": files}).encode()
        elif self.path.startswith("/me/mine/resolve/") and (self.folder / Path(self.path).name).is_file():
            content = (self.folder / Path(self.path).name).read_bytes()
        else:
            return self.send_error(404)
        self.send_response(200)
        named = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        for name, value in (named | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.mark.slow
def test_a_model_of_the_hub_is_a_checkpoint(architecture, tmp_path):
    """In a process of its own, because the hub's address is read when its library is imported."""
    clip = random_clip(architecture())
    export.export(clip, Path("exported"))
    Path("exported/evil.py").write_text("raise SystemExit")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": Path("exported")}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    lines = (
        "import pc_clip; print(pc_clip.load('hf-hub:me/mine').clip.weights_hash()); pc_clip.load('hf-hub:me/absent')"
    )
    address = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
    }
    address["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", lines], env=os.environ | address, capture_output=True, text=True)
    server.shutdown()
    assert done.stdout.strip() == clip.weights_hash(), done.stderr
    assert "UserError: hf-hub:me/absent cannot be had from the hub" in done.stderr
    assert not list((tmp_path / "hub").rglob("evil.py"))
    assert describe_checkpoint("hf-hub:me/mine") == "mine"


# -- and back ------------------------------------------------------------------------------------------


def test_exports_and_transformers_folders_are_checkpoints(architecture):
    for quick, name in ((False, "tiny-vit"), (True, "tiny-vit-quickgelu")):
        transform = {"mean": (0.5,) * 3, "interpolation": "bilinear"}
        clip = random_clip(architecture(name, quick_gelu=quick), transform)
        loading.save_model(Path(f"runs/{name}/model.safetensors"), clip)
        export.main([f"runs/{name}", "--out", name])
        exported = loading.load_model(name)
        with pytest.raises(UserError, match="says what its image transform is; leave --model.tag out"):
            loading.load_model(name, tag="openai")
        with pytest.raises(UserError, match="says what its architecture is; leave --model.name out"):
            loading.load_model(name, "tiny-vit")
        assert exported.weights_hash() == clip.weights_hash() and base_of(exported) is None
        shutil.copytree(name, f"hf-{name}", ignore=shutil.ignore_patterns("open_clip*", "pc_clip.json"))
        of_transformers = loading.load_model(f"hf-{name}")
        assert of_transformers.name == name and repr(of_transformers.preprocess) == repr(clip.preprocess)
        assert_same(
            embeddings(of_transformers.model, of_transformers.preprocess, of_transformers.tokenizer),
            embeddings(clip.model, clip.preprocess, clip.tokenizer),
        )


def test_the_transform_is_read_from_every_layout_of_processors(architecture):
    """transformers 5 saves processor_config.json; before 4.20 a size was a number."""
    clip = random_clip(architecture(), {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"})
    export.write_transformers(clip, Path("hf"))
    processor = Path("hf/preprocessor_config.json")
    known = json.loads(processor.read_text())
    for name, content in (
        ("preprocessor_config.json", known | {"size": 32, "crop_size": 32}),
        ("processor_config.json", {"image_processor": known, "processor_class": "CLIPProcessor"}),
    ):
        processor.unlink(missing_ok=True)
        write_json(Path("hf") / name, content)
        assert repr(loading.load_model("hf").preprocess) == repr(clip.preprocess), name


def test_a_name_that_has_another_activation_than_the_folder_is_refused(architecture):
    architecture("tiny-vit-quickgelu", quick_gelu=True)
    export.write_transformers(random_clip(architecture()), Path("hf"))
    with pytest.raises(UserError, match="hf has GELU, and tiny-vit-quickgelu QuickGELU"):
        loading.load_model("hf", "tiny-vit-quickgelu")


def test_a_clip_model_is_read_in_shards_and_never_in_part(architecture):
    clip = random_clip(architecture())
    export.write_transformers(clip, Path("whole"))
    model = transformers.CLIPModel.from_pretrained("whole")
    model.save_pretrained("shards", max_shard_size="20KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    loaded = loading.load_model("shards").model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in clip.model.state_dict().items())
    state = load_file("whole/model.safetensors")
    state.pop("text_projection.weight")
    save_file(state, "whole/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="whole lacks 1 weights of its CLIPModel, first text_projection.weight"):
        loading.load_model("whole")
    write_json(Path("bert/config.json"), {"model_type": "bert"})
    with pytest.raises(UserError, match="bert holds a model of transformers of the kind 'bert'"):
        loading.load_model("bert")
