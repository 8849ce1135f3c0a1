"""Ranking data: for a caption, which of two similar images fits it better. NAME.parquet, and NAME.meta.json.

A model retrieves candidates for each caption (write/candidates.py), each candidate gets a description, the
descriptions are put in order (write/rank_answers.py, ranking.py), and every two candidates of different rank are a
row. While it works, NAME.rank.parts/ holds candidates.jsonl, then what a language model answered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pc_clip.core import environment
from pc_clip.core.config.settings import DataConfig, identity
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.files import write_json, write_text
from pc_clip.data.dataset import Dataset
from pc_clip.data.training_data import load_dataset
from pc_clip.models.clip import Clip
from pc_clip.write.candidates import Query, find_candidates, read_candidates, write_candidates
from pc_clip.write.progress import Parts, put_in_place
from pc_clip.write.rank_answers import Answers, questions, sees
from pc_clip.write.ranking import Pair, draw_pairs, pairs
from pc_clip.write.work import check_free, is_finished, least_characters

log = logging.getLogger(__name__)


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
    drawn = parts.folder / "candidates.jsonl"
    with ExitStack() as held:
        if processes.is_main and not is_finished(out, settings, config.overwrite):
            held.enter_context(parts.lock(0))
            _begin(parts.folder, settings, config.overwrite)
            if not drawn.is_file():  # by one process, once: another machine might round them to another order
                write_candidates(drawn, find_candidates(config, data, clip), data)
        del clip  # its memory may be wanted for a language model
        processes.wait()
        if is_finished(out, settings, config.overwrite):
            if processes.is_main:
                _clear(parts, out)
                log.info("%s is complete; --overwrite true writes it again", out)
            return out
        answers = Answers(config, data, read_candidates(drawn, data), parts.folder)
        processes.wait()  # all have read them, before the main one can have finished
        answers.run(settings, processes)
        if processes.is_main:
            _finish(out, parts, answers, {"settings": settings, "writer": answers.describe(), "model": model})
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
    resolve_device(rank.device, "rank.device")
    if rank.order_prompt and config.writer == "rules":
        raise UserError("--rank.order_prompt has no effect with --writer rules; leave it out")
    if not rank.pictures and config.writer != "server":
        raise UserError(f"--rank.pictures false has no effect with --writer {config.writer}, which sees none anyway")
    if sees(config) and not config.server.chat:
        raise UserError("pictures can be shown in a chat alone; with --server.chat false add --rank.pictures false")
    try:
        import pyarrow  # noqa: F401  (now, rather than when all is written)
    except ImportError:
        raise UserError("Parquet files need the package pyarrow; pip install -r requirements.txt") from None


def _data(config: GenerateConfig) -> Dataset:
    wanted = DataConfig(config.dataset, config.root, config.split, config.rank.missing, captions=config.captions)
    return load_dataset(wanted)


def _clip(config: GenerateConfig, embeds: bool) -> Clip:
    """The model; on the CPU for a process that only wants to know which it is."""
    device = resolve_device(config.rank.device, "rank.device") if embeds else "cpu"
    return Clip.create(*config.model.source(config.dataset), device=device, seed=config.seed)


def _settings(config: GenerateConfig, data: Dataset, clip: Clip) -> dict[str, Any]:
    """Everything the rows depend on, and nothing else."""
    by_content = {"order_prompt", "missing", *(() if sees(config) else ("pictures",))}  # which images are there counts
    rank = {name: value for name, value in identity(config.rank).items() if name not in by_content}
    captions = hashlib.sha256(repr(data.captions).encode()).hexdigest()
    found = {"task": "rank", "caption": config.caption, "seed": config.seed, "writer": config.writer, "rank": rank}
    found |= {"data": data.label, "fingerprint": data.fingerprint, "captions_sha256": captions}
    found["model"] = clip.weights_hash()
    if config.writer == "rules":
        return found
    found[config.writer] = identity(getattr(config, config.writer))
    found["asked"] = {phase: dataclasses.asdict(prompt) for phase, prompt in questions(config).items()}
    return found | {"min_characters": least_characters(config)}


def _begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the working folder ready. Raises UserError where it holds work of other settings that is to be kept."""
    place = folder / "settings.json"
    if place.is_file() and json.loads(place.read_text(encoding="utf-8")) == settings:
        return
    if place.is_file() and (folder / "candidates.jsonl").is_file() and not overwrite:
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


def _rows(answers: Answers) -> Iterator[dict[str, Any]]:
    """The rows, and their counts in answers.counts."""
    config, counts = answers.config, answers.counts
    for query, order in answers.ranked():
        known = pairs(order, answers.sees)
        kept = draw_pairs(known, config.rank.pairs_each, config.seed, query)
        counts["queries"] += 1
        counts["queries_without_pairs"] += not kept
        counts["candidates"] += len(order)
        counts["crops"] += sum(not r.candidate.is_whole for r in order)
        counts["undecided_pairs"] += len(order) * (len(order) - 1) // 2 - len(known)
        counts["pairs"] += len(kept)
        yield from (_row(answers.data, query, pair) for pair in kept)


def _finish(out: Path, parts: Parts, answers: Answers, about: dict[str, Any]) -> None:
    """All pairs into their place; then the working folder goes."""
    import pandas

    folder = parts.folder
    table = pandas.DataFrame(list(_rows(answers)))
    counts = dict(answers.counts)
    if table.empty:
        raise UserError(f"no two candidates could be told apart ({counts}, {answers.reasons()}); raise --rank.margin")
    table.to_parquet(folder / "pairs.parquet", engine="pyarrow", index=False)
    meta = {**about, "counts": counts, "answers": answers.reasons(), **environment.describe()}
    write_json(folder / "meta.json", meta)
    write_json(folder / "finished.json", meta)  # stays, to be known by if only the removing is interrupted
    rejected = out.with_suffix(".rejected.jsonl")
    place = {out.with_suffix(".meta.json"): folder / "meta.json", out: folder / "pairs.parquet"}
    if text := answers.rejected():
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
    if parts.folder.is_dir() and not (finished.is_file() and finished.read_bytes() == meta.read_bytes()):
        log.info("%s is left from writing it again, which --overwrite true continues", parts.folder)
    else:
        parts.clear(0)  # also what a removing that was interrupted left
