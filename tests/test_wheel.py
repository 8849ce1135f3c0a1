"""A wheel holds what the program needs: it is built, unpacked, and used in a folder that is no checkout."""

import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
from pathlib import Path
import pytest
import pc_clip
assert Path(pc_clip.__file__).is_relative_to(Path("installed").resolve()), pc_clip.__file__
from pc_clip.__main__ import main
from pc_clip.core.errors import UserError
from pc_clip.core.paths import configs_folder
from pc_clip import evals
from pc_clip.data import attributes, example_sets
from pc_clip.interface import finetune, generate_diffs, run
from pc_clip.write import prompts
assert attributes.tasks_of("cifar100") == ["cifar100_size"]
assert prompts.read(prompts.FOLDER / "pairs.yaml").instruction
assert (evals.COMPARISONS / "cifar10.yaml").is_file()
assert (configs_folder() / "studies" / "quickstart.yaml").is_file()
assert len(example_sets.example_changes("val", 2).changes) == 2
assert pc_clip.load("example").embed_texts(["a red circle"]).shape == (1, 128)
for script in (finetune, generate_diffs, run):
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
main(["study", "configs/studies/quickstart.yaml", "--dry_run"])
with pytest.raises(UserError, match="train.lr"):
    finetune.main(["--config", "configs/example.yaml", "--train.lr", "x"])
"""


@pytest.mark.slow
def test_a_wheel_has_yaml_and_weights_and_its_commands_work(tmp_path):
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so the project's own files cannot be told from others")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("pc_clip/", "configs/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = "-m pip wheel --no-deps --no-build-isolation -q -w . ./source"
    done = subprocess.run([sys.executable, *shlex.split(build)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    environment = {"PYTHONPATH": "installed", "PATH": "", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python finetune.py" in done.stdout  # of the dry run
