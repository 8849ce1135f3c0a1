"""A wheel holds what the program needs: it is built, unpacked, and used in a folder that is no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
from pathlib import Path
import pc_clip
assert Path(pc_clip.__file__).is_relative_to(Path("installed").resolve()), pc_clip.__file__
from pc_clip.data import attributes, class_text
from pc_clip.evals import comparative
from pc_clip.write import prompts
from pc_clip.core.paths import configs_folder
assert attributes.tasks_of("cifar100") == ["cifar100_size"]
assert prompts.read(prompts.FOLDER / "pairs.yaml").instruction
assert (comparative.FOLDER / "cifar10.yaml").is_file()
assert (configs_folder() / "studies" / "quickstart.yaml").is_file()
assert pc_clip.load("example").embed_texts(["a red circle"]).shape == (1, 128)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so the project's own files cannot be told from others")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("pc_clip/", "configs/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, copy]
    found = subprocess.run(build, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "installed")
    return folder


def call(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": "installed", "PATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_yaml_beside_the_code_is_in_the_wheel(installed):
    found = call(installed, "-c", USE)
    assert found.returncode == 0, found.stderr


def test_the_commands_work_from_there(installed):
    called = call(installed, "-m", "pc_clip", "study", "configs/studies/quickstart.yaml", "--dry_run")
    assert "commands" in called.stdout, called.stderr
    called = call(installed, "-m", "pc_clip.interface.finetune", "--config", "configs/example.yaml", "--train.lr", "x")
    assert (called.returncode, "train.lr" in called.stderr) == (2, True), called.stderr
