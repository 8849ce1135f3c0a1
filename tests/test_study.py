"""Studies: what the YAML may say, what runs, what is not run again, what is chosen and written."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pc_clip.core.cli import configure, given
from pc_clip.core.config.train import METHODS, FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.interface import run
from pc_clip.report import study
from pc_clip.report.study import COLUMNS, Study, best, conduct, render, results_of, tabulate

ROOT = Path(__file__).parents[1]
REST = {"name": "s", "evaluations": [["--mode", "retrieve"]], "metrics": ["t2i_r1", "i2t_r1"]}
GRID = {
    "variant": "{similarity}-k{k}",
    "arguments": ["--config", "x.yaml", "--k={k}", "--n", 3, '{"a": 1}'],
    "values": {"similarity": ["text", "image"], "k": [2, 0.5]},
}


def read(**content) -> Study:
    """Through a file, as people write it."""
    Path("s.yaml").write_text(yaml.safe_dump(REST | {"grid": [GRID]} | content, sort_keys=False))
    return Study.read(Path("s.yaml"))


# -- the file ------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_after_the_variants():
    grids = read(variants={"base": None, "random": ["--config", "x.yaml"]})
    assert list(grids.variants) == ["base", "random", "text-k2", "text-k0.5", "image-k2", "image-k0.5"]
    assert grids.variants["image-k0.5"] == ["--config", "x.yaml", "--k=0.5", "--n", "3", '{"a": 1}']
    assert grids.members([4, 7])[:4] == [("base", None), ("random", 4), ("random", 7), ("text-k2", 4)]


def test_what_is_wrong_is_said():
    refused = [
        ({"grid": [GRID | {"variant": "{similarity}-k{kk}"}]}, r"two variants of study s are called 'text-k\{kk\}'"),
        ({"grid": [GRID | {"arguments": ["{kk}"]}]}, "variant 'text-k2' of study s names 'kk'"),
        ({"grid": [GRID | {"values": {"k": 2}}]}, "is not a study"),
        ({"grid": [{"variant": "a"}]}, "is not a study.*arguments"),
        ({"grid": []}, "study s has no variants"),
        ({"baselines": ["text-k3"]}, "baselines of study s names 'text-k3'"),
        ({"against": "text-k3"}, "against of study s names 'text-k3'.*text-k2"),
        ({"chosen_on": ["example/val"]}, "needs both `chosen_on` and `choose_by`"),
        ({"tradeoff": ["example/val:t2i_r5"]}, "tradeoff of study s names 't2i_r5'"),
        ({"chosen_on": ["example/val"], "choose_by": ["t2i_r5"]}, "choose_by of study s names 't2i_r5'"),
        ({"colour": "red"}, "is not a study.*colour"),
        ({"variants": {"b": ["{a}"], "a": []}}, "variant 'b' of study s names 'a'"),
        ({"variants": {"base": None, "b": ["{base}"]}}, "variant 'b' of study s names 'base'"),
    ]
    for content, message in refused:
        with pytest.raises(UserError, match=message):
            read(**content)
    with pytest.raises(UserError, match=r"no study at absent\.yaml.*quickstart\.yaml"):
        Study.read(Path("absent.yaml"))


def test_every_study_command_is_valid():
    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        shipped = Study.read(path)
        for arguments in filter(None, shipped.variants.values()):
            argv = [str(argument) for argument in arguments]
            method = given(argv)["method"]
            configure(FinetuneConfig, "finetune.py", "", argv, options={method: METHODS[method]})
        for arguments in shipped.evaluations:
            run.settings([str(argument) for argument in arguments])
        modes = {mode for words in shipped.evaluations for word in words for mode in str(word).split(",")}
        compares_with_the_start = modes & {"average", "change_retrieval"}  # start_* and subtraction_* are the base's
        blind = "caption" in modes and {"most_common_right", "shuffled_right"} <= set(shipped.metrics)
        assert "base" in shipped.variants or compares_with_the_start or blind, path


# -- what runs -----------------------------------------------------------------------------------------


def put(label: str, dataset: str = "x/test", name: str = "small", intervals: dict | None = None, **metrics) -> None:
    path = Path("results") / name / label / f"zeroshot-{dataset.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"model": label, "evaluation": "zeroshot", "dataset": dataset, "n": 4, "images": "one"}
    path.write_text(json.dumps(head | {"metrics": metrics, "intervals": intervals or {}}))


@pytest.fixture
def calls(monkeypatch):
    """Commands are noted instead of run; run.py leaves a result."""
    commands = []

    def note(command, log):
        commands.append(command)
        value = dict(pairwise(command))
        if command[0] == "run.py":
            put(value["--label"], name=Path(value["--out"]).name, zeroshot=0.5, difference=0.25)

    monkeypatch.setattr(study, "_call", note)
    return commands


def test_variants_are_trained_once_in_order_of_dependence(calls):
    variants = {"base": None, "text-1e-06": ["--x", 1], "then": ["--start", "{text-1e-06}"], "last": ["--s={then}"]}
    chain = Study("chain", [["--mode", "zeroshot"], ["--mode", "rank"]], ["zeroshot"], variants)
    conduct(chain, [0, 1], workers=4)
    trained = [c for c in calls if c[0] == "finetune.py"]
    names = [c[c.index("--name") + 1] for c in trained]
    for seed in (0, 1):
        first, then, last = [f"chain/{name}-seed{seed}" for name in list(variants)[1:]]
        assert [name for name in names if name.endswith(str(seed))] == [first, then, last]
        rest = ["--seed", str(seed), "--resume", "true"]  # what is finished is then checked, what is not goes on
        assert ["finetune.py", "--start", f"runs/{first}", "--name", then, *rest] in trained
        assert ["finetune.py", f"--s=runs/{then}", "--name", last, *rest] in trained
        both = [c for c in calls if f"runs/{last}" in c or last in c]
        assert [c[0] for c in both] == ["finetune.py", "run.py", "run.py"]
    assert sum(c[0] == "run.py" for c in calls) == 2 * 7 and len(trained) == 6


def test_a_failing_command_stops_the_study_with_its_log():
    Path("broken.py").write_text("import sys; print('error: the cat is out'); sys.exit(2)")
    broken = Study("small", [], ["zeroshot"], {"a": []}, prepare=[["broken.py", "--a", "b c"]])
    message = r"python broken\.py --a 'b c' failed with 2: .*the cat is out.*results/small/logs/prepare\.log"
    with pytest.raises(UserError, match=message):
        conduct(broken, [0], workers=1)


def test_a_variant_that_fails_stops_what_begins_with_it(monkeypatch):
    commands = []

    def fail(command, log):
        commands.append(command)
        raise UserError("a failed")

    monkeypatch.setattr(study, "_call", fail)
    with pytest.raises(UserError, match="a failed"):
        conduct(Study("small", [["--mode", "rank"]], ["r"], {"a": [], "b": ["{a}"]}), [0], workers=2)
    assert len(commands) == 1


# -- what is written -----------------------------------------------------------------------------------


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
    return lambda *arguments: study.main(["small.yaml", *arguments])


def test_a_study_writes_its_tables_and_its_picture(main, capsys):
    main("--seeds", "0", "1")
    table = pd.read_csv("results/small/table.csv")
    assert list(table.columns) == COLUMNS
    assert COLUMNS == ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]
    assert dict(zip(table.variant, table.seeds)) == {"base": 1, "a": 2, "b-1": 2}
    text = Path("results/small/table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "Nothing to compare with base" in text  # the results have no number for each image
    assert Path("results/small/comparison.csv").read_text().count("\n") == 1
    assert Path("results/small/table.png").stat().st_size > 5000


def test_a_tradeoff_of_figures_that_are_not_there_is_said(main):
    content = yaml.safe_load(Path("small.yaml").read_text()) | {"tradeoff": ["y/test:zeroshot", "x/test:difference"]}
    Path("small.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="tradeoff of study small names 'y/test:zeroshot'. Did you mean 'x/test"):
        main()


def test_a_dry_run_prints_each_command_and_runs_none(main, calls, capsys):
    main("--seeds", "0", "1", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert calls == []
    assert "python finetune.py --k 1 --name small/b-1-seed1 --seed 1 --resume true" in lines
    assert sum(line.startswith("python run.py") for line in lines) == 5 and len(lines) == 9


def test_some_variants_are_run_in_the_order_they_are_named(main, calls, capsys):
    main("--variants", "b-1", "base", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--label ")[-1].split()[0] for line in lines] == ["python", "b-1-seed0", "base"]
    with pytest.raises(UserError, match="--variants of study small names 'b-3'"):
        main("--variants", "b-3")


def test_ambiguous_missing_or_broken_results_are_errors():
    small = Study("small", [], ["r1"], {"base": None})
    with pytest.raises(UserError, match="no such file or folder: results/small/base"):
        results_of(small, [0])
    put("base", r1=0.8)
    copy = Path("results/small/base/copy.json")
    copy.write_bytes(Path("results/small/base/zeroshot-x-test.json").read_bytes())
    with pytest.raises(UserError, match="hold r1 of base twice"):
        tabulate(small, results_of(small, [0]))
    copy.write_text(json.dumps(json.loads(copy.read_text()) | {"evaluation": "rank", "weights": "others"}))
    with pytest.raises(UserError, match="holds results of several models"):
        results_of(small, [0])
    copy.unlink()
    with pytest.raises(UserError, match="hold none of r9"):
        tabulate(Study("small", [], ["r9"], {"base": None}), results_of(small, [0]))
    copy.write_text("{")
    with pytest.raises(UserError, match=r"copy\.json: it is cut short.*run the study again"):
        results_of(small, [0])


def choosing(**more) -> tuple[Study, pd.DataFrame]:
    """b is better on validation, a on test; the baselines are best of all."""
    figures = {"base": (0.99, 0.1), "random-seed0": (0.9, 0.2), "a-seed0": (0.3, 0.7), "b-seed0": (0.5, 0.6)}
    for label, (val, test) in figures.items():
        put(label, "x/val", r1=val, r5=val)
        put(label, "x/test", r1=test, r5=test, intervals={"r1": [test - 0.01, test + 0.01]})
    variants = {"base": None, "random": [], "a": [], "b": []}
    content = {"chosen_on": ["x/val"], "choose_by": ["r1", "r5"], "baselines": ["base", "random"]} | more
    small = Study("small", [], ["r1", "r5"], variants, **content)
    return small, tabulate(small, results_of(small, [0]))


def test_the_choice_is_made_on_validation_among_those_that_compete():
    small, table = choosing()
    assert set(table.dataset) == {"x/val", "x/test"}  # the CSV has both
    assert best(small, table) == ("b", pytest.approx(0.5))
    text = render(small, table, None)
    assert "30.0" not in text  # a's figure on validation
    assert "Best by the mean of r1 and r5 on x/val, baselines apart: b (50.0)." in text
    assert "70.0 [69.0, 71.0]" in text
    assert "30.0" in render(small, table[table.dataset == "x/val"], None)  # where there is no other data set


def test_selection_is_optional_and_an_impossible_one_says_why():
    test, val = sorted(
        render(*choosing(chosen_on=[], choose_by=[]), None).split("x/val"), key=lambda text: "30.0" in text
    )
    assert "70.0" in test and "30.0" in val
    small, table = choosing()
    with pytest.raises(UserError, match="a has no r5 on x/val"):
        best(small, table[(table.variant != "a") | (table.metric != "r5")])
    with pytest.raises(UserError, match="a has no r1 and r5 on y/val.*measured: x/test, x/val"):
        best(*choosing(chosen_on=["y/val"]))
