"""What all tasks of generate_diffs.py share: a task's work, done or continued by several processes, and its file.

While it works, NAME.parts/ holds what is done (write/progress.py), so that it continues wherever it was stopped.
Sentences that were rejected end in NAME.rejected.jsonl.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pc_clip.core import environment
from pc_clip.core.config.evaluate import ComparativeConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_json
from pc_clip.core.random import seed_of, stream
from pc_clip.write import prompts
from pc_clip.write.causal import LanguageModelWriter
from pc_clip.write.cleaning import MIN_CHARACTERS, Checked, Given, check
from pc_clip.write.progress import Item, Jobs, Parts, put_in_place
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Job, Writer

log = logging.getLogger(__name__)

WRITERS = ("rules", "transformers", "server")  # from captions, or names of classes; change looks at pictures
MIN_OF_CLASSES = 20  # characters; "An owl: a small bird." says enough, where of two photographs it would not


class Work(NamedTuple):
    """What a task writes about.

    items: pairs of keys. job: of two keys and a number. to_line: of a finished row. writer: made of the settings,
    where it is not `make_writer`'s; judge: how its answers are looked at, where that is not the cleaning of sentences.
    """

    items: Callable[[], list[Item]]
    job: Callable[[str, str, int], Job]
    to_line: Callable[[dict[str, Any]], str]
    unit: str
    made_from: dict[str, Any]
    writer: Callable[[GenerateConfig], Writer] | None = None
    judge: Callable[[str, Job], Checked] | None = None


def write_all(config: GenerateConfig, work: Work, out: Path, settings: dict[str, Any], processes: Processes) -> Path:
    """Write what a task asks for into `out`, or continue; all processes call this alike.

    settings: all that the sentences depend on, as JSON gives it back.
    """
    parts = Parts(out)
    finished = is_finished(out, settings, config.overwrite)
    items = [] if finished else work.items()
    if not finished and not items:
        raise UserError(f"there are no {work.unit} to write about; a pair takes two images, or classes")
    with ExitStack() as held:
        if processes.is_main and not finished:
            held.enter_context(parts.lock(0))
            _begin(out, parts, settings, config.overwrite)
        processes.wait()
        if is_finished(out, settings, config.overwrite):  # asked again: nothing can change under the main one's lock
            if processes.is_main:
                parts.clear(sum(read_meta(out)["counts"].values()))
                log.info("%s is complete; --overwrite true writes it again", out)
            return out
        if not processes.is_main:
            held.enter_context(parts.lock(processes.rank))
        todo = np.flatnonzero(parts.index(items)[:, 0] < 0)
        if processes.is_main and len(todo) < len(items):
            log.info("%d of %d %s are done; continuing", len(items) - len(todo), len(items), work.unit)
        processes.wait()  # all have seen the same, before anything is added to it
        error = _write(config, work, parts, items, processes.share(todo), processes)
        processes.wait()
        if processes.is_main:
            writer = parts.writer() or (work.writer or make_writer)(config).describe()
            _merge(out, parts, items, {"settings": settings, "writer": writer}, work.to_line, error)
        processes.wait()
    return out


def is_finished(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    if overwrite or not out.is_file():
        return False
    if read_meta(out).get("settings") == settings:
        return True
    raise UserError(f"{out} exists and was written with other settings; choose another --name or --overwrite true")


def check_free(out: Path, other: str) -> None:
    """Raises UserError where another task's file of the same name is there: both would have the one .meta.json."""
    if (there := out.with_suffix(other)).is_file():
        raise UserError(f"{there} is there, and {out.name} would take its .meta.json; choose another --name")


def read_meta(out: Path) -> dict[str, Any]:
    try:
        found = json.loads(out.with_suffix(".meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_writer(config: GenerateConfig | ComparativeConfig, task: str | None = None) -> Writer:
    """The writer that the settings name, asked the task's question."""
    check_choice("writer", config.writer, WRITERS)
    if config.writer == "rules":
        return RulesWriter()
    own = getattr(config, "prompt", None)
    prompt = prompts.read(own or prompts.FOLDER / f"{task or config.task}.yaml")
    if config.writer == "transformers":
        return LanguageModelWriter(config.transformers, prompt)
    from pc_clip.write.server import ServerWriter  # here, because its client takes a second to import

    return ServerWriter(config.server, prompt)


def least_characters(config: GenerateConfig) -> int:
    return config.min_characters or (MIN_CHARACTERS if config.task == "pairs" else MIN_OF_CLASSES)


def _judge(config: GenerateConfig, writer: Writer) -> Callable[[str, Job], Checked]:
    """How raw sentences are cleaned: held against their captions, and what a language model was shown beside them."""
    if not writer.needs_cleaning:
        return lambda raw, job: Checked(raw or None, "kept" if raw else "empty", ())
    asked = getattr(writer, "asked", None)
    shown = tuple(text for example in writer.describe().get("worked_examples", ()) for text in example.values())
    least, instructions = least_characters(config), (asked.system, asked.instruction) if asked else ()

    def judge(raw: str, job: Job) -> Checked:
        captions = tuple(caption for caption in (job.first, job.second) if caption)
        return check(raw, Given(least, captions, shown, instructions))

    return judge


def job_seed(seed: int, number: int) -> int:
    return seed_of(seed, "job", number) % 2**31  # what servers take


def draw_images(ids: list[str], config: GenerateConfig, what: str = "images have captions") -> list[str]:
    if config.n_images is None:
        return ids
    if config.n_images > len(ids):
        raise UserError(f"n_images is {config.n_images}, but only {len(ids)} {what}")
    rng = stream(config.seed, "images")
    return [ids[n] for n in sorted(rng.choice(len(ids), config.n_images, replace=False))]


def _begin(out: Path, parts: Parts, settings: dict[str, Any], overwrite: bool) -> None:
    parts.begin(settings, drop_others=overwrite)
    if (old := out.with_suffix(".partial.jsonl")).is_file():
        log.info("%s was left by an earlier version of this program and is not continued; delete it", old)


def _write(
    config: GenerateConfig, work: Work, parts: Parts, items: list[Item], numbers: np.ndarray, processes: Processes
) -> str:
    """This process's share, each sentence into its shard as soon as the writer gives it.

    Returns why the last job failed that the writer left out, "" if none did.
    """
    if not len(numbers):
        return ""
    writer = (work.writer or make_writer)(config)
    if processes.is_main:
        _keep_description(writer, parts)
    judge = work.judge or _judge(config, writer)
    jobs = Jobs(numbers, lambda n: work.job(*items[n], n))
    of = f", process 1 of {processes.size}" if processes.size > 1 else ""
    hidden = None if processes.is_main else True  # None: hidden where there is no terminal
    with (
        parts.shard(processes.rank) as shard,
        tqdm(total=len(jobs), desc=config.name + of, unit=" sentences", disable=hidden) as bar,
    ):
        stream = writer.stream(jobs)  # all at once: a writer looks at as many as it has use for
        try:
            for place, raw in stream:
                n = int(numbers[place])
                shard.add({"n": n, **_row(items[n], jobs[place], raw, judge)})
                bar.update()
        finally:
            if hasattr(stream, "close"):  # a generator's; it may have requests under way
                stream.close()
            if processes.is_main:
                _keep_description(writer, parts)  # a server may have said more of itself with its answers
    return writer.last_error if writer.failed else ""


def _keep_description(writer: Writer, parts: Parts) -> None:
    now, before = writer.describe(), parts.writer() or {}
    if before.get("model", now.get("model")) != now.get("model"):  # where the settings leave it to the server
        raise UserError(
            f"the sentences in {parts.folder} are by {before['model']}, and the writer is now {now.get('model')}; "
            "bring that model back, or choose another --name"
        )
    for key in ("answered_by", "url"):  # also those of earlier runs
        if key in now:
            now[key] = sorted({*before.get(key, ()), *now[key]})
    parts.keep_writer(now)


def _row(item: Item, job: Job, raw: str, judge: Callable[[str, Job], Checked]) -> dict[str, Any]:
    cut = getattr(raw, "cut", False)
    raw = raw.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    text, reason, trims = Checked(None, "cut") if cut else judge(raw, job)
    row = {"first": item[0], "second": item[1], "text": text, "reason": reason, "captions": [job.first, job.second]}
    return row | ({"trims": list(trims)} if trims else {}) | ({"raw": raw} if text is None else {})


def _merge(
    out: Path,
    parts: Parts,
    items: list[Item],
    about: dict[str, Any],
    line: Callable[[dict[str, Any]], str],
    error: str,
) -> None:
    """All sentences in the order of their items, into their place; then the working folder goes.

    error: the last failure of a job that was left out, to be named where sentences are missing.
    """
    where = parts.index(items)
    if missing := int((where[:, 0] < 0).sum()):
        raise UserError(
            f"{missing} of {len(items)} sentences are not in {parts.folder} yet; the same command continues"
            + f" (the last error: {error})" * bool(error)
        )
    kept, rejected, meta = (parts.folder / name for name in ("kept.jsonl", "rejected.jsonl", "meta.json"))
    reasons: Counter[str] = Counter()
    trims: Counter[str] = Counter()
    with kept.open("w", encoding="utf-8") as good, rejected.open("w", encoding="utf-8") as bad:
        for row in parts.rows(where):
            reasons[row["reason"]] += 1
            trims.update(row.pop("trims", ()))
            if row["text"] is not None:
                good.write(line(row))
            else:
                del row["n"], row["text"]
                bad.write(json.dumps(row, ensure_ascii=False) + "\n")
    counts = dict(reasons.most_common())
    if not kept.stat().st_size:
        raise UserError(f"none of the {len(items)} sentences could be used ({counts}); look at {rejected}")
    write_json(meta, {**about, "counts": counts, "trims": dict(trims.most_common()), **environment.describe()})
    place = {out.with_suffix(".meta.json"): meta, out.with_suffix(".rejected.jsonl"): rejected, out: kept}
    if not rejected.stat().st_size:
        del place[out.with_suffix(".rejected.jsonl")]
    for path in (out, out.with_suffix(".rejected.jsonl")):
        path.unlink(missing_ok=True)  # of an earlier writing; gone first, so that an interruption mixes nothing
    put_in_place(place)  # the sentences last: where they are, the rest is
    parts.remove()
    log.info("%s is written: %s", out, ", ".join(f"{n} {reason}" for reason, n in counts.items()))
