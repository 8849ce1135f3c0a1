"""Studies: what runs, what is not run again, and a table whose numbers are means over the seeds."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pc_clip import methods, study
from pc_clip.errors import UserError
from pc_clip.study import COLUMNS, Job, Study, conduct, plot, render, tabulate

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
    table = conduct(SMALL, [0, 1], workers=2)
    trained = [c for c in calls if c[0] == "finetune.py"]
    assert len(trained) == 4
    assert sum(c[0] == "run.py" for c in calls) == 5
    assert {c[c.index("--seed") + 1] for c in trained} == {"0", "1"}
    assert list(table.columns) == COLUMNS
    assert dict(zip(table.variant, table.seeds)) == {"base": 1, "a": 2, "b": 2}


def test_a_study_goes_on_where_it_was_interrupted(calls):
    job = Job(SMALL, "a", 0)
    assert "--resume" not in job.commands()[0]
    job.run.mkdir(parents=True)
    (job.run / "state.safetensors").touch()
    assert job.commands()[0][-2:] == ["--resume", "true"]
    (job.run / "model.safetensors").touch()
    assert "--resume" not in job.commands()[0]  # finetune.py checks that the finished run is this one


def test_mean_and_sample_deviation_over_seeds():
    write_result("base", zeroshot=0.8, difference=0.5, other=1.0)
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        write_result(f"a-seed{seed}", zeroshot=value, difference=0.9)
        write_result(f"b-seed{seed}", zeroshot=0.6, difference=0.9)
    table = tabulate(SMALL, [0, 1, 2])
    row = table[(table.variant == "a") & (table.metric == "zeroshot")].iloc[0]
    assert (row["mean"], row["std"], row.seeds) == (pytest.approx(0.8), pytest.approx(0.1), 3)
    assert set(table.metric) == {"zeroshot", "difference"}
    saved = pd.read_csv("results/small/table.csv")
    assert saved[saved.variant == "base"]["std"].isna().all()
    text = render(SMALL, table)
    assert "80.0 ± 10.0" in text
    plot(SMALL, table, Path("table.png"))
    assert Path("table.png").stat().st_size > 5000


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
        assert yaml.safe_load(config.read_text())["method"] in methods.names()
    compares_with_the_start = any("average" in evaluation for evaluation in found.evaluations)  # start_* is the base
    assert "base" in found.variants or compares_with_the_start
