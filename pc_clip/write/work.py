"""Run a writing task on one or several processes, and resume it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pc_clip.core.config.evaluate import ComparativeConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_json, write_text
from pc_clip.core.random import seed_of, stream
from pc_clip.data.differences import Difference
from pc_clip.write import prompts
from pc_clip.write.causal import LanguageModelWriter
from pc_clip.write.cleaning import MIN_CHARACTERS, Checked, Given, check
from pc_clip.write.progress import Item, Progress, read_json
from pc_clip.write.rules import PLAIN, RulesWriter
from pc_clip.write.writers import Job, Writer

log = logging.getLogger(__name__)

WRITERS = ("rules", "transformers", "server")  # from captions, or names of classes; change looks at pictures
MIN_OF_CLASSES = 20  # characters; "An owl: a small bird." says enough, where of two photographs it would not
FIRST_ANSWERS = 100  # a language model of which so many cannot be used is not asked on


@dataclass(frozen=True)
class Task:
    """A writing task.

    items: pairs of keys. job: of two keys and the item's number. columns: names in the file, and what of a finished
    row they are (first and second: the keys). made_from: what the sentences depend on beside the settings. make_writer
    and judge replace `make_writer` and the cleaning of sentences.
    """

    items: list[Item]
    job: Callable[[str, str, int], Job]
    unit: str
    columns: dict[str, str] = field(default_factory=lambda: {name: name for name in Difference._fields})
    made_from: dict[str, Any] = field(default_factory=dict)
    make_writer: Callable[[GenerateConfig], Writer] | None = None
    judge: Callable[[str, Job], Checked] | None = None


def write_all(config: GenerateConfig, task: Task, out: Path, settings: dict[str, Any], processes: Processes) -> Path:
    """Write a task's sentences into `out`, or continue; all processes call this alike.

    settings: all that the sentences depend on. Raises UserError for a file of other settings.
    """
    if not task.items:
        raise UserError(f"there are no {task.unit} to write about; a pair takes two images, or classes")
    progress, items = Progress(out), task.items
    with progress.working(settings, config.overwrite, processes) as wanted:
        if wanted:
            done = set(progress.lines(items))
            if processes.is_main and done:
                log.info("%d of %d %s are done; continuing", len(done), len(items), task.unit)
            todo = [n for n in range(len(items)) if n not in done]
            processes.wait()  # all have read the same, before anything is added to it
            error = _write(config, task, progress, todo[processes.rank :: processes.size], processes)
            processes.wait()
            if processes.is_main:
                _merge(progress, task, settings, error, config.allow_missing)
    return out


def make_writer(config: GenerateConfig | ComparativeConfig, task: str | None = None) -> Writer:
    """The writer that the settings name, asked the task's question."""
    check_choice("writer", config.writer, WRITERS)
    if config.writer == "rules":
        return RulesWriter(getattr(config, "wording", PLAIN))
    own = getattr(config, "prompt", None)
    prompt = prompts.read(own or prompts.FOLDER / f"{task or config.task}.yaml")
    if config.writer == "transformers":
        return LanguageModelWriter(config.transformers, prompt)
    from pc_clip.write.server import ServerWriter  # here, because its client takes a second to import

    return ServerWriter(config.server, prompt)


def least_characters(config: GenerateConfig) -> int:
    return config.min_characters or (MIN_CHARACTERS if config.task == "pairs" else MIN_OF_CLASSES)


def job_seed(seed: int, number: int) -> int:
    return seed_of(seed, "job", number) % 2**31  # what servers take


def draw_images(ids: list[str], config: GenerateConfig, what: str = "images have captions") -> list[str]:
    """`n_images` of the ids, by seed; all where it is not set. Raises UserError where they are fewer."""
    if config.n_images is None:
        return ids
    if config.n_images > len(ids):
        raise UserError(f"n_images is {config.n_images}, but only {len(ids)} {what}")
    rng = stream(config.seed, "images")
    return [ids[n] for n in sorted(rng.choice(len(ids), config.n_images, replace=False))]


# -- writing -------------------------------------------------------------------------------------------


def _write(config: GenerateConfig, task: Task, progress: Progress, numbers: list[int], processes: Processes) -> str:
    """This process's share, each sentence into its file as soon as the writer gives it.

    Returns why the last job failed that the writer left out, "" if none did.
    """
    if not numbers:
        return ""
    writer = (task.make_writer or make_writer)(config)
    judge = task.judge or _judge(config, writer)
    jobs = [task.job(*task.items[n], n) for n in numbers]
    if processes.is_main:
        _keep_description(writer, progress)
    hidden = None if processes.is_main else True  # None: hidden where there is no terminal
    usable, rejected = not writer.needs_cleaning, []
    try:
        with progress.open(processes.rank) as file, closing(writer.stream(jobs)) as answers:
            for place, raw in tqdm(answers, config.name, len(jobs), unit=" sentences", disable=hidden):
                row = _row(task.items[numbers[place]], jobs[place], raw, judge)
                file.write((json.dumps({"n": numbers[place], **row}, ensure_ascii=False) + "\n").encode())
                file.flush()  # the operating system has it then
                usable = usable or row["text"] is not None
                if usable:
                    continue
                rejected.append(row)
                if len(rejected) == FIRST_ANSWERS:
                    Path(file.name).unlink()  # so that they are asked for again
                    raise UserError(f"none of the first {FIRST_ANSWERS} answers could be used{_samples(rejected)}")
    finally:
        if processes.is_main:
            _keep_description(writer, progress)  # a server may have said more of itself with its answers
    return writer.last_error if writer.failed else ""


def _keep_description(writer: Writer, progress: Progress) -> None:
    now, before = writer.describe(), read_json(progress.writer)
    if before.get("model", now.get("model")) != now.get("model"):  # where the settings leave it to the server
        raise UserError(
            f"the sentences in {progress.folder} are by {before['model']}, and the writer is now {now.get('model')}; "
            "bring that model back, or choose another --name"
        )
    if "answered_by" in now:  # also in earlier runs
        now["answered_by"] = sorted({*before.get("answered_by", ()), *now["answered_by"]})
    write_json(progress.writer, now)


def _judge(config: GenerateConfig, writer: Writer) -> Callable[[str, Job], Checked]:
    """How raw sentences are cleaned: held against their captions, and what a language model was shown beside them."""
    if not writer.needs_cleaning:
        return lambda raw, _: Checked(raw or None, "kept" if raw else "empty")
    given = Given.of(least_characters(config), writer.describe())
    return lambda raw, job: check(raw, given._replace(captions=tuple(filter(None, (job.first, job.second)))))


def _row(item: Item, job: Job, raw: str, judge: Callable[[str, Job], Checked]) -> dict[str, Any]:
    """The line of one answer: its text, or why it was rejected."""
    cut = getattr(raw, "cut", False)  # before encode, which gives back a plain str
    raw = raw.encode("utf-8", "replace").decode()  # half a surrogate pair is not valid text
    text, reason = Checked(None, "cut") if cut else judge(raw, job)
    row = {"first": item[0], "second": item[1], "text": text, "reason": reason, "captions": [job.first, job.second]}
    return row | ({"raw": raw} if text is None else {})


def _samples(rejected: Sequence[dict[str, Any]]) -> str:
    """The end of an error where no answer could be used: counts of reasons, three answers, what to do."""
    counts = dict(Counter(row["reason"] for row in rejected).most_common())
    answers = "; ".join(f"{row['reason']}: {row['raw'][:120]!r}" for row in rejected[:3])
    return f" ({counts}), such as {answers}. Mend the model or its prompt; the same command then asks again"


def _merge(progress: Progress, task: Task, settings: dict[str, Any], error: str, allow_missing: bool) -> None:
    """All sentences in the order of their items, into their place.

    error: the last failure of a job that was left out, named where sentences are missing.
    """
    lines = progress.lines(task.items)
    if (missing := len(task.items) - len(lines)) and not (allow_missing and lines):
        raise UserError(
            f"{missing} of {len(task.items)} sentences are not in {progress.folder}"
            + f" (the last error: {error})" * bool(error)
            + "; the same command continues, --allow_missing true leaves them out"
        )
    kept, rejected = [], []
    reasons: Counter[str] = Counter()
    for n in sorted(lines):
        row = json.loads(lines[n])
        reasons[row["reason"]] += 1
        if row["text"] is not None:
            kept.append(json.dumps({name: row[key] for name, key in task.columns.items()}, ensure_ascii=False) + "\n")
        else:
            rejected.append({name: value for name, value in row.items() if name not in ("n", "text")})
    if not kept:
        progress.remove()
        raise UserError(f"none of the {len(task.items)} sentences could be used{_samples(rejected)}")
    counts = dict(reasons.most_common()) | ({"missing": missing} if missing else {})
    made = progress.folder / "made.jsonl"
    write_text(made, "".join(kept))
    meta = {"settings": settings, "writer": read_json(progress.writer), "counts": counts}
    progress.finish(made, meta, rejected)
    log.info("%s is written: %s", progress.out, ", ".join(f"{n} {reason}" for reason, n in counts.items()))
