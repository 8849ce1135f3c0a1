"""Make a Clip: by the name of an architecture and its weights, or from a checkpoint; and save one.

A checkpoint is one safetensors file with every weight, under open_clip's names. Nothing is unpickled freely: other
people's .pt files are read with torch's weights-only loader.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pc_clip
from pc_clip.core.errors import UserError, nearest
from pc_clip.core.files import write_tensors
from pc_clip.core.paths import CONFIG_FILE, EXPORTED_FILE, HUB, MODEL_FILE, checkpoint_file
from pc_clip.core.random import seed_of
from pc_clip.models import from_transformers, tags
from pc_clip.models.change_model import PREFIX, ChangeClip, ChangeModel
from pc_clip.models.clip import SCRATCH, SHIPPED, Clip, model_folder, open_clip
from pc_clip.models.weight_files import load_strictly, read_weights

from open_clip.transform import PreprocessCfg, image_transform_v2  # isort: skip

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
RANDOM_WEIGHTS = ("No pretrained weights loaded", "Local config loaded, but no CLIP weights found")

# -- by name -------------------------------------------------------------------------------------------


def create_model(
    name: str,
    pretrained: str | None = None,
    tag: str | None = None,
    *,
    load_weights: bool = True,
    device: str | torch.device = "cpu",
    preprocess: dict[str, Any] | None = None,
    seed: int = 0,
) -> Clip:
    """Build an architecture and load its weights.

    tag: where `pretrained` is a file, the tag of open_clip's whose image transform its weights have.
    preprocess: the image transform in place of the one that comes with the weights (mean, std, ...).
    seed: of the weights where `pretrained` is SCRATCH.
    Raises UserError for an unknown name, an unknown tag, or weights that cannot be had.
    """
    load_weights = load_weights and pretrained != SCRATCH
    file = _weights_file(name, pretrained) if load_weights else None
    by_tag = load_weights and file is None  # then open_clip reads the weights, and all that it warns of is heard
    architecture = _architecture(name)
    if tag and file is None:
        raise UserError(f"model.tag {tag} is for weights from a file; here it would have no effect")
    if by_tag:
        tags.check_activation(name, pretrained)
    elif file is not None and preprocess is None:
        preprocess = tags.transform_of_file(name, tag, str(file))
    options = _local_text_tower(architecture) | ({"force_preprocess_cfg": preprocess} if preprocess else {})
    try:
        with _quiet_open_clip(random_weights=not by_tag), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, "weights"))  # torch.manual_seed would seed the GPUs too
            model = open_clip.create_model(
                architecture, pretrained if by_tag else None, load_weights=by_tag, pretrained_text=False, **options
            )
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        known = tags.config_of(name, pretrained) if by_tag else {}
        source = known.get("hf_hub", "").rstrip("/") or known.get("url")
        by_hand = (
            f". Without a network, fetch the weights at {source} elsewhere and pass --model.pretrained PATH/TO/FILE "
            f"--model.tag {pretrained}"
        )
        raise UserError(f"{name} could not be loaded: {reason}{by_hand if source else ''}") from error
    if file is not None:
        state = _example_vit() if file.parent == model_folder("example_vit") else read_weights(file)[0]
        load_strictly(model, state, file, name)
    return complete(model, name, pretrained, device)


def complete(model: nn.Module, name: str, pretrained: str | None, device: str | torch.device = "cpu") -> Clip:
    """A model of open_clip's with its own tokenizer and image transform."""
    with _quiet_open_clip():
        tokenizer = open_clip.get_tokenizer(_architecture(name))
    # JSON has no tuples: without this, one transform would have two names, and so two caches.
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in model.visual.preprocess_cfg.items()}
    preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return Clip(model.to(device).eval(), tokenizer, preprocess, name, pretrained)


def _architecture(name: str) -> str:
    """open_clip's name of a model. Raises UserError where there is none."""
    architecture = f"local-dir:{model_folder(name)}" if name in SHIPPED else name
    if architecture.startswith("local-dir:"):
        folder = Path(architecture.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{folder} is not an open_clip model folder: it has no open_clip_config.json")
    elif architecture.startswith(HUB):  # open_clip would go on with random weights where it cannot fetch any
        raise UserError(
            f"{name} names weights too: take it as a checkpoint, --checkpoint {name} or --model.start {name}"
        )
    elif architecture not in open_clip.list_models():
        close = nearest(name, open_clip.list_models())
        raise UserError(f"unknown model {name!r}. {close} local-dir:FOLDER names your own.")
    return architecture


def _weights_file(name: str, pretrained: str | None) -> Path | None:
    """The file that all weights come from; None for a tag of open_clip's. Raises UserError where there is neither."""
    architecture = _architecture(name)
    if pretrained and Path(pretrained).is_file():
        return Path(pretrained)
    if not architecture.startswith("local-dir:"):
        known = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:
            raise UserError(
                f"model {name} was asked for without weights. Give --model.pretrained a file or one of its tags: "
                f"{', '.join(known) or 'it has none'}; or --checkpoint a finetuned one."
            )
        if pretrained not in known:
            raise UserError(
                f"{pretrained!r} is neither a file nor a pretrained tag of {name}. {nearest(pretrained, known)}"
            )
        return None
    folder = Path(architecture.removeprefix("local-dir:"))
    if pretrained:
        raise UserError(f"{pretrained!r} is not a file; {name} takes the weights in its folder, or a file of weights")
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    others = sorted(path.name for path in folder.glob("*.*") if path.suffix in (".pt", ".pth", ".bin", ".safetensors"))
    raise UserError(
        f"{folder} holds no weights under a name that is known ({', '.join(WEIGHT_FILES)}); it has "
        f"{', '.join(others) or 'no others'}: name one with --model.pretrained, or scratch for random ones"
    )


def _local_text_tower(architecture: str) -> dict[str, Any]:
    """A Hugging Face text tower that lies in the model's own folder is written as "." in its config.

    open_clip would look for it from the working directory, so a folder could not be moved.
    """
    if not architecture.startswith("local-dir:"):
        return {}
    folder = Path(architecture.removeprefix("local-dir:"))
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"].get("text_cfg", {})
    if text.get("hf_model_name") != ".":
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}}


def _example_vit() -> dict[str, Tensor]:
    """The example's text tower with a vision transformer that was trained with it (examples/pretrain.py)."""
    text, image = (load_file(model_folder(name) / "open_clip_model.safetensors") for name in SHIPPED)
    return {name: value for name, value in text.items() if not name.startswith("visual.")} | image


@contextmanager
def _quiet_open_clip(random_weights: bool = False) -> Iterator[None]:
    """Leave out open_clip's log of each step; with `random_weights` also its warning that it read none.

    Every other warning of open_clip is heard, and every record of other loggers.
    """

    def keep(record: logging.LogRecord) -> bool:
        expected = random_weights and record.getMessage().startswith(RANDOM_WEIGHTS)
        return record.levelno >= logging.WARNING and not expected

    root = logging.getLogger()  # open_clip logs there; its filter sees no record of a logger below it
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


# -- from a checkpoint ---------------------------------------------------------------------------------


def save_model(path: Path, clip: Clip) -> None:
    """Write every weight under open_clip's names, and what the model was made from, in one file.

    The weights of a change model lie there too, under names that begin with change.
    """
    transform = clip.model.visual.preprocess_cfg
    about = {"model": clip.name, "pretrained": clip.pretrained, "preprocess": transform, "pc_clip": pc_clip.__version__}
    about |= {"start": clip.start} if clip.start else {}
    weights = clip.model.state_dict() | clip.extra_weights()
    write_tensors(path, weights, {"format": "pt", "pc_clip": json.dumps(about | clip.about())})


def load_model(
    path: str | Path,
    name: str | None = None,
    pretrained: str | None = None,
    device: str = "cpu",
    tag: str | None = None,
) -> Clip:
    """A model from a checkpoint: the folder of a run, of an export or of transformers' CLIPModel, or a state dict.

    name: the architecture, for files that do not say; guessed from the shapes when not given. pretrained: the weights
    before finetuning. tag: open_clip's, whose image transform the weights have; `pretrained` where that is a tag.
    Raises UserError for a file that is absent, cut short, of another architecture, or not only weights.
    """
    path = checkpoint_file(path)
    exported = path.name == EXPORTED_FILE and (path.parent / "open_clip_config.json").is_file()
    if tag and (exported or path.name == CONFIG_FILE):
        raise UserError(f"{path.parent} says what its image transform is; leave --model.tag out")
    if exported and name:  # its own file says more than a name: activation, transform, context length
        raise UserError(f"{path.parent} says what its architecture is; leave --model.name out")
    if exported:
        return _exported(path, pretrained, device)
    if path.name == CONFIG_FILE:
        return _of_transformers(path.parent, name, pretrained, device)
    state, about = read_weights(path)
    saved = about.get("model")
    moved = any((each or "").startswith("local-dir:") for each in (name, saved))  # folders may have been moved
    if name and saved and name != saved and not moved:  # activations differ without a trace in the weights' shapes
        raise UserError(f"{path} says that it is of {saved}, not {name}; leave --model.name out")
    name = name or saved or guess_architecture(state)
    start = about.get("start")
    if pretrained and start:  # the user says where they are now
        start = {"weights": start["weights"]}
    pretrained = pretrained or about.get("pretrained")
    if tag and "preprocess" in about:
        raise UserError(f"{path} says what its image transform is; leave --model.tag out")
    tag = tag or (pretrained if tags.config_of(name, pretrained) else None)
    preprocess = about.get("preprocess") or tags.transform_of_file(name, tag, str(path))
    clip = create_model(name, load_weights=False, device=device, preprocess=preprocess)
    clip.pretrained, clip.start = pretrained, start
    if "change" in about:
        change = {key.removeprefix(PREFIX): state.pop(key) for key in list(state) if key.startswith(PREFIX)}
        clip = ChangeClip.of(clip, ChangeModel.build(clip, about["change"]))
        load_strictly(clip.change, change, path, name)
    load_strictly(clip.model, state, path, name)
    return clip


def _exported(path: Path, pretrained: str | None, device: str) -> Clip:
    """The model in a folder that `python -m pc_clip export` wrote, or in one that is built like it."""
    clip = create_model(f"local-dir:{path.parent}", str(path), device=device)
    file = path.parent / "pc_clip.json"
    about = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    clip.pretrained = pretrained
    clip.start = about.get("start") or {"weights": "unknown"}  # so that the model is not compared with itself
    return clip


def _of_transformers(folder: Path, name: str | None, pretrained: str | None, device: str) -> Clip:
    """transformers' CLIPModel as the architecture of open_clip's that has its shapes and its activation."""
    state, preprocess, quick = from_transformers.read(folder)
    name = name or guess_architecture(state)
    quick_name = f"{name.removesuffix('-quickgelu')}-quickgelu"
    named_quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if named_quick and not quick:
        raise UserError(f"{folder} has GELU, and {name} QuickGELU; leave --model.name out")
    if quick and not named_quick:
        if quick_name not in open_clip.list_models():
            raise UserError(f"{folder} has QuickGELU, and open_clip has no {quick_name}")
        name = quick_name
    clip = create_model(name, load_weights=False, device=device, preprocess=preprocess)
    clip.pretrained = pretrained
    load_strictly(clip.model, state, folder, name)
    return clip


def describe_checkpoint(path: str | Path) -> str:
    """A short name for results: the run's, or the file's."""
    path = Path(path)
    return path.name if path.is_dir() else path.parent.name if path.name == MODEL_FILE else path.stem


# -- weights without a name ----------------------------------------------------------------------------


def blend(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, weight by weight (WiSE-FT, Wortsman et al. 2022).

    Raises UserError when the two are not of one architecture.
    """
    if start.keys() != end.keys() or any(start[k].shape != end[k].shape for k in start):
        raise UserError("weights of two architectures cannot be averaged")
    return {
        k: torch.lerp(start[k].float(), end[k].float(), alpha).to(start[k].dtype)
        if start[k].is_floating_point()
        else end[k]
        for k in start
    }


def guess_architecture(state: Mapping[str, Tensor]) -> str:
    """The open_clip architecture of a bare state dict, by the names and shapes of its weights.

    Activations leave no trace in a state dict, so "ViT-L-14" and "ViT-L-14-quickgelu" look the same; the
    plain one is taken, which is right for the PC-CLIP authors' checkpoint (a DataComp model); `transform_of_file` then
    warns of the other.
    Raises UserError when no architecture, or a state dict of something else, is found.
    """
    shapes = {key: value.shape for key, value in state.items()}
    projection = shapes.get("text_projection") or shapes.get("text.text_projection")  # [text width, embed_dim]
    for name in sorted(open_clip.list_models(), key=lambda name: ("quickgelu" in name, len(name), name)):
        config = open_clip.get_model_config(name)
        width = config["text_cfg"].get("width", 512)
        if projection != (width, config["embed_dim"]) or "timm_model_name" in config["vision_cfg"]:
            continue
        with _quiet_open_clip(random_weights=True), torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, device="meta")
        if {key: value.shape for key, value in model.state_dict().items()} == shapes:
            return name
    first = ", ".join(f"{key} {list(shape)}" for key, shape in list(shapes.items())[:3])
    raise UserError(
        f"the architecture of this state dict is not known: its first weights are {first}. "
        "Name it with --model.name (open_clip's name, or local-dir:FOLDER)."
    )
