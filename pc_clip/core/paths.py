"""Where things are: the files of a run, YAML beside the code, the recipes."""

from __future__ import annotations

from pathlib import Path

from pc_clip.core.errors import UserError

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
EXPORTED_FILE = "open_clip_model.safetensors"
CONFIG_FILE = "config.json"  # transformers'
HUB = "hf-hub:"  # before USER/NAME: an export, or a model of open_clip's, on the Hugging Face hub


def checkpoint_file(path: str | Path) -> Path:
    """The file of a checkpoint: of a run, an export, or the one that is named. Raises UserError where there is none.

    Of a folder of transformers it is the file that says what it is. "hf-hub:USER/NAME" is fetched once.
    """
    path = _fetched(str(path).removeprefix(HUB)) if str(path).startswith(HUB) else Path(path)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file() and (path / STATE_FILE).is_file():
            raise UserError(f"the run {path} is not finished; continue it with finetune.py --resume true")
        path = next(
            (file for name in (EXPORTED_FILE, CONFIG_FILE) if (file := path / name).is_file()), path / MODEL_FILE
        )
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}. Give a run's folder, a .safetensors or a .pt file.")
    return path


def _fetched(name: str) -> Path:
    """The folder of a model of the hub: its weights and what describes them, and no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", EXPORTED_FILE]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        raise UserError(f"{HUB}{name} cannot be had from the hub: {str(error).splitlines()[0]}") from error


def package_data(folder: Path) -> Path:
    """A folder of YAML that lies beside the code. Raises UserError where an installation lost it."""
    if not any(folder.glob("*.yaml")):
        raise UserError(f"{folder} is missing or empty: this installation of pc_clip is not whole; install it again")
    return folder


def configs_folder() -> Path:
    """The recipes: configs/ of a checkout, or where an installation keeps them."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped(path: Path) -> Path:
    """A config as it was named, or where there is no such file, the recipe of that name: configs/example.yaml."""
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    recipe = configs_folder().joinpath(*parts)
    return recipe if not path.is_file() and not path.is_absolute() and recipe.is_file() else path
