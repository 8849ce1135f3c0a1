"""What all tasks of generate_diffs.py share: a task's sentences, written or continued by several processes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pc_clip.core import environment
from pc_clip.core.config.evaluate import ComparativeConfig
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_json, write_text
from pc_clip.core.random import seed_of, stream
from pc_clip.write import prompts
from pc_clip.write.causal import LanguageModelWriter
from pc_clip.write.cleaning import MIN_CHARACTERS, Checked, Given, check
from pc_clip.write.progress import Item, Progress, append, read_json
from pc_clip.write.rules import RulesWriter
from pc_clip.write.writers import Job, Writer

log = logging.getLogger(__name__)

WRITERS = ("rules", "transformers", "server")  # from captions, or names of classes; change looks at pictures
MIN_OF_CLASSES = 20  # characters; "An owl: a small bird." says enough, where of two photographs it would not
FIRST_ANSWERS = 100  # a language model of which so many cannot be used is not asked on


@dataclass(frozen=True)
class Task:
    """What to write about.

    items: pairs of keys. job: of two keys and the item's number. to_line: of a finished row. made_from: what the
    sentences depend on beside the settings. make_writer and judge replace `make_writer` and the cleaning of sentences.
    """

    items: Callable[[], list[Item]]
    job: Callable[[str, str, int], Job]
    to_line: Callable[[dict[str, Any]], str]
    unit: str
    made_from: dict[str, Any] = field(default_factory=dict)
    make_writer: Callable[[GenerateConfig], Writer] | None = None
    judge: Callable[[str, Job], Checked] | None = None


def write_all(config: GenerateConfig, task: Task, out: Path, settings: dict[str, Any], processes: Processes) -> Path:
    """Write a task's sentences into `out`, or continue; all processes call this alike.

    settings: all that the sentences depend on, as JSON gives it back. Raises UserError for a file of other settings.
    """
    progress = Progress(out)
    with progress.lock() if processes.is_main else nullcontext():
        processes.wait()  # from here the main process has the lock, and no other launch changes anything
        if is_finished(progress, settings, config.overwrite, processes):
            return out
        items = task.items()
        if not items:
            raise UserError(f"there are no {task.unit} to write about; a pair takes two images, or classes")
        if processes.is_main:
            progress.begin(settings, config.overwrite)
        processes.wait()
        done = progress.lines(items)
        todo = [n for n in range(len(items)) if n not in done]
        if processes.is_main and done:
            log.info("%d of %d %s are done; continuing", len(done), len(items), task.unit)
        del done
        processes.wait()  # all have read the same, before anything is added to it
        error = _write(config, task, progress, items, todo[processes.rank :: processes.size], processes)
        processes.wait()
        if processes.is_main:
            writer = read_json(progress.writer) or (task.make_writer or make_writer)(config).describe()
            _merge(progress, items, {"settings": settings, "writer": writer}, task.to_line, error, config.allow_missing)
        processes.wait()
    return out


def is_finished(progress: Progress, settings: dict[str, Any], overwrite: bool, processes: Processes) -> bool:
    """Whether the file is there already. Raises UserError where it was written with other settings."""
    out = progress.out
    if overwrite or not out.is_file():
        return False
    if read_meta(out).get("settings") != settings:
        raise UserError(f"{out} exists and was written with other settings; choose another --name or --overwrite true")
    if processes.is_main:
        progress.clear()
        if progress.folder.is_dir():
            log.info("%s is left from writing it again, which --overwrite true continues", progress.folder)
        log.info("%s is complete; --overwrite true writes it again", out)
    return True


def check_free(out: Path, other: str) -> None:
    """Raises UserError where another task's file of the same name is there: both would have the one .meta.json."""
    if (there := out.with_suffix(other)).is_file():
        raise UserError(f"{there} is there, and {out.name} would take its .meta.json; choose another --name")


def read_meta(out: Path) -> dict[str, Any]:
    return read_json(out.with_suffix(".meta.json"))


def make_writer(config: GenerateConfig | ComparativeConfig, task: str | None = None) -> Writer:
    """The writer that the settings name, asked the task's question."""
    check_choice("writer", config.writer, WRITERS)
    if config.writer == "rules":
        return RulesWriter(getattr(config, "wording", None))
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


def _write(
    config: GenerateConfig, task: Task, progress: Progress, items: list[Item], numbers: list[int], processes: Processes
) -> str:
    """This process's share, each sentence into its file as soon as the writer gives it.

    Returns why the last job failed that the writer left out, "" if none did.
    """
    if not numbers:
        return ""
    writer = (task.make_writer or make_writer)(config)
    judge = task.judge or _judge(config, writer)
    jobs = [task.job(*items[n], n) for n in numbers]
    if processes.is_main:
        _keep_description(writer, progress)
    hidden = None if processes.is_main else True  # None: hidden where there is no terminal
    usable, rejected = not writer.needs_cleaning, []
    try:
        with progress.open(processes.rank) as file, closing(writer.stream(jobs)) as answers:
            for place, raw in tqdm(answers, config.name, len(jobs), unit=" sentences", disable=hidden):
                row = _row(items[numbers[place]], jobs[place], raw, judge)
                append(file, {"n": numbers[place], **row})
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
    for key in ("answered_by", "url"):  # also those of earlier runs
        if key in now:
            now[key] = sorted({*before.get(key, ()), *now[key]})
    write_json(progress.writer, now)


def _judge(config: GenerateConfig, writer: Writer) -> Callable[[str, Job], Checked]:
    """How raw sentences are cleaned: held against their captions, and what a language model was shown beside them."""
    if not writer.needs_cleaning:
        return lambda raw, _: Checked(raw or None, "kept" if raw else "empty")
    asked = getattr(writer, "asked", None)
    shown = tuple(text for example in writer.describe().get("worked_examples", ()) for text in example.values())
    least, instructions = least_characters(config), (asked.system, asked.instruction) if asked else ()

    def judge(raw: str, job: Job) -> Checked:
        captions = tuple(caption for caption in (job.first, job.second) if caption)
        return check(raw, Given(least, captions, shown, instructions))

    return judge


def _row(item: Item, job: Job, raw: str, judge: Callable[[str, Job], Checked]) -> dict[str, Any]:
    """The line of one answer: its text, or why it was rejected."""
    cut = getattr(raw, "cut", False)  # before encode, which gives back a plain str
    raw = raw.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    text, reason, trims = Checked(None, "cut") if cut else judge(raw, job)
    row = {"first": item[0], "second": item[1], "text": text, "reason": reason, "captions": [job.first, job.second]}
    return row | ({"trims": list(trims)} if trims else {}) | ({"raw": raw} if text is None else {})


def _samples(rejected: Sequence[dict[str, Any]]) -> str:
    """The end of an error where no answer could be used: counts of reasons, three answers, what to do."""
    counts = dict(Counter(row["reason"] for row in rejected).most_common())
    answers = "; ".join(f"{row['reason']}: {row['raw'][:120]!r}" for row in rejected[:3])
    return f" ({counts}), such as {answers}. Mend the model or its prompt; the same command then asks again"


def _merge(
    progress: Progress,
    items: list[Item],
    about: dict[str, Any],
    to_line: Callable[..., str],
    error: str,
    allow_missing: bool,
) -> None:
    """All sentences in the order of their items, into their place; then the working folder goes.

    error: the last failure of a job that was left out, named where sentences are missing.
    """
    out, lines = progress.out, progress.lines(items)
    if (missing := len(items) - len(lines)) and not allow_missing:
        raise UserError(
            f"{missing} of {len(items)} sentences are not in {progress.folder}"
            + f" (the last error: {error})" * bool(error)
            + "; the same command continues, --allow_missing true leaves them out"
        )
    kept, rejected = [], []
    reasons: Counter[str] = Counter()
    trims: Counter[str] = Counter()
    for n in sorted(lines):
        row = json.loads(lines[n])
        reasons[row["reason"]] += 1
        trims.update(row.pop("trims", ()))
        if row["text"] is not None:
            kept.append(to_line(row))
        else:
            rejected.append({name: value for name, value in row.items() if name not in ("n", "text")})
    if not kept:
        raise UserError(f"none of the {len(items)} sentences could be used{_samples(rejected)}")
    counts = dict(reasons.most_common()) | ({"missing": missing} if missing else {})
    progress.merging()
    put_aside(out, rejected)
    meta = {**about, "counts": counts, "trims": dict(trims.most_common()), **environment.describe()}
    write_json(out.with_suffix(".meta.json"), meta)
    write_text(out, "".join(kept))  # last: where the sentences are, the rest is
    progress.remove()
    log.info("%s is written: %s", out, ", ".join(f"{n} {reason}" for reason, n in counts.items()))


def put_aside(out: Path, rejected: Sequence[dict[str, Any]]) -> None:
    """Write NAME.rejected.jsonl, or remove that of an earlier writing where nothing was rejected."""
    path = out.with_suffix(".rejected.jsonl")
    if rejected:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
    else:
        path.unlink(missing_ok=True)
