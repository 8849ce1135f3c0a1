"""The report: the right numbers in all three files, a page that holds everything itself and that a browser accepts."""

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.report import report
from pc_clip.report.page import charts, pictures, tables, training, words
from pc_clip.report.page.charts import Dot, Line
from pc_clip.report.page.summary import split

EVIL = "<script>alert(1)</script>"
SVG = "{http://www.w3.org/2000/svg}"


def put(label: str, file: str = "zeroshot-x", folder: str = "results", **content) -> Path:
    path = Path(folder) / label / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation = {"evaluation": file.split("-")[0], "dataset": "x", "metrics": {"zeroshot": 0.5}, "n": 40}
    path.write_text(json.dumps({"model": label} | evaluation | content))
    return path


def log_run(label: str, rows: list[dict], folder: str = "runs") -> Path:
    path = Path(folder) / label / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parsed(path: Path) -> ET.Element:
    """The page read as XML, which is stricter than any browser: a tag left open or a bare < fails here."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return ET.fromstring(text)


def words_of(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def table(root: ET.Element, caption: str) -> dict[str, dict[str, str]]:
    """Row head -> column head -> cell, of the table with this caption."""
    found = [t for t in root.iter("table") if words_of(t.find("caption")) == caption]
    assert len(found) == 1, [words_of(t.find("caption")) for t in root.iter("table")]
    heads = [words_of(th) for th in found[0].find("thead/tr")]
    return {words_of(tr[0]): dict(zip(heads[1:], map(words_of, tr[1:]))) for tr in found[0].find("tbody")}


def study() -> None:
    """A pretrained model with an interval, and one variant with three seeds whose deviation is 10 points."""
    parts = {"details": {"colour": {"top1": 0.1}, "shape": {"top1": 0.2}}}
    metrics = {"zeroshot": 0.8, "zeroshot_colour": 0.7, "zeroshot_shape": 0.9, "spearman": -0.125}
    put("base", metrics=metrics, intervals={"zeroshot": [0.75, 0.8449]}, **parts)
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        put(f"tuned-seed{seed}", metrics=metrics | {"zeroshot": value, "zeroshot_shape": 0.25 * seed}, **parts)


# -- numbers -------------------------------------------------------------------------------------------


def test_the_same_numbers_stand_in_page_markdown_and_csv():
    study()
    path, found = report.write([Path("results")])
    assert path == Path("results/report.html")
    assert found.skipped == []
    overview = table(parsed(path), "Models and evaluations on x")
    assert overview == {
        "base baseline": {"zeroshot": "80.0 [75.0, 84.5]"},
        "tuned 3 seeds": {"zeroshot": "80.0 ± 10.0"},
    }
    main = table(parsed(path), "zeroshot on x, main figures")
    assert main["tuned 3 seeds"] == {"zeroshot": "80.0 ± 10.0", "spearman": "−0.12 ± 0.00"}
    everything = table(parsed(path), "zeroshot on x, all figures")
    assert everything["zeroshot_shape"] == {"base": "90.0", "tuned": "25.0 ± 25.0"}
    markdown = path.with_suffix(".md").read_text()
    assert re.search(r"^\| tuned +\| 80\.0 ± 10\.0 +\|$", markdown, re.MULTILINE)
    assert re.search(r"^\| base \(baseline\) +\| 80\.0 \[75\.0, 84\.5\] +\|$", markdown, re.MULTILINE)
    csv = pd.read_csv(path.with_suffix(".csv")).set_index(["variant", "metric"])
    assert list(csv.reset_index()) == ["variant", "metric", *[c for c in tables.COLUMNS if c not in csv.index.names]]
    tuned, base = csv.loc[("tuned", "zeroshot")], csv.loc[("base", "zeroshot")]
    assert (tuned["mean"], tuned["std"], tuned.seeds) == (pytest.approx(0.8), pytest.approx(0.1), 3)
    assert (base["mean"], base.low, base.high, base.n) == (0.8, 0.75, 0.8449, 40)
    assert base.baseline
    assert not tuned.baseline
    assert base[["std"]].isna().all()
    assert csv.loc[("base", "zeroshot")].main
    assert not csv.loc[("base", "zeroshot_shape")].main


def test_figures_of_parts_are_behind_a_click():
    study()
    root = parsed(report.write([Path("results")])[0])
    hidden = [t for details in root.iter("details") for t in details.iter("table")]
    names = {words_of(t.find("caption")) for t in hidden}
    assert "zeroshot on x, all figures" in names
    assert "zeroshot on x, main figures" not in names


@pytest.mark.parametrize(
    ("value", "share", "text"),
    [(0.876, True, "87.6"), (1.0, True, "100.0"), (-0.0001, True, "0.0"), (-0.05, True, "−5.0"), (89.0, False, "89"),
     (0.16668, False, "0.17"), (float("nan"), True, "–"), (None, False, "–")],
)  # fmt: skip
def test_figures_as_people_read_them(value, share, text):
    assert words.figure(value, share) == text


def test_a_count_of_images_is_no_column_of_the_overview():
    study()
    put("base", "rank-folder", metrics={"images": 89.0}, n=89)
    root = parsed(report.write([Path("results")])[0])
    assert list(table(root, "Models and evaluations on x")["base baseline"]) == ["zeroshot"]
    assert table(root, "rank on x") == {"base baseline": {"images": "89"}}


def test_what_is_a_share():
    assert words.is_share("zeroshot_count", [0.5, 1.0])
    assert not words.is_share("images", [1.0])
    assert not words.is_share("spearman_size", [0.5])
    assert not words.is_share("median", [0.5, 3.0])


def test_labels_are_variants_and_seeds():
    assert split("pc_anchor-seed12") == ("pc_anchor", 12)
    assert split("base") == ("base", None)
    assert split("seed3") == ("seed3", None)


def test_the_baseline_is_the_pretrained_model_or_the_one_named():
    put("tuned", metrics={"zeroshot": 0.25})
    put("ViT-B-32-pretrained", metrics={"zeroshot": 0.75})
    rows = table(parsed(report.write([Path("results")])[0]), "Models and evaluations on x")
    assert list(rows) == ["ViT-B-32-pretrained baseline", "tuned"]  # before the others
    rows = table(parsed(report.write([Path("results")], baseline="tuned")[0]), "Models and evaluations on x")
    assert list(rows) == ["tuned baseline", "ViT-B-32-pretrained"]
    with pytest.raises(UserError, match=r"--baseline is 'tunde'.*'tuned'"):
        report.write([Path("results")], baseline="tunde")


def test_two_studies_that_use_one_label_are_kept_apart():
    put("base", folder="results/a", metrics={"zeroshot": 0.25})
    put("base", folder="results/b", metrics={"zeroshot": 0.75})
    rows = table(parsed(report.write([Path("results")])[0]), "Models and evaluations on x")
    assert {name: row["zeroshot"] for name, row in rows.items()} == {
        "a/base baseline": "25.0",
        "b/base baseline": "75.0",
    }


def test_of_two_answers_to_one_question_the_newer_counts_and_the_other_is_named():
    put("base", metrics={"zeroshot": 0.25}, date="2026-01-02T00:00:00+00:00")
    put("base", "zeroshot-y", metrics={"zeroshot": 0.75}, date="2026-01-01T00:00:00+00:00")
    path, found = report.write([Path("results")])
    assert table(parsed(path), "Models and evaluations on x")["base baseline"]["zeroshot"] == "25.0"
    assert [name for name, _ in found.skipped] == ["results/base/zeroshot-y.json"]


def test_read_and_long_table_are_as_run_and_study_use_them(capsys):
    study()
    results = report.read([Path("results")])
    assert len(results) == 4
    assert len(report.long_table(results)) == 16
    report.show(results)
    assert re.search(r"zeroshot +80\.0 +70\.0 +80\.0 +90\.0", capsys.readouterr().out)
    Path("results/base/zeroshot-x.json").write_text('{"model": "ba')
    with pytest.raises(UserError, match=r"zeroshot-x\.json cannot be read"):
        report.read([Path("results")])
    with pytest.raises(UserError, match="no results in absent"):
        report.read([Path("absent")])


def test_figures_at_several_ranks_are_printed_as_one_row_with_what_their_names_mean(capsys):
    figures = {"t2i_r1": 0.25, "i2t_r1": 0.5, "t2i_r5": 0.75, "t2i_r10": 1.0, "centred_i2t_r1": 0.125, "spearman": -0.5}
    put("base", "retrieve-x", metrics=figures, intervals={"t2i_r1": [0.2, 0.3], "t2i_r5": [0.7, 0.8]})
    put("base", "difference-x", metrics={"sign": 0.5, "difference_r1": 0.75})
    report.show(report.read([Path("results")]))
    difference, retrieve = capsys.readouterr().out.strip().split("\n\n", 1)
    assert difference.splitlines()[2:] == ["sign           50.0", "difference_r1  75.0"]  # one alone is a row as others
    rows = [line.split() for line in retrieve.splitlines()]
    assert ["spearman", "−0.50"] in rows
    assert ["r1", "r5", "r10"] in rows
    assert ["t2i", "25.0", "[20.0,", "30.0]", "75.0", "100.0"] in rows
    assert ["i2t", "50.0", "–", "–"] in rows
    assert ["centred_i2t", "12.5", "–", "–"] in rows
    assert "t2i_r1" not in retrieve
    for words_ in (
        "rk: per cent found among the first k; [a, b]",
        "t2i: a caption finds its image",
        "paired: one",
        "docs/",
    ):
        assert words_ in retrieve


def test_ranks_of_several_models_stand_below_one_another(capsys):
    for label, value in (("base", 0.25), ("tuned", 0.5)):
        put(label, "retrieve-x", metrics={"t2i_r1": value, "t2i_r20": 0.75})
    put("later", "retrieve-x", metrics={"t2i_r5": 0.625})
    report.show(report.read([Path("results/base"), Path("results/tuned"), Path("results/later")]))
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert rows[rows.index(["r1", "r5", "r20"]) :][1:4] == [
        ["t2i", "base", "25.0", "–", "75.0"],
        ["tuned", "50.0", "–", "75.0"],
        ["later", "–", "62.5", "–"],
    ]
    assert "[a, b]" not in printed  # none has an interval


# -- what is in the folders ----------------------------------------------------------------------------


def test_what_is_cut_short_is_named_and_stops_nothing(monkeypatch, capsys):
    study()
    Path("results/base/cut.json").write_text('{"model": "ba')
    Path("results/base/text.json").write_bytes(b"\xff\xfe\x00")
    put("odd", metrics={"zeroshot": "high"})
    log_run("tuned-seed0", [{"step": 1, "loss": 2.0}]).open("a").write('{"step": 2, "lo')
    monkeypatch.setattr("sys.argv", ["report", "results", "runs"])
    report.main()
    printed = capsys.readouterr()
    assert printed.out.split() == ["results/report.html", "results/report.md", "results/report.csv"]
    root = parsed(Path("results/report.html"))
    notice = words_of(next(div for div in root.iter("div") if div.get("class") == "notice"))
    for text in (notice, printed.err):
        assert "results/base/cut.json: it is cut short or no JSON" in text
        assert "results/base/text.json: it is no UTF-8 text" in text
        assert "results/odd/zeroshot-x.json: its metrics are not all numbers" in text
        assert "runs/tuned-seed0/metrics.jsonl: 1 of its 2 lines are broken" in text


def test_nothing_to_report_is_an_error_that_says_what_was_found(tmp_path):
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        report.write([Path("nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results and no runs in empty"):
        report.write([Path("empty")])
    Path("empty/x.json").write_text("{")
    with pytest.raises(UserError, match=r"no results.*empty/x\.json: it is cut short"):
        report.write([Path("empty")])
    Path("other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: it is no result of run\.py"):
        report.write([Path("other.json")])


def places(content, before: tuple = ()) -> list[tuple]:
    """The way to every value of a JSON."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [before] + [way for key, value in inside for way in places(value, (*before, key))]


@pytest.mark.parametrize("wrong", [None, "x", 10**400, {"a": [1]}], ids=["null", "text", "huge", "table"])
def test_a_wrong_value_anywhere_in_a_result_breaks_no_page(wrong):
    curve = {"title": "a", "x": "b", "y": "c", "series": {"s": [[0, 1], [1, 2]]}, "marked": 1}
    good = {
        "model": "t", "evaluation": "zeroshot", "dataset": "x", "about": "", "metrics": {"zeroshot": 0.5}, "n": 4,
        "intervals": {"zeroshot": [0.1, 0.2]}, "curves": [curve], "pictures": [{"file": "a.png", "alt": "b"}],
        "details": {"q": {"classes": ["a", "b"], "confusion": [[1, 2], [3, 4]]}, "rows": {"a": 1}}, "seed": 0,
        "commit": "abc", "date": "2026-01-01", "versions": {"a": "1"}, "command": ["a"], "key": "k",
    }  # fmt: skip
    put("base", **good | {"model": "base"})
    for n, way in enumerate(places(good)[1:]):
        content = json.loads(json.dumps(good))
        inner = content
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = wrong
        put(f"t{n}", **content)
    root = parsed(report.write([Path("results")])[0])
    assert "base baseline" in table(root, captions(root)[0])


def test_where_it_is_written():
    file = put("base")
    assert report.write([file])[0] == Path("results/base/report.html")
    assert report.write([Path("results")], Path("new"))[0] == Path("new/report.html")
    assert report.write([Path("results")], Path("new/page.html"))[0] == Path("new/page.html")
    assert {p.name for p in Path("new").iterdir()} == {
        f"{n}.{s}" for n in ("report", "page") for s in ("html", "md", "csv")
    }
    with pytest.raises(UserError, match=r"a file that is no page"):
        report.write([Path("results")], file)


def test_a_run_alone_makes_a_page():
    log_run("pc-seed0", [{"step": 10, "loss": 2.0, "lr": 0.1}, {"step": 20, "loss": 1.5, "lr": 0.2}])
    path, _ = report.write([Path("runs")])
    assert path == Path("runs/report.html")
    assert table(parsed(path), "Runs")["runs/pc-seed0"] == {
        "Method": "", "Steps": "20", "First loss": "2", "Last loss": "1.5", "Begun": "",
    }  # fmt: skip
    assert pd.read_csv("runs/report.csv").empty


def test_the_header_and_the_sources_say_how_figures_were_made():
    made = {"commit": "0123456789abcdef+", "date": "2026-03-04T05:06:07+00:00", "python": "3.11.7", "seed": 7}
    put("base", key="k" * 16, command=["run.py", "--mode", "zero shot"], versions={"torch": "9.8"}, **made)
    root = parsed(report.write([Path("results")])[0])
    facts = {words_of(div[0]): words_of(div[1]) for div in root.find(".//dl[@class='facts']")}
    assert facts["Code"] == "0123456789ab with uncommitted changes"
    assert facts["Made"] == "2026-03-04 05:06 UTC"
    assert facts["Versions"] == "python 3.11.7, torch 9.8"
    assert facts["This page"].startswith("python -m pc_clip report results, 2")
    row = next(iter(table(root, next(c for c in captions(root) if c.startswith("Results;"))).values()))
    assert (row["Seed"], row["n"], row["Key"]) == ("7", "40", "k" * 16)
    assert "python run.py --mode 'zero shot'" in words_of(root.find(".//dl[@class='commands']"))


def captions(root: ET.Element) -> list[str]:
    return [words_of(caption) for caption in root.iter("caption")]


# -- charts --------------------------------------------------------------------------------------------


def ticks_of(svg: ET.Element, axis: str) -> dict[str, float]:
    """What is written beside an axis, and where. x: the text of the ticks at the bottom."""
    values = [t for t in svg.iter("text") if t.get("class") == "value"]
    if axis == "x":
        return {t.text: float(t.get("x")) for t in values if t.get("text-anchor") == "middle"}
    return {t.text: float(t.get("y")) for t in values if t.get("text-anchor") == "end"}


def points_of(path: ET.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d"))]


def test_points_of_a_line_lie_at_their_ticks():
    line = Line("a", [(0, 0.2), (5, 0.4), (10, 1.0)], 1)
    svg = ET.fromstring(charts.line_chart([line], "t", "step", "accuracy", share=True))
    xs, ys = ticks_of(svg, "x"), ticks_of(svg, "y")
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg.find(".//path"))
    assert (x0, x2) == (xs["0"], xs["10"])
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.01)
    assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.02)  # a quarter of the way from 20 to 100
    assert y2 == pytest.approx(ys["100"] - 4.2, abs=0.02)  # text stands 4.2 below its line
    assert y0 == pytest.approx(ys["20"] - 4.2, abs=0.02)
    assert "a: 20 at step 0, 100 at 10" in svg.get("aria-label")


def test_a_value_that_is_no_number_leaves_a_gap():
    line = Line("a", [(0, 1.0), (1, 2.0), (2, float("nan")), (3, 1.0), (4, 2.0)], 1)
    path = ET.fromstring(charts.line_chart([line], "t", "x", "y")).find(".//path")
    assert re.sub(r"[\d. ]", "", path.get("d")) == "MLML"
    assert "nan" not in path.get("d")


def test_dots_and_whiskers_lie_at_their_per_cents():
    svg = ET.fromstring(
        charts.dot_chart([("zeroshot", [Dot("base", 0.4, 0.2, 0.6, 0), Dot("b", 1.0, None, None, 1)])], "t")
    )
    xs = ticks_of(svg, "x")
    first, second = svg.iter("circle")
    assert float(first.get("cx")) == xs["40"]
    assert float(second.get("cx")) == xs["100"]
    (whisker,) = [r for r in svg.iter("line") if r.get("class") == "whisker"]
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == (xs["20"], xs["60"])


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3.1, 4.9, [3, 3.5, 4, 4.5, 5]), (-30, 100, [-50, 0, 50, 100]),
     (7, 7, [2, 4, 6, 8, 10, 12])],
)  # fmt: skip
def test_ticks_are_round_and_hold_all(low, high, found):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert low == high or ticks == found


def test_letters_are_at_least_12_pixels_on_a_phone():
    assert charts.FONT * (360 - 2 * 16 - 15) / charts.WIDTH >= 12
    css = (Path(charts.__file__).parent / "page.css").read_text()
    assert min(map(float, re.findall(r"(?:font-size:|font:) ?([\d.]+)px", css))) >= 12


def test_logs_are_smoothed_only_where_they_are_long():
    assert training.smoothing(39) == 1
    assert training.smoothing(40) == 3
    assert training.smoothing(10_000) == 11
    points = [(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)]
    assert training.smooth(points, 3) == [(0, 0.0), (1, 3.0), (2, 3.0), (3, 0.0)]


def test_runs_of_one_variant_share_a_colour_and_a_chart():
    rows = [{"step": s, "epoch": s / 9, "loss": 5 - s / 10, "lr": 0.1} for s in (0, 10, 20)]
    for label in ("a-seed0", "a-seed1", "b-seed0"):
        log_run(label, rows)
    log_run("long", [{"step": s, "loss": 3.0} for s in range(80)])
    root = parsed(report.write([Path("runs")])[0])
    figures = root.findall(".//section[@id='training']//figure")
    assert [words_of(f.find("figcaption")).split()[0] for f in figures] == ["loss", "lr"]  # epoch is no figure
    lines = figures[0].findall(".//g")
    drawn = {
        path.findtext("title"): g.get("class")
        for g in lines
        for path in g.iter("path")
        if "faint" not in path.get("class")
    }
    assert drawn["a-seed0"] == drawn["a-seed1"] != drawn["b-seed0"]
    assert "mean of up to 5 neighbouring records" in words_of(figures[0].find("figcaption"))
    assert len([p for p in figures[0].iter("path") if "faint" in p.get("class")]) == 1  # the long run as logged


def test_how_hard_the_negatives_of_runs_are_is_drawn_with_what_it_means_in_words():
    hardness = ("mean_negative", "hardest_negative", "likely_false_negatives", "identical_negatives")
    for label, level in (("random", 0.25), ("k2", 0.5)):
        rows = [{"step": s, "loss": 2.0} | dict.fromkeys(hardness, level + s / 100) for s in (0, 10, 20)]
        rows[1]["likely_false_negatives"] = float("nan")
        log_run(label, rows)
    root = parsed(report.write([Path("runs")])[0])
    figures = {words_of(f[0]).split()[0]: f for f in root.findall(".//section[@id='training']//figure")}
    assert list(figures) == ["loss", *hardness]
    for name in hardness:
        svg = figures[name].find("svg")
        assert {path.findtext("title") for path in svg.iter("path")} == {"random", "k2"}
        assert "k2: 0.5 at step 0, 0.7 at 20" in svg.get("aria-label")
        assert words.logged(name)
        assert f"{name} {words.logged(name)} as logged" == words_of(figures[name].find("figcaption"))
    assert "same sentence" in words_of(figures["identical_negatives"].find("figcaption"))
    assert words.logged("loss") == ""


def test_names_are_in_the_order_people_count_in():
    for label in ("k16", "k2", "k2-seed10", "k2-seed9", "k4"):
        log_run(label, [{"step": 1, "loss": 1.0}])
        put(label)
    root = parsed(report.write([Path("results"), Path("runs")])[0])
    assert list(table(root, "Models and evaluations on x")) == ["k2 3 seeds", "k4", "k16"]
    assert list(table(root, "Runs")) == [f"runs/{n}" for n in ("k2", "k2-seed9", "k2-seed10", "k4", "k16")]


def test_curves_are_means_over_seeds_with_each_choice_marked():
    def curve(a: float, marked: float) -> dict:
        series = {"test": [[0.0, a], [1.0, 0.5]], "validation": [[0.0, 0.2], [1.0, 0.6]]}
        return {"title": "over alpha", "x": "alpha", "y": "accuracy", "series": series, "marked": marked}

    put("t-seed0", curves=[curve(0.2, 0.0), {"title": "broken"}, {"title": "b", "series": {"a": [["x", 1]]}}])
    put("t-seed1", curves=[curve(0.4, 1.0)])
    put("u", curves=[curve(0.6, 1.0)])
    root = parsed(report.write([Path("results")])[0])
    first, second = root.findall(".//section[@id='curves']//figure")
    assert words_of(first.find("figcaption")) == "t mean of 2 seeds"
    svg = first.find("svg")
    ys = ticks_of(svg, "y")
    start = {p.findtext("title"): points_of(p)[0] for p in svg.iter("path")}
    assert start["test"][1] == pytest.approx(ys["30"] - 4.2, abs=0.02)  # the mean of 20 and 40 per cent
    marks = {float(r.get("x1")) for r in svg.iter("line") if r.get("class") == "mark"}
    assert marks == {ticks_of(svg, "x")["0.0"], ticks_of(svg, "x")["1.0"]}
    assert ticks_of(second.find("svg"), "y") == ys  # side by side on one scale


# -- confusion -----------------------------------------------------------------------------------------


def test_confusion_before_after_and_change():
    def asked(table: list) -> dict:
        return {"details": {"colour": {"classes": ["red", "blue"], "confusion": table}}}

    put("base", **asked([[8, 2], [0, 10]]))
    put("t-seed0", **asked([[4, 6], [0, 10]]))
    put("t-seed1", **asked([[8, 2], [2, 8]]))
    root = parsed(report.write([Path("results")])[0])
    section = root.find(".//section[@id='confusion']")
    assert table(section, "before: base") == {"red": {"red": "80", "blue": "20"}, "blue": {"red": "·", "blue": "100"}}
    assert table(section, "after: t") == {"red": {"red": "60", "blue": "40"}, "blue": {"red": "10", "blue": "90"}}
    assert table(section, "change") == {"red": {"red": "−20", "blue": "+20"}, "blue": {"red": "+10", "blue": "−10"}}
    kinds = [td.get("class") for td in section.findall(".//table")[2].iter("td")]
    assert kinds == ["down", "up", "up", "down"]


def test_many_classes_are_listed_by_what_changed_most():
    names = [f"c{k}" for k in range(31)]
    before = [[10 * (a == b) for b in range(31)] for a in range(31)]
    after = [list(row) for row in before]
    after[3][3], after[3][5] = 6, 4
    put("base", details={"q": {"classes": names, "confusion": before}})
    put("t", details={"q": {"classes": names, "confusion": after}})
    root = parsed(report.write([Path("results")])[0])
    (listed,) = [t for t in root.iter("table") if words_of(t.find("caption")) == "q, before and after"]
    rows = [[words_of(cell) for cell in tr] for tr in listed.find("tbody")]
    assert rows == [["c3", "c3 right", "100.0", "60.0", "−40"], ["c3", "c5", "0.0", "40.0", "+40"]]


def test_tables_that_do_not_fit_are_left_out():
    put("base", details={"q": {"classes": ["a", "b"], "confusion": [[1]]}, "r": {"classes": ["a"], "confusion": None}})
    put("t", details={"q": {"classes": ["a", "b"], "confusion": "x"}, "list": [1]})
    assert parsed(report.write([Path("results")])[0]).find(".//section[@id='confusion']") is None


# -- pictures ------------------------------------------------------------------------------------------


def test_pictures_are_inside_the_page_with_their_description_and_not_huge():
    sheet = Image.effect_noise((2000, 500), 90).convert("RGB")
    put("base", pictures=[{"file": "zeroshot-x-small.png", "alt": "a red square"},
                          {"file": "zeroshot-x-big.png", "alt": "noise"},
                          {"file": "cut.png", "alt": ""}, {"file": "absent.png", "alt": ""},
                          {"file": "../secret.png", "alt": "of another folder"}])  # fmt: skip
    Image.new("RGB", (30, 20), "red").save("results/base/zeroshot-x-small.png")
    Image.new("RGB", (30, 20), "red").save("results/secret.png")
    sheet.save("results/base/zeroshot-x-big.png")
    Path("results/base/cut.png").write_bytes(Path("results/base/zeroshot-x-big.png").read_bytes()[:5000])
    path, found = report.write([Path("results")])
    shown = {img.get("alt"): img for img in parsed(path).iter("img")}
    assert list(shown) == ["a red square", "noise"]
    sizes = {
        alt: Image.open(io.BytesIO(base64.b64decode(img.get("src").split(",")[1]))).size for alt, img in shown.items()
    }
    assert sizes == {"a red square": (30, 20), "noise": (pictures.WIDEST, 350)}
    assert shown["noise"].get("width") == "1400"
    assert path.stat().st_size < 1_200_000
    assert [Path(file).name for file, _ in found.skipped] == ["cut.png", "absent.png"]


# -- the page ------------------------------------------------------------------------------------------


@pytest.fixture
def everything() -> Path:
    """A page with every kind of section, each holding a hostile text wherever results can hold one."""
    detail = {f"q{EVIL}": {"classes": ["a", EVIL], "confusion": [[3, 1], [0, 4]]}}
    line = {"title": EVIL, "x": EVIL, "y": EVIL, "series": {EVIL: [[0, 0.1], [1, 0.9]]}, "marked": 1}
    common = {"evaluation": "zeroshot", "details": detail, "curves": [line], "about": EVIL, "command": ["run.py", EVIL]}
    common |= {"metrics": {EVIL: 0.5, "zeroshot": 0.25, f"a_q{EVIL}": 0.1}, "commit": EVIL, "versions": {EVIL: EVIL}}
    for label in ("base", f"{EVIL.replace('/', '')}-seed0", "quote\"'&-seed0"):
        file = put(
            label, **common, dataset=EVIL, pictures=[{"file": "zeroshot-x-a.png", "alt": f'"><img src=x>{EVIL}'}]
        )
        Image.new("RGB", (40, 30), "navy").save(file.with_name("zeroshot-x-a.png"))
    file = put("odd", metrics={"zeroshot": 0.125, "low\u0000\ud800": 0.5})
    file.with_name("cut.json").write_text("{")
    run = log_run("base", [{"step": s, EVIL: s / 7.0, "loss": 3.0} for s in range(50)])
    run.with_name("config.yaml").write_text(f"method: '{EVIL}'")
    return report.write([Path("results"), Path("runs")])[0]


def test_hostile_text_stays_text(everything):
    root = parsed(everything)
    assert list(root.iter("script")) == []
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section", "article",
        "div", "h1", "h2", "h3", "h4", "p", "span", "code", "a", "ul", "li", "dl", "dt", "dd", "details", "summary",
        "figure", "figcaption", "img", "table", "caption", "thead", "tbody", "tr", "th", "td", "wbr", "svg", "g",
        "path", "line", "circle", "text",
    }  # fmt: skip
    assert EVIL in words_of(root.find(".//h1"))
    assert not any(name.startswith("on") for e in root.iter() for name in e.attrib)
    assert f"q{EVIL}" in [words_of(h) for h in root.iter("h4")]
    assert sum(words_of(th) == EVIL for th in root.find(".//section[@id='confusion']").iter("th")) == 4
    markdown = everything.with_suffix(".md").read_text()
    assert "<script" not in markdown
    assert "&lt;script&gt;" in markdown
    assert EVIL in set(pd.read_csv(everything.with_suffix(".csv")).metric)


def test_nothing_is_fetched_from_anywhere(everything):
    root = parsed(everything)
    for element in root.iter():
        assert (
            element.get("src", "data:").startswith("data:image/")
            if element.tag == "img"
            else "src" not in element.attrib
        )
        assert element.get("href", "#").startswith("#")
    css = root.findtext(".//style")
    assert "url(" not in css
    assert "@import" not in css
    assert "http" not in css
    (policy,) = [m.get("content") for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_the_page_has_names_headings_and_landmarks_in_order(everything):
    root = parsed(everything)
    assert root.get("lang") == "en"
    assert root.findtext("head/title").endswith("pc_clip report")
    assert [e.tag for e in root.find("body")] == ["header", "main", "footer"]
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch(r"h\d", e.tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {a.get("href")[1:] for a in root.iter("a")} == {
        "overview",
        "evaluations",
        "confusion",
        "curves",
        "training",
        "pictures",
        "sources",
    }
    assert {a.get("href")[1:] for a in root.iter("a")} <= set(ids)
    assert all(e.get("aria-labelledby") in ids for e in root.iter("section"))
    assert all(th.get("scope") in ("row", "col") for th in root.iter("th"))
    assert all(words_of(t.find("caption")) for t in root.iter("table"))
    assert len(list(root.iter("img"))) == 3
    assert all(img.get("alt") for img in root.iter("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in root.iter("svg"))
    parents = {child: parent for parent in root.iter() for child in parent}
    assert all(parents[t].get("class") == "scroll" for t in root.iter("table"))


def test_colours_can_be_told_from_the_page_in_both_modes():
    css = (Path(charts.__file__).parent / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    for mode in (light, dark):
        for paper in ("page", "surface", "notice"):
            for ink in ("text", "muted", "link"):
                assert contrast(mode[ink], mode[paper]) >= 4.5, (ink, paper)
        for k in range(charts.STYLES + 1):
            assert contrast(mode[f"s{k}"], mode["page"]) >= 3, k
    tints = [
        dict(re.findall(r"--(heat|up|down): ([\d ]+);", block))
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    for mode, tint in zip((light, dark), tints):
        for name in ("heat", "up", "down"):  # the fullest cell of a heat map: 0.6 of the tint on the page
            paper = [int(mode["page"][k : k + 2], 16) for k in (1, 3, 5)]
            mixed = [round(0.6 * int(t) + 0.4 * p) for t, p in zip(tint[name].split(), paper)]
            assert contrast(mode["text"], "#{:02x}{:02x}{:02x}".format(*mixed)) >= 4.5, name
    assert {sum(map(float, re.findall(r"0\.\d+", cell))) for cell in re.findall(r"/ calc\((.*?)\);", css)} == {0.6}


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours."""
    light, dark = sorted(map(_luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def console(page: Path, profile: Path) -> list[str]:
    """What a browser writes on its console when it opens a page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome to open the page in")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=1"]
    command = [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_opens_it_without_a_word(everything, tmp_path):
    wrong = tmp_path / "wrong.html"
    wrong.write_text(everything.read_text().replace("</main>", '<img src="https://example.org/a.png" alt="" /></main>'))
    (refused,) = console(wrong, tmp_path / "one")  # so the catcher catches, and the page's policy holds
    assert "Content Security Policy" in refused
    assert console(everything, tmp_path / "two") == []
