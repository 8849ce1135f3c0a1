"""Pretrain the tiny CLIPs of the example from scratch: `python -m examples.pretrain [--model example_vit]`.

An ordinary symmetric contrastive loss (CLIP, Radford et al. 2021) over rendered scenes and their captions,
in open_clip's own model classes. Deterministic for a given torch build and one thread; about ten minutes on
one CPU core. Writes `open_clip_config.json` and `open_clip_model.safetensors` (fp16) into `--out`, a folder
open_clip loads as `local-dir:`. The folder in the repository is its output with no argument.

example_vit is a vision transformer beside the same text tower, which stays as it is (LiT, Zhai et al. 2022), so that
its file has the image tower alone: `--model example_vit --steps 6000 --images 60000 --lr 1e-3`, 50 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from pc_clip.core.files import write_tensors
from pc_clip.example.scenes import draw
from pc_clip.example.world import captions, scene
from pc_clip.models import torchvision_compat  # noqa: F401  (before open_clip)
from pc_clip.models.clip import model_folder
from pc_clip.models.loading import create_model
from pc_clip.models.pair_encoder import run_block
from pc_clip.train.optim import multiplies_bf16

from open_clip.transformer import VisionTransformer  # isort: skip

VISION = {
    "example": {"image_size": 64, "layers": [3, 3, 2, 1], "width": 16, "patch_size": None},
    "example_vit": {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8},
}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}


def config(model: str) -> dict:
    """open_clip's description of one of the two."""
    return {
        "model_cfg": {"embed_dim": 128, "vision_cfg": VISION[model], "text_cfg": TEXT},
        "preprocess_cfg": PREPROCESS,
    }


def render(split: str, n: int) -> torch.Tensor:
    """The first `n` pictures of a split, normalised as the model's transform does.  [n, 3, 64, 64] uint8"""
    pictures = [
        np.asarray(draw(scene(split, i))) for i in tqdm(range(n), f"drawing {split}", leave=False, disable=None)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = PREPROCESS["mean"][0], PREPROCESS["std"][0]
    return ((pictures.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def embed(visual: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, D]; the blocks of a vision transformer in the way that is quick on a CPU."""
    if not isinstance(visual, VisionTransformer):
        return visual(pixels)
    x = visual._embeds(pixels)
    for block in visual.transformer.resblocks:
        x = run_block(block, x)
    return visual.ln_post(x)[:, 0] @ visual.proj


def contrastive(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss. image, text: [B, D], any length."""
    logits = logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # [B, B]
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(name: str, out: Path, steps: int, images: int, batch_size: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(config(name), indent=2) + "\n")
    clip = create_model(f"local-dir:{out}", load_weights=False, seed=seed)
    model = clip.model.train().to(memory_format=torch.channels_last)
    if beside := name != "example":  # its text tower is the example's, and stays so
        model.load_state_dict(text_tower(create_model("example").model.state_dict()), strict=False)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.startswith("visual."))
    pictures = render("train", images)
    tokens = clip.tokenize([text for i in range(images) for text in captions("train", i)])
    tokens = tokens.view(images, -1, tokens.shape[-1])  # [images, captions each, L]

    learn = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learn if p.ndim > 1]
    others = [p for p in learn if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warmup = min(200, steps // 5)
    factor = lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(images) for _ in range(math.ceil(steps * batch_size / images))])
    quick = multiplies_bf16(torch.device("cpu"))
    start, bar = time.time(), tqdm(range(steps), "pretraining")
    for step in bar:
        rows = torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])
        chosen = tokens[rows, torch.from_numpy(rng.integers(tokens.shape[1], size=len(rows)))]
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            image = embed(model.visual, normalise(pictures[rows]))
        loss = contrastive(image.float(), clip.encode_text(clip.trim(chosen)), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = {k: v for k, v in weights.items() if not beside or k.startswith("visual.")}
    write_tensors(out / "open_clip_model.safetensors", weights, {"format": "pt"})
    print(f"{steps} steps in {time.time() - start:.0f} s; wrote {out}")


def text_tower(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is not of the image tower, the logit scale included."""
    return {name: value for name, value in weights.items() if not name.startswith("visual.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", dest="name", choices=sorted(VISION), default="example")
    parser.add_argument("--out", type=Path, help="the model's own folder in the package unless given")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--images", type=int, default=40000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out = arguments.out or model_folder(arguments.name)
    torch.set_num_threads(1)
    pretrain(**vars(arguments))


if __name__ == "__main__":
    main()
