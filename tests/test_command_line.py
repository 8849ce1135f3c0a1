"""The command line answers at once: settings are read and checked before torch is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pc_clip.core.errors import UserError
from pc_clip.core.paths import package_data
from pc_clip.interface import finetune, generate_diffs, run

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "open_clip", "transformers", "accelerate", "pandas", "sklearn")
PROGRAM = """
import sys
from pc_clip.core.errors import run_script
from pc_clip.interface import {module}
sys.argv[1:] = {argv}
try:
    run_script({module}.main)
finally:
    print(sorted(set({heavy}) & set(sys.modules)), file=sys.stderr)
"""


def call(module: str, *argv: str) -> subprocess.CompletedProcess:
    code = PROGRAM.format(module=module, argv=list(argv), heavy=HEAVY)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "argv", "code", "message"),
    [
        ("finetune", ["--help"], 0, "--retain.texts"),
        ("generate_diffs", ["--help"], 0, "--server.url"),
        ("run", ["--checkpoint", "absent.pt"], 2, "no checkpoint at absent.pt"),
        ("finetune", ["--method", "dreaming"], 2, "method is 'dreaming'"),
        ("generate_diffs", ["--n_pair", "3"], 2, "Did you mean 'n_pairs'"),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(module, argv, code, message):
    actual = call(module, *argv)
    assert actual.returncode == code, actual.stderr
    assert message in actual.stdout + actual.stderr
    assert actual.stderr.splitlines()[-1] == "[]"


def test_help_of_run_shows_the_modes_settings():
    short, mode, every = (
        call("run", *argv).stdout for argv in (["--help"], ["--mode", "caption", "--help"], ["--help-all"])
    )
    assert "--caption.beams" not in short and "--seed" in short
    assert "--caption.beams" in mode and "--seed" not in mode and "--probe.shots" not in mode
    assert all(flag in every for flag in ("--caption.beams", "--seed", "--probe.shots", "--comparative.server.url"))
    assert "python run.py --dataset cifar100 --checkpoint ckpt.pt" in short and len(short.splitlines()) < 120


def test_an_installation_that_lost_its_yaml_says_so(tmp_path):
    with pytest.raises(UserError, match="is missing or empty: this installation of pc_clip is not whole"):
        package_data(tmp_path / "prompts")


def test_a_flag_that_another_setting_leaves_without_effect_is_refused():
    kept = []
    for script, argv, message in [
        (finetune.main, ["--sampler.share", "0.5"], "--sampler.share has no effect with sampler.kind random"),
        (finetune.main, ["--train.decay", "0.5"], "--train.decay has no effect with train.schedule cosine"),
        (finetune.main, ["--retain.texts", "0", "--retain.batch", "8"], "has no effect with retain.weights {}"),
        (finetune.main, ["--pairwise.anchor", "2"], "pairwise.anchor is called retain.texts now"),
        (finetune.main, ["--pairwise.keep_by", "similar"], "has no effect with pairwise.keep 1.0"),
        (
            run.main,
            ["--mode", "zeroshot", "--difference.draws", "3"],
            "has no effect with --mode zeroshot",
        ),
        (generate_diffs.main, ["--writer", "rules", "--server.url", "http://x"], "has no effect with writer rules"),
    ]:
        with pytest.raises(UserError) as error:
            script(argv)
        kept += [str(error.value)] * (re.search(message, str(error.value)) is None)
    assert not kept


def test_output_that_is_no_longer_read_ends_without_a_traceback():
    code = "from pc_clip.core.errors import run_script; run_script(lambda: print('x\\n' * 10**6))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
