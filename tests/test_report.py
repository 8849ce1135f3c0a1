"""Results: the right numbers on the terminal, in the page, in Markdown and CSV; nothing left out without a word."""

import base64
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from pc_clip.core.errors import UserError
from pc_clip.report import page, results

EVIL = "<script>alert(1)</script>"


def put(label: str, file: str = "zeroshot-x", folder: str = "results", **content) -> Path:
    path = Path(folder) / label / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation = {"evaluation": file.split("-")[0], "dataset": "x", "metrics": {"zeroshot": 0.5}, "n": 40}
    path.write_text(json.dumps({"model": label} | evaluation | content))
    return path


def log_run(label: str, rows: list[dict], folder: str = "runs") -> Path:
    path = Path(folder) / label / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def study() -> None:
    """A pretrained model with an interval, and one variant with three seeds whose deviation is 10 points."""
    metrics = {"zeroshot": 0.8, "zeroshot_shape": 0.9, "spearman": -0.125}
    put("base", metrics=metrics, intervals={"zeroshot": [0.75, 0.8449]})
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        put(f"tuned-seed{seed}", metrics=metrics | {"zeroshot": value, "zeroshot_shape": 0.25 * seed})


# -- numbers -------------------------------------------------------------------------------------------


def test_the_same_numbers_stand_in_page_markdown_and_csv():
    study()
    path, left_out = page.write([Path("results")])
    assert (path, left_out) == (Path("results/report.html"), [])
    html, markdown = path.read_text(), path.with_suffix(".md").read_text()
    for text in ("80.0 [75.0, 84.5]", "80.0 ± 10.0", "25.0 ± 25.0", "−0.12 ± 0"):
        assert text in html and text in markdown, text
    assert re.search(r"^\| base \(baseline\) +\| 80\.0 \[75\.0, 84\.5\] +\|$", markdown, re.MULTILINE)
    csv = pd.read_csv(path.with_suffix(".csv")).set_index(["variant", "metric"])
    tuned, base = csv.loc[("tuned", "zeroshot")], csv.loc[("base", "zeroshot")]
    assert (tuned["mean"], tuned["std"], tuned.seeds) == (pytest.approx(0.8), pytest.approx(0.1), 3)
    assert (base["mean"], base.low, base.high, base.n, base.seeds) == (0.8, 0.75, 0.8449, 40, 1)
    assert base.baseline and not tuned.baseline
    assert pd.isna(base["std"])


def test_how_figures_are_written():
    cases = {
        (0.876, True): "87.6", (-0.0001, True): "0.0", (-0.05, True): "−5.0", (89.0, False): "89",
        (0.16668, False): "0.17", (float("nan"), True): "–",
    }  # fmt: skip
    assert {case: results.figure(*case) for case in cases} == cases
    shares = {"zeroshot_count": 1.0, "cider": 1.5, "images": 1.0, "spearman_size": 0.5, "median": 3.0}
    assert [name for name, value in shares.items() if results.is_share(name, [0.5, value])] == [
        "zeroshot_count",
        "cider",
    ]


def test_intervals_are_averaged_over_seeds():
    put("a-seed0", metrics={"r1": 0.5, "r5": 0.5}, intervals={"r1": [0.4, 0.6], "r5": [0.4, 0.6]})
    put("a-seed1", metrics={"r1": 0.7, "r5": 0.5}, intervals={"r1": [0.6, 0.9]})
    rows = results.summarise(results.long_table(results.read([Path("results")])[0])).set_index("metric")
    assert rows.loc["r1", ["low", "high"]].tolist() == pytest.approx([0.5, 0.75])
    assert rows.loc["r5", ["low", "high"]].isna().all()
    assert results.cells(rows, intervals=True)["r1"] == "60.0 ± 14.1 [50.0, 75.0]"


def test_the_baseline_is_first_and_names_sort_naturally():
    for label in ("k16", "k2-seed9", "k2-seed10", "k4", "ViT-B-32-pretrained"):
        put(label)
    csv = page.write([Path("results")])[0].with_suffix(".csv")
    assert pd.read_csv(csv).variant.tolist() == ["ViT-B-32-pretrained", "k2", "k4", "k16"]
    page.write([Path("results")], baseline="k4")
    assert pd.read_csv(csv).variant.tolist() == ["k4", "ViT-B-32-pretrained", "k2", "k16"]
    with pytest.raises(UserError, match=r"--baseline is 'k5'.*'k4'"):
        page.write([Path("results")], baseline="k5")


def test_two_studies_that_use_one_label_are_kept_apart():
    put("base", folder="results/a", metrics={"zeroshot": 0.25})
    put("base", folder="results/b", metrics={"zeroshot": 0.75})
    csv = pd.read_csv(page.write([Path("results")])[0].with_suffix(".csv"))
    assert dict(zip(csv.variant, csv["mean"])) == {"a/base": 0.25, "b/base": 0.75}
    put("base", "zeroshot-copy", folder="results/b")
    with pytest.raises(UserError, match="hold zeroshot of b/base twice"):
        page.write([Path("results")])


def test_the_terminal_table_has_metrics_by_model(capsys):
    for label, value in (("base", 0.25), ("tuned", 0.5)):
        put(label, "retrieve-x", metrics={"t2i_r1": value, "cosine": -0.5}, intervals={"t2i_r1": [0.2, 0.6]})
    put("base", "difference-x", metrics={"sign": 0.5})
    results.show(results.read([Path("results")])[0])
    difference, retrieve = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    assert difference[0] == "difference on x (n = 40)" and difference[2].split() == ["sign", "50.0"]
    assert retrieve[1].split() == ["base", "tuned"]
    assert retrieve[2].split() == ["t2i_r1", "25.0", "[20.0,", "60.0]", "50.0", "[20.0,", "60.0]"]
    assert retrieve[3].split() == ["cosine", "−0.50", "−0.50"]


# -- what is in the folders ----------------------------------------------------------------------------


def test_what_is_cut_short_is_named_and_stops_nothing(capsys):
    study()
    Path("results/base/cut.json").write_text('{"model": "ba')
    Path("results/base/text.json").write_bytes(b"\xff\xfe\x00")
    put("odd", metrics={"zeroshot": "high"})
    put("base", "pictured-x", pictures=[{"file": "absent.png", "alt": "a"}])
    log_run("tuned-seed0", [{"step": 1, "loss": 2.0}]).open("a").write('{"step": 2, "lo')
    page.main(["results", "runs"])
    printed = capsys.readouterr()
    assert printed.out.split() == ["results/report.html", "results/report.md", "results/report.csv"]
    for text in (Path("results/report.html").read_text(), printed.err):
        assert "results/base/cut.json: it is cut short or no JSON" in text
        assert "results/base/text.json: it is cut short or no JSON" in text
        assert "results/odd/zeroshot-x.json: its metrics are not all numbers" in text
        assert "results/base/absent.png: it is not there" in text
        assert "runs/tuned-seed0/metrics.jsonl: 1 of its 2 lines are broken" in text


def test_nothing_to_report_is_an_error_that_says_what_was_found():
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        page.write([Path("nowhere")])
    Path("empty").mkdir()
    Path("empty/x.json").write_text("{")
    with pytest.raises(UserError, match=r"no results and no runs in empty.*empty/x\.json: it is cut short"):
        page.write([Path("empty")])
    with pytest.raises(UserError, match=r"empty/log\.jsonl: it is cut short or no JSON"):
        page.write([log_run("", [{"step": 1}, {"step": 2}], "empty").rename("empty/log.jsonl")])
    Path("other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: it is not a result of run\.py"):
        page.write([Path("other.json")])


def test_where_it_is_written():
    file = put("base")
    assert page.write([file])[0] == Path("results/base/report.html")
    assert page.write([Path("results")], Path("new"))[0] == Path("new/report.html")


# -- the page ------------------------------------------------------------------------------------------


def test_results_of_different_images_are_named(capsys):
    put("a", images="one", metrics={"zeroshot": 0.25})
    put("b", images="two", metrics={"zeroshot": 0.75})
    page.main(["results"])
    assert "not to be compared: zeroshot on x: a and b saw different images" in capsys.readouterr().err


def test_the_classes_most_confused_and_the_change():
    def asked(table: list) -> dict:
        return {"details": {"colour": {"classes": ["red", "blue"], "confusion": table}}}

    put("base", **asked([[8, 2], [0, 10]]))
    put("t-seed0", **asked([[4, 6], [0, 10]]))
    put("t-seed1", **asked([[8, 2], [2, 8]]))
    html = page.write([Path("results")])[0].read_text()
    rows = re.findall(r"<th>(\w+ taken for \w+)</th>\s*<td>(\d+)</td>\s*<td>([+-]\d+)</td>", html)
    red, blue = "red taken for blue", "blue taken for red"
    assert rows == [(red, "20", "+0"), (blue, "0", "+0"), (red, "40", "+20"), (blue, "10", "+10")]
    html = page.write([Path("results/t-seed0")])[0].read_text()
    assert "change" not in html.partition("red taken for blue")[0].rpartition("<table")[2]  # nothing to change from


def test_the_page_holds_everything_itself_and_hostile_text_stays_text():
    curve = {"title": EVIL, "x": EVIL, "y": "accuracy", "series": {EVIL: [[0, 0.1], [1, 0.9]]}, "marked": 1}
    common = {"dataset": EVIL, "about": EVIL, "curves": [curve], "command": ["run.py", EVIL], "commit": EVIL}
    common |= {"details": {EVIL: {"classes": ["a", EVIL], "confusion": [[3, 1], [0, 4]]}}, "evaluation": "zeroshot"}
    common |= {"pictures": [{"file": "../a.png", "alt": f'"><img src=x>{EVIL}'}], "metrics": {EVIL: 0.5}}
    for label in ("base", f"{EVIL.replace('/', '')}-seed0"):
        file = put(label, **common)
        file.with_name("a.png").write_bytes(b"a picture")
    log_run("base", [{"step": s, EVIL: s / 7.0, "loss": 3.0} for s in range(50)])
    html = page.write([Path("results"), Path("runs")])[0].read_text()
    assert "<script" not in html and "<img src=x" not in html
    assert "alert(1)" in html
    assert "default-src 'none'" in html
    sources = re.findall(r'src="([^"]*)"', html)
    kinds = [source.split(";")[0] for source in sources]
    assert sorted(set(kinds)) == ["data:image/png", "data:image/svg+xml"]
    assert len(re.findall(r'alt="[^"]+"', html)) == len(sources) == 5  # a curve, two pictures, two logs
    png = sources[kinds.index("data:image/png")]
    assert base64.b64decode(png.split(",")[1]) == Path("results/base/a.png").read_bytes()


def test_a_page_of_runs_has_a_chart_per_figure():
    for label in ("a-seed0", "a-seed1", "b-seed0"):
        log_run(label, [{"step": s, "epoch": s / 9, "loss": 5 - s / 10, "lr": 0.1} for s in (0, 10, 20)])
    html = page.write([Path("runs")])[0].read_text()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', html)
    assert [alt.split(":")[0] for _, alt in images] == ["loss", "lr"]  # epoch is no figure
    (loss, alt), _ = images
    assert alt == "loss: a from 5 to 3; a from 5 to 3; b from 5 to 3"
    svg = base64.b64decode(loss).decode()
    assert set(re.findall(r"stroke: (#(?:1f77b4|ff7f0e|2ca02c))", svg)) == {"#1f77b4", "#ff7f0e"}
