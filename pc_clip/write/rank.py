"""Ranking data: for a caption, which of two similar images fits it better. NAME.parquet, and NAME.meta.json.

A model retrieves candidates for each caption, each candidate gets a description, the descriptions are put in order (by
the words they share with the caption, or by a language model), and every two candidates of different rank are a row.
While it works, NAME.rank.parts/ holds the candidates, then what a language model answered.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pc_clip.core.config.settings import DataConfig, identity
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.files import write_json
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model
from pc_clip.write import prompts
from pc_clip.write.candidates import Query, find_candidates, words_of
from pc_clip.write.cleaning import Checked
from pc_clip.write.progress import Item, Progress, read_meta
from pc_clip.write.words import content_words, stem
from pc_clip.write.work import Task, job_seed, least_characters, make_writer, write_all
from pc_clip.write.writers import Job, Writer

log = logging.getLogger(__name__)

THE_PICTURE = "this picture"  # what a question about a picture that is shown calls it
# True of what is called otherwise ("three objects" of three stars, "one star" of a star): their absence says nothing.
_GENERAL = frozenset({stem(word) for word in ("object", "shape", "thing", "item", "one")})
_ORDER = re.compile(r"(?:answer:)?[\s\[(]*([0-9]{1,4}(?:[\s,;>]+[0-9]{1,4})*)[\s\])]*\.?", re.IGNORECASE)


def generate_rank(config: GenerateConfig, processes: Processes) -> Path:
    """Write the ranking data; returns the finished file. Interrupted and called again, it continues.

    Raises UserError for settings that do not fit, for data without captions, and as all tasks do.
    """
    asked = _check(config)
    out = Path(config.out) / f"{config.name}.parquet"
    rank = config.rank
    data = load_dataset(
        DataConfig(
            config.dataset, config.root, config.split, rank.missing, captions=config.captions, upright=rank.upright
        )
    )
    device = resolve_device(rank.device, "rank.device") if processes.is_main else "cpu"
    clip = create_model(*config.model.source(config.dataset), device=device, seed=config.seed)
    settings, model = _settings(config, data, clip, asked), clip.describe()
    progress = Progress(out, ".rank.parts")
    drawn = progress.folder / "candidates.json"
    with progress.working(settings, config.overwrite, processes) as wanted:
        if wanted:
            if processes.is_main and not drawn.is_file():
                write_json(drawn, find_candidates(config, data, clip))  # once: another machine might round otherwise
            del clip  # its memory may be wanted for a language model
            processes.wait()
            queries = [Query(*query) for query in json.loads(drawn.read_text(encoding="utf-8"))]
            answers = Answers(config, data, queries, asked, progress.folder)
            answers.write(settings, processes)
            if processes.is_main:
                _finish(answers, progress, {"settings": settings, "model": model})
    return out


def _check(config: GenerateConfig) -> dict[str, prompts.Prompt]:
    """Raise UserError for settings that cannot be. Returns what a language model is asked, by phase."""
    rank = config.rank
    for name, least in (("most", 2), ("n_queries", 1), ("pairs_each", 1)):
        if (value := getattr(rank, name)) is not None:
            check_at_least(f"rank.{name}", value, least)
    if not rank.pictures and config.writer != "server":
        raise UserError(f"--rank.pictures false has no effect with --writer {config.writer}, which sees none anyway")
    if sees(config) and not config.server.chat:
        raise UserError("pictures can be shown in a chat alone; with --server.chat false add --rank.pictures false")
    if config.writer == "rules":
        if rank.order_prompt:
            raise UserError("--rank.order_prompt has no effect with --writer rules; leave it out")
        return {}
    path = rank.order_prompt or prompts.FOLDER / "rank_order.yaml"
    usual = prompts.FOLDER / ("rank_picture.yaml" if sees(config) else "rank.yaml")
    asked = {"descriptions": prompts.read(config.prompt or usual), "orders": prompts.read(path)}
    if "{second}" not in asked["orders"].instruction:
        raise UserError(f"{path}: the instruction has no {{second}} where the descriptions belong")
    return asked


def sees(config: GenerateConfig) -> bool:
    """Whether the writer is shown the pictures."""
    return config.writer == "server" and config.rank.pictures


def _settings(config: GenerateConfig, data: Dataset, clip: Clip, asked: dict[str, prompts.Prompt]) -> dict[str, Any]:
    """Everything the rows depend on, and nothing else."""
    used = {"task", "caption", "seed", "writer", "rank"} | ({config.writer} if asked else set())
    return {name: value for name, value in identity(config).items() if name in used} | {
        "data": data.label,
        "fingerprint": data.fingerprint,
        "captions_sha256": hashlib.sha256(repr(data.captions).encode()).hexdigest(),
        "model": clip.weights_hash(),
        "asked": {phase: dataclasses.asdict(prompt) for phase, prompt in asked.items()},
        "min_characters": least_characters(config),
    }


# -- answers -------------------------------------------------------------------------------------------


def overlap(caption: str, description: str) -> float:
    """The share of a caption's content words that a description has, endings aside; 0 for a caption without any."""
    words = set(content_words(caption)) - _GENERAL
    return len(words & set(content_words(description))) / len(words) if words else 0.0


def parse_order(raw: str, n: int) -> list[int] | None:
    """The numbers 1 to n in some order; None for an answer that is anything else, or says anything beside them.

    Between the numbers may be spaces, line ends, commas, semicolons and >; around them brackets, a full stop and
    "Answer:".
    """
    match = _ORDER.fullmatch(raw.strip())
    numbers = [int(number) for number in re.findall("[0-9]+", match[1])] if match else []
    return numbers if sorted(numbers) == list(range(1, n + 1)) else None


def judge_order(raw: str, job: Job) -> Checked:
    """`parse_order` instead of sentence cleaning; what is kept is written "2, 1, 3"."""
    order = parse_order(raw, job.second.count("\n") + 1)
    return Checked(", ".join(map(str, order)), "kept") if order else Checked(None, "no_order")


@dataclass
class Answers:
    """After `write`, `texts` has descriptions by image id, `orders` a language model's order of a query's by its id.

    asked: a language model's prompts, by phase, none where rules write. folder: where its answers are kept.
    """

    config: GenerateConfig
    data: Dataset
    queries: list[Query]
    asked: dict[str, prompts.Prompt]
    folder: Path
    texts: dict[str, str] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)

    def write(self, settings: dict[str, Any], processes: Processes) -> None:
        """Describe and order, together with other processes."""
        config, data, seen = self.config, self.data, sees(self.config)
        rows = {data.ids[row]: row for row in sorted({row for query in self.queries for row, _ in query.candidates})}
        captions = {key: _as_one(data.captions[row]) for key, row in rows.items()}
        described = list(rows) if seen else [key for key, text in captions.items() if text]
        if not self.asked:
            self.texts = {key: captions[key] for key in described}
            return
        writer = functools.cache(lambda: make_writer(config))  # one for both phases: it takes long to load

        def ask(phase: str, items: list[Item], job: Callable[..., Job], judge: Any = None) -> dict[str, str]:
            def asking(_: GenerateConfig) -> Writer:
                writer().asked = self.asked[phase]
                writer().look = lambda key: data.load(rows[key])
                return writer()

            task = Task(items, job, phase, make_writer=asking, judge=judge)
            named = dataclasses.replace(config, name=f"{config.name} {phase}", overwrite=False)
            write_all(named, task, self.folder / f"{phase}.jsonl", settings, processes)
            return {row["first"]: row["text"] for row in _lines(self.folder / f"{phase}.jsonl")}

        def describe(key: str, _: str, n: int) -> Job:
            seed = job_seed(config.seed, n)
            return Job(THE_PICTURE, "", seed, key) if seen else Job(captions[key], "", seed)

        def order(key: str, caption: str, n: int) -> Job:
            lines = (f"{k}. {' '.join(text.split())}" for k, text in enumerate(shown[key], 1))
            return Job(caption, "\n".join(lines), job_seed(config.seed, n))

        self.texts = ask("descriptions", [(key, "") for key in described], describe)
        shown = {data.ids[query.row]: self.shown(query) for query in self.queries}
        if items := [(key, query.caption) for key, query in zip(shown, self.queries) if len(shown[key]) > 1]:
            self.orders = ask("orders", items, order, judge_order)

    def shown(self, query: Query) -> list[str]:
        """The descriptions of a query's candidates, each once, shuffled so that the likeliest is not always first."""
        keys = (self.data.ids[row] for row, _ in query.candidates)
        texts = list(dict.fromkeys(self.texts[key] for key in keys if key in self.texts))
        return [texts[k] for k in stream(self.config.seed, "shuffle", query.row).permutation(len(texts))]

    def score(self, query: Query) -> dict[str, float] | None:
        """How well each description fits, higher is better; None where a language model gave no order."""
        texts = self.shown(query)
        if not self.asked or len(texts) < 2:  # of a single one no order was asked
            return {text: overlap(query.caption, text) for text in texts}
        order = self.orders.get(self.data.ids[query.row])
        return order and {texts[int(number) - 1]: -place for place, number in enumerate(order.split(", "))}


def _as_one(captions: Sequence[str]) -> str:
    """All captions of an image, as one text."""
    return " ".join(text if text[-1] in ".!?" else f"{text}." for text in captions if text)


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]


# -- pairs ---------------------------------------------------------------------------------------------


def pairs(answers: Answers, query: Query, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row for every two candidates of which one is known to fit better, in a fixed order; `counts` grows.

    Images that have the caption themselves, the query's own first of all, are never the rejected one.
    """
    score, data = answers.score(query), answers.data
    if score is None:
        counts["queries_without_order"] += 1
        return
    texts = {row: answers.texts[data.ids[row]] for row, _ in query.candidates if data.ids[row] in answers.texts}
    places = sorted(set(score.values()), reverse=True)
    rank = {row: 1 + places.index(score[text]) for row, text in texts.items()}
    fits = {row for row in rank if words_of(query.caption) in map(words_of, data.captions[row])}
    cosine = dict(query.candidates)
    counts.update(queries=1, candidates=len(rank))
    for a, b in itertools.permutations(rank, 2):
        if rank[a] < rank[b] and b in fits:
            counts["own_image_rejected"] += 1
        elif rank[a] < rank[b]:
            yield {
                "caption": query.caption,
                "preferred_image": data.ids[a],
                "rejected_image": data.ids[b],
                "query_image": data.ids[query.row],
                "preferred_rank": rank[a],
                "rejected_rank": rank[b],
                "preferred_similarity": round(cosine[a], 6),
                "rejected_similarity": round(cosine[b], 6),
                "preferred_text": texts[a],
                "rejected_text": texts[b],
            }


def _finish(answers: Answers, progress: Progress, about: dict[str, Any]) -> None:
    """All pairs into their place."""
    seed, most, rows = answers.config.seed, answers.config.rank.pairs_each, []
    counts: Counter[str] = Counter()
    for query in answers.queries:
        known = list(pairs(answers, query, counts))
        if most is not None and len(known) > most:
            rng = stream(seed, "pairs of candidates", query.row)
            known = [known[k] for k in sorted(rng.choice(len(known), most, replace=False))]
        rows += known
    counts["pairs"] = len(rows)
    written = {phase: read_meta(progress.folder / f"{phase}.jsonl") for phase in answers.asked}
    reasons = {phase: meta["counts"] for phase, meta in written.items() if meta}
    if not rows:
        raise UserError(f"no two candidates could be told apart ({dict(counts)}, {reasons}); raise --rank.margin")
    writers = {phase: meta["writer"] for phase, meta in written.items() if meta} or {"writer": "rules"}
    rejected = [
        {"phase": phase, **row} for phase in written for row in _lines(progress.folder / f"{phase}.rejected.jsonl")
    ]
    made = progress.folder / "made.parquet"
    pd.DataFrame(rows).to_parquet(made, engine="pyarrow", index=False)
    progress.finish(made, {**about, "writer": writers, "counts": dict(counts), "answers": reasons}, rejected)
    log.info(
        "%s is written: %s", progress.out, ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
    )
