"""The commands of the README and of docs/training.md, and every number of the documents against its file."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from accelerate.state import AcceleratorState

from pc_clip.core.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING, SPEED = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("training", "speed"))
LINES = re.findall(r"^    (python .*)$", README + TRAINING, re.MULTILINE)
COMMANDS = [line.split("  #")[0].strip() for line in LINES]
NEEDS_DATA = ("diffs_llama2_coco", "pc_clip_coco", "cifar100", "pc_clip release", "server.url")
DESCRIBED = ("results", "simclip", "clip_po", "change")  # documents with tables of studies
MAINS = {
    "generate_diffs.py": "pc_clip.interface.generate_diffs",
    "finetune.py": "pc_clip.interface.finetune",
    "run.py": "pc_clip.interface.run",
    "-m pc_clip": "pc_clip.__main__",
}


def call(command: str) -> None:
    """A line of the README in this process; of finetuning four steps, of the sentences' images few."""
    (script,) = [name for name in MAINS if command.startswith(f"python {name}")]
    argv = shlex.split(command.removeprefix(f"python {script}"))
    if script == "finetune.py":
        argv += ["--train.steps", "4"]
    if script == "generate_diffs.py" and "--task" not in argv and "rank" not in command:
        argv += ["--n_images", "300"]  # of 3,000
    importlib.import_module(MAINS[script]).main(argv)


@pytest.mark.slow
def test_the_commands_of_the_readme_do_what_it_says(small_example, monkeypatch):
    """Three scripts with no argument, then the examples; what needs data says in one line what to fetch."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", "")  # no Java, whose metrics have a test of their own
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        AcceleratorState._reset_state(reset_partial_state=True)
        if any(name in command for name in NEEDS_DATA):
            with pytest.raises(UserError) as error:
                call(command)
            message = str(error.value)
            assert "\n" not in message
            assert re.search(r"[Ff]etch|annotations_trainval|no checkpoint at|--from|Run first", message), message
        else:
            call(command)
    results = json.loads(Path("results/example/difference-example-test.json").read_text())["metrics"]
    assert {"difference", "two_way", "reversed", "caption_subtraction"} <= results.keys()
    assert Path("results/example/rank-example-test-size.png").is_file()
    assert Path("llm_diffs/mine.jsonl").read_text().count("\n") == 1000
    assert Path("runs/mine/model.safetensors").is_file()


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{name}.md" for name in DESCRIBED)])
def test_the_results_in_the_text_are_those_of_the_studies(document):
    """Every table says which file it is from, perhaps which data set, and holds its numbers; of test, if of several."""
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (docs/results/\w+\.csv)(?: ([\w/]+))? -->\n((?:\|.*\n)+)", text)
    assert len(tables) == text.count("<!-- docs/results/")
    wrong = []
    for source, dataset, written in tables:
        table = pd.read_csv(ROOT / source)
        table = table[table.dataset == dataset] if dataset else table
        (_, *metrics), _, *rows = cells(written)
        for variant, *figures in rows:
            for metric, shown in [pair for pair in zip(metrics, figures) if pair[1]]:
                row = table[(table.variant == variant) & (table.metric == metric)]
                row = row if len(row) == 1 else row[row.dataset.str.endswith("/test")]
                mean, std, low, high = re.fullmatch(r"([^ ]+)(?: ± ([^ ]+))?(?: \[(.+), (.+)\])?", shown).groups()
                for name, number in {"mean": mean, "std": std, "low": low, "high": high}.items():
                    if number and float(number) != pytest.approx(100 * row[name].item(), abs=0.051):
                        wrong.append((source, variant, metric, name, number))
    assert not wrong


def cells(table: str) -> list[list[str]]:
    """The cells of a table in Markdown, by row."""
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def test_the_speeds_in_the_text_are_those_measured():
    """Each row names a figure of bench/results.csv and shows it with three digits."""
    tables = re.findall(r"<!-- bench/results.csv -->\n((?:\|.*\n)+)", SPEED)
    measured = pd.read_csv(ROOT / "bench" / "results.csv").drop_duplicates("name", keep="last").set_index("name")
    rows = [row for table in tables for row in cells(table)[2:]]
    assert len(rows) > 20
    for name, shown in rows:
        assert shown == f"{measured.ratio[name]:.3g} {measured.unit[name]}", name


def test_every_file_and_target_that_the_documents_name_exists():
    every = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))]
    every.append((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for name in re.findall(r"`?((?:configs|pc_clip|docs|tests)/[\w/.-]+\.(?:yaml|py|md))", "\n".join(every)):
        assert (ROOT / name).is_file() or re.search(r"[A-Z]{3}", name), name
    for target in re.findall(r"^    make (\w+)", "\n".join(every), re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
