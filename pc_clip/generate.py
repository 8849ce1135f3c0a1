"""Captions, classes or pictures in, sentences out: NAME.jsonl, and NAME.meta.json on how it was made.

While it works, NAME.parts/ holds what is done (pc_clip/shards.py), so that it continues wherever it was
stopped, with as many processes as it then has. Sentences that were rejected end in NAME.rejected.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pc_clip import attributes, classes, environment, prompts
from pc_clip.cleaning import MIN_CHARACTERS, Checked, Given, check, clean
from pc_clip.config import DataConfig, EvaluateConfig, GenerateConfig
from pc_clip.datasets import READERS, Dataset, Question, open_dataset, read_captions
from pc_clip.differences import Difference, choose_pairs, to_line
from pc_clip.errors import UserError, check_at_least, check_choice
from pc_clip.files import write_json
from pc_clip.shards import Item, Jobs, Parts, Processes, put_in_place
from pc_clip.writers import Job, LanguageModelWriter, RulesWriter, Writer

log = logging.getLogger(__name__)

TASKS = ("pairs", "compare", "describe", "rewrite", "rank")
WRITERS = ("rules", "transformers", "server")  # from captions, or names of classes; change looks at pictures
MIN_OF_CLASSES = 20  # characters; "An owl: a small bird." says enough, where of two photographs it would not
UNUSED = {  # settings that a task has no use for; silence about them would be believed
    "pairs": ("dataset", "root", "question", "n_each", "rank", "model"),
    "rewrite": ("dataset", "root", "question", "n_each", "n_pairs", "both_orders", "caption", "rank", "model"),
    "compare": ("captions", "n_images", "n_each", "caption", "rank", "model"),
    "describe": ("captions", "n_images", "n_pairs", "both_orders", "caption", "rank", "model"),
    "rank": ("question", "n_images", "n_pairs", "n_each", "both_orders"),
    "change": ("captions", "caption", "question", "n_each", "min_characters", "prompt", "rank", "model"),  # the writer
}
HOW = {  # of a writer's settings, those that say how it writes, not what
    "transformers": ("batch_size", "share_prefix", "device"),
    "server": ("url", "concurrency", "timeout", "patience", "api_key_env"),
}
EXAMPLE = GenerateConfig(
    name="example", split="train", n_images=3000, n_pairs=20000, caption="longest"
)  # configs/diffs_example.yaml, which a test compares


def generate(config: GenerateConfig, processes: Processes | None = None) -> Path:
    """Write the sentences; returns the finished file. Interrupted and called again, it continues.

    processes: who shares the work; those of `accelerate launch` unless given. All of them call this alike.
    Raises UserError when the file exists with other settings, for captions that cannot be used, and when
    another process writes the same file.
    """
    check_choice("task", config.task, TASKS)
    check_choice("writer", config.writer, (*WRITERS, "change"))
    check_choice("caption", config.caption, ("random", "longest"))
    check_at_least("seed", config.seed, 0)
    for name in ("n_images", "n_pairs", "n_each", "min_characters"):
        if (value := getattr(config, name)) is not None:
            check_at_least(name, value, 1)
    _check_no_unused(config)
    config = dataclasses.replace(config, name=config.name or _name(config))
    processes = processes or Processes.here()
    if config.task == "rank":
        from pc_clip.generate_rank import generate_rank  # here, because it loads models, and uses this module

        return generate_rank(config, processes)
    if config.writer == "change":
        from pc_clip.generate_change import generate_change  # likewise

        return generate_change(config, processes)
    out = Path(config.out) / f"{config.name}.jsonl"
    check_free(out, ".parquet")
    work = _work(config)
    settings = json.loads(json.dumps(_settings(config, work.made_from)))  # as a file of them reads
    return write_all(config, work, out, settings, processes)


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
        _write(config, work, parts, items, processes.share(todo), processes)
        processes.wait()
        if processes.is_main:
            writer = parts.writer() or (work.writer or make_writer)(config).describe()
            _merge(out, parts, items, {"settings": settings, "writer": writer}, work.to_line)
        processes.wait()
    return out


def _check_no_unused(config: GenerateConfig) -> None:
    if config.writer == "change" and config.task != "pairs":
        raise UserError(f"--writer change sees two pictures and writes for --task pairs; --task is {config.task}")
    of_rules = ("prompt",) if config.writer == "rules" else ()
    of_task = UNUSED["change" if config.writer == "change" else config.task]
    of_change = () if config.writer == "change" else ("change",)
    unused = (*of_task, *of_rules, *of_change, *(("split",) if config.captions and config.task != "rank" else ()))
    usual = GenerateConfig()
    for name in unused:
        if changed := _changed(name, getattr(config, name), getattr(usual, name)):
            hint = "; for COCO's captions give --captions" if name == "dataset" else ""
            beside = " with --captions" if name == "split" else ""
            where = f"--task {config.task} --writer {config.writer}{beside}"
            raise UserError(f"--{changed} has no effect in {where}; leave it out{hint}")


def _changed(name: str, value: Any, usual: Any) -> str:
    """A setting's name if it is not as usual, of a group the first such within; otherwise empty."""
    if dataclasses.is_dataclass(usual):
        return next((f"{name}.{key}" for key, was in vars(usual).items() if getattr(value, key) != was), "")
    return name if value != usual else ""


def make_writer(config: GenerateConfig | EvaluateConfig, task: str | None = None) -> Writer:
    """The writer that the settings name, asked the task's question."""
    check_choice("writer", config.writer, WRITERS)
    if config.writer == "rules":
        return RulesWriter()
    own = getattr(config, "prompt", None)
    prompt = prompts.read(own or prompts.FOLDER / f"{task or config.task}.yaml")
    if config.writer == "transformers":
        return LanguageModelWriter(config.transformers, prompt)
    from pc_clip.writers.server import ServerWriter  # here, because its client takes a second to import

    return ServerWriter(config.server, prompt)


def compare_classes(
    writer: Writer, kind: str, data: Dataset, question: Question, pairs: list[tuple[str, str]], seed: int
) -> list[str | None]:
    """A sentence a pair of classes on how the first differs from the second; None where it was not usable.

    kind: rules or transformers, what the writer is.
    """
    jobs = [_class_job(kind, data, question, a, b, job_seed(seed, n)) for n, (a, b) in enumerate(pairs)]
    return [clean(raw, min_characters=MIN_OF_CLASSES)[0] for raw in writer.write(jobs)]


def write_missing_example(data: DataConfig) -> None:
    """The example's sentences, where a run on the example needs them and they are not there yet."""
    path = Path(data.differences)
    if data.dataset == "example" and path == Path(EXAMPLE.out) / f"{EXAMPLE.name}.jsonl" and not path.is_file():
        log.info("%s is not there yet; writing it as generate_diffs.py does with no argument", path)
        generate(EXAMPLE, Processes())  # alone, whoever waits for it


# -- what goes in --------------------------------------------------------------------------------------


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


def _work(config: GenerateConfig) -> Work:
    if config.task == "rewrite":
        if config.writer == "rules":
            raise UserError("rules cannot rewrite captions; use --writer transformers or --writer server")
        captions = _captions(config)
        return Work(
            lambda: [(i, str(k)) for i in draw_images(sorted(captions), config) for k in range(len(captions[i]))],
            lambda key, k, n: Job(captions[key][int(k)], "", job_seed(config.seed, n)),
            lambda row: json.dumps({"image": row["first"], "text": row["text"]}, ensure_ascii=False) + "\n",
            "captions", {},
        )  # fmt: skip
    if config.task == "pairs":
        captions = _captions(config)
        if config.caption == "longest":
            captions = {key: (max(texts, key=len),) for key, texts in captions.items()}

        def pairs() -> list[Item]:
            return choose_pairs(draw_images(sorted(captions), config), config.n_pairs, config.seed, config.both_orders)

        return Work(pairs, lambda i, j, n: _job(captions, i, j, config.seed, n), _difference_line, "pairs", {})
    data = open_dataset(config.dataset, config.root, config.split or next(iter(_splits(config.dataset)), None))
    question = classes.find_question(data, config.question)
    made_from = {"classes": list(question.classes), "data": data.label, "fingerprint": data.fingerprint}
    if config.task == "compare":
        return Work(
            lambda: choose_pairs(list(question.classes), config.n_pairs, config.seed, config.both_orders),
            lambda a, b, n: _class_job(config.writer, data, question, a, b, job_seed(config.seed, n)),
            _difference_line, "pairs of classes", made_from,
        )  # fmt: skip
    return Work(
        lambda: [(name, str(k)) for name in question.classes for k in range(config.n_each)],
        lambda name, _, n: _description_job(config, data, question, name, n),
        lambda row: json.dumps({"class": row["first"], "text": row["text"]}, ensure_ascii=False) + "\n",
        "descriptions", made_from,
    )  # fmt: skip


def _name(config: GenerateConfig) -> str:
    if config.writer == "change":
        return f"{config.dataset}_change"
    if config.captions:
        stem = Path(config.captions).stem
        return stem if config.task == "pairs" else f"{stem}_{config.task}"
    if config.task == "pairs":
        return EXAMPLE.name
    return "_".join(part for part in (config.dataset, config.question, config.task) if part)


def _splits(dataset: str) -> tuple[str, ...]:
    return READERS[dataset].splits if dataset in READERS else ()


def _captions(config: GenerateConfig) -> dict[str, tuple[str, ...]]:
    if config.captions:
        return {key: captions for key, (_, captions) in read_captions(config.captions).items()}
    data = open_dataset("example", split=config.split or "train")
    return dict(zip(data.ids, data.captions))


def _class_job(writer: str, data: Dataset, question: Question, a: str, b: str, seed: int) -> Job:
    """Rules are told what sets the classes apart; a language model is told their names, and knows the rest."""
    if writer == "rules":
        return Job(*classes.opposed(data, question, a, b, seed), seed)
    return Job(classes.phrase(question, a), classes.phrase(question, b), seed)


def _description_job(config: GenerateConfig, data: Dataset, question: Question, name: str, number: int) -> Job:
    seed = job_seed(config.seed, number)
    if config.writer == "rules":
        return Job(classes.described(data, question, name, seed), "", seed)
    return Job(classes.phrase(question, name), "", seed)


def job_seed(seed: int, number: int) -> int:
    return int(np.random.default_rng([seed, 3, number]).integers(2**31))


def _difference_line(row: dict[str, Any]) -> str:
    return to_line(Difference(row["first"], row["second"], row["text"]))


def draw_images(ids: list[str], config: GenerateConfig, what: str = "images have captions") -> list[str]:
    if config.n_images is None:
        return ids
    if config.n_images > len(ids):
        raise UserError(f"n_images is {config.n_images}, but only {len(ids)} {what}")
    rng = np.random.default_rng([config.seed, 1])
    return [ids[n] for n in sorted(rng.choice(len(ids), config.n_images, replace=False))]


def _job(captions: dict[str, tuple[str, ...]], i: str, j: str, seed: int, number: int) -> Job:
    """One caption of each image, drawn for this pair."""
    rng = np.random.default_rng([seed, 2, number])
    first, second = (captions[key][int(rng.integers(len(captions[key])))] for key in (i, j))
    return Job(first, second, int(rng.integers(2**31)))


def _settings(config: GenerateConfig, made_from: dict[str, Any]) -> dict[str, Any]:
    """Everything the sentences depend on, and nothing else."""
    found = dataclasses.asdict(config) | made_from
    found["min_characters"] = least_characters(config)
    for name in ("out", "overwrite", "prompt", *(["min_characters"] if config.writer == "rules" else [])):
        found.pop(name)
    about_classes = config.task in ("describe", "compare")
    for name in ("captions", "root") if about_classes else ("dataset", "root", "question", "n_each"):
        found.pop(name)
    if config.task == "pairs":
        found.pop("task")
    if about_classes and config.writer == "rules":
        words = [(attributes.FOLDER / f"{task}.yaml").read_bytes() for task in attributes.tasks_of(config.dataset)]
        found["words"] = hashlib.sha256(b"".join(words)).hexdigest()
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, f.name)) and f.name != config.writer:
            found.pop(f.name)  # the settings of another writer
    for name in HOW.get(config.writer, ()):
        found[config.writer].pop(name, None)
    if config.writer != "rules":
        found["asked"] = dataclasses.asdict(prompts.read(config.prompt or prompts.FOLDER / f"{config.task}.yaml"))
    if found.get("captions"):  # by content, so that an edited file is not taken for the same
        found["captions_sha256"] = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest()
    return found


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


def least_characters(config: GenerateConfig) -> int:
    return config.min_characters or (MIN_CHARACTERS if config.task == "pairs" else MIN_OF_CLASSES)


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


# -- writing -------------------------------------------------------------------------------------------


def _begin(out: Path, parts: Parts, settings: dict[str, Any], overwrite: bool) -> None:
    parts.begin(settings, drop_others=overwrite)
    if (old := out.with_suffix(".partial.jsonl")).is_file():
        log.info("%s was left by an earlier version of this program and is not continued; delete it", old)


def _write(
    config: GenerateConfig, work: Work, parts: Parts, items: list[Item], numbers: np.ndarray, processes: Processes
) -> None:
    """This process's share, each sentence into its shard as soon as the writer gives it."""
    if not len(numbers):
        return
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
    raw = raw.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    text, reason, trims = judge(raw, job)
    row = {"first": item[0], "second": item[1], "text": text, "reason": reason, "captions": [job.first, job.second]}
    return row | ({"trims": list(trims)} if trims else {}) | ({"raw": raw} if text is None else {})


# -- what comes out ------------------------------------------------------------------------------------


def _merge(
    out: Path, parts: Parts, items: list[Item], about: dict[str, Any], line: Callable[[dict[str, Any]], str]
) -> None:
    """All sentences in the order of their items, into their place; then the working folder goes."""
    where = parts.index(items)
    if missing := int((where[:, 0] < 0).sum()):
        raise UserError(
            f"{missing} of {len(items)} sentences are not in {parts.folder} yet; the same command continues"
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
