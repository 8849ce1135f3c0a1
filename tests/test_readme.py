"""The commands of the README, run as they stand there, in order, in a copy of the project."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for line in re.findall(r"^    (python .*)$", README, re.MULTILINE)]
NEEDS_DATA = ("diffs_llama2_coco", "pc_clip_coco", "cifar100", "pc_clip.release.authors")
DESCRIBED = ("results", "simclip", "clip_po", "change")  # documents with tables of studies


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's own files, without what was built or downloaded beside them."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so the project's own files cannot be told from others")
    copy = tmp_path_factory.mktemp("copy")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


def call(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "https_proxy": "http://127.0.0.1:9",
        "CUDA_VISIBLE_DEVICES": "",
    }
    argv = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_commands_of_the_readme_do_what_it_says(project):
    """Three scripts with no argument, then the examples; the paper's run says what to fetch."""
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        found = call(command, project)
        if any(name in command for name in NEEDS_DATA):
            assert found.returncode == 2, f"{command}\n{found.stderr}"
            assert found.stderr.startswith("error: "), found.stderr
            assert re.search(r"[Ff]etch|are in annotations_trainval|no checkpoint at|--from|Run first", found.stderr), (
                found.stderr
            )
        else:
            assert found.returncode == 0, f"{command}\n{found.stderr}"
    results = json.loads((project / "results/example/difference-example-test.json").read_text())["metrics"]
    assert results["difference"] > 0.95  # python finetune.py, as it stands
    assert results["reversed"] > 0.9
    assert (project / "results/example/rank-example-test-size.png").is_file()
    assert (project / "llm_diffs/mine.jsonl").read_text().count("\n") == 1000
    assert (project / "runs/mine/model.safetensors").is_file()


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{name}.md" for name in DESCRIBED)])
def test_the_results_in_the_text_are_those_of_the_studies(document):
    """Every table says which file it is from, perhaps which data set, and holds its numbers; of test, if of several."""
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (docs/results/\w+\.csv)(?: ([\w/]+))? -->\n((?:\|.*\n)+)", text)
    assert len(tables) == text.count("<!-- docs/results/")
    for source, dataset, written in tables:
        table = pd.read_csv(ROOT / source)
        table = table[table.dataset == dataset] if dataset else table
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in written.splitlines()]
        header, rows = lines[0], lines[2:]
        for variant, *cells in rows:
            for metric, cell in zip(header[1:], cells):
                row = table[(table.variant == variant) & (table.metric == metric)]
                row = row if len(row) == 1 else row[row.dataset.str.endswith("/test")]
                if not cell:
                    continue
                figure, _, interval = cell.partition("[")
                shown = {"mean": figure.split("±")[0], "std": figure.partition("±")[2]}
                shown |= dict(zip(("low", "high"), interval.rstrip("]").split(",")))
                for name, number in shown.items():
                    if number:
                        assert float(number) == pytest.approx(100 * row[name].item(), abs=0.051), (
                            variant,
                            metric,
                            name,
                        )


def test_the_speeds_in_the_text_are_those_measured():
    """Each row names a figure of bench/results.csv and shows it with three digits."""
    (written,) = re.findall(r"<!-- bench/results.csv -->\n((?:\|.*\n)+)", README)
    measured = pd.read_csv(ROOT / "bench" / "results.csv").drop_duplicates("name", keep="last").set_index("name")
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in written.splitlines()[2:]]
    assert len(rows) > 5
    for name, shown in rows:
        assert shown == f"{measured.ratio[name]:.3g} {measured.unit[name]}", name


def test_every_file_and_option_the_readme_names_exists():
    for name in re.findall(r"`?((?:configs|pc_clip|docs|tests)/[\w/.-]+\.(?:yaml|py|md))", README):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
