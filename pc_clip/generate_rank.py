"""Ranking data: for a caption, which of two similar images fits it better. NAME.parquet, and NAME.meta.json.

A model retrieves candidates for each caption (pc_clip/candidates.py), each candidate gets a description, the
descriptions are put in order (pc_clip/ranking.py), and every two candidates of different rank are a row.

While it works, NAME.rank.parts/ holds candidates.jsonl, then descriptions and orders of a language model, each written
and continued as sentences are (pc_clip/generate.py). Rules need no phases: they take seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from pc_clip import environment, prompts
from pc_clip.candidates import Candidate, Query, crops, draw_queries, retrieve, unit
from pc_clip.clip import Clip
from pc_clip.config import DataConfig, GenerateConfig
from pc_clip.datasets import Dataset
from pc_clip.embeddings import embed_images
from pc_clip.errors import UserError, check_at_least, check_choice
from pc_clip.files import write_json, write_text
from pc_clip.generate import HOW, Work, check_free, is_finished, job_seed, least_characters, make_writer, write_all
from pc_clip.learning_data import load_dataset
from pc_clip.ranking import (
    Pair,
    Ranked,
    draw_pairs,
    judge_order,
    numbered,
    own_first,
    pairs,
    places_by_order,
    places_by_words,
    ranked,
    shuffled,
)
from pc_clip.shards import Item, Parts, Processes, put_in_place
from pc_clip.views import views
from pc_clip.writers import Job, Writer

log = logging.getLogger(__name__)

THE_PICTURE = "this picture"  # what a question about a picture that is shown calls it


class Asked(NamedTuple):
    """A query with its candidates, the most similar first."""

    query: Query
    candidates: list[Candidate]


def generate_rank(config: GenerateConfig, processes: Processes) -> Path:
    """Write the ranking data; returns the finished file. Interrupted and called again, it continues.

    Raises UserError for settings that do not fit, for data without captions, and as all tasks do.
    """
    _check(config)
    out = Path(config.out) / f"{config.name}.parquet"
    check_free(out, ".jsonl")
    data, clip = _data(config), _clip(config, processes.is_main)
    settings, model = json.loads(json.dumps(_settings(config, data, clip))), clip.describe()
    parts = Parts(out.with_suffix(".rank.parquet"))  # NAME.rank.parts: NAME.parts is that of sentences
    with ExitStack() as held:
        if processes.is_main and not is_finished(out, settings, config.overwrite):
            held.enter_context(parts.lock(0))
            _begin(parts.folder, settings, config.overwrite)
            _write_candidates(parts.folder / "candidates.jsonl", config, data, clip)
        del clip  # its memory may be wanted for a language model
        processes.wait()
        if is_finished(out, settings, config.overwrite):
            if processes.is_main:
                _clear(parts, out)
                log.info("%s is complete; --overwrite true writes it again", out)
            return out
        task = _Task(config, data, _read_candidates(parts.folder / "candidates.jsonl", data), parts.folder)
        processes.wait()  # all have read them, before the main one can have finished
        task.run(settings, processes)
        if processes.is_main:
            _finish(out, parts, task, {"settings": settings, "writer": task.describe(), "model": model})
        processes.wait()
    return out


# -- settings ------------------------------------------------------------------------------------------


def _check(config: GenerateConfig) -> None:
    rank = config.rank
    check_at_least("rank.least", rank.least, 1)
    check_at_least("rank.most", rank.most, 2)
    if rank.least > rank.most:
        raise UserError(f"rank.least is {rank.least} and rank.most {rank.most}; least must be at most that")
    if not 0 <= rank.margin <= 2:
        raise UserError(f"rank.margin is {rank.margin:g}; it is a difference of cosines, from 0 to 2")
    for name in ("n_queries", "pairs_each"):
        if (value := getattr(rank, name)) is not None:
            check_at_least(f"rank.{name}", value, 1)
    check_choice("rank.missing", rank.missing, ("error", "skip"))
    check_choice("rank.device", rank.device or "cpu", ("cpu", "cuda"))
    if rank.device == "cuda" and not torch.cuda.is_available():
        raise UserError("rank.device is cuda, but torch finds no GPU here; leave it out")
    if rank.order_prompt and config.writer == "rules":
        raise UserError("--rank.order_prompt has no effect with --writer rules; leave it out")
    if not rank.pictures and config.writer != "server":
        raise UserError(f"--rank.pictures false has no effect with --writer {config.writer}, which sees none anyway")
    if _sees(config) and not config.server.chat:
        raise UserError("pictures can be shown in a chat alone; with --server.chat false add --rank.pictures false")
    try:
        import pyarrow  # noqa: F401  (now, rather than when all is written)
    except ImportError:
        raise UserError("Parquet files need the package pyarrow; pip install -r requirements.txt") from None


def _sees(config: GenerateConfig) -> bool:
    """Whether the writer is shown the pictures."""
    return config.writer == "server" and config.rank.pictures


def _data(config: GenerateConfig) -> Dataset:
    wanted = DataConfig(config.dataset, config.root, config.split, config.rank.missing, captions=config.captions)
    return load_dataset(wanted)


def _clip(config: GenerateConfig, embeds: bool) -> Clip:
    """The model; on the CPU for a process that only wants to know which it is."""
    device = config.rank.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = device if embeds else "cpu"
    return Clip.create(*config.model.source(config.dataset), device=device, seed=config.seed)


def _asked(config: GenerateConfig) -> dict[str, prompts.Prompt]:
    """What a language model is asked for descriptions and for orders."""
    usual = prompts.FOLDER / ("rank_picture.yaml" if _sees(config) else "rank.yaml")
    return {
        "descriptions": prompts.read(config.prompt or usual),
        "orders": prompts.read(config.rank.order_prompt or prompts.FOLDER / "rank_order.yaml"),
    }


def _settings(config: GenerateConfig, data: Dataset, clip: Clip) -> dict[str, Any]:
    """Everything the rows depend on, and nothing else."""
    how = ("order_prompt", "missing", "device", "batch_size", "workers", *(() if _sees(config) else ("pictures",)))
    rank = {name: value for name, value in dataclasses.asdict(config.rank).items() if name not in how}
    captions = hashlib.sha256(repr(data.captions).encode()).hexdigest()
    found = {"task": "rank", "caption": config.caption, "seed": config.seed, "writer": config.writer, "rank": rank}
    found |= {"data": data.label, "fingerprint": data.fingerprint, "captions_sha256": captions}
    found["model"] = clip.weights_hash()
    if config.writer == "rules":
        return found
    writer = dataclasses.asdict(getattr(config, config.writer))
    found[config.writer] = {name: value for name, value in writer.items() if name not in HOW[config.writer]}
    found["asked"] = {phase: dataclasses.asdict(prompt) for phase, prompt in _asked(config).items()}
    return found | {"min_characters": least_characters(config)}


# -- candidates ----------------------------------------------------------------------------------------


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the working folder ready. Raises UserError where it holds work of other settings that is to be kept."""
    place = folder / "settings.json"
    if place.is_file() and json.loads(place.read_text(encoding="utf-8")) == settings:
        return
    if place.is_file() and not overwrite:
        raise UserError(
            f"{folder} was begun with other settings; choose another --name, or --overwrite true to drop what it holds"
        )
    place.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()
    write_json(place, settings)


def _write_candidates(path: Path, config: GenerateConfig, data: Dataset, clip: Clip) -> None:
    """Once, by one process: another, or another machine, might round a similarity to another order."""
    if path.is_file():
        return
    found = find_candidates(config, data, clip)
    lines = [
        {
            "image": data.ids[query.row],
            "caption": query.caption,
            "candidates": [{**c._asdict(), "row": data.ids[c.row]} for c in candidates],
        }
        for query, candidates in found
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def find_candidates(config: GenerateConfig, data: Dataset, clip: Clip) -> list[Asked]:
    """The queries that the settings draw, each with its candidates: images, then crops of them, by similarity each."""
    rank, options = config.rank, {"batch_size": config.rank.batch_size, "workers": config.rank.workers}
    queries = draw_queries(data, rank.n_queries, config.caption, config.seed)
    texts = clip.embed_texts([query.caption for query in queries])  # [Q, D]
    z = unit(embed_images(clip, data, **options).z)  # [N, D]
    near = retrieve(texts, z, [query.row for query in queries], rank.margin, rank.most)
    more = [
        crops(data, query, [row for row, _ in found], max(0, rank.least - len(found)), config.seed)
        for query, found in zip(queries, near)
    ]
    names = sorted({view for found in more for view, _, _ in found})
    place = {name: n for n, name in enumerate(names)}
    z_crops = unit(embed_images(clip, views(data, names), **options).z) if names else None
    asked = []
    for n, (query, found) in enumerate(zip(queries, near)):
        wholes = [Candidate(data.ids[row], row, 1.0, round(cosine, 6)) for row, cosine in found]
        parts = [Candidate(v, row, kept, round(float(z_crops[place[v]] @ texts[n]), 6)) for v, row, kept in more[n]]
        asked.append(Asked(query, [*wholes, *sorted(parts, key=lambda c: (-c.similarity, c.view))]))
    return asked


def _read_candidates(path: Path, data: Dataset) -> list[Asked]:
    rows = {key: row for row, key in enumerate(data.ids)}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        Asked(
            Query(rows[line["image"]], line["caption"]),
            [Candidate(**{**c, "row": rows[c["row"]]}) for c in line["candidates"]],
        )
        for line in lines
    ]


# -- descriptions and orders ---------------------------------------------------------------------------


class _Task:
    """One writing of ranking data: after `run`, `ranked` gives the orders, and `rejected` what was not used.

    Descriptions are of views where the writer is shown pictures, of whole images otherwise.
    """

    def __init__(self, config: GenerateConfig, data: Dataset, asked: list[Asked], folder: Path) -> None:
        self.config, self.data, self.asked, self.folder = config, data, asked, folder
        self.sees, self.by_rules = _sees(config), config.writer == "rules"
        self.files = {phase: folder / f"{phase}.jsonl" for phase in ("descriptions", "orders")}
        self.counts: Counter[str] = Counter()
        self._writer: Writer | None = None
        self._texts: dict[str, str] = {}

    def run(self, settings: dict[str, Any], processes: Processes) -> None:
        """The phases of a language model, together with other processes."""
        if self.by_rules:
            self._texts = {self.data.ids[c.row]: self._told(c.row) for one in self.asked for c in one.candidates}
            return
        self._phase("descriptions", self._describing(), settings, processes)
        self._texts = {row["image"]: row["text"] for row in _lines(self.files["descriptions"])}
        self._by_item = {(self.data.ids[a.query.row], a.query.caption): a for a in self.asked}
        if self._items():
            self._phase("orders", self._ordering(), settings, processes)

    def _phase(self, name: str, work: Work, settings: dict[str, Any], processes: Processes) -> None:
        config = dataclasses.replace(self.config, name=f"{self.config.name} {name}", overwrite=False)
        write_all(config, work._replace(writer=partial(self._make_writer, name)), self.files[name], settings, processes)

    def _make_writer(self, phase: str, config: GenerateConfig) -> Writer:
        """One writer for both phases: a language model takes long to load."""
        self._writer = self._writer or make_writer(config)
        self._writer.asked = _asked(config)[phase]
        if self.sees:
            self._writer.look = self._look()
        return self._writer

    def _look(self) -> Callable[[str], Image.Image]:
        """How the picture of a view is had."""
        names = sorted({c.view for one in self.asked for c in one.candidates})
        pictures, place = views(self.data, names), {name: n for n, name in enumerate(names)}
        return lambda view: pictures.load(place[view])

    def _told(self, row: int) -> str:
        """All captions of an image, as one text."""
        return " ".join(text if text[-1] in ".!?" else f"{text}." for text in self.data.captions[row] if text)

    def _describing(self) -> Work:
        rows = {self._key(c): c.row for one in self.asked for c in one.candidates}

        def job(key: str, _: str, n: int) -> Job:
            seed = job_seed(self.config.seed, n)
            return Job(THE_PICTURE, "", seed, key) if self.sees else Job(self._told(rows[key]), "", seed)

        def line(row: dict[str, Any]) -> str:
            return json.dumps({"image": row["first"], "text": row["text"]}, ensure_ascii=False) + "\n"

        return Work(lambda: [(key, "") for key in sorted(rows)], job, line, "pictures", {})

    def _ordering(self) -> Work:
        def job(image: str, caption: str, n: int) -> Job:
            one = self._by_item[image, caption]
            texts = [self._text(c) for c in self._shown(one)]
            shown = [texts[k] for k in shuffled(len(texts), self.config.seed, one.query)]
            return Job(caption, numbered(shown), job_seed(self.config.seed, n))

        def line(row: dict[str, Any]) -> str:
            return json.dumps({"image": row["first"], "order": row["text"]}, ensure_ascii=False) + "\n"

        return Work(self._items, job, line, "captions", {}, judge=judge_order)

    def _items(self) -> list[Item]:
        """The queries that there is something to ask about."""
        return [item for item, one in self._by_item.items() if len(self._shown(one)) > 1]

    def _key(self, c: Candidate) -> str:
        """What a candidate's description is found under."""
        return c.view if self.sees else self.data.ids[c.row]

    def _text(self, c: Candidate) -> str:
        return self._texts.get(self._key(c), "")

    def _shown(self, one: Asked) -> list[Candidate]:
        """The candidates that are put in order: those with a description; of crops, those that were seen."""
        return [c for c in one.candidates if self._text(c) and (self.sees or c.is_whole)]

    def ranked(self) -> Iterator[tuple[Query, list[Ranked]]]:
        """The queries with their candidates in order; those without an order are left out and counted."""
        orders = {}
        if self.files["orders"].is_file():
            orders = {row["image"]: [int(k) for k in row["order"].split(", ")] for row in _lines(self.files["orders"])}
        for one in self.asked:
            shown, image = self._shown(one), self.data.ids[one.query.row]
            if self.by_rules:
                places = places_by_words(one.query.caption, [self._text(c) for c in shown])
            elif len(shown) < 2:
                places = list(range(len(shown)))
            elif image in orders:
                places = places_by_order(orders[image], shuffled(len(shown), self.config.seed, one.query))
            else:
                self.counts["queries_without_order"] += 1
                continue
            yield one.query, self._in_order(one, shown, places)

    def _in_order(self, one: Asked, shown: Sequence[Candidate], places: Sequence[int]) -> list[Ranked]:
        """The caption's own image first, whatever was said of it; crops that nobody saw are put after their wholes."""
        own = next(c for c in one.candidates if c.row == one.query.row and c.is_whole)
        if own not in shown:  # its description was rejected; that it fits best is known without one
            shown, places = [own, *shown], [-1, *places]
        else:
            places, was_first = own_first(one.query, shown, places)
            self.counts["own_said_to_be_first" if was_first else "own_said_not_to_be_first"] += len(shown) > 1
        if not self.sees:
            place = {c.row: place for c, place in zip(shown, places)}
            shown = [c for c in one.candidates if c.row in place]
            places = [place[c.row] for c in shown]
        return ranked(shown, places, [self._text(c) for c in shown], self.sees)

    def describe(self) -> Any:
        """What the phases' writers said of themselves."""
        if self.by_rules:
            return {"writer": "rules"}
        return {phase: _meta(path)["writer"] for phase, path in self.files.items() if path.is_file()}

    def reasons(self) -> dict[str, dict[str, int]]:
        """Counts of the answers of each phase, by what became of them."""
        return {phase: _meta(path)["counts"] for phase, path in self.files.items() if path.is_file()}

    def rejected(self) -> str:
        """The answers that were not used, a JSON a line, with their phase."""
        lines = [
            {"phase": phase, **row}
            for phase, path in self.files.items()
            if path.with_suffix(".rejected.jsonl").is_file()
            for row in _lines(path.with_suffix(".rejected.jsonl"))
        ]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _meta(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))


# -- what comes out ------------------------------------------------------------------------------------


def _row(data: Dataset, query: Query, pair: Pair) -> dict[str, Any]:
    a, b = pair
    return {
        "caption": query.caption,
        "preferred_image": a.candidate.view,
        "rejected_image": b.candidate.view,
        "query_image": data.ids[query.row],
        "preferred_rank": a.rank,
        "rejected_rank": b.rank,
        "preferred_similarity": a.candidate.similarity,
        "rejected_similarity": b.candidate.similarity,
        "preferred_text": a.text,
        "rejected_text": b.text,
    }


def _rows(task: _Task) -> Iterator[dict[str, Any]]:
    """The rows, and their counts in task.counts."""
    config, counts = task.config, task.counts
    for query, order in task.ranked():
        known = pairs(order, task.sees)
        kept = draw_pairs(known, config.rank.pairs_each, config.seed, query)
        counts["queries"] += 1
        counts["queries_without_pairs"] += not kept
        counts["candidates"] += len(order)
        counts["crops"] += sum(not r.candidate.is_whole for r in order)
        counts["undecided_pairs"] += len(order) * (len(order) - 1) // 2 - len(known)
        counts["pairs"] += len(kept)
        yield from (_row(task.data, query, pair) for pair in kept)


def _finish(out: Path, parts: Parts, task: _Task, about: dict[str, Any]) -> None:
    """All pairs into their place; then the working folder goes."""
    import pandas

    folder = parts.folder
    table = pandas.DataFrame(list(_rows(task)))
    counts = dict(task.counts)
    if table.empty:
        raise UserError(f"no two candidates could be told apart ({counts}, {task.reasons()}); raise --rank.margin")
    table.to_parquet(folder / "pairs.parquet", engine="pyarrow", index=False)
    meta = {**about, "counts": counts, "answers": task.reasons(), **environment.describe()}
    write_json(folder / "meta.json", meta)
    write_json(folder / "finished.json", meta)  # stays, to be known by if only the removing is interrupted
    rejected = out.with_suffix(".rejected.jsonl")
    place = {out.with_suffix(".meta.json"): folder / "meta.json", out: folder / "pairs.parquet"}
    if text := task.rejected():
        write_text(folder / "rejected.jsonl", text)
        place = {rejected: folder / "rejected.jsonl", **place}
    for path in (out, rejected):
        path.unlink(missing_ok=True)  # of an earlier writing; gone first, so that an interruption mixes nothing
    put_in_place(place)  # the pairs last: where they are, the rest is
    parts.remove()
    log.info("%s is written: %s", out, ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n))


def _clear(parts: Parts, out: Path) -> None:
    """Remove the working folder beside a finished file, if it is that file's."""
    finished, meta = parts.folder / "finished.json", out.with_suffix(".meta.json")
    if finished.is_file() and finished.read_bytes() == meta.read_bytes():
        with parts.lock(0):
            parts.remove()
    elif parts.folder.is_dir():
        log.info("%s is left from writing it again, which --overwrite true continues", parts.folder)
