"""Where benchmarks put their figures: limits, digits, rows of a machine, and what was missed."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import record
from record import Figure, Missed

BENCH = Path(record.__file__).parent
NAN = math.nan


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "HERE", tmp_path)
    return tmp_path


def rows(folder) -> dict[str, dict]:
    return pd.read_csv(folder / "results.csv").set_index("name").to_dict("index")


def page(folder) -> dict[str, list[str]]:
    """The rows of RESULTS.md, by name."""
    lines = (folder / "RESULTS.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: rest for name, *rest in cells}


def test_limits_of_both_kinds_are_shown_judged_and_returned(folder, capsys):
    missed = record.record([
        Figure("fast", 6.0, 5, "x"),
        Figure("slow", 4.5, 5, "x", "a note"),
        Figure("small", 7.0, NAN, "GB", most=8),
        Figure("large", 9.0, NAN, "GB", most=8),
        Figure("between", 3.0, 2, "x", most=4),
        Figure("above", 5.0, 2, "x", most=4),
        Figure("free", 1.0, NAN, "s"),
    ])  # fmt: skip
    assert missed == [
        Missed("slow", 4.5, "at least 5 x"),
        Missed("large", 9.0, "at most 8 GB"),
        Missed("above", 5.0, "at least 2, at most 4 x"),
    ]
    assert page(folder) == {
        "what": ["figure", "asked", "met", ""],
        "fast": ["6 x", "at least 5", "yes", ""],
        "slow": ["4.5 x", "at least 5", "**no**", "a note"],
        "small": ["7 GB", "at most 8", "yes", ""],
        "large": ["9 GB", "at most 8", "**no**", ""],
        "between": ["3 x", "at least 2, at most 4", "yes", ""],
        "above": ["5 x", "at least 2, at most 4", "**no**", ""],
        "free": ["1 s", "", "", ""],
    }
    assert "slow: 4.5 x, at least 5: MISSED (a note)" in capsys.readouterr().out.splitlines()


def test_a_limit_that_is_reached_exactly_is_met():
    assert not record.record([Figure("a", 5, 5, "x"), Figure("b", 8, NAN, "GB", most=8)])


def test_a_figure_that_is_no_number_misses_its_limits_and_only_those(folder):
    missed = record.record([Figure("a", NAN, 1, "x"), Figure("b", NAN, NAN, "x", most=1), Figure("c", NAN, NAN, "x")])
    assert [each.name for each in missed] == ["a", "b"]
    assert page(folder)["a"][2] == "**no**"


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0.99951, 0.99951), (0.99989951, 0.9999), (0.9998994, 0.999899), (123456.7, 123457), (2e-7, 2e-7)],
)
def test_six_digits_are_kept(folder, value, kept):
    (missed,) = record.record([Figure("cosine", value, 1e9, "x")])
    assert missed.value == kept
    assert rows(folder)["cosine"]["ratio"] == kept
    assert float(page(folder)["cosine"][0].split()[0]) == kept


def test_a_limit_missed_in_the_fourth_decimal_is_seen(folder):
    """Three decimals would have shown 1."""
    (missed,) = record.record([Figure("cosine", 0.99951, 0.9999, "cosine")])
    assert missed == ("cosine", 0.99951, "at least 0.9999 cosine")
    assert page(folder)["cosine"][:3] == ["0.99951 cosine", "at least 0.9999", "**no**"]


# -- rows ----------------------------------------------------------------------------------------------


def test_a_figure_replaces_its_older_one_of_the_same_machine_alone(folder, monkeypatch):
    for machine, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        monkeypatch.setattr(record, "describe_machine", lambda machine=machine: machine)
        record.record([Figure("a", value, NAN, "x"), Figure(f"only {value:g}", value, NAN, "x")])
    found = pd.read_csv(folder / "results.csv")
    kept = sorted(zip(found.machine, found.name, found.ratio))
    assert kept == [
        ("one", "a", 3.0), ("one", "only 1", 1.0), ("one", "only 3", 3.0), ("two", "a", 2.0), ("two", "only 2", 2.0),
    ]  # fmt: skip
    said = (folder / "RESULTS.md").read_text()
    assert said.count("## one, ") == 1
    assert said.count("## two, ") == 1


def test_rows_from_before_there_were_upper_limits_are_kept(folder):
    (folder / "results.csv").write_text(
        'name,ratio,floor,unit,note,date,machine\n"old",7.205,4.0,x,"a, b",2026-01-02,"Linux, 2 CPU cores"\n'
    )
    record.record([Figure("new", 1.0, NAN, "GB", most=8)])
    assert pd.read_csv(folder / "results.csv").columns.tolist() == record.COLUMNS
    old = rows(folder)["old"]
    assert math.isnan(old.pop("most"))
    assert old == {"ratio": 7.205, "floor": 4.0, "unit": "x", "note": "a, b", "date": "2026-01-02",
                   "machine": "Linux, 2 CPU cores"}  # fmt: skip
    assert rows(folder)["new"]["most"] == 8
    assert page(folder)["old"] == ["7.205 x", "at least 4", "yes", "a, b"]
    assert "## Linux, 2 CPU cores, 2026-01-02" in (folder / "RESULTS.md").read_text()


def test_the_table_of_the_repository_is_what_its_rows_say():
    table = pd.read_csv(BENCH / "results.csv")
    assert table.columns.tolist() == record.COLUMNS
    assert (BENCH / "RESULTS.md").read_text() == record.render(table)


def test_the_machine_says_whether_it_multiplies_in_bf16(monkeypatch):
    known = {"cpu_name": "Some  Chip ", "avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(record.torch.cpu, "get_capabilities", lambda: known)
    assert "CPU cores (Some Chip, avx512_bf16 yes, amx_bf16 no), " in record.describe_machine()
    monkeypatch.setattr(record.torch.cpu, "get_capabilities", lambda: {})
    assert "avx512_bf16 no, amx_bf16 no), " in record.describe_machine()


# -- bench/run.py --------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Runs bench/run.py on parts made of the figures given."""
    spec = importlib.util.spec_from_file_location("bench_run", BENCH / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(**parts):
        for name, figures in parts.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(figures=lambda threads, figures=figures: figures))
        monkeypatch.setattr(sys, "argv", ["run.py", "--only", *parts])
        module.main()

    return call


def test_run_names_what_was_missed_in_any_part_and_exits_with_1(run, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(step=[Figure("speed", 3.0, 5, "x"), Figure("good", 6, 5, "x")], data=[Figure("start", 9, NAN, "s", most=5)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "missed: speed is 3, asked was at least 5 x",
        "missed: start is 9, asked was at most 5 s",
    ]
    assert set(rows(folder)) == {"speed", "good", "start"}


def test_run_ends_well_where_nothing_was_missed(run, capsys):
    run(
        step=[Figure("speed", 6.0, 5, "x")], scaling=[Figure("loss", 1, NAN, "x", most=10), Figure("free", 0, NAN, "x")]
    )
    assert not capsys.readouterr().err
