"""Which evaluations of which model, and where their results are kept: one JSON a (model, evaluation, data set)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from pc_clip import evals
from pc_clip.core import environment
from pc_clip.core.config.evaluate import EVALUATIONS, EvaluateConfig
from pc_clip.core.config.settings import identity
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json, write_text
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import UNSEEN, WORDINGS
from pc_clip.data.registry import download, open_dataset
from pc_clip.data.statements import label_of, read_statements
from pc_clip.evals import Result, Subject
from pc_clip.evals.comparative import FOLDER as COMPARISONS
from pc_clip.models import loading as checkpoints
from pc_clip.models.clip import Clip
from pc_clip.write import prompts

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Run what was asked for, except what has been evaluated already; returns all results.

    Raises UserError for an unknown mode, one the data set cannot answer, and whatever model or data lack.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    for mode in _wanted(config):
        evals.find(mode)
    data = _data(config)
    return measure(_model(config), data, config)


def measure(clip: Clip, data: Dataset, config: EvaluateConfig) -> list[dict[str, Any]]:
    """The same for a model that is built, whose weights have to stay as they are, and a data set that is open."""
    clip = clip.remembering()
    subject = Subject(clip, _finder_of_base(clip) if config.checkpoint else (lambda: clip), data, config)
    wanted = _wanted(config)
    modes = wanted or [mode for mode in sorted(EVALUATIONS) if _can_be_measured(mode, subject)]
    if not modes:
        raise UserError(
            f"nothing can be measured on {data.label} with these settings; modes: {', '.join(sorted(EVALUATIONS))}"
        )
    label = checkpoints.describe_checkpoint(config.checkpoint) if config.checkpoint else _label(clip)
    if data.note:
        log.info("%s", data.note)
    keys = _Keys(subject)
    measured = _these if wanted else _all_that_can_be_measured
    return measured(subject, modes, evals.results_folder(config, label), keys)


def _wanted(config: EvaluateConfig) -> list[str]:
    return [mode.strip() for mode in config.mode.split(",") if mode.strip()]


def _these(subject: Subject, modes: list[str], folder: Path, keys: _Keys) -> list[dict[str, Any]]:
    return [_one(subject, mode, folder, keys) for mode in modes]


def _all_that_can_be_measured(subject: Subject, modes: list[str], folder: Path, keys: _Keys) -> list[dict[str, Any]]:
    """What cannot be measured after all and was not asked for by name is left out, and said."""
    found, failure = [], None
    for mode in modes:
        try:
            found.append(_one(subject, mode, folder, keys))
        except UserError as error:
            log.warning("%s is left out: %s", mode, error)
            failure = error
    if not found:
        raise failure
    return found


def _can_be_measured(mode: str, subject: Subject) -> bool:
    """Whether data, settings and weights allow a mode that was not asked for by name."""
    module = evals.find(mode)
    if getattr(module, "BY_NAME_ALONE", False) or not module.applies(subject.data, subject.config):
        return False
    if why := getattr(module, "lacks", lambda _: None)(subject):
        log.info("%s is left out: %s", mode, why)
    return not why


def example_checkpoints() -> list[str | None]:
    """What `run.py` evaluates when told nothing: the embedded model, and the example's run if it is finished."""
    run = Path("runs/example")
    if (run / checkpoints.MODEL_FILE).is_file():
        return [None, str(run)]
    log.info("no finetuned example yet (python finetune.py makes one); evaluating the embedded model alone")
    return [None]


def _finder_of_base(clip: Clip) -> Callable[[], Clip | None]:
    """Loads the model that a checkpoint was finetuned from, once; None where it cannot be had."""

    @functools.cache
    def found() -> Clip | None:
        base = evals.base_of(clip)
        return base and base.remembering()

    return found


def _data(config: EvaluateConfig) -> Dataset:
    if config.images is None:
        if config.download:
            download(config.dataset, config.root)
        return open_dataset(config.dataset, config.root, config.split, missing=config.missing)
    if not config.rank.attribute:
        raise UserError("--images ranks a folder of images by --rank.attribute; say which, as in 'a larger animal'")
    return open_dataset("folder", config.images)


def _model(config: EvaluateConfig) -> Clip:
    device = resolve_device(config.device)
    if config.checkpoint is None:
        return Clip.create(*config.model.source(config.dataset if config.images is None else ""), device=device)
    return checkpoints.load_model(config.checkpoint, config.model.name or None, config.model.pretrained, device=device)


def _one(subject: Subject, mode: str, folder: Path, keys: _Keys) -> dict[str, Any]:
    config, data = subject.config, subject.data
    if not evals.find(mode).applies(data, config):
        raise UserError(f"mode {mode} cannot be measured on {data.label}: it needs {evals.find(mode).NEEDS}")
    key = keys.of(mode)
    about = _about(config, mode)
    path = folder / f"{mode}-{data.label.replace('/', '-')}{about and f'-{about}'}.json"
    known = _read(path)
    base_is_new = known and known.get("base_known") is False and subject.base is not None
    if known and known["key"] == key and not base_is_new and not config.again:
        log.info("%s %s: already in %s", folder.name, mode, path)
        return known
    log.info("%s %s on %s ...", folder.name, mode, data.label)
    found = evals.find(mode).evaluate(subject)
    result = {
        "model": folder.name, "evaluation": mode, "dataset": data.label, "about": about,
        "metrics": found.metrics, "n": found.n,
        "intervals": {name: list(ends) for name, ends in found.intervals.items()},  # as they are read again
        "items": found.items, "curves": [curve._asdict() for curve in found.curves],
        "pictures": [
            {"file": f"{path.stem}-{name}", "alt": picture.alt} for name, picture in found.pictures.items()
        ],
        "details": found.details, "key": key, "images": data.fingerprint, "weights": keys.weights,
        "checkpoint_of": subject.clip.describe(),
        "base_known": subject.base is not None if "base" in vars(subject) else None,
        "seed": config.seed, **environment.describe(),
    }  # fmt: skip
    _write(path, result, found)
    return result


class _Keys:
    """What results depend on: settings, images and what is known of them, model and transform, texts on the disk.

    Raises UserError at once for files of statements that cannot be read, whatever is measured.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.config, self.data, self.clip = subject, subject.config, subject.data, subject.clip
        self.statements = self._statements()
        self.weights = subject.clip.weights_hash()

    def of(self, mode: str) -> str:
        """The key of one evaluation: equal keys, equal results."""
        config, data = self.config, self.data
        settings = identity(config) | {"statements": self.statements} | self._options(mode)
        other = getattr(evals.find(mode), "also_reads", lambda _: None)(self.subject)
        chosen_on = other.fingerprint if other else None
        compared = COMPARISONS / f"{data.name}.yaml"
        texts = self._tasks, WORDINGS, UNSEEN, compared.read_bytes() if compared.is_file() else b""
        model = self.weights, self.clip.describe(), self.clip.image_tower_hash()
        known, graded = self._known
        content = repr((settings, mode, data.fingerprint, chosen_on, model, known, graded, texts))
        version = getattr(evals.find(mode), "VERSION", None)
        content += "" if version is None else f" {version}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _options(self, mode: str) -> dict[str, Any]:
        """The evaluation's own settings; files by content, so that an edited one is evaluated again."""
        options = getattr(self.config, mode, None)
        found = identity(options) if options else {}
        for name in {"sentences", "descriptions"} & found.keys():
            path = found[name] and Path(found[name])
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None
        if found.get("pairs") == "auto":
            found["asked"] = (prompts.FOLDER / "compare.yaml").read_bytes()
        return found

    @cached_property
    def _known(self) -> tuple[Any, Any]:
        """What is known of the images."""
        data = self.data
        questions = [
            (q.name, q.classes, q.templates, q.several, q.target.tolist(), repr(q.graded)) for q in data.questions
        ]
        graded = [(a.name, a.more, a.less, a.high, a.low, a.gap, a.value.tolist()) for a in data.attributes]
        return (data.captions, questions), graded

    def _statements(self) -> str:
        """What is said of the images, by content and with the contradictions that our table gives."""
        config = self.config
        said = read_statements(config.statements, config.seed) if config.statements else self.data.statements
        return hashlib.sha256(repr(tuple(said)).encode()).hexdigest()

    @cached_property
    def _tasks(self) -> list[bytes]:
        return [(attributes.FOLDER / f"{task}.yaml").read_bytes() for task in attributes.tasks_of(self.data.name)]


def _about(config: EvaluateConfig, mode: str) -> str:
    """What sets this question to the data set apart: settings that are not as usual. Part of the result's file name."""
    usual, options = EvaluateConfig(), getattr(config, mode, None)
    named = list(config.tasks)
    named += ["prompts several"] * (config.prompts == "several")
    named += ["prompts " + _digest(config.templates)] if config.templates else []
    named += ["+".join(map(_place, config.statements))] if config.statements else []
    for name, value in vars(options).items() if options else ():
        was = getattr(getattr(usual, mode), name)
        if value != was and not dataclasses.is_dataclass(value):
            text = Path(value).stem if name in ("sentences", "descriptions") else value
            named.append(text if isinstance(was, str | None) else f"{name} {_plain(value)}")
    cut = [value if len(value) <= 40 else f"{value[:40]} {_digest(value)}" for value in named]
    return "-".join("".join(c if c.isalnum() else "_" for c in value) for value in cut)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _place(statements: str) -> str:
    """A file of statements with the folder it is in: VSR has several of the name test.jsonl."""
    inside = "" if Path(statements).is_dir() else f"{Path(statements).resolve().parent.name} "
    return inside + label_of([statements])


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def _label(clip: Clip) -> str:
    """The name of an unfinetuned model among results: two that differ in weights or folder get different ones."""
    name = "-".join(Path(clip.name.removeprefix("local-dir:")).parts[-2:])
    tag = clip.pretrained and Path(clip.pretrained).stem
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{name}-{tag or 'pretrained'}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"key", "metrics"} <= found.keys() else None
    except (OSError, json.JSONDecodeError, AttributeError):
        return None


def _write(path: Path, result: dict[str, Any], found: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in found.pictures.items():
        _save_picture(path.with_name(f"{path.stem}-{name}"), picture.image)
    if "order" in found.details:
        table = pd.DataFrame(found.details["order"])
        table.insert(0, "rank", range(1, len(table) + 1))
        write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6f"))
    write_json(path, result)


def _save_picture(path: Path, picture: Image.Image) -> None:
    picture.save(path)
    log.info("  picture: %s", path)
