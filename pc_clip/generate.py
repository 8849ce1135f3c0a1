"""Captions or classes in, sentences out: NAME.jsonl, and NAME.meta.json on how it was made.

While it works, NAME.partial.jsonl holds one line a pair that is done, kept or rejected, after a first
line with the settings. Started again, it continues after the last whole line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pc_clip import classes, environment, prompts
from pc_clip.config import DataConfig, EvaluateConfig, GenerateConfig
from pc_clip.datasets import READERS, Dataset, Question, open_dataset, read_captions
from pc_clip.differences import Difference, choose_pairs, clean, to_line
from pc_clip.errors import UserError, check_at_least, check_choice
from pc_clip.files import write_json, write_text
from pc_clip.writers import Job, LanguageModelWriter, RulesWriter, Writer

log = logging.getLogger(__name__)

TASKS = ("pairs", "compare", "describe")
EXAMPLE = GenerateConfig(
    name="example", split="train", n_images=3000, n_pairs=20000, caption="longest"
)  # configs/diffs_example.yaml, which a test compares


def generate(config: GenerateConfig) -> Path:
    """Write the sentences; returns the finished file. Interrupted and called again, it continues.

    Raises UserError when the file exists with other settings, and for captions that cannot be used.
    """
    check_choice("task", config.task, TASKS)
    check_choice("writer", config.writer, ("rules", "transformers"))
    check_choice("caption", config.caption, ("random", "longest"))
    for name in ("n_images", "n_pairs", "n_each", "chunk"):
        if (value := getattr(config, name)) is not None:
            check_at_least(name, value, 1)
    config = dataclasses.replace(config, name=config.name or _name(config))
    out = Path(config.out) / f"{config.name}.jsonl"
    work = _work(config)
    settings = _settings(config, work.made_from)
    if out.is_file() and not config.overwrite:
        if _made_with(out.with_suffix(".meta.json")) == settings:
            log.info("%s is complete; --overwrite true writes it again", out)
            return out
        raise UserError(f"{out} exists and was written with other settings; choose another --name or --overwrite true")
    pairs = work.items()
    partial = _Partial(out.with_suffix(".partial.jsonl"), settings, drop_others=config.overwrite)
    if partial.done:
        log.info("%d of %d %s are done; continuing", partial.done, len(pairs), work.unit)
    writer = make_writer(config)

    with (
        partial.path.open("a", encoding="utf-8") as file,
        tqdm(total=len(pairs), initial=partial.done, desc=config.name, disable=None) as bar,
    ):
        for start in range(partial.done, len(pairs), config.chunk):
            chunk = pairs[start : start + config.chunk]
            jobs = [work.job(i, j, start + n) for n, (i, j) in enumerate(chunk)]
            for (i, j), job, raw in zip(chunk, jobs, writer.write(jobs)):
                text, reason = clean(raw)
                row = {"first": i, "second": j, "text": text, "reason": reason, "captions": [job.first, job.second]}
                file.write(json.dumps(row | ({"raw": raw} if text is None else {}), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))
    _finish(out, partial, settings, writer, len(pairs), work.to_line)
    return out


def make_writer(config: GenerateConfig | EvaluateConfig, task: str | None = None) -> Writer:
    """The writer that the settings name, asked the task's question."""
    check_choice("writer", config.writer, ("rules", "transformers"))
    if config.writer == "rules":
        return RulesWriter()
    own = getattr(config, "prompt", None)
    return LanguageModelWriter(config.transformers, prompts.read(own or prompts.FOLDER / f"{task or config.task}.yaml"))


def compare_classes(
    writer: Writer, kind: str, data: Dataset, question: Question, pairs: list[tuple[str, str]], seed: int
) -> list[str | None]:
    """A sentence a pair of classes on how the first differs from the second; None where it was not usable.

    kind: rules or transformers, what the writer is.
    """
    jobs = [_class_job(kind, data, question, a, b, _seed(seed, n)) for n, (a, b) in enumerate(pairs)]
    return [clean(raw)[0] for raw in writer.write(jobs)]


def write_missing_example(data: DataConfig) -> None:
    """The example's sentences, where a run on the example needs them and they are not there yet."""
    path = Path(data.differences)
    if data.dataset == "example" and path == Path(EXAMPLE.out) / f"{EXAMPLE.name}.jsonl" and not path.is_file():
        log.info("%s is not there yet; writing it as generate_diffs.py does with no argument", path)
        generate(EXAMPLE)


# -- what goes in --------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """What a task writes about: `items`, pairs of keys; `job` of two keys and a number; `to_line` of a finished row."""

    items: Callable[[], list[tuple[str, str]]]
    job: Callable[[str, str, int], Job]
    to_line: Callable[[dict[str, Any]], str]
    unit: str
    made_from: dict[str, Any]


def _work(config: GenerateConfig) -> _Work:
    if config.task == "pairs":
        captions = _captions(config)
        if config.caption == "longest":
            captions = {key: (max(texts, key=len),) for key, texts in captions.items()}

        def pairs() -> list[tuple[str, str]]:
            return choose_pairs(_draw_images(sorted(captions), config), config.n_pairs, config.seed, config.both_orders)

        return _Work(pairs, lambda i, j, n: _job(captions, i, j, config.seed, n), _difference_line, "pairs", {})
    data = open_dataset(config.dataset, config.root, config.split or next(iter(_splits(config.dataset)), None))
    question = classes.find_question(data, config.question)
    made_from = {"classes": list(question.classes), "data": data.label, "fingerprint": data.fingerprint}
    if config.task == "compare":
        return _Work(
            lambda: choose_pairs(list(question.classes), config.n_pairs, config.seed, config.both_orders),
            lambda a, b, n: _class_job(config.writer, data, question, a, b, _seed(config.seed, n)),
            _difference_line, "pairs of classes", made_from,
        )  # fmt: skip
    return _Work(
        lambda: [(name, str(k)) for name in question.classes for k in range(config.n_each)],
        lambda name, _, n: _description_job(config, data, question, name, n),
        lambda row: json.dumps({"class": row["first"], "text": row["text"]}, ensure_ascii=False) + "\n",
        "descriptions", made_from,
    )  # fmt: skip


def _name(config: GenerateConfig) -> str:
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
    seed = _seed(config.seed, number)
    if config.writer == "rules":
        return Job(classes.described(data, question, name, seed), "", seed)
    return Job(classes.phrase(question, name), "", seed)


def _seed(seed: int, number: int) -> int:
    return int(np.random.default_rng([seed, 3, number]).integers(2**31))


def _difference_line(row: dict[str, Any]) -> str:
    return to_line(Difference(row["first"], row["second"], row["text"]))


def _draw_images(ids: list[str], config: GenerateConfig) -> list[str]:
    if config.n_images is None:
        return ids
    if config.n_images > len(ids):
        raise UserError(f"n_images is {config.n_images}, but only {len(ids)} images have captions")
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
    for name in ("out", "overwrite", "chunk", "prompt"):
        found.pop(name)
    unused = ("task", "dataset", "root", "question", "n_each") if config.task == "pairs" else ("captions", "root")
    for name in unused:
        found.pop(name)
    if config.writer == "transformers":
        for name in ("batch_size", "device"):  # how, not what
            found["transformers"].pop(name)
        found["asked"] = dataclasses.asdict(prompts.read(config.prompt or prompts.FOLDER / f"{config.task}.yaml"))
        found["asked"]["examples"] = list(found["asked"]["examples"])
    else:
        found.pop("transformers")
    if found.get("captions"):  # by content, so that an edited file is not taken for the same
        found["captions_sha256"] = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest()
    return found


def _made_with(meta: Path) -> dict[str, Any] | None:
    try:
        return json.loads(meta.read_text(encoding="utf-8")).get("settings")
    except (OSError, json.JSONDecodeError):
        return None


# -- what comes out ------------------------------------------------------------------------------------


class _Partial:
    """The working file. A last line that was torn by an interruption is cut off; its pair is written again."""

    def __init__(self, path: Path, settings: dict[str, Any], drop_others: bool) -> None:
        self.path = path
        head = (json.dumps({"settings": settings}, ensure_ascii=False) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        content = content[: content.rfind(b"\n") + 1]
        if drop_others and not content.startswith(head):
            content = b""
        if content and not content.startswith(head):
            raise UserError(
                f"{path} was begun with other settings; choose another --name, or --overwrite true to drop it"
            )
        if not content:
            path.write_bytes(content := head)
        elif len(content) < path.stat().st_size:
            os.truncate(path, len(content))  # never rewritten: what is done stays on the disk whatever happens now
        self.done = content.count(b"\n") - 1

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n")[1:-1]]


def _finish(
    out: Path, partial: _Partial, settings: dict[str, Any], writer: Writer, pairs: int, line: Callable[[dict], str]
) -> None:
    rows = partial.rows()
    if len(rows) != pairs:
        raise UserError(
            f"{partial.path} has {len(rows)} lines for {pairs} pairs; did two processes write it? Delete it."
        )
    reasons = Counter(row["reason"] for row in rows)
    kept = [line(row) for row in rows if row["text"] is not None]
    if not kept:
        raise UserError(f"none of the {len(rows)} sentences could be used ({dict(reasons)}); look at {partial.path}")
    meta = {
        "settings": settings,
        "writer": writer.describe(),
        "counts": dict(reasons.most_common()),
        **environment.describe(),
    }
    write_json(out.with_suffix(".meta.json"), meta)
    write_text(out, "".join(kept))
    partial.path.unlink()
    log.info("%s: %d sentences (%s)", out, len(kept), ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()))
