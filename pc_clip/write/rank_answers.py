"""What a writer says of candidates: a description of each, then for each caption their order.

A language model is asked in two phases, each written and continued as sentences are (write/generate.py). Rules need
no phases: their descriptions are the captions, and they take seconds.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.views import views
from pc_clip.write import prompts
from pc_clip.write.candidates import Asked, Candidate, Query, words_of
from pc_clip.write.progress import Item
from pc_clip.write.ranking import (
    Ranked,
    judge_order,
    numbered,
    own_first,
    places_by_order,
    places_by_words,
    ranked,
    shuffled,
)
from pc_clip.write.work import Work, job_seed, make_writer, read_meta, write_all
from pc_clip.write.writers import Job, Writer

THE_PICTURE = "this picture"  # what a question about a picture that is shown calls it


def sees(config: GenerateConfig) -> bool:
    """Whether the writer is shown the pictures."""
    return config.writer == "server" and config.rank.pictures


def questions(config: GenerateConfig) -> dict[str, prompts.Prompt]:
    """What a language model is asked, for descriptions and for orders. Raises UserError for a file that cannot ask."""
    usual = prompts.FOLDER / ("rank_picture.yaml" if sees(config) else "rank.yaml")
    path = config.rank.order_prompt or prompts.FOLDER / "rank_order.yaml"
    found = {"descriptions": prompts.read(config.prompt or usual), "orders": prompts.read(path)}
    if "{second}" not in found["orders"].instruction:
        raise UserError(
            f"{path}: the instruction has no {{second}} where the descriptions belong that are put in order"
        )
    return found


class Answers:
    """After `run`, `ranked` gives the orders, `counts` what came of them, and `rejected` the answers not used.

    Descriptions are of views where the writer is shown pictures, of whole images otherwise. folder: where the answers
    of a language model are kept.
    """

    def __init__(self, config: GenerateConfig, data: Dataset, asked: list[Asked], folder: Path) -> None:
        self.config, self.data, self.asked, self.folder = config, data, asked, folder
        self.sees, self.by_rules = sees(config), config.writer == "rules"
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
        self._writer.asked = questions(config)[phase]
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
        every = {self._key(c): c.row for one in self.asked for c in one.candidates}
        rows = {key: row for key, row in every.items() if self.sees or self._told(row)}  # of nothing comes invention

        def job(key: str, _: str, n: int) -> Job:
            seed = job_seed(self.config.seed, n)
            return Job(THE_PICTURE, "", seed, key) if self.sees else Job(self._told(rows[key]), "", seed)

        def line(row: dict[str, Any]) -> str:
            return json.dumps({"image": row["first"], "text": row["text"]}, ensure_ascii=False) + "\n"

        return Work(lambda: [(key, "") for key in sorted(rows)], job, line, "pictures", {})

    def _ordering(self) -> Work:
        def job(image: str, caption: str, n: int) -> Job:
            one = self._by_item[image, caption]
            texts = self._said(self._shown(one))
            shown = [texts[k] for k in shuffled(len(texts), self.config.seed, one.query)]
            return Job(caption, numbered(shown), job_seed(self.config.seed, n))

        def line(row: dict[str, Any]) -> str:
            return json.dumps({"image": row["first"], "order": row["text"]}, ensure_ascii=False) + "\n"

        return Work(self._items, job, line, "captions", {}, judge=judge_order)

    def _items(self) -> list[Item]:
        """The queries that there is something to ask about."""
        return [item for item, one in self._by_item.items() if len(self._said(self._shown(one))) > 1]

    def _key(self, c: Candidate) -> str:
        """What a candidate's description is found under."""
        return c.view if self.sees else self.data.ids[c.row]

    def _text(self, c: Candidate) -> str:
        return self._texts.get(self._key(c), "")

    def _shown(self, one: Asked) -> list[Candidate]:
        """The candidates that are put in order: those with a description; of crops, those that were seen."""
        return [c for c in one.candidates if self._text(c) and (self.sees or c.is_whole)]

    def _said(self, shown: Sequence[Candidate]) -> list[str]:
        """Their descriptions, each once: of two that are the same, no order says which fits better."""
        return list(dict.fromkeys(map(self._text, shown)))

    def ranked(self) -> Iterator[tuple[Query, list[Ranked]]]:
        """The queries with their candidates in order; those without an order are left out and counted."""
        orders = {}
        if self.files["orders"].is_file():
            orders = {row["image"]: [int(k) for k in row["order"].split(", ")] for row in _lines(self.files["orders"])}
        for one in self.asked:
            self.counts["same_picture"] += one.same_picture
            shown, order = self._shown(one), orders.get(self.data.ids[one.query.row])
            if self.by_rules:
                places = places_by_words(one.query.caption, [self._text(c) for c in shown])
            elif (said := self._said(shown)) and len(said) > 1:
                if order is None:
                    self.counts["queries_without_order"] += 1
                    continue
                place = dict(zip(said, places_by_order(order, shuffled(len(said), self.config.seed, one.query))))
                places = [place[self._text(c)] for c in shown]
            else:
                places = [0] * len(shown)
            yield one.query, self._in_order(one, shown, places)

    def _in_order(self, one: Asked, shown: list[Candidate], places: list[int]) -> list[Ranked]:
        """The caption's own image first, whatever was said of it; crops that nobody saw are put after their wholes."""
        own = next(c for c in one.candidates if c.row == one.query.row and c.is_whole)
        known = own in shown
        if not known:  # its description was rejected; that it fits best is known without one
            shown, places = [own, *shown], [min(places, default=0) - 1, *places]
        places, was_first = own_first(one.query, self._as_good(one), shown, places)
        if known and len(set(map(self._text, shown))) > 1:
            self.counts["own_said_to_be_first" if was_first else "own_said_not_to_be_first"] += 1
        if not self.sees:
            place = {c.row: place for c, place in zip(shown, places)}
            shown = [c for c in one.candidates if c.row in place]
            places = [place[c.row] for c in shown]
        return ranked(shown, places, [self._text(c) for c in shown], self.sees)

    def _as_good(self, one: Asked) -> set[int]:
        """The rows of candidates that have the query's very caption, too."""
        caption = words_of(one.query.caption)
        return {c.row for c in one.candidates if caption in map(words_of, self.data.captions[c.row])}

    def describe(self) -> Any:
        """What the phases' writers said of themselves."""
        if self.by_rules:
            return {"writer": "rules"}
        return {phase: read_meta(path)["writer"] for phase, path in self.files.items() if path.is_file()}

    def reasons(self) -> dict[str, dict[str, int]]:
        """Counts of the answers of each phase, by what became of them."""
        return {phase: read_meta(path)["counts"] for phase, path in self.files.items() if path.is_file()}

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
