"""Captions, classes or pictures in, sentences out: NAME.jsonl, and NAME.meta.json on how it was made.

Interrupted, it continues with as many processes as it then has (write/progress.py). Sentences that were rejected end in
NAME.rejected.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

from pc_clip.core.cli import configure
from pc_clip.core.config.settings import DataConfig, identity, is_group
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.paths import configs_folder
from pc_clip.core.random import stream
from pc_clip.data import attributes, graded_nouns, wordings
from pc_clip.data.captions import read_captions
from pc_clip.data.differences import choose_pairs
from pc_clip.data.download import file_digest
from pc_clip.data.training_data import load_dataset
from pc_clip.write import prompts
from pc_clip.write.captioner import change_task
from pc_clip.write.classes import compare_task, describe_task
from pc_clip.write.rank import generate_rank
from pc_clip.write.reword import reword_task
from pc_clip.write.work import (
    WRITERS,
    Task,
    draw_images,
    job_seed,
    least_characters,
    write_all,
)
from pc_clip.write.writers import Job

log = logging.getLogger(__name__)

TASKS = ("pairs", "compare", "describe", "rewrite", "reword", "rank")
EXAMPLES = ("example", "example_plain")  # files of sentences that are written when a run first needs them


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
        return generate_rank(config, processes)
    tasks = {
        "pairs": _pairs, "rewrite": _rewrite, "reword": reword_task, "compare": compare_task, "describe": describe_task,
    }  # fmt: skip
    task = change_task(config, processes) if config.writer == "change" else tasks[config.task](config)
    out = Path(config.out) / f"{config.name}.jsonl"
    return write_all(config, task, out, _settings(config, task.made_from), processes)


def _check_no_unused(config: GenerateConfig) -> None:
    """Raise UserError for a setting that this task and writer have no use for; the fields say which tasks use them."""
    if config.writer == "change" and config.task != "pairs":
        raise UserError(f"--writer change sees two pictures and writes for --task pairs; --task is {config.task}")
    task = "change" if config.writer == "change" else config.task
    usual = GenerateConfig()
    for f in dataclasses.fields(config):
        unused = task not in f.metadata.get("tasks", (task,))
        unused |= f.name == ("prompt" if config.writer == "rules" else "wording")
        of_file = config.captions and task != "rank" and config.dataset == usual.dataset
        beside = " with --captions" if f.name == "split" and of_file else ""
        if (unused or beside) and getattr(config, f.name) != getattr(usual, f.name):
            where = f"--task {config.task} --writer {config.writer}{beside}"
            raise UserError(f"--{f.name} has no effect in {where}; leave it out")


def write_missing_example(data: DataConfig) -> None:
    """The example's sentences, where a run on the example needs them and they are not there yet."""
    path = Path(data.differences)
    if data.dataset == "example" and path.stem in EXAMPLES and not path.is_file():
        config = of_example(path.stem)
        if path == Path(config.out) / f"{config.name}.jsonl":
            log.info("%s is not there yet; writing it as configs/diffs_%s.yaml says", path, config.name)
            generate(config, Processes())  # in one process; the others wait


def of_example(name: str) -> GenerateConfig:
    """The settings of configs/diffs_NAME.yaml."""
    return configure(GenerateConfig, "generate_diffs.py", "", [], default=configs_folder() / f"diffs_{name}.yaml")


# -- tasks ---------------------------------------------------------------------------------------------


def _pairs(config: GenerateConfig) -> Task:
    captions = _captions(config)
    if config.caption == "longest":
        captions = {key: (max(texts, key=len),) for key, texts in captions.items()}

    def job(i: str, j: str, number: int) -> Job:
        """One caption of each image, drawn for this pair."""
        rng = stream(config.seed, "captions", number)
        first, second = (captions[key][int(rng.integers(len(captions[key])))] for key in (i, j))
        return Job(first, second, int(rng.integers(2**31)))

    ids = draw_images(sorted(captions), config)
    return Task(choose_pairs(ids, config.n_pairs, config.seed, config.both_orders), job, "pairs")


def _rewrite(config: GenerateConfig) -> Task:
    if config.writer == "rules":
        raise UserError("rules cannot rewrite captions; use --writer transformers or --writer server")
    captions = _captions(config)
    return Task(
        [(key, str(k)) for key in draw_images(sorted(captions), config) for k in range(len(captions[key]))],
        lambda key, k, n: Job(captions[key][int(k)], "", job_seed(config.seed, n)),
        "captions",
        {"image": "first", "text": "text"},
    )


def _captions(config: GenerateConfig) -> dict[str, tuple[str, ...]]:
    """Captions by image: of a file, of a data set, or of those of its images that the file has captions of."""
    if config.captions and config.dataset == GenerateConfig.dataset:
        return {key: captions for key, (_, captions) in read_captions(config.captions).items() if captions}
    what = {"dataset": config.dataset, "root": config.root, "split": config.split, "captions": config.captions}
    data = load_dataset(DataConfig(**what, missing="keep"))  # pictures are not read
    if not data.captions:
        raise UserError(f"{data.label} has no captions to write from; name a file of them with --captions")
    return {key: texts for key, texts in zip(data.ids, data.captions) if texts}  # the others are in the data set's note


# -- settings ------------------------------------------------------------------------------------------


def _name(config: GenerateConfig) -> str:
    if config.writer == "change":
        return f"{config.dataset}_change"
    if source := config.captions or config.differences:
        stem = Path(source).stem
        return stem if config.task == "pairs" else f"{stem}_{config.task}"
    if config.task == "pairs":
        return EXAMPLES[0] if config.dataset == "example" else config.dataset
    return "_".join(part for part in (config.dataset, config.question, config.task) if part)


def _settings(config: GenerateConfig, made_from: dict[str, Any]) -> dict[str, Any]:
    """Everything the sentences depend on, and nothing else; files by content, so that an edited one is another."""
    task = "change" if config.writer == "change" else config.task
    used = {f.name for f in dataclasses.fields(config) if task in f.metadata.get("tasks", (task,))}
    of_writer = {config.writer, "wording"} if config.writer == "rules" else {config.writer}
    used -= {f.name for f in dataclasses.fields(config) if is_group(f)} - of_writer
    used -= {"root", "prompt", "min_characters"}
    settings = {name: value for name, value in identity(config).items() if name in used} | made_from
    if config.captions:
        settings["captions_sha256"] = file_digest(Path(config.captions), "sha256")
    if config.writer in ("transformers", "server"):
        settings["min_characters"] = least_characters(config)
        settings["asked"] = dataclasses.asdict(prompts.read(config.prompt or prompts.FOLDER / f"{config.task}.yaml"))
    elif config.writer == "rules":
        files = [wordings.FILE] if "wording" in used else []
        files += [graded_nouns.FILE] if "wording" in used and config.wording.graded else []
        if config.task in ("describe", "compare"):
            files += [attributes.FOLDER / f"{task}.yaml" for task in attributes.tasks_of(config.dataset)]
        settings["words"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return settings
