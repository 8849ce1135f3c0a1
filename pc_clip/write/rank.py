"""Ranking data: for a caption, which of two similar images fits it better. NAME.parquet, and NAME.meta.json.

A model retrieves candidates for each caption, each candidate gets a description, the descriptions are put in order (by
the words they share with the caption, or by a language model), and every two candidates of different rank are a row.
While it works, NAME.rank.parts/ holds the candidates, then what a language model answered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pc_clip.core import environment
from pc_clip.core.config.settings import DataConfig, identity
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.files import write_json
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import embed_images
from pc_clip.data.training_data import load_dataset
from pc_clip.models.clip import Clip
from pc_clip.models.loading import create_model
from pc_clip.write import prompts
from pc_clip.write.cleaning import Checked
from pc_clip.write.progress import Progress
from pc_clip.write.words import content_words, stem
from pc_clip.write.work import (
    Task,
    check_free,
    is_finished,
    job_seed,
    least_characters,
    make_writer,
    put_aside,
    read_meta,
    write_all,
)
from pc_clip.write.writers import Job, Writer

log = logging.getLogger(__name__)

BLOCK = 256  # captions compared with all images at once
SAME = 1 - 1e-5  # two embeddings with this cosine are of one picture; float32 leaves the rest
THE_PICTURE = "this picture"  # what a question about a picture that is shown calls it
# True of what is called otherwise ("three objects" of three stars, "one star" of a star): their absence says nothing.
_GENERAL = frozenset({stem(word) for word in ("object", "shape", "thing", "item", "one")})
_BETWEEN = r"(?:\s*(?:,|;|>|->|→)\s*(?:and\s+)?|\s+(?:and\s+|then\s+)?)"
_LIST = re.compile(rf"[0-9]{{1,4}}(?:{_BETWEEN}[0-9]{{1,4}})*")
_AROUND = re.compile(r"^(?:(?:answer|order|ranking)\s*:\s*)?[\[(]?\s*(.*?)\s*[\])]?\s*\.?$", re.DOTALL | re.IGNORECASE)


class Query(NamedTuple):
    """A caption and the image it was written for. candidates: rows of images and their cosines, best first."""

    row: int
    caption: str
    candidates: Sequence[tuple[int, float]] = ()


def generate_rank(config: GenerateConfig, processes: Processes) -> Path:
    """Write the ranking data; returns the finished file. Interrupted and called again, it continues.

    Raises UserError for settings that do not fit, for data without captions, and as all tasks do.
    """
    asked = _check(config)
    out = Path(config.out) / f"{config.name}.parquet"
    check_free(out, ".jsonl")
    rank = config.rank
    data = load_dataset(DataConfig(config.dataset, config.root, config.split, rank.missing, captions=config.captions))
    device = resolve_device(rank.device, "rank.device") if processes.is_main else "cpu"
    clip = create_model(*config.model.source(config.dataset), device=device, seed=config.seed)
    settings, model = json.loads(json.dumps(_settings(config, data, clip, asked))), clip.describe()
    progress = Progress(out, ".rank.parts")
    drawn = progress.folder / "candidates.json"
    with progress.lock() if processes.is_main else nullcontext():
        processes.wait()
        if is_finished(progress, settings, config.overwrite, processes):
            return out
        if processes.is_main:
            progress.begin(settings, config.overwrite, drawn.name)
            if not drawn.is_file():  # by one process, once: another machine might round them to another order
                write_json(drawn, find_candidates(config, data, clip))
        del clip  # its memory may be wanted for a language model
        processes.wait()
        queries = [Query(*query) for query in json.loads(drawn.read_text(encoding="utf-8"))]
        answers = Answers(config, data, queries, progress.folder, asked)
        answers.write(settings, processes)
        if processes.is_main:
            _finish(progress, answers, {"settings": settings, "writer": answers.describe(), "model": model})
        processes.wait()
    return out


def _check(config: GenerateConfig) -> dict[str, prompts.Prompt]:
    """Raise UserError for settings that cannot be. Returns what a language model is asked, by phase."""
    rank, by_rules = config.rank, config.writer == "rules"
    check_at_least("rank.most", rank.most, 2)
    if not 0 <= rank.margin <= 2:
        raise UserError(f"rank.margin is {rank.margin:g}; it is a difference of cosines, from 0 to 2")
    for name in ("n_queries", "pairs_each"):
        if (value := getattr(rank, name)) is not None:
            check_at_least(f"rank.{name}", value, 1)
    check_choice("rank.missing", rank.missing, ("error", "skip"))
    resolve_device(rank.device, "rank.device")
    if rank.order_prompt and by_rules:
        raise UserError("--rank.order_prompt has no effect with --writer rules; leave it out")
    if not rank.pictures and config.writer != "server":
        raise UserError(f"--rank.pictures false has no effect with --writer {config.writer}, which sees none anyway")
    if sees(config) and not config.server.chat:
        raise UserError("pictures can be shown in a chat alone; with --server.chat false add --rank.pictures false")
    if by_rules:
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
    by_content = {"order_prompt", "missing", *(() if sees(config) else ("pictures",))}  # which images are there counts
    settings = {name: getattr(config, name) for name in ("task", "caption", "seed", "writer")} | {
        "rank": {name: value for name, value in identity(config.rank).items() if name not in by_content},
        "data": data.label,
        "fingerprint": data.fingerprint,
        "captions_sha256": hashlib.sha256(repr(data.captions).encode()).hexdigest(),
        "model": clip.weights_hash(),
    }
    if asked:
        settings[config.writer] = identity(getattr(config, config.writer))
        settings["asked"] = {phase: dataclasses.asdict(prompt) for phase, prompt in asked.items()}
        settings["min_characters"] = least_characters(config)
    return settings


# -- candidates ----------------------------------------------------------------------------------------


def words_of(caption: str) -> tuple[str, ...]:
    """A caption without what makes no other caption of it: capitals, spaces and punctuation."""
    return tuple(re.findall(r"\w+", caption.lower()))


def draw_queries(data: Dataset, n: int | None, which: str, seed: int) -> list[Query]:
    """A caption each of `n` images (all for None), in the order of their rows; none of them twice.

    which: of an image's captions the longest, or a random one. Raises UserError where there are no captions, or fewer
    different ones than are asked for.
    """
    rows = [row for row, texts in enumerate(data.captions or ()) if texts]
    if not rows:
        raise UserError(f"{data.label} has no captions to rank its images by; name a file of them with --captions")
    rng = stream(seed, "queries")
    order, draws = rng.permutation(rows).tolist(), rng.random(len(rows))
    queries: dict[tuple[str, ...], Query] = {}  # two images with one caption would ask the same question twice
    for row, draw in zip(order, draws):
        texts = data.captions[row]
        caption = max(texts, key=len) if which == "longest" else texts[int(draw * len(texts))]
        queries.setdefault(words_of(caption), Query(row, caption))
        if len(queries) == n:
            break
    if n is not None and len(queries) < n:
        raise UserError(
            f"rank.n_queries is {n}, but {data.label} has {len(rows)} images with captions, of which only "
            f"{len(queries)} differ; ask for fewer"
        )
    return sorted(queries.values())


def retrieve(texts: Tensor, z: Tensor, own: Sequence[int], margin: float, most: int) -> list[list[tuple[int, float]]]:
    """For each text the rows and cosines of its candidates, the most similar first.

    texts [Q, D], z [N, D]: unit vectors. own: the row of each text's own image, which is a candidate in any case.
    margin: how far below the best a cosine may be. A picture that is there twice is one candidate.
    """
    candidates = []
    for start in range(0, len(texts), BLOCK):
        cosines = texts[start : start + BLOCK] @ z.T  # [B, N]
        best, rows = cosines.topk(min(most, len(z)), dim=1)
        for n, mine in enumerate(own[start : start + BLOCK]):
            near = [mine]
            for row, value in zip(rows[n].tolist(), best[n].tolist()):
                if value >= best[n, 0] - margin and len(near) < most and float((z[near] @ z[row]).max()) < SAME:
                    near.append(row)
            candidates.append(sorted(((row, float(cosines[n, row])) for row in near), key=lambda item: -item[1]))
    return candidates


def find_candidates(config: GenerateConfig, data: Dataset, clip: Clip) -> list[Query]:
    """The queries that the settings draw, each with its candidates."""
    rank = config.rank
    queries = draw_queries(data, rank.n_queries, config.caption, config.seed)
    texts = clip.embed_texts([query.caption for query in queries])  # [Q, D]
    z = embed_images(clip, data, batch_size=rank.batch_size, workers=rank.workers).z  # [N, D]
    z = torch.nn.functional.normalize(z.float(), dim=-1)
    near = retrieve(texts, z, [query.row for query in queries], rank.margin, rank.most)
    return [query._replace(candidates=candidates) for query, candidates in zip(queries, near)]


# -- orders --------------------------------------------------------------------------------------------


def overlap(caption: str, description: str) -> float:
    """The share of a caption's content words that a description has, endings aside; 0 for a caption without any."""
    words = set(content_words(caption)) - _GENERAL
    return len(words & set(content_words(description))) / len(words) if words else 0.0


def parse_order(raw: str, n: int) -> tuple[list[int] | None, str]:
    """An answer that must be the numbers 1 to n in some order: those, or None; and the reason.

    Between the numbers may be commas, semicolons, spaces, line ends, arrows or >; around them brackets, a full stop and
    "Answer:". Anything else is no answer: what else was said of the numbers is not known.
    Reasons: kept, empty, no_list, unknown_number, twice, not_all.
    """
    text = " ".join(raw.split())  # a long run of spaces would keep the patterns busy for hours
    if not text:
        return None, "empty"
    inner = _AROUND.match(text)[1]
    if not _LIST.fullmatch(inner):
        return None, "no_list"
    order = [int(number) for number in re.findall("[0-9]+", inner)]
    if not all(1 <= number <= n for number in order):
        return None, "unknown_number"
    if len(set(order)) < len(order):
        return None, "twice"
    return (order, "kept") if len(order) == n else (None, "not_all")


def judge_order(raw: str, job: Job) -> Checked:
    """`parse_order` in the place of the cleaning of sentences; what is kept is written "2, 1, 3"."""
    order, reason = parse_order(raw, job.second.count("\n") + 1)
    return Checked(", ".join(map(str, order)) if order else None, reason)


@dataclass
class Answers:
    """After `write`, `texts` has descriptions by image id, and `score` says how well each fits a query.

    folder: where the answers of a language model are kept. asked: its prompts, by phase; none where rules write.
    """

    config: GenerateConfig
    data: Dataset
    queries: list[Query]
    folder: Path
    asked: dict[str, prompts.Prompt]
    texts: dict[str, str] = field(default_factory=dict)
    orders: dict[str, list[int]] = field(default_factory=dict)
    writer: Writer | None = None

    @property
    def files(self) -> dict[str, Path]:
        return {phase: self.folder / f"{phase}.jsonl" for phase in self.asked}

    def write(self, settings: dict[str, Any], processes: Processes) -> None:
        """Describe and order, together with other processes."""
        rows = sorted({row for query in self.queries for row, _ in query.candidates})
        ids = {self.data.ids[row]: row for row in rows if sees(self.config) or self._captions(row)}
        if not self.asked:
            self.texts = {key: self._captions(row) for key, row in ids.items()}
            return
        self._phase("descriptions", self._describing(ids), settings, processes)
        self.texts = {row["first"]: row["text"] for row in _lines(self.files["descriptions"])}
        if any(len(self.shown(query)) > 1 for query in self.queries):
            self._phase("orders", self._ordering(), settings, processes)
            self.orders = {
                row["first"]: [int(number) - 1 for number in row["text"].split(", ")]
                for row in _lines(self.files["orders"])
            }

    def _phase(self, phase: str, task: Task, settings: dict[str, Any], processes: Processes) -> None:
        """A language model's answers to one of its two prompts, written and continued as sentences are."""

        def writer(config: GenerateConfig) -> Writer:
            self.writer = self.writer or make_writer(config)  # one for both: it takes long to load
            self.writer.asked = self.asked[phase]
            if sees(config):
                row = {key: n for n, key in enumerate(self.data.ids)}
                self.writer.look = lambda key: self.data.load(row[key])
            return self.writer

        config = dataclasses.replace(self.config, name=f"{self.config.name} {phase}", overwrite=False)
        write_all(config, dataclasses.replace(task, make_writer=writer), self.files[phase], settings, processes)

    def _captions(self, row: int) -> str:
        """All captions of an image, as one text."""
        return " ".join(text if text[-1] in ".!?" else f"{text}." for text in self.data.captions[row] if text)

    def _describing(self, ids: dict[str, int]) -> Task:
        def job(key: str, _: str, n: int) -> Job:
            seed = job_seed(self.config.seed, n)
            return Job(THE_PICTURE, "", seed, key) if sees(self.config) else Job(self._captions(ids[key]), "", seed)

        return Task(lambda: [(key, "") for key in ids], job, _as_it_is, "pictures")

    def _ordering(self) -> Task:
        shown = {self.data.ids[query.row]: (query, self.shown(query)) for query in self.queries}

        def job(key: str, caption: str, n: int) -> Job:
            lines = (f"{k}. {' '.join(text.split())}" for k, text in enumerate(shown[key][1], 1))
            return Job(caption, "\n".join(lines), job_seed(self.config.seed, n))

        items = [(key, query.caption) for key, (query, texts) in shown.items() if len(texts) > 1]
        return Task(lambda: items, job, _as_it_is, "captions", judge=judge_order)

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
        return None if order is None else {texts[k]: -place for place, k in enumerate(order)}

    def describe(self) -> dict[str, Any]:
        """What the writers of both phases said of themselves."""
        return {p: read_meta(path)["writer"] for p, path in self.files.items() if path.is_file()} or {"writer": "rules"}


def _as_it_is(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# -- pairs ---------------------------------------------------------------------------------------------


def pairs(answers: Answers, query: Query, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row for every two candidates of which one is known to fit better, in a fixed order; `counts` grows.

    Images that have the caption themselves, the query's own first of all, are never the rejected one.
    """
    score, data = answers.score(query), answers.data
    if score is None:
        counts["queries_without_order"] += 1
        return
    candidates = [(row, cosine) for row, cosine in query.candidates if data.ids[row] in answers.texts]
    places = sorted(set(score.values()), reverse=True)
    rank = {row: 1 + places.index(score[answers.texts[data.ids[row]]]) for row, _ in candidates}
    fits = {row for row in rank if words_of(query.caption) in map(words_of, data.captions[row])}
    counts.update(queries=1, candidates=len(candidates))
    for a, cosine_a in candidates:
        for b, cosine_b in candidates:
            if rank[a] >= rank[b]:
                continue
            if b in fits:
                counts["own_image_rejected"] += 1
                continue
            yield {
                "caption": query.caption,
                "preferred_image": data.ids[a],
                "rejected_image": data.ids[b],
                "query_image": data.ids[query.row],
                "preferred_rank": rank[a],
                "rejected_rank": rank[b],
                "preferred_similarity": round(cosine_a, 6),
                "rejected_similarity": round(cosine_b, 6),
                "preferred_text": answers.texts[data.ids[a]],
                "rejected_text": answers.texts[data.ids[b]],
            }


def _finish(progress: Progress, answers: Answers, about: dict[str, Any]) -> None:
    """All pairs into their place; then the working folder goes."""
    config, out, rows = answers.config, progress.out, []
    counts: Counter[str] = Counter()
    for query in answers.queries:
        known = list(pairs(answers, query, counts))
        if config.rank.pairs_each is not None and len(known) > config.rank.pairs_each:
            rng = stream(config.seed, "pairs of candidates", query.row)
            known = [known[k] for k in sorted(rng.choice(len(known), config.rank.pairs_each, replace=False))]
        rows += known
    counts["pairs"] = len(rows)
    reasons = {phase: read_meta(path)["counts"] for phase, path in answers.files.items() if path.is_file()}
    if not rows:
        raise UserError(f"no two candidates could be told apart ({dict(counts)}, {reasons}); raise --rank.margin")
    new = progress.folder / "pairs.parquet"
    pd.DataFrame(rows).to_parquet(new, engine="pyarrow", index=False)
    progress.merging()
    rejected = {phase: _lines(path.with_suffix(".rejected.jsonl")) for phase, path in answers.files.items()}
    put_aside(out, [{"phase": phase, **row} for phase, lines in rejected.items() for row in lines])
    meta = {**about, "counts": dict(counts), "answers": reasons, **environment.describe()}
    write_json(out.with_suffix(".meta.json"), meta)
    new.replace(out)  # last: where the pairs are, the rest is
    progress.remove()
    log.info("%s is written: %s", out, ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
