"""Studies: what runs, what is not run again, and what is written."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pc_clip.core.config.train import METHODS
from pc_clip.core.errors import UserError
from pc_clip.report import study
from pc_clip.report.study import Job, conduct
from pc_clip.report.study_config import Study
from pc_clip.report.study_table import COLUMNS

ROOT = Path(__file__).parents[1]
SMALL = Study(
    name="small",
    variants={"base": None, "a": ["--train.lr", "1"], "b": []},
    evaluations=[["--mode", "zeroshot"]],
    metrics=["difference", "zeroshot"],
)


def write_result(label: str, **metrics: float) -> None:
    path = Path("results/small") / label / "zeroshot-x.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": label, "evaluation": "zeroshot", "dataset": "x", "metrics": metrics, "n": 4}))


@pytest.fixture
def calls(monkeypatch):
    """Commands are noted instead of run; run.py leaves a result, finetune.py a model."""
    found = []

    def note(command, log):
        found.append(command)
        value = dict(pairwise(command))
        if command[0] == "run.py":
            write_result(value["--label"], zeroshot=0.5, difference=0.25 + 0.1 * len(value["--label"]) % 3 / 10)
        elif command[0] == "finetune.py":
            folder = Path("runs") / value["--name"]
            folder.mkdir(parents=True)
            (folder / "model.safetensors").touch()

    monkeypatch.setattr(study, "_call", note)
    return found


def test_each_variant_is_trained_once_a_seed_and_the_base_never(calls):
    conduct(SMALL, [0, 1], workers=2)
    trained = [c for c in calls if c[0] == "finetune.py"]
    assert len(trained) == 4
    assert sum(c[0] == "run.py" for c in calls) == 5
    assert {c[c.index("--seed") + 1] for c in trained} == {"0", "1"}


def test_what_a_run_begins_with_is_trained_before_it(calls):
    chain = Study(
        name="chain",
        variants={"first": [], "then": ["--model.start", "{first}"], "last": ["--model.start", "{then}"]},
        evaluations=[["--mode", "zeroshot"]],
        metrics=["zeroshot"],
    )
    conduct(chain, [0, 1], workers=4)
    trained = [value for c in calls if c[0] == "finetune.py" for value in [dict(pairwise(c))]]
    order = [value["--name"] for value in trained]
    for seed in (0, 1):
        assert [n for n in order if n.endswith(str(seed))] == [
            f"chain/{name}-seed{seed}" for name in ("first", "then", "last")
        ]
    starts = {value["--name"]: value.get("--model.start") for value in trained}
    assert starts["chain/last-seed1"] == "runs/chain/then-seed1"


def test_a_study_goes_on_where_it_was_interrupted(calls):
    job = Job(SMALL, "a", 0)
    assert "--resume" not in job.commands()[0]
    job.run.mkdir(parents=True)
    (job.run / "state.safetensors").touch()
    assert job.commands()[0][-2:] == ["--resume", "true"]
    (job.run / "model.safetensors").touch()
    assert "--resume" not in job.commands()[0]  # finetune.py checks that the finished run is this one


@pytest.fixture
def main(calls):
    """The command line, for a study of two runs and a baseline."""
    content = {
        "name": "small",
        "variants": {"base": None, "a": ["--train.lr", "1"]},
        "grid": [{"variant": "b-{k}", "arguments": ["--k", "{k}"], "values": {"k": [1]}}],
        "evaluations": [["--mode", "zeroshot"]],
        "metrics": ["zeroshot", "difference"],
        "against": "base",
    }
    Path("small.yaml").write_text(yaml.safe_dump(content))

    def run(*arguments: str) -> None:
        study.main(["small.yaml", *arguments])

    return run


def test_a_study_writes_its_tables_its_picture_and_a_page(main, capsys):
    main("--seeds", "0", "1")
    table = pd.read_csv("results/small/table.csv")
    assert list(table.columns) == COLUMNS
    assert list(table.columns)[:7] == ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds"]
    assert dict(zip(table.variant, table.seeds)) == {"base": 1, "a": 2, "b-1": 2}
    text = Path("results/small/table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "Nothing to compare with base" in text  # the results have no number for each image
    assert Path("results/small/comparison.csv").read_text().count("\n") == 1
    assert Path("results/small/table.png").stat().st_size > 5000
    assert Path("results/small/report.html").is_file()


def test_only_runs_what_matches_and_leaves_the_tables_as_they_were(main, calls, capsys):
    main("--only", "b-*")
    assert [c[c.index("--name") + 1] for c in calls if c[0] == "finetune.py"] == ["small/b-1-seed0"]
    assert "| b-1 " in capsys.readouterr().out
    assert not list(Path("results/small").glob("table.*"))
    with pytest.raises(UserError, match=r"--only c\* matches no variant.*b-1"):
        main("--only", "c*")


def test_a_dry_run_prints_each_command_and_how_many_they_are_and_runs_none(main, calls, capsys):
    folder = Path("runs/small/a-seed0")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    main("--seeds", "0", "1", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert calls == []
    assert "python finetune.py --k 1 --name small/b-1-seed1 --seed 1" in lines
    assert sum(line.startswith("python run.py") for line in lines) == 5
    assert lines[-1].startswith(
        "9 commands: 0 to prepare, 4 trainings (1 of them finished), 5 evaluations of 3 variants"
    )


def test_a_command_that_fails_stops_the_study_with_its_last_lines(tmp_path):
    Path("broken.py").write_text("import sys; print('error: the cat is out'); sys.exit(2)")
    with pytest.raises(UserError, match=r"broken\.py failed with 2.*the cat is out.*log"):
        study._call(["broken.py"], Path("log"))


def test_a_file_that_is_no_study_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match="no study at.*quickstart.yaml"):
        Study.read(tmp_path / "absent.yaml")
    (tmp_path / "x.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="is no study"):
        Study.read(tmp_path / "x.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_project_names_configs_that_exist(path):
    found = Study.read(path)
    for arguments in filter(None, found.variants.values()):
        config = ROOT / arguments[arguments.index("--config") + 1]
        assert yaml.safe_load(config.read_text())["method"] in METHODS
    modes = {mode for words in found.evaluations for word in words for mode in str(word).split(",")}
    compares_with_the_start = modes & {"average", "change_retrieval"}  # start_* and subtraction_* are the base's
    blind = "caption" in modes and {"most_common_right", "shuffled_right"} <= set(found.metrics)
    assert "base" in found.variants or compares_with_the_start or blind
